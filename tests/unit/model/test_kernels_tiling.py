"""Tile sizes and splits, which are plain functions, and what the wrappers refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels_support import DEVICE, FP8

from disagg.errors import ConfigError
from disagg.model.kernels import tiling
from disagg.model.kernels.block_copy import gather_blocks
from disagg.model.kernels.decode_attention import decode_attention, workspace_elements
from disagg.model.kernels.kv_store import store_kv
from disagg.model.kernels.prefill_attention import prefill_attention
from disagg.model.kernels.rms_norm import add_rms_norm
from disagg.model.kernels.rope import apply_rope_
from disagg.model.kernels.sampling import sample
from disagg.model.kernels.swiglu import swiglu

H200 = 132


def test_one_long_stream_fills_the_chip() -> None:
    splits = tiling.num_splits(1, 8, 128 * 1024, H200)
    assert splits * 8 >= 3 * H200


def test_a_full_batch_is_cut_little_and_a_short_context_not_at_all() -> None:
    assert tiling.num_splits(256, 8, 32768, H200) == 2
    assert tiling.num_splits(1024, 8, 32768, H200) == 1
    assert tiling.num_splits(1, 8, tiling.MIN_SPLIT_TOKENS, H200) == 1


@pytest.mark.parametrize("max_context", [1, 255, 256, 4096, 1 << 20])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 32, 500])
def test_splits_are_bounded_and_never_too_small(batch_size: int, max_context: int) -> None:
    splits = tiling.num_splits(batch_size, 8, max_context, H200)
    assert 1 <= splits <= tiling.MAX_SPLITS
    assert splits == 1 or max_context // splits >= tiling.MIN_SPLIT_TOKENS
    # A larger batch needs no more of them.
    assert tiling.num_splits(batch_size + 1, 8, max_context, H200) <= splits


@pytest.mark.parametrize("group", [1, 3, 7, 8, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kv_itemsize", [1, 2])
def test_attention_tiles(group: int, head_dim: int, itemsize: int, kv_itemsize: int) -> None:
    decode = tiling.decode_tile(group, head_dim, itemsize, kv_itemsize)
    assert decode.rows >= max(group, tiling.MIN_DOT_ROWS)
    for max_query_len in (1, 5, 64, 8192):
        prefill = tiling.prefill_tile(group, head_dim, itemsize, max_query_len)
        assert prefill.rows >= group
        for tile in (decode, prefill):
            assert tile.rows == tiling.padded(tile.rows) and tile.tokens == tiling.padded(tile.tokens)
            assert tile.tokens >= tiling.MIN_DOT_ROWS
            # Keys and values of a stage within the budget that the docstrings give.
            assert tile.tokens == 16 or 2 * tile.tokens * head_dim * itemsize <= 32 << 10
    assert tiling.prefill_tile(4, 128, 2, 8192).rows == 128
    assert tiling.prefill_tile(4, 128, 2, 3).rows == 16


def test_elementwise_tiles() -> None:
    assert [tiling.padded(size) for size in (1, 2, 3, 80, 128)] == [1, 2, 4, 128, 128]
    assert [tiling.elementwise_warps(size) for size in (64, 4096, 65536)] == [4, 8, 16]
    assert (
        tiling.rope_heads(40, 64) == 32 and tiling.rope_heads(3, 64) == 4 and tiling.rope_heads(1, 4096) == 1
    )
    assert tiling.swiglu_width(14336) == 1024 and tiling.swiglu_width(100) == 128
    assert tiling.copy_width(1 << 20, 8) * 8 == tiling.COPY_BYTES and tiling.copy_width(5, 8) == 8
    assert tiling.sample_width(128256) == 4096 and tiling.sample_width(3) == 4


def test_a_workspace_serves_every_batch_size() -> None:
    max_context, heads, kv_heads, head_dim = 8192, 8, 2, 128
    elements = workspace_elements(48, heads, kv_heads, head_dim, max_context, H200)
    for batch in range(1, 49):
        splits = tiling.num_splits(batch, kv_heads, max_context, H200)
        if splits > 1:
            assert batch * heads * splits * (head_dim + 1) <= elements


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, device=DEVICE).to(dtype)


def indices(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=DEVICE)


def decode(
    *,
    q: torch.Tensor | None = None,
    kv: torch.Tensor | None = None,
    tables: torch.Tensor | None = None,
    lens: torch.Tensor | None = None,
    max_context: int = 16,
    window: int | None = None,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    decode_attention(
        zeros(2, 4, 64) if q is None else q,
        zeros(3, 2, 2, 16, 64) if kv is None else kv,
        indices(2, 1) if tables is None else tables,
        indices(2) if lens is None else lens,
        scale=1.0,
        max_context=max_context,
        window=window,
        num_splits=num_splits,
        workspace=workspace,
    )


def prefill(*, starts: int = 3, max_query_len: int = 2, head_dim: int = 64, num_heads: int = 4) -> None:
    prefill_attention(
        zeros(4, num_heads, head_dim),
        zeros(3, 2, 2, 16, head_dim),
        indices(2, 1),
        indices(starts),
        indices(2),
        scale=1.0,
        max_query_len=max_query_len,
    )


def store(*, v: torch.Tensor | None = None, slots: torch.Tensor | None = None, k_scale: float = 1.0) -> None:
    store_kv(
        zeros(2, 1, 64),
        zeros(2, 1, 64) if v is None else v,
        zeros(3, 2, 1, 16, 64, dtype=FP8),
        indices(2) if slots is None else slots,
        k_scale=k_scale,
    )


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("q", lambda: decode(q=zeros(2, 3, 64))),
    ("q", lambda: decode(q=zeros(2, 4, 64, dtype=torch.float64))),
    ("q", lambda: decode(q=zeros(2, 4, 128)[..., ::2])),
    ("head_dim", lambda: decode(q=zeros(2, 4, 512), kv=zeros(3, 2, 2, 16, 512))),
    ("kv", lambda: decode(kv=zeros(3, 2, 2, 16, 32))),
    ("kv", lambda: decode(kv=zeros(3, 2, 2, 16, 64, dtype=torch.bfloat16))),
    ("kv", lambda: decode(kv=zeros(3, 2, 2, 24, 64))),
    ("kv", lambda: decode(kv=zeros(3, 1, 2, 16, 64))),
    ("block_tables", lambda: decode(tables=indices(3, 1))),
    ("block_tables", lambda: decode(tables=zeros(2, 1))),
    ("context_lens", lambda: decode(lens=indices(3))),
    ("max_context", lambda: decode(max_context=0)),
    ("window", lambda: decode(window=0)),
    ("num_splits", lambda: decode(num_splits=65)),
    ("workspace", lambda: decode(num_splits=2, workspace=zeros(10))),
    ("workspace", lambda: decode(num_splits=2, workspace=zeros(10_000, dtype=torch.float16))),
    ("query_starts", lambda: prefill(starts=2)),
    ("max_query_len", lambda: prefill(max_query_len=0)),
    ("head_dim", lambda: prefill(head_dim=8)),
    ("q", lambda: prefill(num_heads=5)),
    ("v", lambda: store(v=zeros(2, 2, 64))),
    ("slot_mapping", lambda: store(slots=indices(3))),
    ("slot_mapping", lambda: store(slots=zeros(2))),
    ("k_scale", lambda: store(k_scale=0)),
    ("residual", lambda: add_rms_norm(zeros(2, 8), zeros(2, 9), zeros(8), 1e-6)),
    ("weight", lambda: add_rms_norm(zeros(2, 8), None, zeros(9), 1e-6)),
    ("x", lambda: add_rms_norm(zeros(1, 2, 8), None, zeros(8), 1e-6)),
    ("k", lambda: apply_rope_(zeros(2, 1, 8), zeros(3, 1, 8), zeros(4, 4), zeros(4, 4), indices(2))),
    ("cos", lambda: apply_rope_(zeros(2, 1, 8), zeros(2, 1, 8), zeros(4, 5), zeros(4, 5), indices(2))),
    ("sin", lambda: apply_rope_(zeros(2, 1, 8), zeros(2, 1, 8), zeros(4, 4), zeros(4, 3), indices(2))),
    ("positions", lambda: apply_rope_(zeros(2, 1, 8), zeros(2, 1, 8), zeros(4, 4), zeros(4, 4), indices(3))),
    ("x", lambda: swiglu(zeros(2, 7))),
    ("out", lambda: swiglu(zeros(2, 8), out=zeros(2, 8))),
    ("staging", lambda: gather_blocks(zeros(3, 8), indices(2), zeros(15))),
    ("blocks", lambda: gather_blocks(zeros(3, 8).T, indices(2), zeros(16))),
    ("block_ids", lambda: gather_blocks(zeros(3, 8), zeros(2), zeros(16))),
    ("logits", lambda: sample(zeros(2, 8, dtype=torch.bfloat16), zeros(2), indices(2).long())),
    ("keys", lambda: sample(zeros(2, 8), zeros(2), indices(2))),
    ("temperatures", lambda: sample(zeros(2, 8), zeros(3), indices(2).long())),
]


@pytest.mark.parametrize(("param", "call"), REFUSED)
def test_arguments_that_do_not_fit_are_named(param: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.param == param
    assert caught.value.message.startswith(param) or param in caught.value.message
