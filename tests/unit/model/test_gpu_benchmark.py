"""The command for a GPU runs whole on a CPU, and its engine rows have the agreed form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_smoke(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--json", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    report = json.loads(target.read_text())
    assert {part: run["status"] for part, run in report["parts"].items()} == {
        "engine": 0,
        "kernels": 0,
        "tests": 0,
    }
    assert {"cpu", "torch", "triton"} <= set(report["machine"])
    rows = {row["name"]: row for row in report["rows"]}
    for name in ("prefill/6", "decode/b1_ctx20", "decode/b3_ctx9"):
        row = rows[f"engine/interpreted/tiny/{name}"]
        assert row["value"] > 0 and row["peer"] > 0 and row["unit"] == "tokens/s"
        assert abs(row["share"] - row["value"] / row["limit"]) <= 2e-3 * row["share"]
    assert any(name.startswith("kernels/interpreted/gather_blocks") for name in rows)
