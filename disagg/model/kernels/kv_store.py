"""Writes the rotated keys and the values of new tokens into their slots of the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import (
    FP8_DTYPE,
    require,
    require_floats,
    require_indices,
    require_layer,
    round_to_e4m3,
)


@triton.jit(do_not_specialize=["slot_mapping_ptr"])
def _store_kernel(
    k_ptr,
    v_ptr,
    kv_ptr,
    slot_mapping_ptr,
    k_scale,
    v_scale,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    kv_stride_block,
    kv_stride_kind,
    kv_stride_head,
    kv_stride_token,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    index = tl.arange(0, WIDTH)
    inside = index < NUM_HEADS * HEAD_DIM
    head, dim = index // HEAD_DIM, index % HEAD_DIM
    k = tl.load(k_ptr + token * k_stride_token + head * k_stride_head + dim, mask=inside, other=0.0)
    v = tl.load(v_ptr + token * v_stride_token + head * v_stride_head + dim, mask=inside, other=0.0)
    if QUANTIZE:
        k = round_to_e4m3(tl.div_rn(k.to(tl.float32), k_scale))
        v = round_to_e4m3(tl.div_rn(v.to(tl.float32), v_scale))
    target = kv_ptr + (slot // BLOCK_SIZE) * kv_stride_block + (slot % BLOCK_SIZE) * kv_stride_token
    target = target + head * kv_stride_head + dim
    tl.store(target, k.to(kv_ptr.dtype.element_ty), mask=inside)
    tl.store(target + kv_stride_kind, v.to(kv_ptr.dtype.element_ty), mask=inside)


def store_kv(
    k: Tensor, v: Tensor, kv: Tensor, slot_mapping: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """Store k and v [T, Hkv, D] in the slots that slot_mapping [T] gives.

    k, v: float32, float16 or bfloat16; rows and heads may be strided (slices of qkv).
    kv: one layer's view of the cache, `cache.blocks[:, layer]`: [num_blocks, 2, Hkv, block_size, D] in k's
        dtype, or float8_e4m3fn: then k / k_scale and v / v_scale are stored, saturated at 448.
    slot_mapping: int64 or int32 [T], block_id * block_size + offset; below 0 is skipped. Slots are distinct
        and within the cache: the caller's to see to.

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    num_tokens, num_heads, head_dim = k.shape
    require_floats(k=k, v=v)
    require(v.shape == k.shape and v.dtype == k.dtype, f"{tuple(v.shape)} {v.dtype} unlike k", param="v")
    require_layer(kv, num_kv_heads=num_heads, head_dim=head_dim, dtype=k.dtype)
    require_indices(num_tokens, slot_mapping=slot_mapping)
    require(k_scale > 0, f"is {k_scale}", param="k_scale")
    require(v_scale > 0, f"is {v_scale}", param="v_scale")
    if num_tokens == 0:
        return
    width = tiling.padded(num_heads * head_dim)
    _store_kernel[(num_tokens,)](
        k,
        v,
        kv,
        slot_mapping,
        k_scale,
        v_scale,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        kv.stride(3),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv.shape[3],
        WIDTH=width,
        QUANTIZE=kv.dtype is FP8_DTYPE,
        num_warps=tiling.elementwise_warps(width),
    )
