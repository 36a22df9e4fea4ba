"""Hostile and damaged bulk streams in numbers, at the puller, whose memory they would reach, and the owner.

What the fuzzer can't do is what checksums don't guard against: send other blocks under their right checksum.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from disagg.errors import KVLostError
from disagg.transfer import bulk_server, frames
from disagg.transfer.bulk_reader import receive_blocks
from disagg.transfer.checksum import blocks_checksum
from disagg.transfer.frames import Frame, FrameKind, encode_frame
from disagg.transfer.stream_io import read_exactly
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2
from tests.unit.transfer.transfer_support import BLOCK_BYTES, SECRET, Directory, running_client, running_node

OWNER = ("prefill-0", "first")
NUM_BLOCKS = 12
FIRST_BLOCK = 3
# A hang fails by it; a machine that has been stopped for minutes does not.
PATIENCE_S = 600.0
RNG = np.random.default_rng(4)
DATA = RNG.integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
# Of another pull, sent under right checksums.
OTHER = RNG.integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
TARGET_ROWS = [20, 21, 22, 5, 6, 30, 29, 28, 1, 2, 3, 4]
UNTOUCHED = sorted(set(range(32)) - set(TARGET_ROWS))


def data_frame(first: int, rows: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    frame = Frame(FrameKind.DATA, first, len(rows), blocks_checksum([rows]))
    return encode_frame(frame) + rows.tobytes()


def stream_of(data: np.ndarray[Any, np.dtype[np.uint8]], first: int) -> list[bytes]:
    """Return a pull's frames: four of three blocks each, and the end."""
    blocks = [data_frame(first + at, data[at : at + 3]) for at in range(0, NUM_BLOCKS, 3)]
    return [*blocks, encode_frame(Frame(FrameKind.END, count=NUM_BLOCKS))]


GOOD = stream_of(DATA, FIRST_BLOCK)
ALIEN = [
    b"",
    b"\0" * 64,
    b"\xff" * 64,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix",
    encode_frame(Frame(FrameKind.REFUSED)),
    encode_frame(Frame(FrameKind.END, count=0)),
    encode_frame(Frame(FrameKind.END, count=2**32 - 1)),
    encode_frame(Frame(FrameKind.DATA, FIRST_BLOCK, 2**32 - 1)),
    encode_frame(Frame(FrameKind.DATA, 2**32 - 1, 1)),
    encode_frame(Frame(FrameKind.DATA, FIRST_BLOCK, 0)),
    *stream_of(OTHER, FIRST_BLOCK + 100),
    frames.encode_hello(bytes(16)),
]


class Tape:
    """A socket whose peer has sent `data` and left."""

    def __init__(self, data: bytes, rng: random.Random) -> None:
        self._data = data
        self._rng = rng
        self.consumed = 0

    def recv_into(self, view: memoryview) -> int:
        most = min(len(view), len(self._data) - self.consumed)
        count = self._rng.randint(1, most) if most and self._rng.random() < 0.2 else most
        view[:count] = self._data[self.consumed : self.consumed + count]
        self.consumed += count
        return count


def truncated(rng: random.Random, stream: list[bytes]) -> bytes:
    data = b"".join(stream)
    return data[: rng.randrange(len(data))]


def bits_flipped(rng: random.Random, stream: list[bytes]) -> bytes:
    data = bytearray(b"".join(stream))
    # Half of them in headers, which are a small part of the stream.
    starts = [sum(len(frame) for frame in stream[:index]) for index in range(len(stream))]
    for _ in range(rng.randint(1, 8)):
        inside = rng.choice(starts) + rng.randrange(frames.HEADER_BYTES)
        data[rng.choice([inside, rng.randrange(len(data))])] ^= 1 << rng.randrange(8)
    return bytes(data)


def duplicated(rng: random.Random, stream: list[bytes]) -> bytes:
    at = rng.randrange(len(stream))
    return b"".join([*stream[: at + 1], *stream[at:]])


def reordered(rng: random.Random, stream: list[bytes]) -> bytes:
    return b"".join(rng.sample(stream, len(stream)))


def dropped(rng: random.Random, stream: list[bytes]) -> bytes:
    at = rng.randrange(len(stream))
    return b"".join([*stream[:at], *stream[at + 1 :]])


