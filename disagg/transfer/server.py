"""The side of a hand-off that computed the KV: leases, and the KVTransfer service that peers call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
import numpy as np

from disagg.errors import DisaggError, KVLostError, LayoutMismatchError
from disagg.tls import ClusterTLS
from disagg.transfer.bulk_server import BulkServer, Claim
from disagg.transfer.leases import LeaseTable
from disagg.transfer.segment import SharedSegment, host_id
from disagg.transfer.wire import (
    canary_bytes,
    check_layout,
    check_published,
    handle_from_proto,
    layout_to_proto,
    probe_handle,
)
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_RENEWALS = 100_000
# A puller that waits for blocks is answered at the latest after this time, so that each knows of the other.
MAX_WAIT_S = 2.0
_STATUS = {
    KVLostError: grpc.StatusCode.NOT_FOUND,
    LayoutMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
}


class KVTransferService(worker_pb2_grpc.KVTransferServicer):
    """Publishes blocks of `segment` under leases. Lives on one event loop.

    chunk_bytes: size of a Pull's messages, rounded down to whole blocks. on_released: called once per
    published request, when its blocks may be used for something else. clock: seconds.
    num_expired: leases that ran out so far.
    """

    def __init__(
        self,
        layout: KVLayout,
        segment: SharedSegment,
        *,
        worker_id: str,
        incarnation: str,
        secret: str,
        lease_s: float,
        chunk_bytes: int,
        on_released: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        tls: ClusterTLS | None = None,
    ) -> None:
        self._layout = layout
        self.num_expired = 0
        self._segment = segment
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._blocks_per_chunk = max(1, chunk_bytes // segment.block_bytes)
        self._on_released = on_released
        self._clock = clock
        self._leases = LeaseTable(lease_s)
        self._loop = asyncio.get_running_loop()
        # Of what somebody waits for; each is set and removed when there is news.
        self._news: dict[str, asyncio.Event] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._host_id = host_id()
        self._bulk = BulkServer(
            segment.rows,
            (worker_id, incarnation),
            secret,
            self._requested_rows,
            None if tls is None else tls.server,
        )
        self._bulk_port = 0
        self._offers: dict[str, Callable[[worker_pb2.ConnectResponse], None]] = {}
        self._probe = probe_handle(worker_id, incarnation, secret)
        segment.canary[:] = np.frombuffer(canary_bytes(self._probe, segment.block_bytes), np.uint8)

    async def listen(self, host: str) -> None:
        """Serve bulk streams too, on a port of `host` that the OS picks. Without this, KV that can't be
        mapped travels as gRPC messages, at a fraction of the speed. Raises ConfigError where the host can't
        be bound.
        """
        self._bulk_port = await self._bulk.start(host)

    @property
    def claim(self) -> Claim:
        """Which rows of the segment a peer's request may read."""
        return self._requested_rows

    def offer(
        self,
        transport: str,
        describe: Callable[[worker_pb2.ConnectResponse], None] = lambda _response: None,
    ) -> None:
        """Tell peers that connect from now on of a transport besides shm and grpc. describe: adds what they
        need to know for it.
        """
        self._offers[transport] = describe

    # -- owner ---------------------------------------------------------------------------------------

    def publish(self, request_id: str, key: bytes, block_ids: Sequence[int], num_tokens: int) -> KVHandle:
        """Open a lease on the blocks that hold a request's first `num_tokens` tokens, in order.

        Raises InvalidRequestError naming a field that can't be published, ValueError where the request is
        published already; then on_released is not called.
        """
        check_published(request_id, key)
        self._leases.publish(request_id, key, block_ids, num_tokens, self._clock())
        self._arm()
        return KVHandle(self._worker_id, self._incarnation, request_id, key, num_tokens)

    def open(self, request_id: str, key: bytes, num_tokens: int) -> KVHandle:
        """Open a lease on KV of `num_tokens` tokens that is yet to be computed; see `progress`.

        Raises as `publish` does. on_released is called however it ends.
        """
        check_published(request_id, key)
        self._leases.open(request_id, key, num_tokens)
        self._tell(request_id)
        return KVHandle(self._worker_id, self._incarnation, request_id, key, num_tokens)

    def progress(self, request_id: str, epoch: int, block_ids: Sequence[int], *, complete: bool) -> None:
        """Let peers read what is computed by now, or know that it is begun.

        epoch: how often `withdraw` was called for it before.
        """
        if self._leases.progress(request_id, epoch, block_ids, complete=complete, now=self._clock()):
            self._arm()
            self._tell(request_id)

    def withdraw(self, request_id: str) -> None:
        """Let nobody read a request's blocks until `progress` says which they are now; on any thread, before
        they are used for anything else. What is read of them at this moment is not taken for right.
        """
        if self._leases.withdraw(request_id):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._tell, request_id)

    def drop(self, request_id: str) -> None:
        """End a request's lease, if it has one, from the owner's side."""
        if self._leases.drop(request_id):
            self._give_back(request_id)

    async def close(self) -> None:
        """End every lease and bulk stream. Peers' calls are the server's to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._bulk.close()
        for request_id in self._leases.clear():
            self._give_back(request_id)

    def _arm(self) -> None:
        """Set the timer for the earliest end, unless one is set: every lease has the same length, so a later
        one ends later, and renewals only make the timer early.
        """
        if self._timer is not None:
            return
        expiry = self._leases.next_expiry()
        if expiry is not None:
            delay = max(0.0, expiry - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        for request_id in self._leases.sweep(self._clock()):
            logger.warning("request %s: its KV lease ran out", request_id)
            self.num_expired += 1
            self._give_back(request_id)
        self._arm()

    def _tell(self, request_id: str) -> None:
        news = self._news.pop(request_id, None)
        if news is not None:
            news.set()

    def _give_back(self, request_id: str) -> None:
        self._tell(request_id)
        try:
            self._on_released(request_id)
        except Exception:
            # One request's failure must not keep the blocks of those after it.
            logger.exception("request %s: its blocks could not be given back", request_id)

    # -- peers ---------------------------------------------------------------------------------------

    async def Connect(
        self, request: worker_pb2.ConnectRequest, context: Context
    ) -> worker_pb2.ConnectResponse:
        try:
            check_layout(self._layout, request.layout)
            segment = self._segment.describe() if request.host_id == self._host_id else None
        except (KVLostError, LayoutMismatchError) as error:
            await _refuse(context, error)
        response = worker_pb2.ConnectResponse(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            layout=layout_to_proto(self._layout),
            host_id=self._host_id,
            transports=["grpc"] if segment is None else ["grpc", "shm"],
            segment=segment,
            num_blocks=self._segment.num_blocks,
            bulk_port=self._bulk_port,
            device="cpu",
        )
        for transport, describe in self._offers.items():
            response.transports.append(transport)
            describe(response)
        return response

    async def Locate(self, request: worker_pb2.LocateRequest, context: Context) -> worker_pb2.LocateResponse:
        deadline = self._clock() + min(MAX_WAIT_S, request.wait_s)
        try:
            while (answer := self._located(request)) is None:
                left = deadline - self._clock()
                if left <= 0:
                    # Unknown until now is no such lease; known without news is an answer.
                    answer = self._located(request, patient=False)
                    break
                await self._wait_for_news(request.handle.request_id, left)
        except KVLostError as error:
            await _refuse(context, error)
        return answer or worker_pb2.LocateResponse()

    def _located(
        self, request: worker_pb2.LocateRequest, *, patient: bool = True
    ) -> worker_pb2.LocateResponse | None:
        """Return what a puller wants to know, None where it may wait for it. Raises KVLostError."""
        handle = self._claim(request.handle)
        if handle == self._probe:
            return worker_pb2.LocateResponse(block_ids=[self._segment.num_blocks], complete=True)
        patient = patient and request.wait_s > 0
        if patient and not self._leases.has(handle.request_id):
            # The puller may have heard of a request before its prefill worker did.
            return None
        current = self._leases.lookup(handle, self._clock()).current
        if current.complete or not patient:
            rows = self._from(current.block_ids, request.first_block, complete=current.complete)
        elif (
            current.epoch == request.epoch
            and len(current.block_ids) <= request.first_block
            and not (request.until_begun and current.begun)
        ):
            return None
        else:
            rows = current.block_ids[request.first_block :]
        return worker_pb2.LocateResponse(
            block_ids=rows, epoch=current.epoch, complete=current.complete, begun=current.begun
        )

    async def _wait_for_news(self, request_id: str, seconds: float) -> None:
        news = self._news.setdefault(request_id, asyncio.Event())
        try:
            async with asyncio.timeout(seconds):
                await news.wait()
        except TimeoutError:
            pass
        finally:
            # Also where the puller is gone. Others that wait for the same news are woken once too often.
            if self._news.get(request_id) is news:
                self._tell(request_id)

    async def Pull(
        self, request: worker_pb2.PullRequest, context: Context
    ) -> AsyncIterator[worker_pb2.PullChunk]:
        try:
            position, total = request.first_block, None
            while total is None or position < total:
                # Looked up anew for each chunk and read without a pause: the lease may end in between, and
                # from then on the blocks are somebody else's.
                rows = self._requested_rows(request, position)
                total = position + len(rows)
                if rows:
                    yield self._chunk(position, rows[: self._blocks_per_chunk])
                position += self._blocks_per_chunk
        except KVLostError as error:
            await _refuse(context, error)

    def _chunk(self, position: int, rows: Sequence[int]) -> worker_pb2.PullChunk:
        blocks = self._segment.rows[list(rows)]
        return worker_pb2.PullChunk(
            first_block=position,
            data=blocks.tobytes(),
            checksums=[zlib.crc32(block) for block in blocks],
        )

    def _requested_rows(self, request: worker_pb2.PullRequest, position: int) -> Sequence[int]:
        """Return the segment's rows that a pull is still to send, from block `position` on.

        Raises KVLostError. Only reads, so that sending threads may call it.
        """
        handle = self._claim(request.handle)
        if handle == self._probe:
            return self._from((self._segment.num_blocks,), position, complete=True)
        current = self._leases.lookup(handle, self._clock()).current
        if current.epoch != request.epoch:
            raise KVLostError("the blocks were taken back")
        rows = current.block_ids
        if request.num_blocks:
            end = request.first_block + request.num_blocks
            if not 0 <= request.num_blocks <= len(rows) - request.first_block:
                raise KVLostError(f"num_blocks must be in [0, {len(rows) - request.first_block}]")
            rows = rows[:end]
        return self._from(rows, position, complete=True)

    @staticmethod
    def _from(rows: Sequence[int], first_block: int, *, complete: bool) -> Sequence[int]:
        if first_block < 0 or (complete and first_block > len(rows)):
            raise KVLostError(f"first_block must be in [0, {len(rows)}], got {first_block}")
        return rows[first_block:]

    def _claim(self, message: worker_pb2.KVHandle) -> KVHandle:
        """Return the handle if it is well-formed and means this very worker. Raises KVLostError."""
        handle = handle_from_proto(message)
        if (handle.worker_id, handle.incarnation) != (self._worker_id, self._incarnation):
            raise KVLostError("the handle names another worker or one from before a restart")
        return handle

    async def Renew(self, request: worker_pb2.RenewRequest, context: Context) -> worker_pb2.RenewResponse:
        if len(request.handles) > MAX_RENEWALS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"handles: at most {MAX_RENEWALS}, got {len(request.handles)}",
            )
        now = self._clock()
        return worker_pb2.RenewResponse(valid=[self._renewed(item, now) for item in request.handles])

    def _renewed(self, message: worker_pb2.KVHandle, now: float) -> bool:
        try:
            self._leases.renew(self._claim(message), now)
        except KVLostError:
            return False
        return True

    async def Release(
        self, request: worker_pb2.ReleaseRequest, context: Context
    ) -> worker_pb2.ReleaseResponse:
        try:
            handle = self._claim(request.handle)
        except KVLostError:
            return worker_pb2.ReleaseResponse(valid=False)
        valid = self._leases.release(handle, request.epoch, self._clock())
        if valid:
            self._give_back(handle.request_id)
        return worker_pb2.ReleaseResponse(valid=valid)


async def _refuse(context: Context, error: DisaggError) -> NoReturn:
    await context.abort(_STATUS[type(error)], error.message)
