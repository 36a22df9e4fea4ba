"""StepInput: one engine step as flat arrays, the form in which every backend takes it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from disagg.engine.runner import ScheduledSequence

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence in this step: rows first_row .. first_row + num_tokens of the flat batch.

    context: tokens already in the cache before them. block_table: covers context + num_tokens.
    """

    first_row: int
    num_tokens: int
    context: int
    block_table: Int64


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's T tokens in B chunks, those of all sequences after one another.

    token_ids, positions: [T]. query_start: [B + 1], chunk b has rows query_start[b] .. query_start[b + 1].
    block_tables: all block tables after one another, chunk b's from table_start[b] to table_start[b + 1].
    sample_rows: [S], the rows whose logits are asked for.
    """

    token_ids: Int64
    positions: Int64
    query_start: Int32
    block_tables: Int64
    table_start: Int64
    sample_rows: Int64

    @property
    def num_chunks(self) -> int:
        return len(self.query_start) - 1

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks one by one."""
        starts, tables = self.query_start.tolist(), self.table_start.tolist()
        for b in range(self.num_chunks):
            table = self.block_tables[tables[b] : tables[b + 1]]
            yield Chunk(starts[b], starts[b + 1] - starts[b], int(self.positions[starts[b]]), table)

    def block_ids(self, block_size: int) -> Int64:
        """Return the block [T] that each token's KV goes to."""
        lengths = np.diff(self.query_start)
        first = np.repeat(self.table_start[:-1], lengths)
        ids: Int64 = self.block_tables[first + self.positions // block_size]
        return ids


def step_input(items: Sequence[ScheduledSequence]) -> StepInput:
    """Flatten a batch. Work in Python is per sequence; tokens and blocks are copied as slices."""
    token_ids, positions, tables = array("q"), array("q"), array("q")
    query_start, table_start, sample_rows = [0], [0], []
    for item in items:
        seq, start = item.seq, item.seq.num_computed_tokens
        end = start + item.num_tokens
        if item.num_tokens == 1:
            token_ids.append(seq.token_ids[start])
            positions.append(start)
        else:
            token_ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
        tables.extend(seq.block_table)
        query_start.append(len(token_ids))
        table_start.append(len(tables))
        if item.samples:
            sample_rows.append(len(token_ids) - 1)
    return StepInput(
        token_ids=np.frombuffer(token_ids, dtype=np.int64),
        positions=np.frombuffer(positions, dtype=np.int64),
        query_start=np.array(query_start, dtype=np.int32),
        block_tables=np.frombuffer(tables, dtype=np.int64),
        table_start=np.array(table_start, dtype=np.int64),
        sample_rows=np.array(sample_rows, dtype=np.int64),
    )
