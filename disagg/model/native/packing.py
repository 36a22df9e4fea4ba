"""Weights in the layouts that kernels.cpp reads: panels of 16 outputs in float32, int8 or int4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.model.large_tensors import large_copy
from disagg.model.native.library import Weight

PANEL = 16
GROUP = 64  # inputs that share a scale in int4; GROUP in kernels.cpp
KINDS = {"float32": 0, "int8": 1, "int4": 2}
# Shares of the largest magnitude that are tried as the range of an int4 group; the best one is kept.
INT4_RANGES = tuple(1.0 - 0.05 * step for step in range(8))

Kind = Literal["float32", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [n, k] in panels. n is rounded up to a multiple of PANEL; the rows added give 0.

    data: float32 or int8 [n / 16, k, 16], or uint8 [n / 16, ceil(k / 2), 16]. scale: float32 [n] for int8,
    [n / 16, ceil(k / 64), 16] for int4. bias: float32 [n].
    """

    kind: Kind
    n: int
    k: int
    data: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def struct(self) -> Weight:
        """Pointers into this object, which must outlive them."""
        return Weight(
            data=self.data.data_ptr(),
            scale=None if self.scale is None else self.scale.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            n=self.n,
            k=self.k,
            kind=KINDS[self.kind],
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.data, self.scale, self.bias) if tensor is not None)


def pack(weight: Tensor, bias: Tensor | None, kind: Kind) -> PackedWeight:
    """Pack float32 [n, k] and, where there is one, its bias [n]."""
    extra = -weight.shape[0] % PANEL
    weight = F.pad(weight, (0, 0, 0, extra))
    bias = None if bias is None else F.pad(bias, (0, extra)).contiguous()
    n, k = weight.shape
    if kind == "float32":
        return PackedWeight(kind, n, k, _panels(weight), None, bias)
    if kind == "int8":
        levels, scale = quantize_int8(weight)
        return PackedWeight(kind, n, k, _panels(levels), scale, bias)
    levels, scale = quantize_int4(weight)
    data = _pack_nibbles(_panels(levels))
    return PackedWeight(kind, n, k, data, _panels(scale), bias)


def join(parts: list[Tensor]) -> Tensor:
    """Stack matrices [n_i, k] along n, each filled with zeros to whole panels."""
    return torch.cat([F.pad(part, (0, 0, 0, -part.shape[0] % PANEL)) for part in parts])


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of [n, k] to int8 levels of its own scale [n]: weight is about levels * scale."""
    scale = weight.abs().amax(1).div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [n, k] to levels -8 .. 7 with a scale per row and GROUP inputs, [n, ceil(k / GROUP)].

    The value of largest magnitude is put at level -8 (as in llama.cpp's Q4_0), and the range that leaves the
    least squared error is taken among INT4_RANGES of it.
    """
    n, k = weight.shape
    grouped = F.pad(weight, (0, -k % GROUP)).view(n, -1, GROUP)
    peak = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)) / -8.0
    peak = torch.where(peak == 0, torch.ones_like(peak), peak)
    best = torch.full_like(peak, torch.inf)
    scale, levels = peak, torch.zeros_like(grouped)
    for part in INT4_RANGES:
        tried = peak * part
        rounded = (grouped / tried).round_().clamp_(-8, 7)
        error = (rounded * tried - grouped).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        levels = torch.where(better, rounded, levels)
    return levels.view(n, -1)[:, :k].to(torch.int8), scale[..., 0].contiguous()


def _panels(weight: Tensor) -> Tensor:
    """[n, k] to [n / 16, k, 16]."""
    return large_copy(weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2))


def _pack_nibbles(levels: Tensor) -> Tensor:
    """Int8 [p, k, 16] to uint8 [p, ceil(k / 2), 16]: even k in the low half, odd in the high."""
    even = F.pad(levels, (0, 0, 0, levels.shape[1] % 2)).view(torch.uint8)
    return large_copy((even[:, 0::2] & 0xF) | (even[:, 1::2] << 4))
