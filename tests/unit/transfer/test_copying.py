"""Copies of rows, compiled and by numpy: the same bytes, and nothing besides them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.transfer import copying
from disagg.transfer.copying import COMPILED, copy_rows
from disagg.transfer.segment import Blocks

NUM_ROWS = 9
needs_core = pytest.mark.skipif(COMPILED is None, reason="no C compiler was there when this was installed")


def rows_of(block_bytes: int, seed: int, offset: int = 0) -> Blocks:
    """Return uint8 [NUM_ROWS, block_bytes] whose memory begins `offset` bytes after an aligned address."""
    flat = np.random.default_rng(seed).integers(0, 256, NUM_ROWS * block_bytes + 128, dtype=np.uint8)
    start = -flat.ctypes.data % 64 + offset
    return flat[start : start + NUM_ROWS * block_bytes].reshape(NUM_ROWS, block_bytes)


@pytest.fixture(params=["numpy", pytest.param("compiled", marks=needs_core)])
def streamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies take the way of large ones."""
    monkeypatch.setattr(copying, "STREAMED_BYTES", 0)
    if request.param == "numpy":
        monkeypatch.setattr(copying, "COMPILED", None)


def copy(source: Blocks, source_rows: Sequence[int], target: Blocks, target_rows: Sequence[int]) -> None:
    copy_rows(source, source_rows, target, target_rows, threading.Event())


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("block_bytes", [1, 15, 16, 37, 64, 127, 128, 4096, 5001])
@pytest.mark.parametrize("offset", [0, 1, 15, 33])
def test_rows_arrive_and_no_other_is_touched(block_bytes: int, offset: int) -> None:
    source, target = rows_of(block_bytes, 1, offset), rows_of(block_bytes, 2, 5)
    expected = target.copy()
    source_rows, target_rows = [3, 4, 5, 0, 8], [1, 2, 7, 0, 8]
    expected[target_rows] = source[source_rows]
    copy(source, source_rows, target, target_rows)
    assert np.array_equal(target, expected)


@needs_core
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.lists(st.integers(0, NUM_ROWS - 1), max_size=12),
    st.permutations(range(NUM_ROWS)),
)
def test_both_ways_copy_the_same(block_bytes: int, chosen: list[int], order: list[int]) -> None:
    assert COMPILED is not None
    source_rows, target_rows = chosen[:NUM_ROWS], order[: len(chosen[:NUM_ROWS])]
    source = rows_of(block_bytes, 3)
    first, second = rows_of(block_bytes, 4), rows_of(block_bytes, 4, 7)
    second[:] = first
    COMPILED(source, source_rows, first, target_rows)
    copying.copy_runs(source, source_rows, second, target_rows)
    assert np.array_equal(first, second)


@pytest.mark.usefixtures("streamed")
def test_what_is_read_only_is_copied_from_and_told_to_stop_nothing_is() -> None:
    source, target = rows_of(64, 1), rows_of(64, 2)
    source.flags.writeable = False
    stop = threading.Event()
    stop.set()
    before = target.copy()
    copy_rows(source, [1], target, [2], stop)
    assert np.array_equal(target, before)
    copy(source, [1], target, [2])
    assert np.array_equal(target[2], source[1])


@needs_core
def test_wrong_rows_and_arrays_are_refused_before_anything_is_written() -> None:
    assert COMPILED is not None
    source, target = rows_of(64, 1), rows_of(64, 2)
    before = target.copy()
    for row in (-1, NUM_ROWS, 2**62):
        with pytest.raises(IndexError):
            COMPILED(source, [0, row], target, [0, 1])
        with pytest.raises(IndexError):
            COMPILED(source, [0, 1], target, [0, row])
    with pytest.raises(OverflowError):
        COMPILED(source, [0, 2**70], target, [0, 1])
    with pytest.raises(TypeError):
        COMPILED(source, [0, "1"], target, [0, 1])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        COMPILED(source, (0, 1), target, [0, 1])  # type: ignore[arg-type]
    wrong: list[tuple[Any, Any, list[int]]] = [
        (source[:, :32], target, [0]),
        (source, target[:, ::2], [0]),
        (source, rows_of(32, 1), [0]),
        (source, target, [0, 1]),
        (source.reshape(-1), target, [0]),
        (source.view(np.uint16), target, [0]),
    ]
    for left, right, left_rows in wrong:
        with pytest.raises(ValueError):
            COMPILED(left, left_rows, right, [0])
    frozen = target.view()
    frozen.flags.writeable = False
    with pytest.raises(ValueError):
        COMPILED(source, [0], frozen, [0])
    assert np.array_equal(target, before)


def test_numpy_alone_serves_too() -> None:
    code = "from disagg.transfer.copying import COMPILED; print(COMPILED)"
    environment = {**os.environ, "DISAGG_KV_COPY": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.strip() == b"None"
