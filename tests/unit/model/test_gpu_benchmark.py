"""The command for a GPU: whole on a CPU (slow), and what it does of parts that fail or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
WRITE = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'machine': {'cpu': 'x'}, 'rows': [%s]}))"


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_or_hangs_loses_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(_smoke: bool, folder: Path) -> dict[str, list[str]]:
        def python(program: str, part: str) -> list[str]:
            return [sys.executable, "-c", program, str(gpu.output_of(part, folder))]

        row = "{'name': 'a', 'value': 2.0, 'unit': 'u', 'limit': 4.0, 'share': 0.5, 'peer': 1.0}"
        return {
            "engine/one": python(WRITE % row, "engine/one"),
            "engine/two": python("print('out of memory'); raise SystemExit(3)", "engine/two"),
            "kernels": python("import time; print('begun', flush=True); time.sleep(60)", "kernels"),
            "tests": python("", "tests"),
        }

    monkeypatch.setattr(gpu, "commands", commands)
    monkeypatch.setattr(gpu, "LIMITS_S", {"engine/one": 60, "engine/two": 60, "kernels": 1, "tests": 60})
    target = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(target), "--plot", str(tmp_path / "gpu.png")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    report = json.loads(target.read_text())
    statuses = {part: run["status"] for part, run in report["parts"].items()}
    assert statuses == {"engine/one": 0, "engine/two": 3, "kernels": 124, "tests": 0}
    assert "out of memory" in report["parts"]["engine/two"]["output"]
    assert "begun" in report["parts"]["kernels"]["output"]
    assert [row["name"] for row in report["rows"]] == ["a"] and report["machine"] == {"cpu": "x"}


def test_all_parts_together_take_less_than_ten_minutes(gpu: ModuleType, tmp_path: Path) -> None:
    parts = gpu.commands(False, tmp_path)
    assert sum(gpu.LIMITS_S[part] for part in parts) < 600
    assert len({gpu.output_of(part, tmp_path) for part in parts}) == len(parts)


@pytest.mark.slow
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
