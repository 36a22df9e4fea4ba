"""Mappings of this process are counted here; those of earlier tests must not go while a test counts."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def _earlier_memory_is_gone() -> None:
    gc.collect()
