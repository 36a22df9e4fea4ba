"""Paged attention on the CPU: which rows of the cache each sequence reads, and attention over them.

What depends on the batch alone (row numbers, masks) is planned once per step; each layer then gathers its
keys and values with one index_select and attends. Grouped query heads share their keys and values: as
queries of one head where a sequence has one token, through a broadcast head dimension in a chunk.

    step ──plan()──► AttentionPlan: decode groups │ chunks ──attend() per layer──► [T, heads * head_dim]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.model.kv_cache import KVCache
from disagg.model.step import Chunk

# Keys and values gathered at a time for a decode group: about what stays in a core's cache until it is
# read again. Larger ones are also fresh pages for every call: 83 ms instead of 2 for 134 MB, measured.
GROUP_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """One-token chunks that attend in one call. gather: rows [2 * B * H * n]; mask: [B, 1, 1, n * bs]."""

    rows: Tensor
    size: int
    num_blocks: int
    gather: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    """A longer chunk. gather: rows [2 * H * n], None where the chunk attends to nothing but itself."""

    start: int
    end: int
    num_blocks: int
    gather: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one step's tokens attend, for all layers with the same window."""

    groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_ChunkPlan, ...]


def plan_step(
    chunks: Sequence[Chunk], windows: Sequence[int | None], cache: KVCache
) -> dict[int | None, AttentionPlan]:
    """Return one plan per distinct window among the layers."""
    longest = max(chunk.context + chunk.num_tokens for chunk in chunks)
    plans: dict[int | None, AttentionPlan] = {}
    for window in set(windows):
        # A window that no sequence has outgrown is none.
        effective = None if window is None or window >= longest else window
        if effective not in plans:
            plans[effective] = _plan(chunks, effective, cache)
        plans[window] = plans[effective]
    return plans


def _plan(chunks: Sequence[Chunk], window: int | None, cache: KVCache) -> AttentionPlan:
    singles = [chunk for chunk in chunks if chunk.num_tokens == 1]
    longer = [chunk for chunk in chunks if chunk.num_tokens > 1]
    groups = tuple(_plan_group(group, window, cache) for group in _grouped(singles, window, cache))
    return AttentionPlan(groups, tuple(_plan_chunk(chunk, window, cache) for chunk in longer))


def _first_block(chunk: Chunk, window: int | None, block_size: int) -> int:
    """First block that the chunk's first token may look at."""
    return 0 if window is None else max(0, chunk.context - window + 1) // block_size


def _needed_blocks(chunk: Chunk, window: int | None, block_size: int) -> npt.NDArray[np.int64]:
    end = -(-(chunk.context + chunk.num_tokens) // block_size)
    return chunk.block_table[_first_block(chunk, window, block_size) : end]


def _grouped(singles: list[Chunk], window: int | None, cache: KVCache) -> list[list[Chunk]]:
    """Cut decodes, longest first, into groups that waste little on padding and stay within GROUP_BYTES."""
    block_bytes = cache.layout.block_bytes // cache.layout.num_layers
    lengths = {id(chunk): len(_needed_blocks(chunk, window, cache.block_size)) for chunk in singles}
    groups: list[list[Chunk]] = []
    longest = 0
    for chunk in sorted(singles, key=lambda chunk: -lengths[id(chunk)]):
        full = groups and (len(groups[-1]) + 1) * longest * block_bytes > GROUP_BYTES
        if not groups or full or 2 * lengths[id(chunk)] < longest:
            groups.append([])
            longest = lengths[id(chunk)]
        groups[-1].append(chunk)
    return groups


def _gather_rows(blocks: npt.NDArray[np.int64], cache: KVCache) -> Tensor:
    """Rows of KVCache.rows for blocks [B, n], in the order [2, B, H, n]."""
    rows = blocks[None, :, None, :] * cache.rows_per_block + cache.head_rows[:, None, :, None]
    return torch.from_numpy(rows.reshape(-1)).to(cache.blocks.device)


def _plan_group(group: list[Chunk], window: int | None, cache: KVCache) -> _DecodeGroup:
    size = cache.block_size
    needed = [_needed_blocks(chunk, window, size) for chunk in group]
    width = max(len(blocks) for blocks in needed)
    # Padding reads the sequence's own first block: finite values, masked below.
    blocks = np.empty((len(group), width), dtype=np.int64)
    for row, own in zip(blocks, needed, strict=True):
        row[: len(own)] = own
        row[len(own) :] = own[0]
    first = np.array([_first_block(chunk, window, size) * size for chunk in group])
    query = np.array([chunk.context for chunk in group])
    mask = _mask(query, first[:, None] + np.arange(width * size), window, cache)
    rows = torch.tensor([chunk.first_row for chunk in group], device=cache.blocks.device)
    return _DecodeGroup(rows, len(group), width, _gather_rows(blocks, cache), mask[:, None, None, :])


def _plan_chunk(chunk: Chunk, window: int | None, cache: KVCache) -> _ChunkPlan:
    start, end = chunk.first_row, chunk.first_row + chunk.num_tokens
    outgrown = window is not None and window < chunk.num_tokens
    if chunk.context == 0 and not outgrown:
        return _ChunkPlan(start, end, 0, None, None)
    blocks = _needed_blocks(chunk, window, cache.block_size)
    first = _first_block(chunk, window, cache.block_size) * cache.block_size
    keys = first + np.arange(len(blocks) * cache.block_size)
    query = chunk.context + np.arange(chunk.num_tokens)
    mask = _mask(query, keys[None, :], window, cache)
    return _ChunkPlan(start, end, len(blocks), _gather_rows(blocks[None, :], cache), mask)


def _mask(
    query: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], window: int | None, cache: KVCache
) -> Tensor:
    """Return 0 where the query at a position may see a key, -inf elsewhere: [len(query), keys.shape[-1]]."""
    seen = keys <= query[:, None]
    if window is not None:
        seen &= keys > query[:, None] - window
    mask = np.where(seen, np.float32(0), np.float32("-inf"))
    return torch.from_numpy(mask).to(device=cache.blocks.device, dtype=cache.dtype)


