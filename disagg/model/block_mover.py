"""Copies KV blocks between a device's cache and rows of host memory, for transports that read host memory.

    cache ── gather ──► device buffer ── one copy per run of rows ──► rows        to_host
    cache ◄─ scatter ── device buffer ◄─ one copy per run of rows ─── rows        to_device

The copies go on a stream of their own beside the steps. They need not wait for those: the host publishes
blocks after it has read the tokens of the step that filled them, and a sequence that receives blocks runs
only after they have come.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disagg.model.host_memory import upload
from disagg.model.shard import Span

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.uint8]

# The device buffer: large enough for the bus's full rate, small beside a cache.
BUFFER_BYTES = 64 * 1024 * 1024


class BlockMover:
    """Moves blocks of one cache. Calls take turns, on any thread; they return when the copy is done.

    blocks: the cache, [num_blocks, ...], contiguous, in any dtype. heads: which heads of whole blocks
    [num_layers, 2, heads.total, ...] these are, None for all. Rows hold whole blocks; of a part of the heads
    it is the host that puts its pieces in their places, since a bus wants long runs.
    """

    def __init__(self, blocks: Tensor, heads: Span | None = None, buffer_bytes: int = BUFFER_BYTES) -> None:
        # Words of 8 bytes where a block's size allows: bytes are gathered at a fraction of the rate.
        flat = blocks.view(len(blocks), -1).view(torch.uint8)
        self._bytes = flat.shape[1]
        self._word = torch.int64 if self._bytes % 8 == 0 else torch.uint8
        self._cache = flat.view(self._word)
        self._capacity = max(1, buffer_bytes // self._bytes)
        self._buffer = torch.empty((self._capacity, self._bytes), dtype=torch.uint8, device=blocks.device)
        self._part: _Part | None = None
        if heads is not None and heads.length != heads.total:
            pieces = blocks.shape[1] * blocks.shape[2]
            self._part = _Part(heads.times(self._bytes // pieces // heads.length), pieces)
            self._pieces = torch.empty(
                self._buffer.shape, dtype=torch.uint8, pin_memory=blocks.device.type == "cuda"
            )
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if blocks.is_cuda:
            self._stream = torch.cuda.Stream(blocks.device)  # type: ignore[no-untyped-call]
            # The buffer's memory may be in use by what was launched before.
            self._stream.wait_stream(torch.cuda.current_stream(blocks.device))

    def to_host(self, block_ids: Sequence[int], target: Rows, rows: Sequence[int]) -> None:
        """Copy block block_ids[i] to row rows[i] of `target`, uint8 [n, block_bytes]."""
        with self._copying():
            for start in range(0, len(block_ids), self._capacity):
                part = slice(start, start + self._capacity)
                ids = self._index(block_ids[part])
                torch.index_select(self._cache, 0, ids, out=self._words(len(ids)))
                self._to_rows(target, rows[part])

    def to_device(self, source: Rows, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Copy row rows[i] of `source`, uint8 [n, block_bytes], to block block_ids[i]; distinct blocks."""
        with self._copying():
            for start in range(0, len(block_ids), self._capacity):
                part = slice(start, start + self._capacity)
                ids = self._index(block_ids[part])
                self._from_rows(source, rows[part])
                self._cache.index_copy_(0, ids, self._words(len(ids)))

    def _to_rows(self, target: Rows, rows: Sequence[int]) -> None:
        if self._part is None:
            for first, count, host in _runs(target, rows):
                host.copy_(self._buffer[first : first + count], non_blocking=True)
            return
        self._pieces[: len(rows)].copy_(self._buffer[: len(rows)], non_blocking=True)
        self._wait()
        for first, count, host in _runs(target, rows):
            own = self._part.of(host)
            own.copy_(self._pieces[first : first + count].view(own.shape))

    def _from_rows(self, source: Rows, rows: Sequence[int]) -> None:
        if self._part is None:
            for first, count, host in _runs(source, rows):
                self._buffer[first : first + count].copy_(host, non_blocking=True)
            return
        # What was launched for the rows before still reads the pieces.
        self._wait()
        for first, count, host in _runs(source, rows):
            own = self._part.of(host)
            self._pieces[first : first + count].view(own.shape).copy_(own)
        self._buffer[: len(rows)].copy_(self._pieces[: len(rows)], non_blocking=True)

    def _words(self, count: int) -> Tensor:
        return self._buffer[:count].view(self._word)

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        return upload([np.asarray(block_ids, dtype=np.int64)], self._buffer.device)[0]

    @contextmanager
    def _copying(self) -> Iterator[None]:
        with self._lock, torch.inference_mode():
            if self._stream is None:
                yield
                return
            with torch.cuda.device(self._buffer.device), torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    # Also after an error: what was launched still uses the caller's rows.
                    self._wait()

    def _wait(self) -> None:
        """Wait for what was launched. Blocking: the thread sleeps meanwhile."""
        if self._stream is not None:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
            done.synchronize()


@dataclass(frozen=True, slots=True)
class _Part:
    """Some heads' bytes in each layer's keys and values. pieces: of a block, two a layer."""

    span: Span
    pieces: int

    def of(self, rows: Tensor) -> Tensor:
        """Return the view [n, pieces, span.length] of whole blocks [n, block_bytes]."""
        return rows.view(len(rows), self.pieces, self.span.total)[:, :, self.span.start : self.span.end]


def _runs(memory: Rows, rows: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (position, count, view of `memory`) of each stretch of neighbouring rows."""
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            yield start, index - start, torch.from_numpy(memory[rows[start] : rows[index - 1] + 1])
            start = index


def pin(memory: Rows, device: torch.device) -> bool:
    """Page-lock host memory for fast copies to and from a GPU; return whether that was possible.

    Without it the same copies work, at a fraction of the rate.
    """
    if device.type != "cuda":
        return False
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
    if int(status) == 0:
        return True
    log.warning("%d bytes of host memory can't be pinned (CUDA error %d)", memory.nbytes, int(status))
    with contextlib.suppress(RuntimeError):
        # The runtime keeps the error for whoever asks next, which would be some innocent launch.
        torch.zeros(1, device=device)
    return False
