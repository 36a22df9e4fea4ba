"""Copies whole KV blocks between the cache and a contiguous staging buffer, one launch for all of a hand-off.

A block of the cache is contiguous over its layers (see kv_cache.py), so this is a copy of bytes whatever the
dtype; it goes in 16-byte words per thread where a block's size allows, which it does for all real models.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from disagg.model.kernels import tiling
from disagg.model.kernels.common import ceil_div, require, require_indices


@triton.jit(do_not_specialize=["block_ids_ptr"])
def _copy_kernel(
    blocks_ptr, staging_ptr, block_ids_ptr, num_blocks, words, WIDTH: tl.constexpr, GATHER: tl.constexpr
):
    # On one axis, since the others end at 65535.
    chunks = tl.cdiv(words, WIDTH)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    block = tl.load(block_ids_ptr + row).to(tl.int64)
    if (block < 0) | (block >= num_blocks):
        return
    index = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)
    inside = index < words
    in_cache = blocks_ptr + block * words + index
    in_staging = staging_ptr + row * words + index
    if GATHER:
        tl.store(in_staging, tl.load(in_cache, mask=inside), mask=inside)
    else:
        tl.store(in_cache, tl.load(in_staging, mask=inside), mask=inside)


def gather_blocks(blocks: Tensor, block_ids: Tensor, staging: Tensor) -> None:
    """Copy blocks[block_ids[i]] to the i-th part of staging.

    blocks: the cache, [num_blocks, ...] contiguous in any dtype. block_ids: int64 or int32 [n]; an id
    outside the cache (-1 for padding) is skipped. staging: contiguous, any dtype, n * block bytes or more.

    Raises ConfigError naming an argument that does not fit.
    """
    _copy(blocks, block_ids, staging, gather=True)


def scatter_blocks(staging: Tensor, blocks: Tensor, block_ids: Tensor) -> None:
    """Copy the i-th part of staging to blocks[block_ids[i]]: gather_blocks the other way; distinct ids."""
    _copy(blocks, block_ids, staging, gather=False)


def _copy(blocks: Tensor, block_ids: Tensor, staging: Tensor, *, gather: bool) -> None:
    require(blocks.is_contiguous() and blocks.dim() > 1, "is not contiguous blocks", param="blocks")
    require(staging.is_contiguous(), "is not contiguous", param="staging")
    num_ids, num_blocks = block_ids.numel(), blocks.shape[0]
    require_indices(num_ids, block_ids=block_ids)
    if num_ids == 0 or num_blocks == 0:
        return
    num_bytes = blocks[0].numel() * blocks.element_size()
    given = staging.numel() * staging.element_size()
    require(given >= num_ids * num_bytes, f"has {given} bytes for {num_ids} of {num_bytes}", param="staging")
    word = _word(num_bytes, blocks, staging)
    words = num_bytes // word.itemsize
    width = tiling.copy_width(words, word.itemsize)
    # Bytes regrouped into words: the same memory, no copy.
    flat, target = blocks.view(-1).view(torch.uint8).view(word), staging.view(-1).view(torch.uint8)
    _copy_kernel[(ceil_div(words, width) * num_ids,)](
        flat,
        target[: num_ids * num_bytes].view(word),
        block_ids,
        num_blocks,
        words,
        WIDTH=width,
        GATHER=gather,
        num_warps=4,
    )


def _word(num_bytes: int, *tensors: Tensor) -> torch.dtype:
    """Return the widest integer that divides a block and both buffers' addresses."""
    for word in (torch.int64, torch.int32, torch.int16):
        size = word.itemsize
        if num_bytes % size == 0 and all(tensor.data_ptr() % size == 0 for tensor in tensors):
            return word
    return torch.uint8
