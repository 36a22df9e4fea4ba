"""Noise for sampling, a pure function of (seed, position, token id).

A counter-based generator: no state, so batching, preemption, hand-off or retry never changes a draw, and
noise can be computed for just the tokens that survived the filters. The mixing is SplitMix64 (Steele, Lea
and Flood, 2014) in wrapping 64-bit integer tensor operations, whose bits are the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
WORD = (1 << 64) - 1
# Largest float32 below 1, so that log1p(-u) stays finite.
BELOW_ONE = 1.0 - 2.0**-24


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * MIX_1) & WORD
    z = ((z ^ (z >> 27)) * MIX_2) & WORD
    return z ^ (z >> 31)


def noise_key(seed: int, position: int) -> int:
    """Return the signed 64-bit key of all noise drawn for the token at `position` of a sequence."""
    inner = _mix(((seed & WORD) + GOLDEN) & WORD)
    return _signed(_mix((inner + (position + 1) * GOLDEN) & WORD))


def random_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Return 64 random bits as int64 per element of keys and token_ids (int64, broadcast together)."""
    z = (token_ids + 1) * _signed(GOLDEN) + keys
    z = _xor_shift_(z, 30).mul_(_signed(MIX_1))
    z = _xor_shift_(z, 27).mul_(_signed(MIX_2))
    return _xor_shift_(z, 31)


def _xor_shift_(z: Tensor, shift: int) -> Tensor:
    # int64 shifts drag the sign along; the mask makes the shift a logical one.
    return z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, float32: argmax(logits + noise) is a draw from softmax(logits).

    -log(-log(1 - u)) with u from 53 bits: float32 keeps its full precision near u = 0, which is where the
    large noise comes from that decides a draw.
    """
    bits = (random_bits(keys, token_ids) >> 11).bitwise_and_((1 << 53) - 1)
    u = bits.to(torch.float32).add_(0.5).mul_(2.0**-53).clamp_(max=BELOW_ONE)
    return u.neg_().log1p_().neg_().log_().neg_()
