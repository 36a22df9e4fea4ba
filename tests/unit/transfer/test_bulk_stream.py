"""Bulk streams: peers that are not who they should be, break off, stall or lie, on both ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from disagg.errors import ConfigError, KVLostError
from disagg.transfer import bulk_server, frames
from disagg.transfer.bulk_reader import BulkReader
from disagg.transfer.bulk_server import BulkServer
from disagg.transfer.checksum import blocks_checksum, contiguous_parts
from disagg.transfer.frames import Frame, FrameKind, encode_frame
from disagg.transfer.stream_io import read_exactly
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2
from tests.unit.transfer.transfer_support import (
    BLOCK_BYTES,
    SECRET,
    Directory,
    running_client,
    running_node,
)

OWNER = ("prefill-0", "first")
HANDLE = KVHandle(*OWNER, "r", bytes(16), 16)
DATA = np.random.default_rng(3).integers(0, 256, (4, BLOCK_BYTES), dtype=np.uint8)


@pytest.fixture
def directory() -> Directory:
    return Directory()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# -- checksum --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 100, 512, 24 * 1024, 64 * 1024, 64 * 1024 + 8, 384 * 1024])
def test_checksum_does_not_depend_on_how_blocks_lie(block_bytes: int) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (9, block_bytes), dtype=np.uint8)
    order = [4, 5, 6, 1, 0, 8]
    gathered = [np.ascontiguousarray(blocks[order])]
    parts = contiguous_parts(blocks, order)
    assert [len(part) for part in parts] == [3, 1, 1, 1]
    assert blocks_checksum(parts) == blocks_checksum(gathered)


@pytest.mark.parametrize("block_bytes", [3, 512, 64 * 1024, 96 * 1024])
def test_checksum_notices_flips_bursts_and_blocks_that_changed_places(block_bytes: int) -> None:
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (4, block_bytes), dtype=np.uint8)
    right = blocks_checksum([blocks])
    assert blocks_checksum([blocks[[1, 0, 2, 3]]]) != right
    assert blocks_checksum([blocks[:3]]) != right
    for _ in range(300):
        damaged = blocks.copy()
        flat = damaged.reshape(-1)
        start = int(rng.integers(0, len(flat)))
        burst = flat[start : start + int(rng.integers(1, 4097))]
        burst ^= np.uint8(1 << int(rng.integers(0, 8)))
        assert blocks_checksum([damaged]) != right


# -- a peer that says what it is told ---------------------------------------------------------------------


class ScriptedOwner:
    """Greets as it should and answers requests with `answers`, one each; then it is silent or leaves."""

    def __init__(self, *answers: bytes, stay: bool = False, owner: tuple[str, str] = OWNER) -> None:
        self.answers = list(answers)
        self.requests = 0
        self.running = 0
        self._stay = stay
        self._owner = owner

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            nonces = frames.decode_hello(await reader.readexactly(frames.HELLO_BYTES)) + bytes(16)
            writer.write(bytes(16) + frames.proof("owner", SECRET, self._owner, nonces))
            await reader.readexactly(frames.PROOF_BYTES)
            while self.answers:
                head = await reader.readexactly(frames.REQUEST_HEAD_BYTES)
                await reader.readexactly(frames.request_length(head))
                self.requests += 1
                writer.write(self.answers.pop(0))
                await writer.drain()
            if self._stay:
                await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.running -= 1


@asynccontextmanager
async def scripted(owner: ScriptedOwner, timeout_s: float = 5.0) -> AsyncIterator[BulkReader]:
    server = await asyncio.start_server(owner.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with ThreadPoolExecutor(4) as executor:
        reader = BulkReader(("127.0.0.1", port), OWNER, SECRET, executor, timeout_s)
        try:
            yield reader
        finally:
            await reader.close()
            server.close()
            # Handlers end when their streams do.
            await until(lambda: owner.running == 0)


def data_frame(first: int, *blocks: int, **changes: int) -> bytes:
    rows = DATA[list(blocks)]
    frame = Frame(
        FrameKind.DATA,
        first,
        changes.get("count", len(blocks)),
        changes.get("checksum", blocks_checksum([rows])),
    )
    return encode_frame(frame) + rows.tobytes()


END = encode_frame(Frame(FrameKind.END, count=4))
GOOD = data_frame(0, 0, 1) + data_frame(2, 2, 3) + END


def target() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((8, BLOCK_BYTES), 0xEE, np.uint8)


ROWS = [5, 6, 2, 1]


async def test_what_is_right_is_taken_and_the_stream_kept() -> None:
    owner = ScriptedOwner(GOOD, GOOD)
    async with scripted(owner) as reader:
        for _ in range(2):
            rows = target()
            await reader.read(HANDLE, 0, rows, ROWS)
            assert np.array_equal(rows[ROWS], DATA)
            assert (rows[[0, 3, 4, 7]] == 0xEE).all()
    assert owner.requests == 2


def flipped(stream: bytes, position: int) -> bytes:
    return stream[:position] + bytes([stream[position] ^ 4]) + stream[position + 1 :]


LIES: dict[str, bytes] = {
    "nothing": b"",
    "half a header": GOOD[:9],
    "a flipped bit in a header": flipped(GOOD, 5),
    "a flipped bit in a checksum": flipped(GOOD, 13),
    "a flipped bit in a block": flipped(GOOD, 20 + 700),
    "a cut block": GOOD[: 20 + 700],
    "no end": GOOD[: -frames.HEADER_BYTES],
    "an early end": data_frame(0, 0, 1) + END,
    "another end": data_frame(0, 0, 1) + data_frame(2, 2, 3) + encode_frame(Frame(FrameKind.END, count=3)),
    "a repeated frame": data_frame(0, 0, 1) + data_frame(0, 0, 1) + data_frame(2, 2, 3) + END,
    "reordered frames": data_frame(2, 2, 3) + data_frame(0, 0, 1) + END,
    "swapped blocks": data_frame(0, 1, 0, checksum=blocks_checksum([DATA[:2]])) + data_frame(2, 2, 3) + END,
    "a frame too many": data_frame(0, 0, 1) + data_frame(2, 2, 3) + data_frame(4, 0) + END,
    "an oversized frame": data_frame(0, 0, 1, count=5),
    "the largest frame": data_frame(0, 0, 1, count=2**32 - 1),
    "an empty frame": data_frame(0) + GOOD,
    "a frame from elsewhere": data_frame(2**32 - 1, 0, 1),
    "something else": b"HTTP/1.1 400 Bad Request\r\n\r\n" * 3,
    "a refusal": encode_frame(Frame(FrameKind.REFUSED)),
    "a late refusal": data_frame(0, 0, 1) + encode_frame(Frame(FrameKind.REFUSED)),
}


@pytest.mark.parametrize("name", LIES)
async def test_lies_are_noticed_and_the_next_read_works(name: str) -> None:
    async with scripted(ScriptedOwner(LIES[name])) as reader:
        rows = target()
        with pytest.raises(KVLostError):
            await reader.read(HANDLE, 0, rows, ROWS)
        assert (rows[[0, 3, 4, 7]] == 0xEE).all()
        assert reader._idle == []
    async with scripted(ScriptedOwner(GOOD)) as reader:
        await reader.read(HANDLE, 0, rows, ROWS)
        assert np.array_equal(rows[ROWS], DATA)


async def test_what_comes_unasked_ends_a_kept_stream() -> None:
    owner = ScriptedOwner(GOOD + GOOD, GOOD)
    async with scripted(owner) as reader:
        await reader.read(HANDLE, 0, target(), ROWS)
        kept = reader._idle[0]
        await asyncio.sleep(0.05)
        rows = target()
        await reader.read(HANDLE, 0, rows, ROWS)
        assert np.array_equal(rows[ROWS], DATA)
        assert kept.fileno() == -1
    assert owner.requests == 2


async def test_silence_ends_in_time() -> None:
    async with scripted(ScriptedOwner(GOOD[:700], stay=True), timeout_s=1.0) as reader:
        async with asyncio.timeout(10):
            with pytest.raises(KVLostError, match="timed out"):
                await reader.read(HANDLE, 0, target(), ROWS)


@pytest.mark.parametrize("owner", [("prefill-1", "first"), ("prefill-0", "second")])
async def test_a_port_that_is_somebody_elses_now_is_refused(owner: tuple[str, str]) -> None:
    peer = ScriptedOwner(GOOD, owner=owner)
    async with scripted(peer) as reader:
        with pytest.raises(KVLostError, match="does not answer as prefill-0"):
            await reader.read(HANDLE, 0, target(), ROWS)
    assert peer.requests == 0


async def test_a_cancelled_read_writes_no_more() -> None:
    async with scripted(ScriptedOwner(GOOD[:700], stay=True)) as reader:
        rows = target()
        read = asyncio.create_task(reader.read(HANDLE, 0, rows, ROWS))
        await until(lambda: bool((rows[5] != 0xEE).any()))
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert reader._busy == set()
        assert reader._idle == []


async def test_closing_ends_reads_that_run() -> None:
    async with scripted(ScriptedOwner(GOOD[:700], stay=True)) as reader:
        rows = target()
        read = asyncio.create_task(reader.read(HANDLE, 0, rows, ROWS))
        await until(lambda: bool((rows[5] != 0xEE).any()))
        await reader.close()
        async with asyncio.timeout(5):
            with pytest.raises(KVLostError, match="left"):
                await read
        with pytest.raises(KVLostError, match="left"):
            await reader.read(HANDLE, 0, rows, ROWS)


# -- the owner's end ---------------------------------------------------------------------------------------


async def dialled(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


async def ended(sock: socket.socket) -> bool:
    """Whether the peer closes the stream, whatever it says before."""
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            while await asyncio.get_running_loop().sock_recv(sock, 4096):
                pass
    sock.close()
    return True


async def greeted(sock: socket.socket, secret: str = SECRET) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, frames.encode_hello(bytes(16)))
    challenge = await read_exactly(sock, frames.CHALLENGE_BYTES)
    nonces = bytes(16) + challenge[:16]
    await loop.sock_sendall(sock, frames.proof("puller", secret, OWNER, nonces))


@asynccontextmanager
async def owner_of(
    rows: np.ndarray[Any, np.dtype[np.uint8]], claim: bulk_server.Claim
) -> AsyncIterator[tuple[BulkServer, int]]:
    server = BulkServer(rows, OWNER, SECRET, claim)
    port = await server.start("127.0.0.1")
    try:
        yield server, port
    finally:
        await server.close()


def everything(_request: worker_pb2.PullRequest, first_block: int) -> Sequence[int]:
    return range(4)[first_block:]


async def test_who_does_not_know_the_secret_gets_nothing() -> None:
    async with owner_of(DATA, everything) as (server, port):
        sock = await dialled(port)
        await greeted(sock, secret="guess")
        request = frames.encode_request(worker_pb2.PullRequest(handle=handle_to_proto(HANDLE)))
        with contextlib.suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(sock, request)
        assert await ended(sock)
        # Its own proof, said back to it, is not one.
        sock = await dialled(port)
        await asyncio.get_running_loop().sock_sendall(sock, frames.encode_hello(bytes(16)))
        challenge = await read_exactly(sock, frames.CHALLENGE_BYTES)
        await asyncio.get_running_loop().sock_sendall(sock, challenge[16:])
        assert await ended(sock)
        await until(lambda: not server._streams)


@pytest.mark.parametrize("start", [b"", frames.encode_hello(bytes(16))[:20], frames.encode_hello(bytes(16))])
async def test_who_never_finishes_its_greeting_is_dropped(
    start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_server, "STEP_TIMEOUT_S", 0.1)
    async with owner_of(DATA, everything) as (server, port):
        sock = await dialled(port)
        await asyncio.get_running_loop().sock_sendall(sock, start)
        assert await ended(sock)
        await until(lambda: not server._streams)


async def test_more_streams_than_allowed_are_refused_and_the_others_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bulk_server, "MAX_STREAMS", 3)
    async with owner_of(DATA, everything) as (server, port):
        kept = [await dialled(port) for _ in range(3)]
        await until(lambda: len(server._streams) == 3)
        assert await ended(await dialled(port))
        await greeted(kept[0])
        request = frames.encode_request(worker_pb2.PullRequest(handle=handle_to_proto(HANDLE)))
        await asyncio.get_running_loop().sock_sendall(kept[0], request)
        answer = await read_exactly(kept[0], frames.HEADER_BYTES + DATA.nbytes)
        assert answer == encode_frame(Frame(FrameKind.DATA, 0, 4, blocks_checksum([DATA]))) + DATA.tobytes()
        for sock in kept:
            sock.close()


async def test_who_takes_nothing_holds_no_thread_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_server, "STEP_TIMEOUT_S", 0.3)
    rows = np.zeros((64, 1024 * 1024), np.uint8)
    async with owner_of(rows, lambda _handle, first: range(64)[first:]) as (server, port):
        sock = await dialled(port)
        await greeted(sock)
        request = frames.encode_request(worker_pb2.PullRequest(handle=handle_to_proto(HANDLE)))
        await asyncio.get_running_loop().sock_sendall(sock, request)
        await until(lambda: not server._streams)
        sock.close()


async def test_closing_ends_a_send_that_runs() -> None:
    rows = np.zeros((64, 1024 * 1024), np.uint8)
    async with owner_of(rows, lambda _handle, first: range(64)[first:]) as (server, port):
        sock = await dialled(port)
        await greeted(sock)
        request = frames.encode_request(worker_pb2.PullRequest(handle=handle_to_proto(HANDLE)))
        await asyncio.get_running_loop().sock_sendall(sock, request)
        await read_exactly(sock, 1024)
        async with asyncio.timeout(3):
            await server.close()
        assert server._streams == {}
        sock.close()


async def test_a_host_that_is_not_ours_is_refused() -> None:
    server = BulkServer(DATA, OWNER, SECRET, everything)
    with pytest.raises(ConfigError) as caught:
        await server.start("192.0.2.1")
    assert caught.value.param == "host"
    await server.close()


# -- both ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["drop", "expire"])
async def test_a_lease_that_ends_between_two_frames(
    directory: Directory, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream stops: no further frame is read from blocks that are somebody else's."""
    monkeypatch.setattr(bulk_server, "FRAME_BYTES", 2 * BLOCK_BYTES)
    now = [0.0]
    async with (
        running_node(directory, lease_s=5.0, clock=lambda: now[0]) as node,
        running_client(directory, transport="grpc") as (client, segment),
    ):
        loop = asyncio.get_running_loop()
        original = node.service._bulk._claim

        def claim(request: worker_pb2.PullRequest, first_block: int) -> Sequence[int]:
            if first_block == 4 and end == "drop":
                asyncio.run_coroutine_threadsafe(dropped(), loop).result(5)
            elif first_block == 4:
                now[0] = 5.0
            return original(request, first_block)

        async def dropped() -> None:
            node.service.drop("r")

        node.service._bulk._claim = claim
        with pytest.raises(KVLostError, match="NOT_FOUND"):
            await client.pull(node.publish("r", range(1, 9)), 0, range(1, 9))
        assert np.array_equal(segment.blocks[1:5], node.segment.blocks[1:5])
        assert (segment.blocks[5:] == 0xEE).all()


async def test_streams_are_kept_between_pulls_and_replaced_when_they_broke(directory: Directory) -> None:
    async with running_node(directory) as node, running_client(directory, transport="grpc") as (client, _):
        streams = node.service._bulk._streams
        for index in range(5):
            await client.pull(node.publish(f"r{index}", [1, 2]), 0, [1, 2])
        assert len(streams) == 1
        for sock in streams.values():
            sock.shutdown(socket.SHUT_RDWR)
        await until(lambda: not streams)
        await client.pull(node.publish("after", [1, 2]), 0, [1, 2])
        assert len(streams) == 1


async def test_a_bulk_port_that_answers_nothing_leaves_messages(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network policy that lets the gRPC port through alone."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with (
            running_node(directory) as node,
            running_client(directory, transport="grpc", pull_timeout_s=2.0) as (client, segment),
        ):
            node.service._bulk_port = silent.getsockname()[1]
            result = await client.pull(node.publish("r", [5]), 0, [1])
            assert result.transport == "grpc"
            assert np.array_equal(segment.blocks[1], node.segment.blocks[5])
            assert node.service._bulk._streams == {}
