"""Rotary position embedding (Su et al., 2021) of queries and keys, in place, in one launch.

Pairs are half a rotary dimension apart, (i, i + R / 2), as Llama's checkpoints and GPT-NeoX store them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import ceil_div, require, require_floats, require_indices


@triton.jit
def _rotate(x_ptr, cos, sin, head, stride_head, num_heads, HALF: tl.constexpr, HALF_PADDED: tl.constexpr):
    dim = tl.arange(0, HALF_PADDED)
    inside = (head < num_heads)[:, None] & (dim < HALF)[None, :]
    first_ptr = x_ptr + head[:, None] * stride_head + dim[None, :]
    second_ptr = first_ptr + HALF
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=inside, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    tl.store(first_ptr, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(second_ptr, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["positions_ptr"])
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_q_heads,
    num_k_heads,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    table_stride,
    Q_TILES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int64)
    dim = tl.arange(0, HALF_PADDED)
    row = position * table_stride + dim
    cos = tl.load(cos_ptr + row, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
    head = tl.arange(0, HEADS)
    if tile < Q_TILES:
        _rotate(
            q_ptr + token * q_stride_token,
            cos,
            sin,
            head + tile * HEADS,
            q_stride_head,
            num_q_heads,
            HALF,
            HALF_PADDED,
        )
    else:
        _rotate(
            k_ptr + token * k_stride_token,
            cos,
            sin,
            head + (tile - Q_TILES) * HEADS,
            k_stride_head,
            num_k_heads,
            HALF,
            HALF_PADDED,
        )


def apply_rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """Rotate q [T, Hq, D] and k [T, Hkv, D] in place by the angles of `positions` [T].

    q, k: one float dtype; rows and heads may be strided (slices of qkv).
    cos, sin: tables [max_position, R / 2] in any float dtype, R <= D; dimensions from R on stay as they are.
    positions: int64 or int32 [T], each below max_position: the caller's to see to.
    Computed in float32, rounded once.

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    require_floats(q=q, k=k, cos=cos, sin=sin)
    fits = (k.shape[0], k.shape[2], k.dtype) == (num_tokens, head_dim, q.dtype)
    require(fits, f"{tuple(k.shape)} {k.dtype} does not go with q", param="k")
    half = cos.shape[1]
    require(2 * half <= head_dim, f"rotates {2 * half} of {head_dim} dimensions", param="cos")
    fits = sin.shape == cos.shape and sin.dtype == cos.dtype and sin.stride() == cos.stride()
    require(fits, f"{tuple(sin.shape)} {sin.dtype} unlike cos", param="sin")
    require_indices(num_tokens, positions=positions)
    if num_tokens == 0:
        return
    heads = tiling.rope_heads(num_q_heads, tiling.padded(half))
    q_tiles = ceil_div(num_q_heads, heads)
    _rope_kernel[(num_tokens, q_tiles + ceil_div(k.shape[1], heads))](
        q,
        k,
        cos,
        sin,
        positions,
        num_q_heads,
        k.shape[1],
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        cos.stride(0),
        Q_TILES=q_tiles,
        HEADS=heads,
        HALF=half,
        HALF_PADDED=tiling.padded(half),
        num_warps=4,
    )
