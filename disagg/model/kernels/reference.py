"""The kernels' meaning in plain torch, a sequence at a time: what tests and benchmarks compare with.

Slow on purpose and in float64 (attention) or float32, whatever comes in; results are not rounded back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disagg.model.kernels.common import FP8_DTYPE, FP8_MAX


def _cached(kv: Tensor, block_table: Tensor, num_tokens: int, scale: float, which: int) -> Tensor:
    """Return keys (which = 0) or values (1) of a sequence's first tokens, float64 [Hkv, num_tokens, D]."""
    block_size = kv.shape[3]
    ids = block_table[: -(-num_tokens // block_size)].long()
    # Through float32: torch converts fp8 to no other dtype directly on every device.
    blocks = kv[ids, which].float().double() * scale
    return blocks.transpose(0, 1).flatten(1, 2)[:, :num_tokens]


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int) -> Tensor:
    """Return [n, Hq, D] for queries [n, Hq, D] at `positions` [n] over keys and values [Hkv, C, D]."""
    group = q.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("qhd,hkd->hqk", q.double(), keys) * scale
    distance = positions[:, None] - torch.arange(keys.shape[1], device=q.device)
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.einsum("hqk,hkd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Return float64 [T, Hq, D]; arguments as those of prefill_attention.prefill_attention."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = query_starts.tolist()
    for index, context in enumerate(context_lens.tolist()):
        start, end = starts[index], starts[index + 1]
        if start == end:
            continue
        keys = _cached(kv, block_tables[index], context, k_scale, 0)
        values = _cached(kv, block_tables[index], context, v_scale, 1)
        positions = torch.arange(context - (end - start), context, device=q.device)
        out[start:end] = _attend(q[start:end], keys, values, positions, scale, window or 0)
    return out


def decode_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Return float64 [B, Hq, D]; zeros where a context is empty."""
    starts = torch.cat([context_lens.new_zeros(1), (context_lens > 0).cumsum(0)])
    rows = (context_lens > 0).nonzero()[:, 0]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    out[rows] = prefill_attention(
        q[rows],
        kv,
        block_tables,
        starts,
        context_lens,
        scale=scale,
        window=window,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return out


def quantize(x: Tensor, scale: float) -> Tensor:
    """Return x / scale in fp8 e4m3, saturated."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def store_kv(
    k: Tensor, v: Tensor, kv: Tensor, slot_mapping: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0
) -> None:
    """Write k and v [T, Hkv, D] into slots of one layer's view of the cache; slots below 0 are skipped."""
    block_size = kv.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        for which, (rows, scale) in enumerate(((k, k_scale), (v, v_scale))):
            row = quantize(rows[token], scale) if kv.dtype is FP8_DTYPE else rows[token].to(kv.dtype)
            kv[slot // block_size, which, :, slot % block_size] = row


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed sum in float32 and the sum in x's dtype, both [T, H]."""
    total = x if residual is None else x + residual
    wide = total.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float(), total


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Return x [T, H, D] rotated, float32; a pair is (i, i + R / 2) within the first R = 2 * cos.shape[1]."""
    half = cos.shape[1]
    c, s = cos[positions].float()[:, None], sin[positions].float()[:, None]
    first, second, rest = x.float().split([half, half, x.shape[2] - 2 * half], dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * up in float32 [T, I] of x [T, 2 I], gate first."""
    gate, up = x.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gather_blocks(blocks: Tensor, block_ids: Tensor) -> Tensor:
    """Return the bytes of the blocks, uint8 [n, block_bytes]."""
    return blocks.flatten(1).view(torch.uint8)[block_ids.long()]


def scatter_blocks(staging: Tensor, blocks: Tensor, block_ids: Tensor) -> None:
    """Write staging's rows, uint8 [n, block_bytes], over the blocks."""
    blocks.flatten(1).view(torch.uint8)[block_ids.long()] = staging
