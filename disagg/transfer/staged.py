"""Hand-off of KV that is on a GPU by transports that move host memory: shm and grpc.

    publish:  cache ──► rows of the owner's segment ──shm, grpc──► rows of the puller's ──► cache   :pull

A segment here is no cache but room through which blocks pass. Half of its rows are for published blocks, half
for pulled ones: a pull must not wait for leases that end only when other workers have pulled. What finds no
room is computed again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from disagg.errors import KVLostError
from disagg.transfer.client import KVTransferClient, PullResult
from disagg.transfer.connections import Peer
from disagg.transfer.segment import Blocks, SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.transfer.staging_rows import StagingRows
from disagg.transfer.threads import to_its_end
from disagg.types import KVHandle

logger = logging.getLogger(__name__)


class BlockMover(Protocol):
    """Copies between a cache on a device and rows of host memory, uint8 [n, block_bytes]; on any thread."""

    def to_host(self, block_ids: Sequence[int], target: Blocks, rows: Sequence[int]) -> None:
        """Copy block block_ids[i] to row rows[i]; return when that is done."""
        ...

    def to_device(self, source: Blocks, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copy row rows[i] to block block_ids[i]; return when that is done."""
        ...


@dataclass(slots=True)
class _Outgoing:
    """A request's rows, and what of it is to be in them. block_ids: computed in `epoch`, all there are if
    complete. has_news: the service has not been told of that yet. broken: a copy failed.
    """

    rows: list[int]
    epoch: int
    block_ids: Sequence[int]
    complete: bool
    num_copied: int = 0
    has_news: bool = True
    broken: bool = False


