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
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from disagg.errors import KVLostError
from disagg.transfer.client import KVTransferClient, PullResult
from disagg.transfer.connections import Peer
from disagg.transfer.segment import Blocks, SharedSegment
from disagg.transfer.server import KVTransferService
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


def staging_blocks(staging_memory: int, block_bytes: int, num_blocks: int) -> int:
    """Return the rows of a segment through which blocks of a cache of `num_blocks` pass; at least two."""
    return max(2, min(staging_memory // block_bytes, 2 * num_blocks))


class StagingRows:
    """Rows of a segment, lent out lowest first so that neighbours stay together. Lives on one event loop."""

    def __init__(self, rows: range) -> None:
        self.capacity = len(rows)
        self._free = sorted(rows, reverse=True)
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Return rows if so many are free and nobody waits for some, else None."""
        if self._waiting or count > len(self._free):
            return None
        return self._pop(count)

    async def wait_for(self, count: int) -> list[int]:
        """Return rows once so many are free, in the order of asking. KVLostError if there never are."""
        if count > self.capacity:
            raise KVLostError(f"{count} blocks of KV don't fit into staging memory for {self.capacity}")
        rows = self.take(count)
        if rows is not None:
            return rows
        turn: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(turn.result())
            else:
                self._waiting.remove((count, turn))
                self._serve()
            raise

    def give_back(self, rows: Sequence[int]) -> None:
        self._free = sorted([*self._free, *rows], reverse=True)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= len(self._free):
            count, turn = self._waiting.popleft()
            turn.set_result(self._pop(count))

    def _pop(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]


def halves(num_blocks: int) -> tuple[StagingRows, StagingRows]:
    """Return the rows of a segment for published and for pulled blocks."""
    middle = num_blocks // 2
    return StagingRows(range(middle)), StagingRows(range(middle, num_blocks))


class StagedPublisher:
    """A KVTransferService's owner side for a cache on a device. Its on_released must call `released`.

    Blocks are copied out once all of a request's are computed, beside the engine's steps; until then peers
    are told of none, so nobody pulls early from a device.
    """

    def __init__(
        self, service: KVTransferService, segment: SharedSegment, mover: BlockMover, rows: StagingRows
    ) -> None:
        self._service = service
        self._segment = segment
        self._mover = mover
        self._rows = rows
        self._staged: dict[str, list[int]] = {}
        self._copies: dict[str, asyncio.Task[None]] = {}
        # One: the bus is exhausted by one copy.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-from-device")

    @property
    def num_expired(self) -> int:
        return self._service.num_expired

    def open(self, request_id: str, key: bytes, num_tokens: int) -> KVHandle:
        return self._service.open(request_id, key, num_tokens)

    def progress(self, request_id: str, epoch: int, block_ids: Sequence[int], *, complete: bool) -> None:
        """Copy out what is complete, and let peers read the copies then.

        Without room the lease covers nothing: whoever pulls learns so at once, and ends it.
        """
        if not complete or request_id in self._staged:
            return
        # A request of the same name may have been here a moment ago, whose copy goes on.
        rows = None if request_id in self._copies else self._rows.take(len(block_ids))
        if rows is None:
            logger.warning("request %s: staging memory has no room for %d blocks", request_id, len(block_ids))
            self._service.progress(request_id, epoch, (), complete=True)
            return
        self._staged[request_id] = rows
        copy = asyncio.get_running_loop().create_task(self._copy(request_id, epoch, list(block_ids), rows))
        self._copies[request_id] = copy

    async def _copy(self, request_id: str, epoch: int, block_ids: list[int], rows: list[int]) -> None:
        copied: Sequence[int] = rows
        try:
            copying = asyncio.get_running_loop().run_in_executor(
                self._executor, self._mover.to_host, block_ids, self._segment.blocks, rows
            )
            await to_its_end(copying, lambda: None)
        except Exception:
            logger.exception("request %s: its KV could not be copied to host memory", request_id)
            copied = ()
        finally:
            del self._copies[request_id]
            if request_id not in self._staged:  # released meanwhile
                self._rows.give_back(rows)
        # Blocks that the engine took back, or a lease that ended, meanwhile: then this does nothing.
        self._service.progress(request_id, epoch, copied, complete=True)

    def withdraw(self, request_id: str) -> None:
        self._service.withdraw(request_id)

    def drop(self, request_id: str) -> None:
        self._service.drop(request_id)

    def released(self, request_id: str) -> None:
        """Take the rows of a lease that ended back, once nothing is copied into them any more."""
        rows = self._staged.pop(request_id, None)
        if rows is not None and request_id not in self._copies:
            self._rows.give_back(rows)

    async def close(self) -> None:
        """Wait for copies to their end."""
        await asyncio.gather(*self._copies.values(), return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)


class StagedPuller:
    """A KVTransferClient for a cache on a device. timeout_s: bound on the wait for room."""

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
        # One: the bus is exhausted by one copy.
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
        try:
            result = await self._client.pull(handle, first_block, rows)
            pulled = time.monotonic()
            copying = asyncio.get_running_loop().run_in_executor(
                self._executor, self._mover.to_device, self._segment.blocks, rows, list(local_block_ids)
            )
            await to_its_end(copying, lambda: None)
        finally:
            self._rows.give_back(rows)
        copied_s = time.monotonic() - pulled
        return replace(result, seconds=result.seconds + copied_s, exposed_s=result.exposed_s + copied_s)

    async def _room(self, handle: KVHandle, count: int) -> list[int]:
        try:
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
