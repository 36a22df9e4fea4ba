"""Every kernel compiles for sm_90 and fits its shared memory, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 232_448
# Merging has one for each power of two of parts.
MOST_VARIANTS = 7
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("more", [[], pytest.param(["--all"], marks=pytest.mark.slow)])
def test_all_kernels_compile_for_hopper(more: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("kernels_compile.py")
    result = subprocess.run(
        [sys.executable, str(script), *more], env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "disagg/model/kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {kernel["name"] for kernel in kernels} == written
    # A compilation takes seconds, which the request pays for whose step is the first of its kind: what one
    # model needs must be few, and not grow with lengths, batches and where slices begin.
    variants = Counter(name for name, _ in {(kernel["name"], kernel["hash"]) for kernel in kernels})
    if not more:
        assert max(variants.values()) <= MOST_VARIANTS, variants
        assert variants["_partial_kernel"] == 2 and variants["_store_kernel"] == 1
    for kernel in kernels:
        assert kernel["cubin_bytes"] > 0
        assert kernel["shared"] <= HOPPER_SHARED_BYTES, kernel
        if kernel["name"] in {"_partial_kernel", "_prefill_kernel"}:
            assert kernel["tensor_cores"], kernel
