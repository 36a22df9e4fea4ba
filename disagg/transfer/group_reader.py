"""The puller's end of a process group: blocks received into a buffer and scattered into the cache."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import grpc
import grpc.aio

from disagg.errors import KVLostError
from disagg.transfer.agreement import Device
from disagg.transfer.calls import DamagedKVError, answered
from disagg.transfer.connections import Peer, Reached
from disagg.transfer.process_group import (
    GROUP_ID_BYTES,
    PULLER,
    GroupBrokenError,
    PairGroup,
    backend_name,
    reach_store,
)
from disagg.transfer.readers import Metadata
from disagg.transfer.scatter import Scatter
from disagg.transfer.segment import Blocks
from disagg.transfer.threads import failed, looked_at
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import reads_pb2, reads_pb2_grpc, worker_pb2

SendCall = grpc.aio.UnaryStreamCall[reads_pb2.SendBlocksRequest, reads_pb2.SentBlocks]


class GroupReader:
    """One peer's blocks over a process group, which is made at the first read and again after a failure.

    Reads take turns: two ranks can only agree about one thing that is sent next. own: this worker, as it
    introduces itself. executor: scatters.
    """

    def __init__(
        self,
        reached: Reached,
        own: Peer,
        metadata: Metadata,
        executor: Executor,
        *,
        host: str,
        device: Device,
        block_bytes: int,
        timeout_s: float,
    ) -> None:
        self.transport = backend_name(device)
        self._stub: reads_pb2_grpc.KVGroupsAsyncStub = reads_pb2_grpc.KVGroupsStub(reached.channel)
        self._peer_host = reached.host
        self._own = own
        self._metadata = metadata
        self._executor = executor
        self._host = host
        self._device = device
        self._block_bytes = block_bytes
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._joining: asyncio.Task[PairGroup] | None = None
        self._closed = False

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
        pull = worker_pb2.PullRequest(
            handle=handle_to_proto(handle),
            first_block=first_block,
            num_blocks=len(target_rows),
            epoch=epoch,
        )
        async with self._turn:
            group = await self._joined()
            try:
                await self._receive(group, pull, target, target_rows)
            except BaseException as error:
                # A refusal comes between two parts, with both ranks in step.
                if not _refused(error):
                    self._drop()
                if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.ABORTED:
                    raise GroupBrokenError(str(error.details())) from None
                raise

    async def close(self) -> None:
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        joining, self._joining = self._joining, None
        if joining is None:
            return
        joining.cancel()
        if not joining.cancelled() and joining.done() and joining.exception() is None:
            joining.result().abort()

    async def _joined(self) -> PairGroup:
        """Return the group, a new one after a failure. Raises KVLostError."""
        if self._closed:
            raise KVLostError("the peer left while its KV was wanted")
        if self._joining is None or failed(self._joining):
            self._joining = asyncio.create_task(self._join())
            self._joining.add_done_callback(looked_at)
        # A pull that is cancelled meanwhile leaves the next one a group.
        return await asyncio.shield(self._joining)

    async def _join(self) -> PairGroup:
        group_id = secrets.token_bytes(GROUP_ID_BYTES)
        request = reads_pb2.JoinGroupRequest(
            worker_id=self._own[0], incarnation=self._own[1], group_id=group_id
        )
        response = await answered(self._stub.Join(request, metadata=self._metadata, timeout=self._timeout_s))
        group = PairGroup(
            lambda: reach_store(self._peer_host, response.store_port, self._timeout_s),
            group_id,
            PULLER,
            host=self._host,
            device=self._device,
            block_bytes=self._block_bytes,
            timeout_s=self._timeout_s,
        )
        try:
            await group.opened()
        except BaseException:
            group.abort()
            raise
        return group

    async def _receive(
        self, group: PairGroup, pull: worker_pb2.PullRequest, target: Blocks, target_rows: Sequence[int]
    ) -> None:
        request = reads_pb2.SendBlocksRequest(group_id=group.group_id, pull=pull)
        call: SendCall = self._stub.Send(request, metadata=self._metadata)
        scattering = Scatter(target, self._executor)
        coming = asyncio.ensure_future(call.read())
        received, turn = 0, 0
        try:
            while isinstance(part := await coming, reads_pb2.SentBlocks):
                buffer = group.buffers[turn % len(group.buffers)]
                missing = len(target_rows) - received
                if not 0 < part.num_blocks <= min(missing, buffer.capacity):
                    raise DamagedKVError(f"a part has {part.num_blocks} blocks where {missing} are missing")
                if part.first_block != pull.first_block + received:
                    raise DamagedKVError(f"block {part.first_block} came out of turn")
                receiving = asyncio.ensure_future(group.receive(buffer, part.num_blocks))
                coming = asyncio.ensure_future(call.read())
                await _while_alive(receiving, coming)
                rows = target_rows[received : received + part.num_blocks]
                await scattering.done()
                scattering.start(buffer, rows, part.checksum)
                received, turn = received + part.num_blocks, turn + 1
            await scattering.done()
        finally:
            coming.cancel()
            call.cancel()
            await scattering.stop()
        if received != len(target_rows):
            raise DamagedKVError(f"the peer sent {received} of {len(target_rows)} blocks")


async def _while_alive(receiving: asyncio.Future[None], coming: asyncio.Future[Any]) -> None:
    """Return when `receiving` is done; raise at once if the call fails meanwhile, since the peer is gone."""
    try:
        await asyncio.wait({receiving, coming}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done() and (error := coming.exception()) is not None and not _refused(error):
            raise GroupBrokenError("the peer left in the middle of a part")
        await receiving
    finally:
        receiving.cancel()
        with contextlib.suppress(BaseException):
            receiving.result()


def _refused(error: BaseException) -> bool:
    """Whether the peer said that it sends nothing (more), as it does for a lease that is gone."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.NOT_FOUND
