"""Gathering and scattering whole KV blocks, byte for byte."""

from __future__ import annotations

import pytest
import torch
from kernels_support import DEVICE, FP8

from disagg.model.kernels import reference
from disagg.model.kernels.block_copy import gather_blocks, scatter_blocks


def random_bytes(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


# Bytes a block: odd, halves, words, more than one program's share, and just beside it.
@pytest.mark.parametrize("block_bytes", [1, 30, 100, 4096, 5000, 32768, 32776, 100_000])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_and_scatter(block_bytes: int, index_dtype: torch.dtype) -> None:
    blocks = random_bytes(9, block_bytes, seed=1)
    ids = torch.tensor([7, 0, 3, 8, 3], dtype=index_dtype, device=DEVICE)
    staging = torch.zeros(len(ids) + 1, block_bytes, dtype=torch.uint8, device=DEVICE)
    gather_blocks(blocks, ids, staging)
    assert torch.equal(staging[:-1], reference.gather_blocks(blocks, ids))
    assert not staging[-1].any(), "wrote past what was asked for"

    target, expected = random_bytes(9, block_bytes, seed=2), random_bytes(9, block_bytes, seed=2)
    new = random_bytes(4, block_bytes, seed=3)
    scatter_blocks(new, target, ids[:4])
    reference.scatter_blocks(new, expected, ids[:4])
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_blocks_of_a_cache_survive_the_trip(dtype: torch.dtype) -> None:
    shape = (6, 3, 2, 2, 16, 80)
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).to(dtype)
    ids = torch.tensor([5, 1, 2], device=DEVICE)
    staging = torch.empty(3, *shape[1:], dtype=dtype, device=DEVICE)
    gather_blocks(blocks, ids, staging)
    other = torch.zeros(shape, device=DEVICE).to(dtype)
    scatter_blocks(staging, other, torch.tensor([0, 4, 3], device=DEVICE))
    sent, arrived = blocks.view(torch.uint8)[[5, 1, 2]], other.view(torch.uint8)[[0, 4, 3]]
    assert torch.equal(sent, arrived)
    assert not other.view(torch.uint8)[[1, 2, 5]].any()


def test_ids_outside_the_cache_are_skipped() -> None:
    blocks, staging = random_bytes(4, 64, seed=1), random_bytes(3, 64, seed=2)
    before = staging.clone()
    ids = torch.tensor([-1, 2, 4], device=DEVICE)
    gather_blocks(blocks, ids, staging)
    assert torch.equal(staging[1], blocks[2])
    assert torch.equal(staging[[0, 2]], before[[0, 2]])
    untouched = blocks.clone()
    scatter_blocks(before, blocks, ids)
    assert torch.equal(blocks[2], before[1])
    assert torch.equal(blocks[[0, 1, 3]], untouched[[0, 1, 3]])


def test_unaligned_buffers() -> None:
    storage = random_bytes(3 * 64 + 1, seed=5)
    blocks = storage[1:].view(3, 64)
    staging = torch.empty(1, 64, dtype=torch.uint8, device=DEVICE)
    gather_blocks(blocks, torch.tensor([2], device=DEVICE), staging)
    assert torch.equal(staging[0], blocks[2])
