"""The owner's end of process groups: blocks gathered into a buffer and sent, each part announced before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from disagg.errors import KVLostError
from disagg.transfer.agreement import Device
from disagg.transfer.bulk_server import Claim
from disagg.transfer.connections import Peer
from disagg.transfer.process_group import (
    GROUP_ID_BYTES,
    OWNER,
    GroupBrokenError,
    PairGroup,
    Store,
    reach_store,
    serve_store,
)
from disagg.transfer.threads import failed, looked_at
from disagg.transfer.wire import MAX_ID_CHARS
from disagg.v1 import reads_pb2, reads_pb2_grpc, worker_pb2

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_GROUPS = 1024
# As for copies elsewhere: two threads exhaust the memory.
GATHER_THREADS = 2


@dataclass(slots=True)
class _Joined:
    """A group and whose it is. turn: one request is answered at a time, also after its puller gave it up."""

    peer: Peer
    group: PairGroup
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class GroupServer(reads_pb2_grpc.KVGroupsServicer):
    """Sends rows of `cache`, uint8 [n, block_bytes], to members of the cluster. Lives on one event loop.

    claim: which rows a request may read. host: this worker's own address.
    """

    def __init__(self, cache: Any, claim: Claim, *, host: str, device: Device, timeout_s: float) -> None:
        self._cache = cache
        self._claim = claim
        self._host = host
        self._device = device
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(GATHER_THREADS, thread_name_prefix="kv-gather")
        self._store: asyncio.Task[Store] | None = None
        self._groups: dict[Peer, _Joined] = {}

    def retain(self, alive: Collection[Peer]) -> None:
        """End the groups with peers that are not in `alive`."""
        for peer in [peer for peer in self._groups if peer not in alive]:
            self._drop(self._groups[peer])

    async def close(self) -> None:
        self.retain(())
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def Join(
        self, request: reads_pb2.JoinGroupRequest, context: Context
    ) -> reads_pb2.JoinGroupResponse:
        ids = (request.worker_id, request.incarnation)
        if len(request.group_id) != GROUP_ID_BYTES or not all(0 < len(item) <= MAX_ID_CHARS for item in ids):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed group")
        try:
            store = await self._serve_store()
        except (RuntimeError, OSError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no store for process groups: {error}")
        # Not before: another of the same peer may have come meanwhile.
        if ids in self._groups:
            self._drop(self._groups[ids])
        if len(self._groups) >= MAX_GROUPS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_GROUPS} groups exist")
        group = PairGroup(
            lambda: reach_store(self._host, store.port, self._timeout_s),
            request.group_id,
            OWNER,
            host=self._host,
            device=self._device,
            block_bytes=self._cache.shape[1],
            timeout_s=self._timeout_s,
        )
        self._groups[ids] = _Joined(ids, group)
        return reads_pb2.JoinGroupResponse(store_port=store.port)

    async def _serve_store(self) -> Store:
        if self._store is None or failed(self._store):
            self._store = asyncio.create_task(asyncio.to_thread(serve_store, self._host, self._timeout_s))
        return await asyncio.shield(self._store)

    # Writes instead of yielding: a generator that waits in `yield` when its peer vanishes is finalised only
    # some time later, and the turn would not end until then.
    async def Send(  # type: ignore[override]
        self, request: reads_pb2.SendBlocksRequest, context: Context
    ) -> None:
        joined = next(
            (item for item in self._groups.values() if item.group.group_id == request.group_id), None
        )
        if joined is None:
            await context.abort(grpc.StatusCode.ABORTED, "no such group")
        async with joined.turn:
            try:
                await self._send(joined.group, request.pull, context.write)
            except GroupBrokenError as error:
                self._drop(joined)
                await context.abort(grpc.StatusCode.ABORTED, error.message)
            except KVLostError as error:
                await context.abort(grpc.StatusCode.NOT_FOUND, error.message)
            except BaseException:
                # The puller is gone, with a part announced that it may not receive.
                self._drop(joined)
                raise

    async def _send(
        self,
        group: PairGroup,
        pull: worker_pb2.PullRequest,
        announce: Callable[[reads_pb2.SentBlocks], Awaitable[None]],
    ) -> None:
        """Gather a part while the one before it is sent. Whatever was announced is sent before this returns
        or raises KVLostError.
        """
        await group.opened()
        position, turn = pull.first_block, 0
        sending: asyncio.Task[None] | None = None
        try:
            # Looked up anew for each part: the lease may end in between.
            while rows := self._claim(pull, position):
                buffer = group.buffers[turn % len(group.buffers)]
                rows = rows[: buffer.capacity]
                checksum = await asyncio.get_running_loop().run_in_executor(
                    self._threads, buffer.gather, self._cache, rows
                )
                if sending is not None:
                    await sending
                part = reads_pb2.SentBlocks(first_block=position, num_blocks=len(rows), checksum=checksum)
                await announce(part)
                sending = asyncio.create_task(group.send(buffer, len(rows)))
                # The puller may leave before it is awaited.
                sending.add_done_callback(looked_at)
                position, turn = position + len(rows), turn + 1
        except KVLostError:
            if sending is not None:
                await sending
            raise
        if sending is not None:
            await sending

    def _drop(self, joined: _Joined) -> None:
        joined.group.abort()
        if self._groups.get(joined.peer) is joined:
            del self._groups[joined.peer]
