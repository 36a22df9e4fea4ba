"""Which tokens top_k, top_p and min_p leave to be drawn: one threshold a row, without waiting for the device.

The same threshold as disagg.model.logits.eligibility_threshold, found without a sort: by bisection over the
bit patterns of float32, which order like the numbers once negative ones are mirrored. Each halving counts
(top_k) or weighs (top_p) the tokens of a row at or above a candidate; 32 of them single out one token's bits.
A row of 128k logits is 0.5 MB and stays in L2 meanwhile; rows whose parameters filter nothing end at once.

torch's way costs a device-wide sort and reads sizes back to the host, which a decode step must not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import require, require_indices


@triton.jit
def _mirrored(bits):
    """Bits of float32 as int32 to integers in the numbers' order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _ordinal(x):
    return _mirrored(x.to(tl.int32, bitcast=True))


@triton.jit
def _scaled(logits_ptr, start, vocab_size, temperature, WIDTH: tl.constexpr):
    token = start + tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf"))
    return tl.div_rn(logits, temperature)


@triton.jit(do_not_specialize=["top_k_ptr", "top_p_ptr"])
def _threshold_kernel(
    logits_ptr,
    temperatures_ptr,
    log_min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    threshold_ptr,
    vocab_size,
    logits_stride,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperatures_ptr + row)
    log_min_p = tl.load(log_min_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    limited = (top_k > 0) & (top_k < vocab_size)
    filters = limited | (top_p < 1.0) | (log_min_p > float("-inf"))
    if (temperature <= 0.0) | (filters == 0):
        tl.store(threshold_ptr + row, float("-inf"))
        return

    highest = tl.full([WIDTH], float("-inf"), tl.float32)
    for start in range(0, vocab_size, WIDTH):
        highest = tl.maximum(highest, _scaled(logits_ptr, start, vocab_size, temperature, WIDTH))
    peak = tl.max(highest, 0)
    threshold = peak + log_min_p

    # Invariant of both searches: `low` keeps enough tokens, `high + 1` does not. In int64: no overflow.
    top = _ordinal(peak).to(tl.int64)
    if limited:
        low, high = tl.full([], -2147483648, tl.int64), top
        for _ in range(32):
            middle = low + (high - low + 1) // 2
            count = tl.zeros([WIDTH], tl.int32)
            for start in range(0, vocab_size, WIDTH):
                x = _scaled(logits_ptr, start, vocab_size, temperature, WIDTH)
                inside = start + tl.arange(0, WIDTH) < vocab_size
                count += (inside & (_ordinal(x).to(tl.int64) >= middle)).to(tl.int32)
            enough = tl.sum(count, 0) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        threshold = tl.maximum(threshold, _mirrored(low.to(tl.int32)).to(tl.float32, bitcast=True))

    if top_p < 1.0:
        low, high = _ordinal(threshold).to(tl.int64), top
        mass = tl.zeros([WIDTH], tl.float64)
        for start in range(0, vocab_size, WIDTH):
            x = _scaled(logits_ptr, start, vocab_size, temperature, WIDTH)
            mass += tl.where(x >= threshold, tl.exp(x - peak), 0.0).to(tl.float64)
        goal = top_p * tl.sum(mass, 0)
        for _ in range(32):
            middle = low + (high - low + 1) // 2
            mass = tl.zeros([WIDTH], tl.float64)
            for start in range(0, vocab_size, WIDTH):
                x = _scaled(logits_ptr, start, vocab_size, temperature, WIDTH)
                kept = _ordinal(x).to(tl.int64) >= middle
                mass += tl.where(kept, tl.exp(x - peak), 0.0).to(tl.float64)
            enough = tl.sum(mass, 0) >= goal
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        threshold = _mirrored(low.to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(threshold_ptr + row, threshold)


def eligibility_threshold(
    logits: Tensor, temperatures: Tensor, log_min_p: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """Return per row the least logits / temperature that may be drawn, float32 [S]; -inf where all may.

    logits: float32 [S, V], kept as they are. temperatures: float32 [S]; 0 (greedy) filters nothing.
    log_min_p: float32 [S], logarithms; -inf for none. top_k: int64 [S]; 0, or V and more, for none.
    top_p: float64 [S], in (0, 1]; 1 for none. All on one device; nothing waits for it.

    Raises ConfigError naming an argument whose shape or dtype does not fit.
    """
    require(logits.dim() == 2 and logits.dtype is torch.float32, f"is {logits.dtype}", param="logits")
    require(logits.shape[1] > 0 and logits.stride(1) == 1, "has empty or strided rows", param="logits")
    num_rows, vocab_size = logits.shape
    require_indices(num_rows, top_k=top_k)
    for name, tensor, dtype in (
        ("temperatures", temperatures, torch.float32),
        ("log_min_p", log_min_p, torch.float32),
        ("top_p", top_p, torch.float64),
    ):
        fits = tensor.shape == (num_rows,) and tensor.dtype is dtype and tensor.is_contiguous()
        require(fits, f"is not {dtype} of one a row", param=name)
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _threshold_kernel[(num_rows,)](
            logits,
            temperatures,
            log_min_p,
            top_k,
            top_p,
            thresholds,
            vocab_size,
            logits.stride(0),
            WIDTH=tiling.sample_width(vocab_size),
            num_warps=8,
        )
    return thresholds
