"""Tensors on large pages are tensors like others."""

from __future__ import annotations

import gc

import pytest
import torch

from disagg.model.large_tensors import large_copy, large_zeros
from disagg.pages import LARGE_PAGE_BYTES, prefer_large_pages


@pytest.mark.parametrize("rows", [1, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
def test_zeros_of_any_size(rows: int, dtype: torch.dtype) -> None:
    made = large_zeros((rows, 3, 257), dtype)
    assert made.shape == (rows, 3, 257) and made.dtype is dtype and made.is_contiguous()
    assert not made.any()
    if made.nbytes >= LARGE_PAGE_BYTES:
        assert made.data_ptr() % LARGE_PAGE_BYTES == 0


def test_a_copy_outlives_what_it_was_made_of() -> None:
    source = torch.arange(2_000_000, dtype=torch.int64).view(1000, 2000).T
    copied = large_copy(source)
    expected = source.clone()
    source.zero_()
    del source
    gc.collect()
    assert copied.is_contiguous() and torch.equal(copied, expected)


def test_advice_on_less_than_a_page_is_no_error() -> None:
    tensor = torch.ones(10)
    prefer_large_pages(tensor.data_ptr() + 1, 3)
    assert (tensor == 1).all()
