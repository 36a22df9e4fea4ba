"""The parts a decoder is made of: linear layers, norms, rotary embedding. Inference only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.model.config import RopeSpec

# oneDNN's packed layout halves the time at 2 to 8 rows from 2048x2048 up and costs 30 us a call below.
MIN_PACKED_ELEMENTS = 1 << 20
PACKED_ROWS_HINT = 4


class Linear:
    """y = x W^T + b. weight: [out_features, in_features]; views of it are loaded from the checkpoint."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None

    def pack(self, *, keep_weight: bool = False) -> None:
        """Bring a large CPU weight into oneDNN's own layout and drop the plain one.

        keep_weight: something else reads `weight` too (tied embeddings). Does nothing where the layer is
        small, lies on another device, or oneDNN has no kernel for its dtype on this machine.
        """
        if self.weight.device.type != "cpu" or self.weight.numel() < MIN_PACKED_ELEMENTS:
            return
        try:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_ROWS_HINT)
        except RuntimeError:  # for instance bfloat16 without AVX-512
            return
        if not keep_weight:
            self.weight = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, out_features] for x [T, in_features]."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return result


class RMSNorm:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019). weight: [size]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Return the rotary frequencies [head_dim / 2] in float32, and a factor on cosine and sine.

    Formulas as in transformers' modeling_rope_utils, in float32 in the same order of operations.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponent
    if rope.type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.type == "yarn":
        return _yarn(rope, frequencies, head_dim)
    # dynamic is the default up to the trained length, beyond which ModelSpec.max_model_len lets nothing go.
    return frequencies, 1.0


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: divide low frequencies by the factor, keep high ones, blend between."""
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeSpec, frequencies: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023), arXiv 2309.00071: a ramp between interpolated and extrapolated."""

    def dimension_of(rotations: float) -> float:
        ratio = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


class RotaryEmbedding:
    """Cosines and sines per step rather than a table: no memory per position, and T x D/2 is little work."""

    def __init__(self, rope: RopeSpec, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> None:
        frequencies, self._scale = inverse_frequencies(rope, head_dim)
        self._frequencies = frequencies.to(device)
        self._dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each [T, 1, head_dim / 2], of positions [T]."""
        cos, sin = self.tables(positions)
        return cos[:, None].to(self._dtype), sin[:, None].to(self._dtype)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each float32 [T, head_dim / 2], of positions [T]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return cos, sin


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [T, heads, head_dim] in place; a pair is (i, i + head_dim / 2), as Llama stores them."""
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
