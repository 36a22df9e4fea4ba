"""What the kernels' wrappers share: Triton's spelling of dtypes, padding, argument checks, fp8 rounding.

Nothing here reads a tensor's contents, so a wrapper never waits for the device and can be captured in a
CUDA graph. Kernels launch on the current device; tensors must lie there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.errors import ConfigError
from disagg.model.kernels.tiling import padded

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
LOG2_E = 1.4426950408889634
# Stands in for the number of multiprocessors on a CPU: small, so that tests split contexts unevenly.
INTERPRETER_PROCESSORS = 4

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def dot_dtype(dtype: torch.dtype) -> Any:
    """Return the Triton dtype in which matrix products over tensors of `dtype` take their operands.

    The interpreter keeps bfloat16 as bare 16-bit integers and would multiply those: float32 there.
    """
    if dtype is torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return _TRITON_DTYPES[dtype]


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return the device's number of streaming multiprocessors."""
    if device.type == "cpu":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def require(condition: bool, message: str, *, param: str) -> None:
    """Raise ConfigError naming the argument `param` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{param}: {message}", param=param)


def require_floats(**tensors: Tensor) -> None:
    """Raise ConfigError unless all tensors are float32, float16 or bfloat16 with a contiguous last dim."""
    for name, tensor in tensors.items():
        require(tensor.dtype in FLOAT_DTYPES, f"has dtype {tensor.dtype}, not one of floats", param=name)
        require(tensor.stride(-1) == 1, "its last dimension is not contiguous", param=name)


def require_indices(size: int, **tensors: Tensor) -> None:
    """Raise ConfigError unless all tensors are contiguous int32 or int64 [size]."""
    for name, tensor in tensors.items():
        require(tensor.shape == (size,), f"has shape {tuple(tensor.shape)}, not ({size},)", param=name)
        require(tensor.is_contiguous(), "is not contiguous", param=name)
        require(tensor.dtype in (torch.int32, torch.int64), f"has dtype {tensor.dtype}", param=name)


def require_tables(block_tables: Tensor, num_seqs: int) -> None:
    """Raise ConfigError unless block_tables is integers [num_seqs, n] with contiguous rows."""
    fits = block_tables.dim() == 2 and block_tables.shape[0] == num_seqs and block_tables.stride(1) == 1
    shape = tuple(block_tables.shape)
    require(fits, f"has shape {shape} for {num_seqs} sequences, or strided rows", param="block_tables")
    fits = block_tables.dtype in (torch.int32, torch.int64)
    require(fits, f"has dtype {block_tables.dtype}", param="block_tables")


def require_layer(kv: Tensor, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Check one layer's view of the cache, [num_blocks, 2, num_kv_heads, block_size, head_dim].

    Raises ConfigError where its heads, head_dim or dtype (that of the model, or fp8) do not fit.
    """
    require(kv.dim() == 5 and kv.shape[1] == 2, f"has shape {tuple(kv.shape)}", param="kv")
    fits = (kv.shape[2], kv.shape[4]) == (num_kv_heads, head_dim)
    require(fits, f"shape {tuple(kv.shape)} is not of {num_kv_heads} heads of {head_dim}", param="kv")
    require(kv.dtype in (dtype, FP8_DTYPE), f"has dtype {kv.dtype}, the model {dtype}", param="kv")
    require(kv.stride(4) == 1, "its last dimension is not contiguous", param="kv")
    require(kv.shape[3] == padded(kv.shape[3]), "its block size is not a power of two", param="kv")


@triton.jit
def round_to_e4m3(x):
    """Round float32 to what fp8 e4m3 can hold, to nearest even, beyond 448 to 448; the result is float32.

    Rounding here instead of in the conversion makes bits equal on every device: Triton's interpreter loses
    the carry out of the mantissa, and devices before Hopper differ in what they do beyond 448. A zero that
    a negative number was rounded to is a positive one.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    # Half of the last kept bit, less one where that bit is even; the carry runs into the exponent.
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    normal = bits.to(tl.float32, bitcast=True)
    # Below 2**-6 the spacing stays 2**-9, that of float32 between 2**14 and 2**15.
    subnormal = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)
