"""Tile sizes, warps and splits of every kernel, as pure functions of the shape.

Fixed rules instead of autotuning: a worker's start takes the same time on every machine, and nothing is
measured while other work runs. They come from the chip's limits (Hopper: 64 Ki registers and 227 KiB of
shared memory a multiprocessor, some 40 KiB of loads in flight on each to reach the memory's bandwidth) and
from what ptxas reports for sm_90: with 16-bit queries up to head_dim 128 no tile below spills registers. None
was timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg.errors import ConfigError

# Five decode programs fit on a multiprocessor; three rounds of them leave little idle at the end, also where
# contexts are ragged, while partial results stay under 2 % of the bytes of a context of 4k tokens.
PROGRAMS_PER_PROCESSOR = 16
# Fewer tokens a split than this, and starting it and merging it cost more than reading them.
MIN_SPLIT_TOKENS = 256
# The merge holds all splits of one query head in registers at once.
MAX_SPLITS = 64
# A cache line is 128 bytes and a thread loads 16; 32 KiB keep 16 loads a thread in flight in 4 warps.
COPY_BYTES = 32768
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
# Tensor cores take no fewer rows; a smaller group of query heads is padded with rows of zeros.
MIN_DOT_ROWS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """rows: query rows of a program. tokens: keys it takes at a time. warps, stages: of its pipeline."""

    rows: int
    tokens: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """Return the next power of two from `size` up: the only extents a Triton tile can have."""
    return 1 << (size - 1).bit_length()


def check_head_dim(head_dim: int) -> None:
    """Raise ConfigError naming head_dim unless the attention kernels' tiles can hold it."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim of {head_dim} is not within {MIN_HEAD_DIM} to {MAX_HEAD_DIM}", param="head_dim"
        )


def decode_tile(group_size: int, head_dim: int, itemsize: int, kv_itemsize: int) -> Tile:
    """Return the tile of decode attention for `group_size` query heads a KV head.

    head_dim: padded to a power of two. itemsize, kv_itemsize: bytes of an element of queries and of the
    cache. 32 KiB of keys and values are in flight for one program, and five programs share a multiprocessor
    (bfloat16, head_dim 128: 92 registers, 39 KiB shared). Converting fp8 takes registers: 64 tokens of it
    would leave room for two programs (202 registers), 32 for four.
    """
    tokens = (32 << 10) // (2 * head_dim * itemsize)
    if kv_itemsize == 1:
        tokens //= 2
    rows = max(MIN_DOT_ROWS, padded(group_size))
    return Tile(rows, max(MIN_DOT_ROWS, min(tokens, 128)), warps=4, stages=3)


def prefill_tile(group_size: int, head_dim: int, itemsize: int, max_query_len: int) -> Tile:
    """Return the tile of prefill attention; its rows hold rows // group_size tokens for all their heads.

    128 rows keep Hopper's matrix units fed (two warpgroups of 64) and read a key from L2 once for 128
    queries; with 64 tokens of 128 dimensions that takes 182 registers and 97 KiB. float32 runs as three
    tf32 products, whose operands only leave room for 32 rows. Short chunks take small tiles: rows beyond
    them would be computed and thrown away.
    """
    most = 128 if itemsize <= 2 else 32
    rows = max(MIN_DOT_ROWS, min(most, padded(max_query_len * group_size)), padded(group_size))
    tokens = max(MIN_DOT_ROWS, min(64, (32 << 10) // (2 * head_dim * itemsize)))
    return Tile(rows, tokens, warps=8 if rows >= 128 else 4, stages=3 if itemsize <= 2 else 2)


def num_splits(batch_size: int, num_kv_heads: int, max_context: int, num_processors: int) -> int:
    """Return into how many parts decode attention cuts every context, at least 1.

    As many as give each multiprocessor PROGRAMS_PER_PROCESSOR programs, but none of fewer than
    MIN_SPLIT_TOKENS tokens at the longest context. Depends on nothing that changes from step to step within
    a CUDA graph; a sequence shorter than max_context leaves its surplus parts empty.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // (batch_size * num_kv_heads))
    useful = max_context // MIN_SPLIT_TOKENS
    return max(1, min(wanted, useful, MAX_SPLITS))


def elementwise_warps(size: int) -> int:
    """Return the warps for a program over `size` elements: about 16 a thread, 4 to 16 warps."""
    return max(4, min(16, size // (16 * 32)))


def rope_heads(num_heads: int, half: int) -> int:
    """Return the heads that one program rotates: 2048 pairs, 16 a thread, so that cosines are read once."""
    return max(1, min(padded(num_heads), 2048 // half))


def swiglu_width(size: int) -> int:
    """Return the columns of a program: 1024, 8 a thread in 4 warps (one 16-byte load of each half)."""
    return min(1024, padded(size))


def copy_width(words: int, word_bytes: int) -> int:
    """Return the words that a program copies: COPY_BYTES, or the whole block where it is smaller."""
    return min(COPY_BYTES // word_bytes, padded(words))


def sample_width(vocab_size: int) -> int:
    """Return the logits of a program: 4096, 16 a thread in 8 warps; one row fills 32 programs."""
    return min(4096, padded(vocab_size))
