"""The kernels' benchmark runs whole under the interpreter and writes rows of the agreed form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
KERNELS = (
    "add_rms_norm decode_attention gather_blocks kv_store prefill_attention rope sampling "
    "scatter_blocks swiglu"
).split()


def test_every_row_on_cpu(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = [
        sys.executable,
        "benchmarks/kernels.py",
        "--device",
        "cpu",
        "--runs",
        "1",
        "--json",
        str(target),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(target.read_text())
    assert {"cpu", "cores", "torch", "triton"} <= set(report["machine"])
    rows = {row["name"]: row for row in report["rows"]}
    assert all(name.startswith("kernels/interpreted/") for name in rows)
    measured = {name: row for name, row in rows.items() if "/limit/" not in name}
    assert sorted({name.split("/")[2] for name in measured}) == KERNELS
    limits = {row["unit"]: row["value"] for name, row in rows.items() if "/limit/" in name}
    for row in measured.values():
        assert row["value"] > 0 and row["peer"] > 0 and row["runs"] == 1
        assert row["limit"] == limits[row["unit"]]
        assert abs(row["share"] - row["value"] / row["limit"]) <= 2e-3 * row["share"]
        assert abs(row["ratio"] - row["value"] / row["peer"]) <= 2e-3 * row["ratio"]