class StagedPublisher:
    """A KVTransferService's owner side for a cache on a device. Its on_released must call `released`.

    Blocks are copied out as their steps end, beside the steps that follow, where rows are plentiful; else
    once all of a request's are computed, so that room is held for no longer than the copies are wanted.
    """

    def __init__(
        self,
        service: KVTransferService,
        segment: SharedSegment,
        mover: BlockMover,
        rows: StagingRows,
        block_size: int,
    ) -> None:
        self._service = service
        self._segment = segment
        self._mover = mover
        self._rows = rows
        self._block_size = block_size
        self._sizes: dict[str, int] = {}
        self._staged: dict[str, _Outgoing] = {}
        self._copies: dict[str, asyncio.Task[None]] = {}
        # One: the bus is exhausted by one copy.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-from-device")

    @property
    def num_expired(self) -> int:
        return self._service.num_expired

    def open(self, request_id: str, key: bytes, num_tokens: int) -> KVHandle:
        handle = self._service.open(request_id, key, num_tokens)
        self._sizes[request_id] = -(-num_tokens // self._block_size)
        return handle

    def progress(self, request_id: str, epoch: int, block_ids: Sequence[int], *, complete: bool) -> None:
        """Copy out what is computed, and let peers read the copies then.

        Without room the lease covers nothing: whoever pulls learns so at once, and ends it.
        """
        staged = self._staged.get(request_id)
        if staged is not None:
            if epoch != staged.epoch:
                staged.epoch, staged.num_copied = epoch, 0
            staged.block_ids, staged.complete, staged.has_news = list(block_ids), complete, True
        elif (rows := self._room(request_id, complete=complete)) is not None:
            staged = self._staged[request_id] = _Outgoing(rows, epoch, list(block_ids), complete)
        elif complete:
            logger.warning("request %s: staging memory has no room for %d blocks", request_id, len(block_ids))
            self._service.progress(request_id, epoch, (), complete=True)
            return
        if staged is not None and request_id not in self._copies:
            copying = asyncio.get_running_loop().create_task(self._copy(request_id, staged))
            self._copies[request_id] = copying

    def _room(self, request_id: str, *, complete: bool) -> list[int] | None:
        if request_id in self._copies or request_id not in self._sizes:
            # A request of the same name was here a moment ago, and its copy goes on; or its lease has ended.
            return None
        size = self._sizes[request_id]
        return self._rows.take(size) if complete else self._rows.take_spare(size)

    async def _copy(self, request_id: str, staged: _Outgoing) -> None:
        """Copy what is computed and tell of it until there is no news."""
        try:
            while staged.has_news and self._staged.get(request_id) is staged:
                staged.has_news = False
                epoch, end, complete = staged.epoch, len(staged.block_ids), staged.complete
                await self._copy_out(request_id, staged)
                if staged.epoch == epoch:
                    staged.num_copied = end
                if complete or not staged.broken:
                    # A lease whose blocks the engine took back, or that ended, meanwhile knows better.
                    copied = () if staged.broken else staged.rows[:end]
                    self._service.progress(request_id, epoch, copied, complete=complete)
        finally:
            del self._copies[request_id]
            if self._staged.get(request_id) is not staged:  # released meanwhile
                self._rows.give_back(staged.rows)

    async def _copy_out(self, request_id: str, staged: _Outgoing) -> None:
        ids, rows = staged.block_ids[staged.num_copied :], staged.rows[staged.num_copied :]
        if not ids or staged.broken:
            return
        copying = asyncio.get_running_loop().run_in_executor(
            self._executor, self._mover.to_host, ids, self._segment.blocks, rows[: len(ids)]
        )
        try:
            await to_its_end(copying, lambda: None)
        except Exception:
            logger.exception("request %s: its KV could not be copied to host memory", request_id)
            staged.broken = True

    def withdraw(self, request_id: str) -> None:
        self._service.withdraw(request_id)

    def drop(self, request_id: str) -> None:
        self._service.drop(request_id)

    def released(self, request_id: str) -> None:
        """Take the rows of a lease that ended back, once nothing is copied into them any more."""
        self._sizes.pop(request_id, None)
        staged = self._staged.pop(request_id, None)
        if staged is not None and request_id not in self._copies:
            self._rows.give_back(staged.rows)

    async def close(self) -> None:
        """Wait for copies to their end."""
        await asyncio.gather(*self._copies.values(), return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)


class StagedPuller:
    """A KVTransferClient for a cache on a device. timeout_s: bound on the wait for room.

    Pulls as blocks are computed where rows are plentiful, and brings each lot to the device while the next
    is on its way; else once all are computed.
    """

    def __init__(
        self,
        client: KVTransferClient,
        segment: SharedSegment,
        mover: BlockMover,
        rows: StagingRows,
        timeout_s: float,
    ) -> None:
        self._client = client
        self._segment = segment
        self._mover = mover
        self._rows = rows
        self._timeout_s = timeout_s
        # One, so that what is read a second time also comes second, and the bus is exhausted by one copy.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-to-device")

    def keep_alive(self, handle: KVHandle) -> None:
        self._client.keep_alive(handle)

    def leave(self, handle: KVHandle) -> None:
        self._client.leave(handle)

    async def started(self, handle: KVHandle) -> None:
        await self._client.started(handle)

    async def probe(self, worker_id: str) -> str:
        return await self._client.probe(worker_id)

    def retain(self, alive: Collection[Peer]) -> None:
        self._client.retain(alive)

    async def pull(self, handle: KVHandle, first_block: int, local_block_ids: Sequence[int]) -> PullResult:
        """Pull into host memory and copy from there to the device; else as KVTransferClient.pull."""
        rows = await self._room(handle, len(local_block_ids))
        incoming = _Incoming(self._executor, self._mover, self._segment.blocks, rows, list(local_block_ids))
        try:
            try:
                result = await self._client.pull(handle, first_block, rows, incoming.copy)
                pulled = time.monotonic()
            finally:
                # Also after a failure: nobody may write to the blocks, or read the rows, from then on.
                await incoming.settle()
        finally:
            self._rows.give_back(rows)
        incoming.check()
        exposed_s = time.monotonic() - pulled
        return replace(
            result, seconds=result.seconds + incoming.seconds, exposed_s=result.exposed_s + exposed_s
        )

    async def _room(self, handle: KVHandle, count: int) -> list[int]:
        rows = self._rows.take_spare(count)
        if rows is not None:
            return rows
        try:
            if count <= self._rows.capacity:
                await self._client.completed(handle)
            async with asyncio.timeout(self._timeout_s):
                return await self._rows.wait_for(count)
        except BaseException as error:
            self._client.leave(handle)
            if isinstance(error, TimeoutError):
                raise KVLostError(f"no room in staging memory within {self._timeout_s:g} s") from None
            raise

    async def close(self) -> None:
        await self._client.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Incoming:
    """Copies of one pull to the device. seconds: that they took."""

    def __init__(
        self, executor: Executor, mover: BlockMover, memory: Blocks, rows: list[int], block_ids: list[int]
    ) -> None:
        self._executor = executor
        self._mover = mover
        self._memory = memory
        self._rows = rows
        self._block_ids = block_ids
        self._copies: list[asyncio.Future[None]] = []
        self.seconds = 0.0

    def copy(self, start: int, count: int) -> None:
        """Begin to copy rows start .. start + count to their blocks, after those before."""
        self._copies.append(
            asyncio.get_running_loop().run_in_executor(self._executor, self._to_device, start, start + count)
        )

    def _to_device(self, start: int, end: int) -> None:
        began = time.monotonic()
        self._mover.to_device(self._memory, self._rows[start:end], self._block_ids[start:end])
        self.seconds += time.monotonic() - began

    async def settle(self) -> None:
        """Return when all have ended, whether they failed or not."""
        await to_its_end(asyncio.gather(*self._copies, return_exceptions=True), lambda: None)

    def check(self) -> None:
        """Raise what one of them raised."""
        for copying in self._copies:
            copying.result()
