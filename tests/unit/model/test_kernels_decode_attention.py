"""Decode attention against float64 gather and softmax, over odd shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kernels_support import DEVICE, FP8, PagedBatch, assert_close

from disagg.model.kernels import reference
from disagg.model.kernels.common import num_processors
from disagg.model.kernels.decode_attention import decode_attention, workspace_elements


def check(
    context_lens: list[int],
    *,
    group: int,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    window: int | None = None,
    num_splits: int = 1,
    seed: int = 0,
) -> None:
    k_scale, v_scale = (0.07, 0.11) if fp8 else (1.0, 1.0)
    batch = PagedBatch(
        context_lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=FP8 if fp8 else dtype,
        scale=0.09,
        seed=seed,
    )
    num_heads = group * num_kv_heads
    # A slice of qkv, as the model has it: rows are further apart than their own length.
    qkv = batch.randn(len(context_lens), num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    q = qkv[:, :num_heads]
    arguments: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "window": window,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    out = torch.full((len(context_lens), num_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    result = decode_attention(
        q,
        batch.kv,
        batch.block_tables,
        batch.context_lens,
        max_context=max(context_lens),
        num_splits=num_splits,
        out=out,
        **arguments,
    )
    assert result is out
    expected = reference.decode_attention(
        q,
        batch.kv,
        batch.block_tables,
        batch.context_lens,
        **arguments,
    )
    assert_close(out, expected)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    check([37, 1], group=4, head_dim=head_dim, dtype=dtype, num_splits=2)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_query_heads_per_kv_head(group: int) -> None:
    check([21, 70], group=group, num_kv_heads=3)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_block_sizes_and_ragged_contexts(block_size: int, num_splits: int) -> None:
    check(
        [1, block_size, block_size + 1, 3 * block_size - 1, 2],
        group=2,
        block_size=block_size,
        num_splits=num_splits,
    )


@pytest.mark.parametrize("window", [1, 5, 16, 64, 1000])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_sliding_window(window: int, num_splits: int) -> None:
    check([1, 5, 77, 150], group=2, window=window, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [2, 5, 16, 64])
def test_splits_of_one_long_context_beside_short_ones(num_splits: int) -> None:
    check([700, 3, 65], group=4, num_kv_heads=1, block_size=32, num_splits=num_splits)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_cache(head_dim: int, dtype: torch.dtype) -> None:
    check([40, 9], group=2, head_dim=head_dim, dtype=dtype, fp8=True, num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_padding_rows_are_zero(num_splits: int) -> None:
    check([0, 33, 0], group=2, num_splits=num_splits)


def test_a_workspace_is_reused_over_batch_sizes() -> None:
    max_context = 1100
    batch = PagedBatch([max_context, 300, 1], num_kv_heads=1, head_dim=64, block_size=64)
    q = batch.randn(3, 2, 64)
    elements = workspace_elements(3, 2, 1, 64, max_context, num_processors(DEVICE))
    workspace = torch.full((elements,), torch.nan, device=DEVICE)
    for size in (3, 1, 2):
        arguments = (q[:size], batch.kv, batch.block_tables[:size], batch.context_lens[:size])
        out = decode_attention(*arguments, scale=0.125, max_context=max_context, workspace=workspace)
        assert_close(out, reference.decode_attention(*arguments, scale=0.125))
    assert workspace.isfinite().any(), "the contexts were not cut: nothing was tested"


@pytest.mark.parametrize("seed", range(6))
def test_random_ragged_batches(seed: int) -> None:
    rng = random.Random(seed)
    check(
        [rng.choice([0, 1, rng.randint(1, 30), rng.randint(30, 160)]) for _ in range(4)]
        + [rng.randint(1, 90)],
        group=rng.choice([1, 3, 4, 6]),
        num_kv_heads=rng.choice([1, 2]),
        head_dim=rng.choice([64, 96]),
        block_size=rng.choice([16, 32, 64]),
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        window=rng.choice([None, None, 24]),
        num_splits=rng.choice([1, 2, 7]),
        seed=seed,
    )
