"""Pages of large memory: taken before they are needed, and large ones where the system has them.

The first touch of a page costs microseconds, and 512 tokens of KV lie on thousands of them: a prompt's pages
are to be there before the prompt is. And what is read from end to end in every step, as weights are, is read
faster from pages of 2 MiB. Both are advice: where the system does not take it, all goes on as without.
"""

from __future__ import annotations

import ctypes
import sys

LARGE_PAGE_BYTES = 2 * 1024 * 1024
# Linux 2.6.38 and 5.14.
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23


def prefer_large_pages(address: int, num_bytes: int) -> None:
    """Have the large pages that lie within a range be taken as such, when they are first touched."""
    start = -(-address // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
    end = (address + num_bytes) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
    if start < end:
        _advise(start, end - start, _MADV_HUGEPAGE)


def populate(address: int, num_bytes: int) -> bool:
    """Take all pages of a range that begins with one; False where this system can't. What is there stays.

    Others may use the range meanwhile. The interpreter is not held up.
    """
    return _advise(address, num_bytes, _MADV_POPULATE_WRITE)


def _advise(address: int, num_bytes: int, advice: int) -> bool:
    if sys.platform != "linux":
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(address, num_bytes, advice) == 0)