def restated(rng: random.Random, stream: list[bytes]) -> bytes:
    """Return the stream with one header that is well-formed and says something else."""
    at = rng.randrange(len(stream))
    numbers = [0, 1, 2, 3, 4, NUM_BLOCKS, NUM_BLOCKS + 1, 2**16, 2**31, 2**32 - 1]
    header = Frame(
        rng.choice(list(FrameKind)),
        rng.choice(numbers),
        rng.choice(numbers),
        rng.choice([0, rng.getrandbits(32), blocks_checksum([DATA[:3]])]),
    )
    body = stream[at][frames.HEADER_BYTES :]
    return b"".join([*stream[:at], encode_frame(header) + body, *stream[at + 1 :]])


def oversized(rng: random.Random, stream: list[bytes]) -> bytes:
    at = rng.randrange(len(stream))
    extra = rng.randbytes(rng.choice([1, 4, 20, BLOCK_BYTES, 5 * BLOCK_BYTES]))
    return b"".join([*stream[:at], stream[at] + extra, *stream[at + 1 :]])


def alien(rng: random.Random, stream: list[bytes]) -> bytes:
    at = rng.randrange(len(stream) + 1)
    return b"".join([*stream[:at], rng.choice(ALIEN), *stream[at:]])


def noise(rng: random.Random, _stream: list[bytes]) -> bytes:
    return rng.randbytes(rng.randint(0, 400))


def refused(rng: random.Random, stream: list[bytes]) -> bytes:
    at = rng.randrange(len(stream))
    return b"".join([*stream[:at], encode_frame(Frame(FrameKind.REFUSED)), *stream[at:]])


def unharmed(_rng: random.Random, stream: list[bytes]) -> bytes:
    return b"".join(stream)


DAMAGE: Sequence[Callable[[random.Random, list[bytes]], bytes]] = (
    truncated,
    bits_flipped,
    duplicated,
    reordered,
    dropped,
    restated,
    oversized,
    alien,
    noise,
    refused,
    unharmed,
)


def fuzz_puller(count: int, seed: int) -> dict[str, int]:
    """Receive `count` frames of streams gone wrong; return how many streams ended in which way.

    A stream is accepted exactly where what was read of it are the bytes that were sent, so no wrong byte is
    ever taken for right; rows that nobody asked for stay as they are; and everything else is a typed error.
    """
    rng = random.Random(seed)
    right = b"".join(GOOD)
    ends: dict[str, int] = {}
    sent = 0
    while sent < count:
        tape = Tape(rng.choice(DAMAGE)(rng, GOOD), rng)
        sent += len(GOOD)
        rows = np.full((32, BLOCK_BYTES), 0xEE, np.uint8)
        try:
            receive_blocks(tape, FIRST_BLOCK, rows, TARGET_ROWS)
            end = "accepted"
        except (KVLostError, EOFError) as error:
            end = type(error).__name__
        ends[end] = ends.get(end, 0) + 1
        assert (end == "accepted") == (tape._data[: tape.consumed] == right)
        assert tape.consumed <= len(right)
        assert (rows[UNTOUCHED] == 0xEE).all()
        if end == "accepted":
            assert np.array_equal(rows[TARGET_ROWS], DATA)
    return ends


def test_ten_thousand_frames_at_the_puller() -> None:
    ends = fuzz_puller(10_000, seed=1)
    assert set(ends) == {"accepted", "DamagedKVError", "KVLostError", "EOFError"}
    assert min(ends.values()) > 20


@pytest.mark.slow
def test_a_million_frames_at_the_puller() -> None:
    ends = fuzz_puller(1_000_000, seed=2)
    print(f"a million frames at the puller: {ends}")  # shown by -rP
    assert min(ends.values()) > 2_000


# -- the owner ---------------------------------------------------------------------------------------------


FIELDS = ["worker_id", "incarnation", "request_id", "key", "num_tokens", "first_block"]
WRONG_IDS = ["", "other", "probe", "x" * 257, "é" * 300, "\0"]


