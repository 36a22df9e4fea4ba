"""Draws one token a row from logits and noise keyed by (seed, position), in one pass over the vocabulary.

The Gumbel-max trick with disagg.model.noise's generator: the same 64 random bits per (key, token id), made
in registers instead of as a tensor of the vocabulary's size (an eighth of the memory traffic and one launch
instead of some fifteen per few rows). A program finds the best token of its part of a row; torch then
chooses among those few with noise.gumbel itself, so that what is drawn is what Sampler draws. The kernel's
logarithms may differ from torch's in the last place: a draw differs only where the best two tokens of one
part are within a millionth of each other.

Greedy rows take the largest logit, the first of equals, as torch.argmax does on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import ceil_div, require, require_indices
from disagg.model.noise import gumbel


@triton.jit
def _gumbel(key, token):
    """disagg.model.noise.gumbel of one key and int64 token ids: SplitMix64, then -log(-log(1 - u))."""
    z = (token + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    # As int64, which it fits: torch converts that, and devices convert it faster than uint64.
    u = ((z >> 11).to(tl.int64).to(tl.float32) + 0.5) * 1.1102230246251565e-16
    u = tl.minimum(u, 0.9999999403953552)
    # log1p(-u), which Triton lacks (Kahan): the rounding of 1 - u cancels in the quotient.
    rest = 1.0 - u
    log1p = tl.where(rest == 1.0, -u, tl.log(rest) * (-u / tl.where(rest == 1.0, 1.0, rest - 1.0)))
    return -tl.log(-log1p)


@triton.jit(do_not_specialize=["keys_ptr"])
def _best_token_kernel(
    logits_ptr,
    temperatures_ptr,
    keys_ptr,
    thresholds_ptr,
    best_ptr,
    vocab_size,
    logits_stride,
    WIDTH: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = part * WIDTH + tl.arange(0, WIDTH)
    inside = token < vocab_size
    scores = tl.load(logits_ptr + row * logits_stride + token, mask=inside, other=float("-inf"))
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0.0:
        key = tl.load(keys_ptr + row)
        scaled = tl.div_rn(scores, temperature)
        eligible = scaled >= tl.load(thresholds_ptr + row)
        scores = tl.where(eligible, scaled + _gumbel(key, token.to(tl.int64)), float("-inf"))
        # Padding has noise too, but nothing is added to -inf.
    best = part * WIDTH + tl.argmax(scores, 0, tie_break_left=True)
    tl.store(best_ptr + row * tl.num_programs(0) + part, best.to(tl.int64))


def sample(logits: Tensor, temperatures: Tensor, keys: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """Return the drawn token ids, int64 [S], of float32 logits [S, V], which stay as they are.

    temperatures: float32 [S]; 0 takes the largest logit. keys: int64 [S], disagg.model.noise.noise_key of
    each row's (seed, position). thresholds: float32 [S], the least logit / temperature that may be drawn
    (kernels.eligibility); None for all.
    All tensors lie on one device and nothing waits for it.

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    require(logits.dim() == 2 and logits.dtype is torch.float32, f"is {logits.dtype}", param="logits")
    require(logits.shape[1] > 0 and logits.stride(1) == 1, "has empty or strided rows", param="logits")
    num_rows, vocab_size = logits.shape
    require_indices(num_rows, keys=keys)
    require(keys.dtype is torch.int64, f"has dtype {keys.dtype}", param="keys")
    fits = temperatures.shape == (num_rows,) and temperatures.dtype is torch.float32
    require(fits and temperatures.is_contiguous(), "is not float32 of one a row", param="temperatures")
    if thresholds is None:
        thresholds = torch.full_like(temperatures, -torch.inf)
    fits = thresholds.shape == (num_rows,) and thresholds.dtype is torch.float32
    require(fits and thresholds.is_contiguous(), "is not float32 of one a row", param="thresholds")
    width = tiling.sample_width(vocab_size)
    parts = ceil_div(vocab_size, width)
    best = torch.empty(num_rows, parts, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return best.sum(-1)
    _best_token_kernel[(parts, num_rows)](
        logits,
        temperatures,
        keys,
        thresholds,
        best,
        vocab_size,
        logits.stride(0),
        WIDTH=width,
        num_warps=8,
    )
    return _choose(logits, temperatures, keys, thresholds, best)


def _choose(logits: Tensor, temperatures: Tensor, keys: Tensor, thresholds: Tensor, best: Tensor) -> Tensor:
    """Return of each row's candidates [S, parts] the one that the reference's arithmetic scores highest."""
    scores = logits.gather(1, best)
    drawn = temperatures[:, None] > 0
    scaled = scores / torch.where(drawn, temperatures[:, None], 1.0)
    # A part may hold no eligible token; its candidate is then none either.
    noisy = torch.where(scaled >= thresholds[:, None], scaled + gumbel(keys[:, None], best), -torch.inf)
    winner = torch.where(drawn, noisy, scores).argmax(-1, keepdim=True)
    return best.gather(1, winner)[:, 0]