def attend(qkv: Tensor, plan: AttentionPlan, cache: KVCache, layer: int) -> Tensor:
    """Return [T, Hq * D] for qkv [T, Hq + 2 H, D], rotated; its keys and values are in the cache already."""
    num_heads = qkv.shape[1] - 2 * cache.num_kv_heads
    out = torch.empty((qkv.shape[0], num_heads, qkv.shape[2]), dtype=qkv.dtype, device=qkv.device)
    for group in plan.groups:
        _attend_group(qkv, group, cache, layer, out)
    for chunk in plan.chunks:
        _attend_chunk(qkv, chunk, cache, layer, out)
    return out.view(qkv.shape[0], -1)


def _gathered(rows: Tensor, size: int, num_blocks: int, cache: KVCache, layer: int) -> Tensor:
    """Return keys and values [2, size, H, num_blocks * block_size, D]."""
    picked = cache.rows(layer).index_select(0, rows)
    return picked.view(2, size, cache.num_kv_heads, num_blocks * cache.block_size, cache.layout.head_dim)


def _attend_group(qkv: Tensor, group: _DecodeGroup, cache: KVCache, layer: int, out: Tensor) -> None:
    num_heads, head_dim = out.shape[1:]
    keys, values = _gathered(group.gather, group.size, group.num_blocks, cache, layer)
    # A group's heads stand where a sequence's tokens would: [B, H, Hq / H, D].
    query = qkv[group.rows, :num_heads].view(group.size, cache.num_kv_heads, -1, head_dim)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=group.mask)
    out[group.rows] = mixed.reshape(group.size, num_heads, head_dim)


def _attend_chunk(qkv: Tensor, chunk: _ChunkPlan, cache: KVCache, layer: int, out: Tensor) -> None:
    num_heads, head_dim = out.shape[1:]
    num_kv, length = cache.num_kv_heads, chunk.end - chunk.start
    own = qkv[chunk.start : chunk.end]
    shared = num_heads // num_kv
    query = own[:, :num_heads].view(length, num_kv, shared, head_dim).permute(1, 2, 0, 3)
    if chunk.gather is None:
        keys, values = own[:, num_heads:].view(length, 2, num_kv, head_dim).permute(1, 2, 0, 3)
    else:
        keys, values = _gathered(chunk.gather, 1, chunk.num_blocks, cache, layer)[:, 0]
    # Stride 0 over the heads that share keys: nothing is repeated in memory.
    keys = keys[:, None].expand(-1, shared, -1, -1)
    values = values[:, None].expand(-1, shared, -1, -1)
    mixed = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None
    )
    out[chunk.start : chunk.end] = mixed.permute(2, 0, 1, 3).reshape(length, num_heads, head_dim)