class HostilePuller:
    """Says wrong things at every stage of a stream. wrong: handles that no lease has."""

    def __init__(self, port: int, handle: KVHandle, seed: int) -> None:
        self._port = port
        self._handle = handle
        self._rng = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self.sent = 0
        self.refused = 0
        self.dropped = 0

    async def run(self, count: int) -> None:
        while self.sent < count:
            # Eight streams at once; each ends with its first message that is no request.
            await asyncio.gather(*(self._one_stream() for _ in range(8)))

    async def _one_stream(self) -> None:
        with socket.socket() as sock:
            sock.setblocking(False)
            # No port is left waiting, of which there are not a million.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await self._loop.sock_connect(sock, ("127.0.0.1", self._port))
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_S):
                    if await self._greet(sock):
                        await self._ask(sock)
        self.dropped += 1

    async def _greet(self, sock: socket.socket) -> bool:
        hello = frames.encode_hello(self._rng.randbytes(16))
        if self._rng.random() < 0.1:
            await self._say(sock, self._damaged(hello))
            return False
        await self._loop.sock_sendall(sock, hello)
        challenge = await read_exactly(sock, frames.CHALLENGE_BYTES)
        nonces = hello[-16:] + challenge[:16]
        right = frames.proof("puller", SECRET, OWNER, nonces)
        if self._rng.random() < 0.1:
            await self._say(sock, self._damaged(right))
            return False
        await self._loop.sock_sendall(sock, right)
        return True

    async def _ask(self, sock: socket.socket) -> None:
        """Send requests, several at once, until one is so wrong that the owner ends the stream; others are
        refused.
        """
        for _ in range(16):
            if self._rng.random() < 0.2:
                await self._say(sock, self._damaged(self._request()))
                return
            count = self._rng.randint(1, 8)
            self.sent += count
            await self._loop.sock_sendall(sock, b"".join(self._request() for _ in range(count)))
            answers = await read_exactly(sock, count * frames.HEADER_BYTES)
            for start in range(0, len(answers), frames.HEADER_BYTES):
                answer = frames.decode_frame(answers[start : start + frames.HEADER_BYTES])
                assert answer.kind is FrameKind.REFUSED
                self.refused += 1

    async def _say(self, sock: socket.socket, data: bytes) -> None:
        self.sent += 1
        await self._loop.sock_sendall(sock, data)

    def _damaged(self, data: bytes) -> bytes:
        match self._rng.randrange(5):
            case 0:
                return data[: self._rng.randrange(len(data))]
            case 1:
                return self._rng.randbytes(self._rng.randint(1, 200))
            case 2:
                return self._rng.choice(ALIEN)
            case 3:
                return struct.pack("<2sBBI", b"KV", 1, 0, self._rng.choice([4097, 2**31, 2**32 - 1]))
            case _:
                position = self._rng.randrange(min(8, len(data)))
                return data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :]

    def _request(self) -> bytes:
        handle = handle_to_proto(self._handle)
        name = self._rng.choice(FIELDS)
        request = worker_pb2.PullRequest(handle=handle, first_block=0)
        if name == "key":
            request.handle.key = self._rng.randbytes(self._rng.choice([0, 1, 15, 16, 16, 17, 500]))
        elif name == "num_tokens":
            request.handle.num_tokens = self._rng.choice([-1, 0, 7, 9, 2**31 - 1])
        elif name == "first_block":
            request.first_block = self._rng.choice([-1, -(2**31), 3, 4, 99, 2**31 - 1])
        else:
            setattr(request.handle, name, self._rng.choice(WRONG_IDS))
        return frames.encode_request(request)


async def fuzz_owner(count: int, seed: int) -> HostilePuller:
    """Let a hostile puller loose on an owner; afterwards the lease lives and a right pull is served."""
    directory = Directory()
    async with running_node(directory, lease_s=3600.0) as node:
        handle = node.publish("r", [1, 2])
        puller = HostilePuller(node.service._bulk_port, handle, seed)
        await puller.run(count)
        assert node.released == []
        async with asyncio.timeout(PATIENCE_S):
            while node.service._bulk._streams:
                await asyncio.sleep(0.01)
        async with running_client(directory, transport="grpc") as (client, segment):
            await client.pull(handle, 0, [1, 2])
            assert np.array_equal(segment.blocks[1:3], node.segment.blocks[1:3])
    return puller


async def test_thousands_of_wrong_messages_leave_the_owner_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_server, "STEP_TIMEOUT_S", 1.0)
    puller = await fuzz_owner(5_000, seed=3)
    assert puller.refused > 3_000
    assert puller.dropped > 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_a_million_wrong_messages_leave_the_owner_serving() -> None:
    puller = await fuzz_owner(1_000_000, seed=5)
    print(f"{puller.sent} messages at the owner: {puller.refused} refused, {puller.dropped} streams ended")
    assert puller.refused > 600_000
