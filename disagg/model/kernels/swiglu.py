"""SwiGLU's activation (Shazeer, 2020): silu(gate) * up, from the fused projection's output."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import ceil_div, require, require_floats


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, x_stride, out_stride, size, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = index < size
    gate = tl.load(x_ptr + row * x_stride + index, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + size + index, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * out_stride + index, out.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up [T, I] of x [T, 2 I], gate first; computed in float32, rounded once.

    x: any float dtype, rows may be strided. Raises ConfigError naming an argument that does not fit.
    """
    require(x.dim() == 2 and x.shape[1] % 2 == 0, f"has shape {tuple(x.shape)}", param="x")
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, size) if out is None else out
    require_floats(x=x, out=out)
    fits = out.shape == (num_rows, size) and out.dtype == x.dtype
    require(fits, f"{tuple(out.shape)} {out.dtype} does not go with x", param="out")
    if num_rows == 0 or size == 0:
        return out
    width = tiling.swiglu_width(size)
    _swiglu_kernel[(num_rows, ceil_div(size, width))](
        x, out, x.stride(0), out.stride(0), size, WIDTH=width, num_warps=4
    )
    return out
