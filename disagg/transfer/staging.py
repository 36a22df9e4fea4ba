"""Buffers between a cache, whose blocks lie anywhere, and a transport that moves one run of bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from disagg.transfer.agreement import Device
from disagg.transfer.checksum import blocks_checksum
from disagg.transfer.copying import copy_rows
from disagg.transfer.segment import Blocks


class Staging(Protocol):
    """Room for `capacity` blocks. The caches are uint8 [n, block_bytes], on the device of the buffer."""

    capacity: int

    def first(self, num_blocks: int) -> Tensor:
        """Return the first blocks of the buffer, uint8 [num_blocks, block_bytes]: a view."""
        ...

    def gather(self, cache: Any, rows: Sequence[int]) -> int:
        """Copy rows of a cache to the front; return their checksum. Returns when the copy is done."""
        ...

    def scatter(self, cache: Any, rows: Sequence[int], checksum: int | None, stop: threading.Event) -> bool:
        """Copy the front to rows of a cache unless told to stop before. False: these are not the blocks that
        have this checksum (None: any will do), and nothing was written. Returns when the copy is done.
        """
        ...


class HostStaging:
    """Staging for caches that are numpy arrays."""

    def __init__(self, capacity: int, block_bytes: int) -> None:
        self.capacity = capacity
        self._blocks: Blocks = np.empty((capacity, block_bytes), np.uint8)
        self._never = threading.Event()

    def first(self, num_blocks: int) -> Tensor:
        return torch.from_numpy(self._blocks[:num_blocks])

    def gather(self, cache: Blocks, rows: Sequence[int]) -> int:
        # For the checksum, and for who sends it.
        copy_rows(cache, rows, self._blocks, range(len(rows)), self._never, read_soon=True)
        return blocks_checksum([self._blocks[: len(rows)]])

    def scatter(
        self, cache: Blocks, rows: Sequence[int], checksum: int | None, stop: threading.Event
    ) -> bool:
        if checksum is not None and blocks_checksum([self._blocks[: len(rows)]]) != checksum:
            return False
        copy_rows(self._blocks, range(len(rows)), cache, rows, stop)
        return True


class DeviceStaging:
    """Staging for caches that are tensors on a GPU. Nothing is checked: what carries the bytes does that."""

    def __init__(self, capacity: int, block_bytes: int, device: torch.device) -> None:
        self.capacity = capacity
        self._blocks = torch.empty((capacity, block_bytes), dtype=torch.uint8, device=device)

    def first(self, num_blocks: int) -> Tensor:
        return self._blocks[:num_blocks]

    def gather(self, cache: Tensor, rows: Sequence[int]) -> int:
        torch.index_select(cache, 0, self._index(rows), out=self.first(len(rows)))
        self._finish()
        return 0

    def scatter(
        self, cache: Tensor, rows: Sequence[int], checksum: int | None, stop: threading.Event
    ) -> bool:
        if not stop.is_set():
            cache.index_copy_(0, self._index(rows), self.first(len(rows)))
            self._finish()
        return True

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._blocks.device)

    def _finish(self) -> None:
        if self._blocks.is_cuda:
            torch.cuda.current_stream(self._blocks.device).synchronize()


def make_staging(device: Device, capacity: int, block_bytes: int) -> Staging:
    if device == "cpu":
        return HostStaging(capacity, block_bytes)
    return DeviceStaging(capacity, block_bytes, torch.device("cuda"))
