"""Blocks copied straight out of a peer's cache on a GPU of this host, device to device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from disagg.errors import KVLostError
from disagg.transfer.calls import answered
from disagg.transfer.connections import MAX_PEER_BLOCKS, Reached
from disagg.transfer.copying import runs
from disagg.transfer.cuda_memory import Driver, ExportedCache, PeerCache
from disagg.transfer.readers import Metadata
from disagg.transfer.segment import Blocks
from disagg.transfer.threads import to_its_end
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2

# Copied without looking up, and the size of the buffer where blocks lie apart.
PIECE_BYTES = 64 * 1024 * 1024
# A copy of its own for each stretch of neighbours, up to so many of them; more go by index.
MAX_STRETCHES = 16


def exported_to_proto(exported: ExportedCache) -> worker_pb2.CudaSegment:
    return worker_pb2.CudaSegment(
        handle=exported.handle,
        offset=exported.offset,
        num_bytes=exported.num_bytes,
        device_uuid=exported.device_uuid,
    )


def exported_from_proto(message: worker_pb2.CudaSegment) -> ExportedCache:
    return ExportedCache(message.handle, message.offset, message.num_bytes, message.device_uuid)


class CudaIpcReader:
    """One peer's blocks, whose cache is opened once. Raises KVLostError where it can't be."""

    transport = "cuda_ipc"

    def __init__(
        self, reached: Reached, metadata: Metadata, executor: Executor, block_bytes: int, driver: Driver
    ) -> None:
        num_blocks = reached.response.num_blocks
        if not 0 < num_blocks < MAX_PEER_BLOCKS:
            raise KVLostError(f"the peer says that it has {num_blocks} blocks")
        self._stub = reached.stub
        self._metadata = metadata
        self._executor = executor
        # The canary's row is one more.
        exported = exported_from_proto(reached.response.cuda)
        self._cache: PeerCache | None = PeerCache(exported, num_blocks + 1, block_bytes, driver)
        self._num_rows = num_blocks + 1
        self._copying: set[asyncio.Future[None]] = set()

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
        rows = list(source_rows) or await self._locate(handle, first_block)
        if len(rows) != len(target_rows) or not all(0 <= row < self._num_rows for row in rows):
            raise KVLostError("the peer located other blocks than the handle covers")
        if self._cache is None:
            raise KVLostError("the peer left while its KV was wanted")
        stop = threading.Event()
        copying = asyncio.get_running_loop().run_in_executor(
            self._executor, copy_blocks, self._cache.rows, rows, target, list(target_rows), stop
        )
        self._copying.add(copying)
        copying.add_done_callback(self._copying.discard)
        await to_its_end(copying, stop.set)

    async def close(self) -> None:
        """Unmap the peer's memory, once no copy runs: while it is mapped, a GPU does not get it back."""
        cache, self._cache = self._cache, None
        if self._copying:
            await asyncio.wait(set(self._copying))
        if cache is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, cache.close)

    async def _locate(self, handle: KVHandle, first_block: int) -> list[int]:
        request = worker_pb2.LocateRequest(handle=handle_to_proto(handle), first_block=first_block)
        response = await answered(self._stub.Locate(request, metadata=self._metadata))
        return list(response.block_ids)


def copy_blocks(
    source: Tensor, source_rows: Sequence[int], target: Any, target_rows: Sequence[int], stop: threading.Event
) -> None:
    """Copy rows until told to stop; return when the device has done it.

    source: uint8 [n, block_bytes]. target: a tensor or array of the same form, on any device.
    """
    into = torch.as_tensor(target)
    piece = max(1, PIECE_BYTES // source.shape[1])
    stretches = list(runs(source_rows, target_rows, piece))
    if len(stretches) <= MAX_STRETCHES or source.device != into.device:
        for start, end in stretches:
            if stop.is_set():
                break
            count = end - start
            first, to = source_rows[start], target_rows[start]
            into[to : to + count].copy_(source[first : first + count], non_blocking=True)
    else:
        for start in range(0, len(source_rows), piece):
            if stop.is_set():
                break
            here, there = (
                torch.tensor(rows[start : start + piece], dtype=torch.int64, device=source.device)
                for rows in (target_rows, source_rows)
            )
            into.index_copy_(0, here, source.index_select(0, there))
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()
