"""Prefill attention against float64 gather and softmax, over odd chunks on top of odd contexts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kernels_support import DEVICE, FP8, PagedBatch, assert_close

from disagg.model.kernels import reference
from disagg.model.kernels.prefill_attention import prefill_attention


def check(
    chunks: list[tuple[int, int]],
    *,
    group: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    window: int | None = None,
    seed: int = 0,
    max_query_len: int | None = None,
) -> None:
    """chunks: per sequence, its query tokens and the tokens cached before them."""
    k_scale, v_scale = (0.07, 0.11) if fp8 else (1.0, 1.0)
    lengths = [length for length, _ in chunks]
    batch = PagedBatch(
        [sum(chunk) for chunk in chunks],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=FP8 if fp8 else dtype,
        scale=0.09,
        seed=seed,
    )
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE)
    num_heads, num_tokens, extra = group * num_kv_heads, sum(lengths), 3
    qkv = batch.randn(num_tokens + extra, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    q = qkv[:, :num_heads]
    arguments: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "window": window,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    out = torch.full((num_tokens + extra, num_heads, head_dim), 7.0, dtype=dtype, device=DEVICE)
    out[:num_tokens] = torch.nan
    prefill_attention(
        q,
        batch.kv,
        batch.block_tables,
        starts,
        batch.context_lens,
        max_query_len=max_query_len or max(lengths),
        out=out,
        **arguments,
    )
    assert (out[num_tokens:] == 7.0).all(), "rows past the last chunk were written"
    expected = reference.prefill_attention(
        q,
        batch.kv,
        batch.block_tables,
        starts,
        batch.context_lens,
        **arguments,
    )
    assert_close(out[:num_tokens], expected[:num_tokens])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    check([(19, 30), (1, 0)], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_query_heads_per_kv_head(group: int) -> None:
    check([(23, 11), (5, 40)], group=group, num_kv_heads=3)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_block_sizes_and_ragged_chunks(block_size: int) -> None:
    check(
        [(1, 0), (block_size, 0), (block_size + 1, block_size - 1), (3, 2 * block_size)],
        block_size=block_size,
    )


@pytest.mark.parametrize("window", [1, 7, 16, 65, 1000])
def test_sliding_window(window: int) -> None:
    check([(40, 0), (33, 90), (1, 50)], window=window)


def test_decodes_and_chunks_in_one_batch() -> None:
    check([(1, 99), (70, 0), (1, 0), (1, 17), (130, 33), (1, 64)], group=4)


@pytest.mark.parametrize("max_query_len", [40, 4096])
def test_the_bound_on_chunks_only_chooses_the_tile(max_query_len: int) -> None:
    check([(40, 5), (2, 150)], group=3, max_query_len=max_query_len)


def test_empty_chunks() -> None:
    check([(0, 20), (9, 4), (0, 0), (17, 0), (0, 3)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_fp8_cache(head_dim: int, dtype: torch.dtype) -> None:
    check([(21, 30), (3, 0)], head_dim=head_dim, dtype=dtype, fp8=True)


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches(seed: int) -> None:
    rng = random.Random(seed)
    check(
        [(rng.choice([0, 1, rng.randint(2, 70)]), rng.choice([0, rng.randint(1, 99)])) for _ in range(4)]
        + [(rng.randint(1, 40), 0)],
        group=rng.choice([1, 3, 4, 6]),
        num_kv_heads=rng.choice([1, 2]),
        head_dim=rng.choice([64, 96]),
        block_size=rng.choice([16, 32, 64]),
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        window=rng.choice([None, None, 24]),
        seed=seed,
    )
