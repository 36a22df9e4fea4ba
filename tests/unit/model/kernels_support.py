"""Small paged caches and ragged batches for the kernels' tests, on the GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from disagg.model.kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn
# Relative error, by norm: a few units in the last place of the outputs. The interpreter cuts bfloat16 off
# instead of rounding it, which doubles its error.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("tests/conftest.py sets TRITON_INTERPRET=1 where there is no GPU")


class PagedBatch:
    """A cache of several layers filled with noise, and block tables of scattered, unordered blocks.

    Slots that no context reaches hold NaN (in fp8 caches the NaN of that format): a kernel that reads one
    without masking it shows. kv is the view of the last layer.
    """

    def __init__(
        self,
        context_lens: Sequence[int],
        *,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // block_size) for length in context_lens]
        num_blocks, num_layers = sum(needed) + 2, 2
        shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        values = torch.randn(shape, generator=generator)
        used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
        free = torch.randperm(num_blocks, generator=generator).tolist()
        tables = torch.full((len(needed), max([*needed, 1]) + 1), -1, dtype=torch.int32)
        for row, (length, count) in enumerate(zip(context_lens, needed, strict=True)):
            ids = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
            tables[row, :count] = ids.int()
            positions = torch.arange(length)
            if length:
                used[ids[positions // block_size], positions % block_size] = True
        values.masked_fill_(~used[:, None, None, None, :, None], torch.nan)
        stored = reference.quantize(values, scale) if dtype is FP8 else values.to(dtype)
        self.blocks = stored.to(DEVICE)
        self.kv = self.blocks[:, num_layers - 1]
        self.block_tables = tables.to(DEVICE)
        self.context_lens = torch.tensor(context_lens, dtype=torch.int32, device=DEVICE)
        self.generator = generator

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float | None = None) -> None:
    """Fail unless the relative error by norm, over all rows and over the worst one, is within tolerance."""
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    actual, expected = actual.double(), expected.double()
    assert torch.isfinite(actual).all(), "not finite, or not written"
    error = (actual - expected).norm(dim=-1)
    size = expected.norm(dim=-1).clamp_min(1e-3 * float(expected.abs().max()) + 1e-12)
    worst = float((error / size).max())
    assert worst <= tolerance, f"relative error {worst:.3g} of a row, allowed {tolerance:.3g}"
