"""Residual addition and root-mean-square norm (Zhang and Sennrich, 2019) in one pass over the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import require, require_floats

# A row is held in registers: 128 elements a thread at 16 warps.
MAX_SIZE = 65536


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    x_stride,
    residual_stride,
    out_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, WIDTH)
    inside = index < SIZE
    x = tl.load(x_ptr + row * x_stride + index, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + index, mask=inside, other=0.0)
        # Rounded as it is stored: the norm is of the residual stream that the next layer will see.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * residual_stride + index, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + index, mask=inside, other=0.0).to(tl.float32)
    out = x * scale * weight
    tl.store(out_ptr + row * out_stride + index, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """Add x to the residual in place and return the norm of the sum, or of x alone without a residual.

    x, residual, out: [T, H] in one float dtype, rows may be strided; out may be x. weight: [H], any float.
    Sums and the norm are in float32; the residual is rounded to its dtype before it is normed.

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    require(x.dim() == 2 and x.shape[1] <= MAX_SIZE, f"has shape {tuple(x.shape)}", param="x")
    num_rows, size = x.shape
    stream = x if residual is None else residual
    require_floats(x=x, residual=stream, weight=weight, out=out)
    for name, tensor in (("residual", stream), ("out", out)):
        fits = tensor.shape == x.shape and tensor.dtype == x.dtype
        require(fits, f"{tuple(tensor.shape)} {tensor.dtype} unlike x", param=name)
    require(weight.shape == (size,), f"has shape {tuple(weight.shape)}", param="weight")
    if num_rows == 0:
        return out
    width = tiling.padded(size)
    _rms_norm_kernel[(num_rows,)](
        x,
        stream,
        weight,
        out,
        eps,
        x.stride(0),
        stream.stride(0),
        out.stride(0),
        SIZE=size,
        WIDTH=width,
        ADD=residual is not None,
        num_warps=tiling.elementwise_warps(width),
    )
    return out
