"""Attention where any two of head dimension, GQA ratio, block size, window, cache and splits meet."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from test_kernels_decode_attention import check as check_decode
from test_kernels_prefill_attention import check as check_prefill


class Case(NamedTuple):
    head_dim: int
    group: int
    block_size: int
    window: int | None
    cache: str
    num_splits: int


AXES: tuple[tuple[Any, ...], ...] = (
    (64, 80, 96, 128, 256),
    tuple(range(1, 17)),
    (16, 32, 64, 128),
    (None, 1, 24),
    ("float32", "bfloat16", "fp8"),
    (1, 3),
)


def pairs_of(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    places = itertools.combinations(range(len(case)), 2)
    return {(first, case[first], second, case[second]) for first, second in places}


def pairwise(axes: tuple[tuple[Any, ...], ...]) -> list[Case]:
    """Return cases in which any two values of two axes meet: no more than the two longest axes force."""
    missing = {pair for case in itertools.product(*axes) for pair in pairs_of(case)}
    cases = []
    longest = sorted(range(len(axes)), key=lambda axis: -len(axes[axis]))
    for first, second in itertools.product(axes[longest[0]], axes[longest[1]]):
        fixed = {longest[0]: (first,), longest[1]: (second,)}
        rows = itertools.product(*(fixed.get(axis, values) for axis, values in enumerate(axes)))
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        cases.append(Case(*best))
    assert not missing, f"{len(missing)} pairs never meet"
    return cases


def decode(case: Case) -> None:
    """Contexts of one token, of a whole block, and of an odd number over two blocks; and a row of padding."""
    check_decode([1, case.block_size, 0, case.block_size + 7], num_kv_heads=1, **arguments(case))


def prefill(case: Case) -> None:
    """A prompt of one token, a chunk on a cached block, and a decode among them."""
    chunks = [(1, 0), (9, case.block_size - 2), (1, 20)]
    passed = arguments(case)
    del passed["num_splits"]
    check_prefill(chunks, num_kv_heads=1, **passed)


def arguments(case: Case) -> dict[str, Any]:
    passed = case._asdict()
    cache = passed.pop("cache")
    return {
        **passed,
        "dtype": torch.bfloat16 if cache == "fp8" else getattr(torch, cache),
        "fp8": cache == "fp8",
    }


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", AXES[0])
@pytest.mark.parametrize("attention", [decode, prefill])
def test_any_two_properties_together(attention: Any, head_dim: int) -> None:
    for case in pairwise(AXES):
        if case.head_dim == head_dim:
            run(attention, case)


def run(attention: Any, case: Case) -> None:
    try:
        attention(case)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error
