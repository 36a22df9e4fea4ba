"""CUDA graphs of decode steps: a decode step is some four hundred launches, whose host time a replay saves.

    StepInput ──one copy──► inputs of the next larger graph ──replay──► hidden states [B, hidden_size]

Graphs are captured for a ladder of batch sizes over the same input and output buffers. Rows that fill a
batch up point at the null block, store nothing (slot -1) and attend to nothing (context 0).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disagg.model.host_memory import upload
from disagg.model.step import Int64, StepInput

# Batches up to 8 have a graph each power of two; from there each multiple of 8, where padding costs less
# than a tenth of a step.
GRAPH_STEP = 8

Replay = Callable[[], None]
Compute = Callable[[], None]
Capture = Callable[[Compute], Replay]


def ladder(largest: int) -> list[int]:
    """Return the batch sizes that have a graph, ascending: 1, 2, 4, 8, then every multiple of GRAPH_STEP."""
    sizes = {size for size in (1, 2, 4) if size < largest} | {largest}
    return sorted(sizes | set(range(GRAPH_STEP, largest, GRAPH_STEP)))


class GraphLadder:
    """One graph for each batch size of the ladder. capture: makes the graph of a size.

    Captured from the largest down: the smaller ones then fit into the memory of the first.
    """

    def __init__(self, largest: int, capture: Callable[[int], Replay]) -> None:
        self.sizes = ladder(largest)
        self._replays = {size: capture(size) for size in reversed(self.sizes)}

    def size_for(self, count: int) -> int:
        """Return the smallest size that holds `count` rows. Raises ValueError where there is none."""
        if not 1 <= count <= self.sizes[-1]:
            raise ValueError(f"no graph holds {count} rows; sizes are {self.sizes}")
        return self.sizes[bisect_left(self.sizes, count)]

    def replay(self, size: int) -> None:
        """Run the graph of one of `sizes`."""
        self._replays[size]()


class CudaCapture:
    """Captures computations as CUDA graphs that share one pool of memory: no two run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Compute) -> Replay:
        # Compiles the kernels and lets libraries take their workspaces, which a capture must not.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile (NCCL's watchdog asks for events) is no part of it and no error.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        self._pool = graph.pool()
        return graph.replay


def rerun(compute: Compute) -> Replay:
    """Stands in for a capture where there is no GPU: computes anew over the same buffers."""
    return compute


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Buffers of a graph of B rows. token_ids, positions, slots, context_lens: [B]; tables: [B, n]."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    tables: Tensor


class DecodeGraphs:
    """Graphs over the buffers of one cache.

    compute: returns the hidden states [B, hidden_size] of inputs; what it launches is captured. width: blocks
    of the longest sequence. largest: rows of the largest graph.
    """

    def __init__(
        self,
        compute: Callable[[DecodeInputs], Tensor],
        capture: Capture,
        *,
        largest: int,
        width: int,
        block_size: int,
        hidden: Tensor,
    ) -> None:
        self._compute = compute
        self._capture = capture
        self._block_size = block_size
        self._largest = largest
        self._hidden = hidden
        device = hidden.device
        self._head = torch.zeros(4 * largest, dtype=torch.int64, device=device)
        self._tables = torch.zeros(largest, width, dtype=torch.int64, device=device)
        self._head.view(4, largest)[2].fill_(-1)
        self._ladder = GraphLadder(largest, self._capture_size)

    def _capture_size(self, size: int) -> Replay:
        head = self._head[: 4 * size].view(4, size)
        inputs = DecodeInputs(head[0], head[1], head[2], head[3], self._tables[:size])

        def compute() -> None:
            self._hidden[:size].copy_(self._compute(inputs))

        # What an earlier, larger size left here are no slots of this one.
        head.zero_()
        head[2].fill_(-1)
        return self._capture(compute)

    def hold(self, step: StepInput) -> bool:
        """Whether the step is one of decodes alone, and not too many."""
        count = step.num_chunks
        return count == len(step.token_ids) == len(step.sample_rows) and count <= self._largest

    def replay(self, step: StepInput) -> Tensor:
        """Return hidden states [B, hidden_size]; the next replay overwrites them."""
        count = step.num_chunks
        size = self._ladder.size_for(count)
        head = np.zeros((4, size), dtype=np.int64)
        head[2, count:] = -1
        head[:, :count] = decode_columns(step, self._block_size)
        tables = padded_tables(step, int(np.diff(step.table_start).max()))
        columns, rows = upload([head, tables], self._head.device)
        self._head[: head.size].copy_(columns)
        # Beyond a row's own blocks nothing is read, so that what is left of earlier steps may stay.
        self._tables[:count, : tables.shape[1]].copy_(rows.view(tables.shape))
        self._ladder.replay(size)
        return self._hidden[:count]


def decode_columns(step: StepInput, block_size: int) -> Int64:
    """Return [4, B]: token id, position, slot and context length of each decode of a step."""
    slots = step.block_ids(block_size) * block_size + step.positions % block_size
    return np.stack([step.token_ids, step.positions, slots, step.positions + 1])


def padded_tables(step: StepInput, width: int) -> Int64:
    """Return the block tables as [B, width], filled up with the null block."""
    tables = np.zeros((step.num_chunks, width), dtype=np.int64)
    tables[np.arange(width) < np.diff(step.table_start)[:, None]] = step.block_tables
    return tables
