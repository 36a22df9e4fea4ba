"""Paged causal attention for chunks of several sequences, each on top of what it has in the cache.

FlashAttention-2 (Dao, 2023) over paged keys and values: online softmax, one pass over the keys for a tile
of query rows. A tile's rows are (token, query head) pairs of one KV head, so that GQA fills matrix units
even where a chunk is short. Queries of all sequences lie behind one another; a program finds its sequence
by bisection, so that the grid is as long as the batch has tokens and not as its longest chunk times its
size. Later tiles of a sequence have more keys to read and start first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import (
    LOG2_E,
    dot_dtype,
    require,
    require_floats,
    require_indices,
    require_layer,
    require_tables,
)
from disagg.model.kernels.tiling import padded


@triton.jit
def _sequence_of(query_starts_ptr, tile, num_seqs, TOKENS: tl.constexpr):
    """Last sequence whose first tile is at or before `tile`.

    Sequence s is given tiles from query_starts[s] // TOKENS + s on: always enough for its tokens, and
    known without a sum over the sequences before it.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_starts_ptr + middle).to(tl.int32) // TOKENS + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend_tiles(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    position,
    start,
    end,
    highest,
    total,
    acc,
    score_scale,
    window,
    kv_stride_block,
    kv_stride_token,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    DOT: tl.constexpr,
):
    """Take in keys start .. end; MASKED: some are not visible to every row, or the last tile is not full."""
    dim = tl.arange(0, HEAD_DIM_PADDED)
    for tile in range(start, end, TILE):
        token = tile + tl.arange(0, TILE)
        k_mask = (dim < HEAD_DIM)[:, None]
        v_mask = (dim < HEAD_DIM)[None, :]
        if MASKED:
            live = token < end
            k_mask = k_mask & live[None, :]
            v_mask = v_mask & live[:, None]
            block = tl.load(table_ptr + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        else:
            block = tl.load(table_ptr + token // BLOCK_SIZE).to(tl.int64)
        slot = block * kv_stride_block + (token % BLOCK_SIZE) * kv_stride_token
        k = tl.load(k_ptr + slot[None, :] + dim[:, None], mask=k_mask, other=0.0)
        scores = tl.dot(q, k.to(DOT), input_precision="tf32x3") * score_scale
        if MASKED:
            visible = token[None, :] <= position[:, None]
            if WINDOWED:
                visible = visible & (position[:, None] - token[None, :] < window)
            scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row may have seen nothing yet: what it sees begins in a later tile than the first row's.
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest) if WINDOWED else new_highest
        weight = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(v_ptr + slot[:, None] + dim[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(weight.to(DOT), v.to(DOT), acc * shrink[:, None], input_precision="tf32x3")
        highest = new_highest
    return highest, total, acc


# What changes from step to step: nothing is compiled anew for its values, nor for where slices begin.
@triton.jit(
    do_not_specialize=["block_tables_ptr", "query_starts_ptr", "context_lens_ptr", "num_seqs", "table_stride"]
)
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    block_tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    out_ptr,
    score_scale,
    v_scale,
    window,
    num_seqs,
    q_stride_token,
    q_stride_head,
    kv_stride_block,
    kv_stride_kind,
    kv_stride_head,
    kv_stride_token,
    table_stride,
    out_stride_token,
    out_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    DOT: tl.constexpr,
):
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = _sequence_of(query_starts_ptr, tile, num_seqs, TOKENS)
    query_start = tl.load(query_starts_ptr + seq).to(tl.int32)
    query_len = tl.load(query_starts_ptr + seq + 1).to(tl.int32) - query_start
    first = (tile - (query_start // TOKENS + seq)) * TOKENS
    if first >= query_len:
        return
    context_len = tl.load(context_lens_ptr + seq).to(tl.int32)
    # Position of the tile's first token in its sequence.
    first_position = context_len - query_len + first

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (token < TOKENS) & (first + token < query_len)
    in_row = live[:, None] & (dim < HEAD_DIM)[None, :]
    query = (query_start + first + token).to(tl.int64)
    q = tl.load(
        q_ptr + query[:, None] * q_stride_token + head[:, None] * q_stride_head + dim[None, :],
        mask=in_row,
        other=0.0,
    ).to(DOT)
    position = first_position + token
    k_ptr = kv_ptr + kv_head.to(tl.int64) * kv_stride_head
    v_ptr = k_ptr + kv_stride_kind
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM_PADDED], tl.float32)
    end = tl.minimum(first_position + TOKENS, context_len)
    if WINDOWED:
        start = tl.maximum(first_position - window + 1, 0) // TILE * TILE
    else:
        # Tiles of keys that all rows see need no mask; they come first, and are most of a long context.
        start = (first_position + 1) // TILE * TILE
        highest, total, acc = _attend_tiles(
            q,
            k_ptr,
            v_ptr,
            table_ptr,
            position,
            0,
            start,
            highest,
            total,
            acc,
            score_scale,
            window,
            kv_stride_block,
            kv_stride_token,
            HEAD_DIM,
            HEAD_DIM_PADDED,
            BLOCK_SIZE,
            TILE,
            False,
            False,
            DOT,
        )
    highest, total, acc = _attend_tiles(
        q,
        k_ptr,
        v_ptr,
        table_ptr,
        position,
        start,
        end,
        highest,
        total,
        acc,
        score_scale,
        window,
        kv_stride_block,
        kv_stride_token,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        BLOCK_SIZE,
        TILE,
        True,
        WINDOWED,
        DOT,
    )
    # Rows past the chunk's end may have seen nothing; they are not stored.
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None] * v_scale
    tl.store(
        out_ptr + query[:, None] * out_stride_token + head[:, None] * out_stride_head + dim[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=in_row,
    )


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return causal attention [T, Hq, D] of chunks whose keys and values are in the paged cache already.

    q: [T, Hq, D] float32, float16 or bfloat16, the sequences' chunks behind one another; rows and heads may
        be strided (a slice of qkv).
    kv: one layer's view of the cache, `cache.blocks[:, layer]`: [num_blocks, 2, Hkv, block_size, D] in q's
        dtype or float8_e4m3fn, keys at 0. Hq is a multiple of Hkv.
    block_tables: int32 or int64 [B, n]; only entries that a context reaches are read.
    query_starts: int32 or int64 [B + 1]; sequence i's queries are rows query_starts[i] up to
        query_starts[i + 1]. Rows beyond the last are left as they are; an empty chunk is allowed.
    context_lens: int32 or int64 [B], tokens in the cache, the chunk's own included.
    max_query_len: upper bound of the chunks' lengths, known to the host; chooses the tile.
    window: a query sees its last `window` tokens, itself included; None for all.
    k_scale, v_scale: what stored keys and values are multiplied with (fp8 caches).

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_seqs = kv.shape[2], context_lens.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    require_floats(q=q, out=out)
    tiling.check_head_dim(head_dim)
    require(num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} KV heads", param="q")
    require_layer(kv, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=q.dtype)
    require_tables(block_tables, num_seqs)
    require_indices(num_seqs, context_lens=context_lens)
    require_indices(num_seqs + 1, query_starts=query_starts)
    require(max_query_len > 0, f"is {max_query_len}", param="max_query_len")
    require(window is None or window > 0, f"is {window}", param="window")
    if num_tokens == 0 or num_seqs == 0:
        return out
    group = num_heads // num_kv_heads
    tile = tiling.prefill_tile(group, padded(head_dim), q.element_size(), max_query_len)
    tokens = tile.rows // group
    _prefill_kernel[(num_kv_heads, num_tokens // tokens + num_seqs)](
        q,
        kv,
        block_tables,
        query_starts,
        context_lens,
        out,
        scale * k_scale * LOG2_E,
        v_scale,
        window or 0,
        num_seqs,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        kv.stride(3),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=padded(head_dim),
        BLOCK_SIZE=kv.shape[3],
        ROWS=tile.rows,
        TOKENS=tokens,
        TILE=tile.tokens,
        WINDOWED=window is not None,
        DOT=dot_dtype(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
