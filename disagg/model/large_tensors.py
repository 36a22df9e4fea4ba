"""Tensors on a CPU that lie on large pages, see disagg.pages."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from disagg.pages import LARGE_PAGE_BYTES, prefer_large_pages


def large_zeros(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros, which take memory as they are written; what is smaller than a large page is ordinary."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < LARGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    # Not from the allocator, which may have touched it before: small pages stay small. Private, since shared
    # memory has large pages only where an administrator has allowed them.
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE_BYTES
    used = whole[start : start + num_bytes]
    # No large page for the rest of less than one: many weights would leave much of theirs unused.
    prefer_large_pages(used.data_ptr(), used.nbytes)
    return used.view(dtype).view(shape)


def large_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy of a tensor, however it lies."""
    return large_zeros(tensor.shape, tensor.dtype).copy_(tensor)
