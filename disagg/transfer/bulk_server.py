"""The owner's end of bulk streams: blocks sent out of the cache's own memory, on threads, over bare TCP.

gRPC's Python runtime moves 0.5 to 1 GB/s of large messages on the machine where a bare TCP stream moves 3, so
it carries what is small (who, which lease, is it still live) and the blocks go beside it, see frames.py.

A stream is a coroutine while it waits and a thread while it sends; an idle one costs a descriptor.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from disagg.errors import ConfigError, KVLostError
from disagg.transfer.checksum import blocks_checksum, contiguous_parts
from disagg.transfer.frames import (
    HELLO_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    REQUEST_HEAD_BYTES,
    Frame,
    FrameKind,
    decode_hello,
    decode_request,
    encode_frame,
    proof,
    request_length,
)
from disagg.transfer.segment import Blocks
from disagg.transfer.stream_io import read_exactly, receive, secured, send_all, shut, tune
from disagg.transfer.threads import to_its_end
from disagg.v1 import worker_pb2

logger = logging.getLogger(__name__)

# Returns the segment's rows that a request is still to get from the given block on, or raises KVLostError.
# Called on sending threads, so it may only read.
Claim = Callable[[worker_pb2.PullRequest, int], Sequence[int]]

MAX_STREAMS = 1024
# Sends that run at once; more wait. Two cores are busy with two, the rest is for peers that read slowly.
SENDING_THREADS = 16
# The first frame is summed before anything is sent, and the last after all has come: short ones wait less.
# From 2 MiB down the rate of long pulls falls by a tenth.
FRAME_BYTES = 4 * 1024 * 1024
# From the first byte of a greeting or a request to its last, and the longest that a peer takes nothing.
STEP_TIMEOUT_S = 5.0
# For a whole frame to be taken: who reads byte by byte must not hold a thread for ever.
FRAME_TIMEOUT_S = 60.0
# A puller that finds its stream closed opens another.
IDLE_TIMEOUT_S = 300.0


class BulkServer:
    """Serves `rows`, uint8 [n, block_bytes], to members of the cluster. Lives on one event loop.

    owner: worker_id and incarnation under which it is asked for.
    """

    def __init__(
        self,
        rows: Blocks,
        owner: tuple[str, str],
        secret: str,
        claim: Claim,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._rows = rows
        self._owner = owner
        self._secret = secret
        self._claim = claim
        self._tls = tls
        self._blocks_per_frame = max(1, FRAME_BYTES // rows.shape[1])
        self._threads = ThreadPoolExecutor(SENDING_THREADS, thread_name_prefix="kv-send")
        self._streams: dict[asyncio.Task[None], socket.socket] = {}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def start(self, host: str) -> int:
        """Listen on a port that the OS picks; return it. Raises ConfigError where the host can't be bound."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"KV can't be served on {host}: {error}", param="host") from None
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return int(self._listener.getsockname()[1])

    async def close(self) -> None:
        """End every stream; when this returns no thread reads the rows any more."""
        tasks = list(self._streams)
        for sock in self._streams.values():
            shut(sock)
        if self._accepting is not None:
            tasks.append(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, mostly: what runs goes on, and some will end.
                logger.warning("can't accept a KV stream: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._streams) >= MAX_STREAMS:
                sock.close()
                continue
            task = asyncio.create_task(self._serve(sock))
            self._streams[task] = sock
            task.add_done_callback(self._streams.pop)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            tune(sock)
            if self._tls is not None:
                sock = await self._secure(sock, self._tls)
            await self._greet(sock)
            while (request := await self._next_request(sock)) is not None:
                await self._answer(sock, request)
        except (KVLostError, OSError, TimeoutError) as error:
            logger.info("a KV stream ended: %s", error)
        except Exception:
            # The next stream must be served whatever this one did.
            logger.exception("a KV stream failed")
        finally:
            sock.close()

    async def _secure(self, sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
        async with asyncio.timeout(STEP_TIMEOUT_S):
            secure = await secured(sock, context)
        task = asyncio.current_task()
        if task in self._streams:
            self._streams[task] = secure
        return secure

    async def _greet(self, sock: socket.socket) -> None:
        """Raises KVLostError for who does not know the cluster's secret; such a peer learns nothing."""
        async with asyncio.timeout(STEP_TIMEOUT_S):
            nonces = decode_hello(await read_exactly(sock, HELLO_BYTES))
            nonce = secrets.token_bytes(NONCE_BYTES)
            nonces += nonce
            await send_all(sock, nonce + proof("owner", self._secret, self._owner, nonces))
            given = await read_exactly(sock, PROOF_BYTES)
        if not hmac.compare_digest(given, proof("puller", self._secret, self._owner, nonces)):
            raise KVLostError("a peer does not know the cluster's secret")

    async def _next_request(self, sock: socket.socket) -> worker_pb2.PullRequest | None:
        """Return the next request, None when the peer is done or was silent for long."""
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                first = await receive(sock, 1)
        except TimeoutError:
            return None
        if not first:
            return None
        async with asyncio.timeout(STEP_TIMEOUT_S):
            head = first + await read_exactly(sock, REQUEST_HEAD_BYTES - 1)
            return decode_request(await read_exactly(sock, request_length(head)))

    async def _answer(self, sock: socket.socket, request: worker_pb2.PullRequest) -> None:
        sending = asyncio.get_running_loop().run_in_executor(self._threads, self._send, sock, request)
        await to_its_end(sending, lambda: shut(sock))

    # -- sending threads -----------------------------------------------------------------------------

    def _send(self, sock: socket.socket, request: worker_pb2.PullRequest) -> None:
        sock.settimeout(STEP_TIMEOUT_S)
        for frame, rows in self._frames(request):
            if frame.kind is FrameKind.DATA:
                self._send_blocks(sock, frame, rows)
            else:
                sock.sendall(encode_frame(frame))
        sock.settimeout(0)

    def _send_blocks(self, sock: socket.socket, frame: Frame, rows: Sequence[int]) -> None:
        parts = contiguous_parts(self._rows, rows)
        # Summed while the peer still takes what the kernel holds of the frame before.
        header = encode_frame(replace(frame, checksum=blocks_checksum(parts)))
        if self._tls is None:
            sock.sendall(header, socket.MSG_MORE)
        else:
            sock.sendall(header)  # TLS takes no flags
        deadline = time.monotonic() + FRAME_TIMEOUT_S
        for part in parts:
            _send_all(sock, part.reshape(-1).data, deadline)

    def _frames(self, request: worker_pb2.PullRequest) -> Iterator[tuple[Frame, Sequence[int]]]:
        """Yield the answer's frames, each with the rows in it.

        The lease is looked up before each: once it ended, the blocks are somebody else's. Where it ends in
        the middle of one, its puller's release will say so.
        """
        position = request.first_block
        while True:
            try:
                rows = self._claim(request, position)
            except KVLostError:
                yield Frame(FrameKind.REFUSED), ()
                return
            if not rows:
                yield Frame(FrameKind.END, count=position - request.first_block), ()
                return
            rows = rows[: self._blocks_per_frame]
            yield Frame(FrameKind.DATA, position, len(rows)), rows
            position += len(rows)


def _send_all(sock: socket.socket, view: memoryview, deadline: float) -> None:
    """Raises TimeoutError where the peer takes nothing for long, or not all of it until the deadline.

    `sendall` has one time for everything, which a slow link would need more of than a dead peer is worth.
    """
    while view:
        if time.monotonic() > deadline:
            raise TimeoutError("the peer takes its blocks too slowly")
        view = view[sock.send(view) :]
