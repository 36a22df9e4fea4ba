"""The side of a hand-off that computed the KV: leases, and the KVTransfer service that peers call."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from disagg.errors import DisaggError, KVLostError, LayoutMismatchError
from disagg.transfer.leases import LeaseTable
from disagg.transfer.segment import SharedSegment, host_id
from disagg.transfer.wire import (
    check_same_layout,
    handle_from_proto,
    handle_to_proto,
    layout_to_proto,
    probe_handle,
)
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_RENEWALS = 100_000
_STATUS = {
    KVLostError: grpc.StatusCode.NOT_FOUND,
    LayoutMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
}


class KVTransferService(worker_pb2_grpc.KVTransferServicer):
    """Publishes blocks of `segment` under leases. Lives on one event loop.

    on_released: called once per published request, when its blocks may be used for something else.
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
    ) -> None:
        self._layout = layout
        self._segment = segment
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._blocks_per_chunk = max(1, chunk_bytes // segment.block_bytes)
        self._on_released = on_released
        self._clock = clock
        self._leases = LeaseTable(lease_s)
        self._timer: asyncio.TimerHandle | None = None
        self._probe = probe_handle(worker_id, incarnation, secret)
        self._host_id = host_id()

    # -- owner ---------------------------------------------------------------------------------------

    def publish(self, request_id: str, key: bytes, block_ids: Sequence[int], num_tokens: int) -> KVHandle:
        """Open a lease. Raises ValueError where the request has one already."""
        self._leases.publish(request_id, key, block_ids, num_tokens, self._clock())
        self._arm()
        return KVHandle(self._worker_id, self._incarnation, request_id, key, num_tokens)

    def drop(self, request_id: str) -> None:
        """End a request's lease, if it has one, from the owner's side."""
        if self._leases.drop(request_id):
            self._on_released(request_id)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        """Set the timer for the earliest end, unless one is set: renewals only make it early."""
        expiry = self._leases.next_expiry()
        if self._timer is None and expiry is not None:
            delay = max(0.0, expiry - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        for request_id in self._leases.sweep(self._clock()):
            logger.warning("request %s: its KV lease ran out", request_id)
            self._on_released(request_id)
        self._arm()

    # -- peers ---------------------------------------------------------------------------------------

    async def Connect(
        self, request: worker_pb2.ConnectRequest, context: Context
    ) -> worker_pb2.ConnectResponse:
        try:
            check_same_layout(self._layout, request.layout)
        except LayoutMismatchError as error:
            await _refuse(context, error)
        response = worker_pb2.ConnectResponse(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            layout=layout_to_proto(self._layout),
            host_id=self._host_id,
            transports=["grpc"],
            num_blocks=self._segment.num_blocks,
        )
        if request.host_id == self._host_id:
            response.transports.append("shm")
            response.segment.CopyFrom(self._segment.describe())
        return response

    async def Locate(self, request: worker_pb2.LocateRequest, context: Context) -> worker_pb2.LocateResponse:
        try:
            blocks = self._claimed(request.handle, request.first_block)
        except KVLostError as error:
            await _refuse(context, error)
        return worker_pb2.LocateResponse(block_ids=blocks)

    async def Pull(
        self, request: worker_pb2.PullRequest, context: Context
    ) -> AsyncIterator[worker_pb2.PullChunk]:
        try:
            position, total = request.first_block, None
            while total is None or position < total:
                # Looked up anew for each chunk and read without a pause: the lease may end in between, and
                # from then on the blocks are somebody else's.
                blocks = self._claimed(request.handle, position)
                total = position + len(blocks)
                if blocks:
                    yield self._chunk(position, blocks[: self._blocks_per_chunk])
                position += self._blocks_per_chunk
        except KVLostError as error:
            await _refuse(context, error)

    def _chunk(self, position: int, block_ids: Sequence[int]) -> worker_pb2.PullChunk:
        blocks = self._segment.blocks[list(block_ids)]
        return worker_pb2.PullChunk(
            first_block=position,
            data=blocks.tobytes(),
            checksums=[zlib.crc32(block) for block in blocks],
        )

    def _claimed(self, message: worker_pb2.KVHandle, first_block: int) -> Sequence[int]:
        """Return the blocks that a handle claims, from the given one on. Raises KVLostError."""
        handle = handle_from_proto(message)
        if handle == self._probe:
            return (0,)
        if handle.incarnation != self._incarnation:
            raise KVLostError("the worker was restarted since")
        lease = self._leases.lookup(handle.request_id, handle.key, self._clock())
        if not 0 <= first_block <= len(lease.block_ids):
            raise KVLostError("first_block is out of range")
        return lease.block_ids[first_block:]

    async def Renew(self, request: worker_pb2.RenewRequest, context: Context) -> worker_pb2.RenewResponse:
        if len(request.handles) > MAX_RENEWALS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many handles")
        now = self._clock()
        return worker_pb2.RenewResponse(
            valid=[self._leases.renew(_bare_handle(item), now) for item in request.handles]
        )

    async def Release(
        self, request: worker_pb2.ReleaseRequest, context: Context
    ) -> worker_pb2.ReleaseResponse:
        handle = _bare_handle(request.handle)
        valid = self._leases.release(handle, self._clock())
        if valid:
            self._on_released(handle.request_id)
        return worker_pb2.ReleaseResponse(valid=valid)


def _bare_handle(message: worker_pb2.KVHandle) -> KVHandle:
    """Return the handle as it came: a malformed one just matches no lease."""
    return KVHandle(
        message.worker_id, message.incarnation, message.request_id, message.key, message.num_tokens
    )


async def _refuse(context: Context, error: DisaggError) -> NoReturn:
    await context.abort(_STATUS[type(error)], error.message)


__all__ = ["KVTransferService", "handle_to_proto"]
