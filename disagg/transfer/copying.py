"""Rows of one cache copied to rows of another.

`_copy.c` writes past the processor's caches, where it was built when the package was installed (there was a C
compiler). Without it, or with DISAGG_KV_COPY=numpy in the environment, numpy does the same: slower, with the
same bytes. Blocks of 2 MiB that are in no cache, on an AMD EPYC: 12 GB/s beside numpy's 7.5.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence

from disagg.transfer.segment import Blocks

# Copied without looking up: bounds how long a cancelled pull is waited for to about 5 ms.
COPY_PIECE_BYTES = 32 * 1024 * 1024
# Less than this stays in a cache until it is read.
STREAMED_BYTES = 4 * 1024 * 1024
# Of the C source; a build of another one is not used.
_VERSION = 1

StreamRows = Callable[[Blocks, list[int], Blocks, list[int]], None]


def _compiled() -> StreamRows | None:
    if os.environ.get("DISAGG_KV_COPY") == "numpy":
        return None
    try:
        from disagg.transfer import _copy
    except ImportError:
        return None
    return _copy.stream_rows if _copy.VERSION == _VERSION else None


COMPILED = _compiled()


def copy_rows(
    source: Blocks,
    source_rows: Sequence[int],
    target: Blocks,
    target_rows: Sequence[int],
    stop: threading.Event,
    *,
    read_soon: bool = False,
) -> None:
    """Copy rows until told to stop, mostly without the GIL. Raises IndexError for a row that isn't there.

    source, target: uint8 [n, block_bytes], contiguous. read_soon: the copy is read again at once, so it had
    better be in a cache.
    """
    stream = COMPILED if not read_soon and len(source_rows) * source.shape[1] >= STREAMED_BYTES else None
    copy = stream or copy_runs
    step = max(1, COPY_PIECE_BYTES // source.shape[1])
    for start in range(0, len(source_rows), step):
        if stop.is_set():
            return
        piece = slice(start, start + step)
        copy(source, list(source_rows[piece]), target, list(target_rows[piece]))


def copy_runs(source: Blocks, source_rows: list[int], target: Blocks, target_rows: list[int]) -> None:
    """Copy rows by numpy; neighbours that stay neighbours go in one piece."""
    for start, end in runs(source_rows, target_rows, len(source_rows)):
        count = end - start
        first, to = source_rows[start], target_rows[start]
        target[to : to + count] = source[first : first + count]


def runs(source_rows: Sequence[int], target_rows: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of stretches, `longest` at most, over which both sequences go up by one."""
    start = 0
    for index in range(1, len(source_rows) + 1):
        joined = (
            index < len(source_rows)
            and index - start < longest
            and source_rows[index] == source_rows[index - 1] + 1
            and target_rows[index] == target_rows[index - 1] + 1
        )
        if not joined:
            yield start, index
            start = index
