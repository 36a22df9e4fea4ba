"""The ladder of graphs, and decode steps over their buffers, with a computation in place of a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from disagg.model.decode_graphs import DecodeGraphs, DecodeInputs, GraphLadder, ladder, rerun
from disagg.model.step import StepInput


def test_the_ladder():
    assert ladder(1) == [1]
    assert ladder(3) == [1, 2, 3]
    assert ladder(8) == [1, 2, 4, 8]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    assert ladder(64) == [1, 2, 4, *range(8, 65, 8)]


def test_captured_from_the_largest_down_and_the_next_larger_is_taken():
    captured, replayed = [], []

    def capture(size: int):
        captured.append(size)
        return lambda: replayed.append(size)

    graphs = GraphLadder(20, capture)
    assert captured == [20, 16, 8, 4, 2, 1]
    for count in range(1, 21):
        size = graphs.size_for(count)
        assert size >= count and not any(count <= other < size for other in graphs.sizes)
    graphs.replay(8)
    assert replayed == [8]
    for count in (0, 21):
        with pytest.raises(ValueError, match="no graph"):
            graphs.size_for(count)


def decodes(contexts: list[int], block_size: int, first_token: int = 10) -> StepInput:
    """A step of one token each; sequence i has blocks 100 * (i + 1), 100 * (i + 1) + 1, ..."""
    counts = [-(-length // block_size) for length in contexts]
    tables = [100 * (i + 1) + j for i, count in enumerate(counts) for j in range(count)]
    return StepInput(
        token_ids=np.arange(first_token, first_token + len(contexts)),
        positions=np.array(contexts) - 1,
        query_start=np.arange(len(contexts) + 1, dtype=np.int32),
        block_tables=np.array(tables, dtype=np.int64),
        table_start=np.concatenate([[0], np.cumsum(counts)]),
        sample_rows=np.arange(len(contexts)),
    )


class Recorder:
    """Computes hidden states that name the rows they were computed from, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[DecodeInputs] = []

    def __call__(self, inputs: DecodeInputs) -> torch.Tensor:
        self.given.append(inputs)
        return torch.stack([inputs.token_ids, inputs.context_lens], dim=1).float()


def test_rows_that_fill_a_batch_up_store_and_attend_to_nothing():
    compute = Recorder()
    graphs = DecodeGraphs(compute, rerun, largest=8, width=4, block_size=4, hidden=torch.zeros(8, 2))
    hidden = graphs.replay(decodes([5, 16, 1, 9, 2], 4))
    assert hidden.tolist() == [[10, 5], [11, 16], [12, 1], [13, 9], [14, 2]]
    given = compute.given[-1]
    own = [101 * 4, 203 * 4 + 3, 300 * 4, 402 * 4, 500 * 4 + 1]
    assert given.slots.tolist() == [*own, -1, -1, -1]
    assert given.context_lens.tolist() == [5, 16, 1, 9, 2, 0, 0, 0]
    assert given.positions.tolist() == [4, 15, 0, 8, 1, 0, 0, 0]
    assert given.tables[1].tolist() == [200, 201, 202, 203]
    assert given.tables[:, 0].tolist() == [100, 200, 300, 400, 500, 0, 0, 0], "the null block"
    # Fewer rows than before: what they leave behind is neither stored nor attended to.
    assert graphs.replay(decodes([3, 7, 8], 4)).shape == (3, 2)
    given = compute.given[-1]
    assert len(given.slots) == 4
    assert given.slots[3] == -1 and given.context_lens[3] == 0 and given.token_ids[3] == 0
    assert given.tables[1, :2].tolist() == [200, 201]


def test_only_steps_of_decodes_are_held():
    graphs = DecodeGraphs(Recorder(), rerun, largest=4, width=4, block_size=4, hidden=torch.zeros(4, 2))
    assert graphs.hold(decodes([5, 6], 4))
    assert not graphs.hold(decodes([1] * 5, 4)), "more rows than the largest graph"
    step = decodes([5], 4)
    chunk = StepInput(
        token_ids=np.arange(3),
        positions=np.arange(3),
        query_start=np.array([0, 3], dtype=np.int32),
        block_tables=step.block_tables,
        table_start=step.table_start,
        sample_rows=np.array([2]),
    )
    assert not graphs.hold(chunk)
