"""The puller's end of bulk streams: blocks received straight into the cache's rows, on threads."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

from disagg.errors import KVLostError
from disagg.tls import ClusterTLS
from disagg.transfer.calls import DamagedKVError
from disagg.transfer.checksum import blocks_checksum, contiguous_parts
from disagg.transfer.frames import (
    CHALLENGE_BYTES,
    HEADER_BYTES,
    NONCE_BYTES,
    Frame,
    FrameKind,
    decode_frame,
    encode_hello,
    encode_request,
    proof,
)
from disagg.transfer.segment import Blocks
from disagg.transfer.stream_io import is_quiet, read_exactly, secured, send_all, shut, tune
from disagg.transfer.threads import to_its_end
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2

# Streams of one peer that receive at once. More would not be faster, and a peer that stalls holds as many
# threads at most, of those that all peers share.
STREAMS_PER_PEER = 4


class BulkReader:
    """One peer's blocks over bare TCP; streams are kept between pulls.

    address: host and port. owner: worker_id and incarnation that must prove to be at its other end. executor:
    where the receiving threads come from. timeout_s: longest silence in the middle of a pull, and bound on
    dialling.
    """

    # The bulk half of the grpc transport: leases, layout and identity are agreed over gRPC.
    transport = "grpc"

    def __init__(
        self,
        address: tuple[str, int],
        owner: tuple[str, str],
        secret: str,
        executor: Executor,
        timeout_s: float,
        tls: ClusterTLS | None = None,
    ) -> None:
        self._address = address
        self._owner = owner
        self._secret = secret
        self._executor = executor
        self._timeout_s = timeout_s
        self._tls = tls
        self._slots = asyncio.Semaphore(STREAMS_PER_PEER)
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._closed = False

    async def dial(self) -> None:
        """Open a stream and keep it for the first pull. Raises KVLostError where it can't be had."""
        self._idle.append(await self._open())

    async def read(
        self,
        handle: KVHandle,
        first_block: int,
        target: Blocks,
        target_rows: Sequence[int],
        *,
        source_rows: Sequence[int] = (),
        epoch: int = 0,
    ) -> None:
        request = worker_pb2.PullRequest(
            handle=handle_to_proto(handle),
            first_block=first_block,
            num_blocks=len(target_rows),
            epoch=epoch,
        )
        async with self._slots:
            sock = self._take_idle() or await self._open()
            self._busy.add(sock)
            try:
                await self._receive(sock, request, target, target_rows)
            except BaseException:
                sock.close()
                raise
            finally:
                self._busy.discard(sock)
            self._give_back(sock)

    async def close(self) -> None:
        """End every stream. Pulls in the middle of one fail, each once its thread has stopped writing."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
        for sock in self._busy:
            shut(sock)

    # -- streams -------------------------------------------------------------------------------------

    def _take_idle(self) -> socket.socket | None:
        """Return a kept stream, unless its peer closed it or said something unasked."""
        while self._idle:
            sock = self._idle.pop()
            if is_quiet(sock):
                return sock
            sock.close()
        return None

    def _give_back(self, sock: socket.socket) -> None:
        if self._closed:
            sock.close()
        else:
            self._idle.append(sock)

    async def _open(self) -> socket.socket:
        if self._closed:
            raise KVLostError(f"{self._owner[0]} left while its KV was wanted")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._connect()
        except (OSError, TimeoutError) as error:
            raise KVLostError(f"{self._owner[0]} can't be reached for its KV: {error}") from None

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        host, port = self._address
        family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, kind, protocol)
        try:
            tune(sock)
            await loop.sock_connect(sock, address)
            if self._tls is not None:
                name = self._tls.name_of(host)
                sock = await secured(sock, self._tls.client, server_hostname=name)
            await self._greet(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _greet(self, sock: socket.socket) -> None:
        """Raises KVLostError where whoever answers is not the worker that was meant: ports are used again."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        await send_all(sock, encode_hello(nonce))
        challenge = await read_exactly(sock, CHALLENGE_BYTES)
        nonces = nonce + challenge[:NONCE_BYTES]
        expected = proof("owner", self._secret, self._owner, nonces)
        if not hmac.compare_digest(challenge[NONCE_BYTES:], expected):
            raise KVLostError(f"port {self._address[1]} does not answer as {self._owner[0]}")
        await send_all(sock, proof("puller", self._secret, self._owner, nonces))

    # -- receiving -----------------------------------------------------------------------------------

    async def _receive(
        self,
        sock: socket.socket,
        request: worker_pb2.PullRequest,
        target: Blocks,
        target_rows: Sequence[int],
    ) -> None:
        try:
            await send_all(sock, encode_request(request))
            sock.settimeout(self._timeout_s)
            receiving = asyncio.get_running_loop().run_in_executor(
                self._executor, receive_blocks, sock, request.first_block, target, target_rows
            )
            await to_its_end(receiving, lambda: shut(sock))
            sock.settimeout(0)
        except (OSError, EOFError) as error:
            if self._closed:
                raise KVLostError(f"{self._owner[0]} left while its KV was wanted") from None
            raise DamagedKVError(f"the stream broke: {error}") from None


class Readable(Protocol):
    """What is needed of a blocking socket."""

    def recv_into(self, view: memoryview, /) -> int: ...


def receive_blocks(sock: Readable, first_block: int, target: Blocks, target_rows: Sequence[int]) -> None:
    """Read one pull's answer into rows of `target`, uint8 [n, block_bytes].

    Raises DamagedKVError for what is not as many right blocks as there are rows, KVLostError where the peer
    refuses, OSError or EOFError where the stream ends. No row but those in `target_rows` is ever written, and
    nothing is read past the answer's end.
    """
    _Answer(sock, first_block, target, target_rows).receive()


class _Answer:
    """One pull's frames, received in order."""

    def __init__(self, sock: Readable, first_block: int, target: Blocks, rows: Sequence[int]) -> None:
        self._sock = sock
        self._first_block = first_block
        self._target = target
        self._rows = list(rows)
        self._received = 0

    def receive(self) -> None:
        while (frame := self._next_frame()).kind is FrameKind.DATA:
            self._fill(frame)
        if frame.kind is FrameKind.REFUSED:
            raise KVLostError("NOT_FOUND: no such lease: unknown, expired or already released")
        if not self._received == frame.count == len(self._rows):
            raise DamagedKVError(f"the peer sent {self._received} of {len(self._rows)} blocks")

    def _next_frame(self) -> Frame:
        header = bytearray(HEADER_BYTES)
        self._read_into(memoryview(header))
        return decode_frame(header)

    def _fill(self, frame: Frame) -> None:
        missing = len(self._rows) - self._received
        expected = self._first_block + self._received
        if not 0 < frame.count <= missing:
            raise DamagedKVError(f"a frame has {frame.count} blocks where {missing} are missing")
        if frame.first_block != expected:
            raise DamagedKVError(f"block {frame.first_block} came where {expected} was due")
        rows = self._rows[self._received : self._received + frame.count]
        parts = contiguous_parts(self._target, rows)
        for part in parts:
            self._read_into(part.reshape(-1).data)
        if blocks_checksum(parts) != frame.checksum:
            raise DamagedKVError(f"blocks from {expected} on failed their checksum")
        self._received += frame.count

    def _read_into(self, view: memoryview) -> None:
        while view:
            count = self._sock.recv_into(view)
            if count == 0:
                raise EOFError("its end came early")
            view = view[count:]
