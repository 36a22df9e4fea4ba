"""BlockMover: what goes to the host and comes back is what was in the cache, whatever the pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from disagg.model.block_mover import BlockMover, pin
from disagg.model.shard import Span

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache(num_blocks: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    size = (num_blocks, *shape)
    return torch.randint(0, 100, size, generator=torch.manual_seed(0)).to(DEVICE).to(dtype)


def as_rows(blocks: torch.Tensor) -> np.ndarray:
    return blocks.cpu().view(len(blocks), -1).view(torch.uint8).numpy()


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 4), torch.float32),
        ((2, 2, 3), torch.bfloat16),
        ((1, 3), torch.uint8),
        ((5,), torch.float8_e4m3fn),
    ],
)
def test_blocks_travel_through_any_rows_in_any_pieces(shape, dtype, pieces):
    blocks = cache(9, *shape, dtype=dtype)
    before = as_rows(blocks)
    block_bytes = before.shape[1]
    mover = BlockMover(blocks, buffer_bytes=pieces * block_bytes)
    host = np.zeros((8, block_bytes), np.uint8)
    mover.to_host([7, 1, 2, 8, 0], host, [3, 4, 0, 6, 7])
    np.testing.assert_array_equal(host[[3, 4, 0, 6, 7]], before[[7, 1, 2, 8, 0]])
    assert not host[[1, 2, 5]].any()

    other = torch.zeros_like(blocks)
    BlockMover(other, buffer_bytes=pieces * block_bytes).to_device(host, [4, 3, 0], [5, 0, 6])
    after = as_rows(other)
    np.testing.assert_array_equal(after[[5, 0, 6]], before[[1, 7, 2]])
    assert not after[[1, 2, 3, 4, 7, 8]].any()


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize("spans", [[(0, 1), (1, 1), (2, 1)], [(0, 2), (2, 1)], [(0, 3)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_ranks_put_their_heads_side_by_side(spans, dtype, pieces):
    """Blocks [layers, 2, heads, tokens, dim] cut by heads fill rows as a whole cache's would, and back."""
    whole = cache(9, 2, 2, 3, 5, 3, dtype=dtype)
    block_bytes = as_rows(whole).shape[1]
    expected, host = (np.zeros((8, block_bytes), np.uint8) for _ in range(2))
    ids, rows = [7, 1, 2, 8, 0], [3, 4, 0, 6, 7]
    BlockMover(whole).to_host(ids, expected, rows)
    for start, length in spans:
        own = whole[:, :, :, start : start + length].contiguous()
        heads = Span(start, length, 3)
        BlockMover(own, heads, buffer_bytes=pieces * block_bytes).to_host(ids, host, rows)
        other = torch.zeros_like(own)
        BlockMover(other, heads, buffer_bytes=pieces * block_bytes).to_device(expected, rows, ids)
        assert torch.equal(other[ids], own[ids])
        assert not other[[3, 4, 5, 6]].any()
    np.testing.assert_array_equal(host, expected)


def test_nothing_moves_for_no_blocks():
    blocks = cache(3, 4, dtype=torch.float32)
    before = blocks.clone()
    mover, host = BlockMover(blocks), np.zeros((2, 16), np.uint8)
    mover.to_host([], host, [])
    mover.to_device(host, [], [])
    assert not host.any() and torch.equal(blocks, before)


def test_host_memory_is_pinned_for_gpus_alone():
    assert not pin(np.zeros((2, 4096), np.uint8), torch.device("cpu"))
