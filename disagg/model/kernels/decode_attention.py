"""Paged attention for one query token a sequence, split over the context.

Flash-decoding (Dao, Haziza, Massa and Sizov, 2023): each context is cut into parts that run as programs of
their own, so that one long sequence fills the chip; a second kernel merges the parts by their maxima and
sums. All query heads that share a KV head are rows of one matrix product (GQA), so a key is read once.

    grid (parts, KV heads, sequences) ──► partial out, log2-sum-exp ──► grid (query heads, sequences) ──► out
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import (
    LOG2_E,
    ceil_div,
    dot_dtype,
    num_processors,
    require,
    require_floats,
    require_indices,
    require_layer,
    require_tables,
)
from disagg.model.kernels.tiling import padded

# What changes from step to step: nothing is compiled anew for its values, nor for where slices begin.
VARYING = ("context_lens_ptr", "num_splits", "min_split")


@triton.jit
def _visible(context_len, window):
    """First token that the last of `context_len` tokens sees; window 0 is none."""
    return tl.where(window > 0, tl.maximum(context_len - window, 0), 0)


@triton.jit
def _split_tokens(num_tokens, num_splits, min_split, TILE: tl.constexpr):
    """Tokens of each part but the last: whole tiles, and no fewer than min_split."""
    share = tl.cdiv(tl.cdiv(num_tokens, num_splits), TILE) * TILE
    return tl.maximum(share, min_split)


@triton.jit(do_not_specialize=[*VARYING, "block_tables_ptr", "table_stride"])
def _partial_kernel(
    q_ptr,
    kv_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    score_scale,
    v_scale,
    window,
    q_stride_seq,
    q_stride_head,
    kv_stride_block,
    kv_stride_kind,
    kv_stride_head,
    kv_stride_token,
    table_stride,
    out_stride_seq,
    out_stride_head,
    num_splits,
    min_split,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens_ptr + seq).to(tl.int32)
    first = _visible(context_len, window)
    share = _split_tokens(context_len - first, num_splits, min_split, TILE)
    start = first + split * share
    end = tl.minimum(start + share, context_len)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    head = kv_head * GROUP + row
    in_row = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    out_row = out_ptr + seq * out_stride_seq + head[:, None] * out_stride_head + dim[None, :]
    if start >= end:
        # The merge never reads an empty part; without a merge, an empty context is zeros.
        if not SPLIT:
            tl.store(out_row, tl.zeros([ROWS, HEAD_DIM_PADDED], out_ptr.dtype.element_ty), mask=in_row)
        return

    q_row = q_ptr + seq * q_stride_seq + head[:, None] * q_stride_head + dim[None, :]
    q = tl.load(q_row, mask=in_row, other=0.0).to(DOT)
    k_ptr = kv_ptr + kv_head.to(tl.int64) * kv_stride_head
    v_ptr = k_ptr + kv_stride_kind
    table_ptr = block_tables_ptr + seq * table_stride

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
    for tile in range(start, end, TILE):
        token = tile + tl.arange(0, TILE)
        live = token < end
        block = tl.load(table_ptr + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        slot = block * kv_stride_block + (token % BLOCK_SIZE) * kv_stride_token
        k = tl.load(
            k_ptr + slot[None, :] + dim[:, None],
            mask=live[None, :] & (dim < HEAD_DIM)[:, None],
            other=0.0,
        )
        v = tl.load(
            v_ptr + slot[:, None] + dim[None, :],
            mask=live[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k.to(DOT), input_precision="tf32x3") * score_scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        # A tile holds at least one live token, so the maximum is finite from the first one on.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weight = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(DOT), v.to(DOT), acc * shrink[:, None], input_precision="tf32x3")
        highest = new_highest

    result = acc / total[:, None] * v_scale
    if not SPLIT:
        tl.store(out_row, result.to(out_ptr.dtype.element_ty), mask=in_row)
    else:
        part = (seq * tl.num_programs(1) * GROUP + head) * num_splits + split
        tl.store(partial_ptr + part[:, None] * HEAD_DIM + dim[None, :], result, mask=in_row)
        tl.store(lse_ptr + part, highest + tl.log2(total), mask=row < GROUP)


@triton.jit(do_not_specialize=[*VARYING])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    context_lens_ptr,
    out_ptr,
    window,
    out_stride_seq,
    out_stride_head,
    num_splits,
    min_split,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    context_len = tl.load(context_lens_ptr + seq).to(tl.int32)
    num_tokens = context_len - _visible(context_len, window)
    share = _split_tokens(num_tokens, num_splits, min_split, TILE)
    split = tl.arange(0, SPLITS_PADDED)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    live = split < tl.cdiv(num_tokens, share)
    part = (seq * tl.num_programs(0) + head) * num_splits + split
    lse = tl.load(lse_ptr + part, mask=live, other=float("-inf"))
    # Finite where no part is live (an empty context): the weights are then all zero.
    highest = tl.maximum(tl.max(lse, 0), -1.0e30)
    weight = tl.exp2(lse - highest)
    partial = tl.load(
        partial_ptr + part[:, None] * HEAD_DIM + dim[None, :],
        mask=live[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    total = tl.maximum(tl.sum(weight, 0), 1.0e-30)
    result = tl.sum(partial * weight[:, None], 0) / total
    out_row = out_ptr + seq * out_stride_seq + head * out_stride_head + dim
    tl.store(out_row, result.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def workspace_elements(
    max_batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int, max_context: int, processors: int
) -> int:
    """Return the float32 elements of a workspace that serves every batch of up to max_batch_size rows.

    processors: num_processors(device), from kernels.common.
    """
    parts = max(
        batch * num_heads * splits
        for batch in range(1, max_batch_size + 1)
        if (splits := tiling.num_splits(batch, num_kv_heads, max_context, processors)) > 1 or batch == 1
    )
    return parts * (head_dim + 1)


def decode_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_context: int,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Return attention [B, Hq, D] of one query token a sequence over its tokens in the paged cache.

    q: [B, Hq, D] float32, float16 or bfloat16; rows and heads may be strided (a slice of qkv).
    kv: one layer's view of the cache, `cache.blocks[:, layer]`: [num_blocks, 2, Hkv, block_size, D] in q's
        dtype or float8_e4m3fn, keys at 0. Hq is a multiple of Hkv.
    block_tables: int32 or int64 [B, n]; only entries that a context reaches are read.
    context_lens: int32 or int64 [B], tokens in the cache with the query's own; 0 marks a padding row: zeros.
    max_context: upper bound of context_lens, known to the host; sets into how many parts contexts are cut.
    window: a query sees its last `window` tokens, itself included; None for all.
    k_scale, v_scale: what stored keys and values are multiplied with (fp8 caches).
    workspace: float32, at least as long as workspace_elements says; allocated where None.
    num_splits: parts per context, instead of tiling.num_splits'.

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    batch_size, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    require_floats(q=q, out=out)
    tiling.check_head_dim(head_dim)
    require(num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} KV heads", param="q")
    require_layer(kv, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=q.dtype)
    require_tables(block_tables, batch_size)
    require_indices(batch_size, context_lens=context_lens)
    require(max_context > 0, f"is {max_context}", param="max_context")
    require(window is None or window > 0, f"is {window}", param="window")
    if batch_size == 0:
        return out
    tile = tiling.decode_tile(
        num_heads // num_kv_heads, padded(head_dim), q.element_size(), kv.element_size()
    )
    if num_splits is None:
        num_splits = tiling.num_splits(batch_size, num_kv_heads, max_context, num_processors(q.device))
    require(1 <= num_splits <= tiling.MAX_SPLITS, f"is {num_splits}", param="num_splits")
    parts = batch_size * num_heads * num_splits
    needed = parts * (head_dim + 1) if num_splits > 1 else 1
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    require(workspace.dtype is torch.float32, f"has dtype {workspace.dtype}", param="workspace")
    require(workspace.numel() >= needed, f"has {workspace.numel()} elements of {needed}", param="workspace")
    partial, lse = workspace, workspace[parts * head_dim if num_splits > 1 else 0 :]
    # A part at least holds what the split was asked for; tests that force many splits get small parts.
    min_split = min(tiling.MIN_SPLIT_TOKENS, max(tile.tokens, ceil_div(max_context, num_splits)))
    min_split = ceil_div(min_split, tile.tokens) * tile.tokens
    _partial_kernel[(num_splits, num_kv_heads, batch_size)](
        q,
        kv,
        block_tables,
        context_lens,
        out,
        partial,
        lse,
        scale * k_scale * LOG2_E,
        v_scale,
        window or 0,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        kv.stride(3),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        num_splits,
        min_split,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded(head_dim),
        BLOCK_SIZE=block_size,
        ROWS=tile.rows,
        TILE=tile.tokens,
        SPLIT=num_splits > 1,
        DOT=dot_dtype(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if num_splits > 1:
        _merge_kernel[(num_heads, batch_size)](
            partial,
            lse,
            context_lens,
            out,
            window or 0,
            out.stride(0),
            out.stride(1),
            num_splits,
            min_split,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=padded(head_dim),
            TILE=tile.tokens,
            SPLITS_PADDED=padded(num_splits),
            num_warps=4,
        )
    return out
