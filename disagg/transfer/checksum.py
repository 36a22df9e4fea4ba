"""A checksum of KV blocks that costs a small part of sending them.

Each block is laid out in lines of 512 words of 64 bits, whose columns are summed modulo 2^64; the sums of all
blocks in order go through CRC-32. Blocks that changed places are noticed, as is every change that touches a
column once, which any burst up to the length of a line (4 KiB) does; changes in one column must cancel to 64
bits to pass, and all else the CRC's 32. Blocks that are short or no whole number of lines go through CRC-32
themselves. It is there for damage, not for malice: whoever could forge it has the cluster's secret.

Measured beside it, out of memory, on 2 cores of an AMD EPYC: these sums 10 to 14 GB/s, CRC-32 alone 1.5 to
2.7, a bare TCP stream 2.5 to 3.5. With CRC-32 over everything at both ends a stream fell to a third.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from disagg.transfer.segment import Blocks

_LINE_WORDS = 512
_LINE_BYTES = _LINE_WORDS * 8
# The sums are at most a sixteenth of what they are made of, so that their CRC takes little time.
_MIN_LINES = 16


def blocks_checksum(parts: Sequence[Blocks]) -> int:
    """Return the 32-bit checksum of blocks in order, however they are cut into parts.

    parts: each uint8 [n, block_bytes] and contiguous. Most of it runs without the interpreter's lock.
    """
    crc = 0
    for part in parts:
        lines, rest = divmod(part.shape[1], _LINE_BYTES)
        if rest or lines < _MIN_LINES:
            crc = zlib.crc32(part.reshape(-1).data, crc)
        else:
            words = part.view(np.uint64).reshape(len(part), lines, _LINE_WORDS)
            crc = zlib.crc32(words.sum(axis=1, dtype=np.uint64).data, crc)
    return crc


def contiguous_parts(blocks: Blocks, rows: Sequence[int]) -> list[Blocks]:
    """Return rows of `blocks`, uint8 [n, block_bytes], in order: a view of each stretch of neighbours."""
    parts, start = [], 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            parts.append(blocks[rows[start] : rows[index - 1] + 1])
            start = index
    return parts
