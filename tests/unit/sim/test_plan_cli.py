"""`disagg plan` from the command line: its table, its files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from sim_support import GPU, SHAPE
from typer.testing import CliRunner

from disagg.cli.main import app

CLUSTER: dict[str, Any] = {
    "model": SHAPE,
    "hardware": {"gpu": {**GPU, "memory": 2e7}},
    "cost": {"kind": "roofline", "step_overhead_ms": 20},
    "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
    "router": {"policy": "least_loaded"},
    "objectives": {"ttft_ms": 1000, "tpot_ms": 50},
    # Of a cluster file as simulate takes it: not looked at.
    "pools": {"mixed": {"role": "mixed", "replicas": 1, "hardware": "gpu"}},
    "faults": [{"kind": "worker_loss", "worker": "mixed-7", "at_s": 1, "for_s": 1}],
}
FAST = [*("--num-requests", "40"), *("--min-seconds", "0"), *("--tolerance", "0.2"), *("--tp", "1")]
LENGTHS = [*("--input-len", "200"), *("--output-len", "20")]


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(CLUSTER))
    return str(path)


def test_a_plan_is_printed_and_written(cluster: str, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("plan.json", "best.yaml", "serve.yaml", "values.yaml")}
    flags = [*("--json", str(files["plan.json"])), *("--cluster-out", str(files["best.yaml"]))]
    flags += [*("--config-out", str(files["serve.yaml"])), *("--values-out", str(files["values.yaml"]))]
    result = CliRunner().invoke(app, ["plan", cluster, "--gpus", "gpu:3", *FAST, *LENGTHS, *flags])
    assert result.exit_code == 0, result.output
    assert "most goodput" in result.output
    data = json.loads(files["plan.json"].read_text())
    assert data["plans"][0]["goodput"] > 0 and data["simulations"] > 0
    assert len(data["ratios"]) == 2
    best = yaml.safe_load(files["best.yaml"].read_text())
    planned = {pool["role"]: pool["replicas"] for pool in data["plans"][0]["pools"]}
    assert {name: pool.get("replicas", 1) for name, pool in best["pools"].items()} == planned
    assert yaml.safe_load(files["values.yaml"].read_text())["prefill"]["replicas"] >= 1
    simulated = CliRunner().invoke(app, ["simulate", str(files["best.yaml"]), "--num-requests", "20"])
    assert simulated.exit_code == 0, simulated.output


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--gpus", "gpu"], "--gpus"),
        (["--gpus", "gpu:0"], "--gpus"),
        ([], "--gpus"),
        (["--gpus", "gpu:2", "--tp", "1,x"], "--tp"),
        (["--gpus", "gpu:2", "--pp", "0"], "--pp"),
        (["--gpus", "gpu:2", "--tolerance", "1"], "--tolerance"),
        (["--gpus", "gpu:2", "--demand", "0"], "--demand"),
        (["--gpus", "gpu:2", "--attainment", "2"], "attainment"),
        (["--gpus", "other:2"], "other"),
        (["--gpus", "gpu:2", "--trace", "x.csv"], "--trace-format"),
        (["--gpus", "gpu:2", "--json", "/no/such/folder/x.json"], "--json"),
        (["--gpus", "gpu:2", "--demand", "1000000000", *FAST], "demand"),
    ],
)
def test_what_makes_no_sense_is_refused(cluster: str, flags: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["plan", cluster, *flags])
    assert result.exit_code == 2
    assert named in result.output


def test_a_bad_key_of_the_file_is_named_and_not_the_gpus(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({**CLUSTER, "linkz": {}}))
    result = CliRunner().invoke(app, ["plan", str(path), "--gpus", "gpu:2"])
    assert result.exit_code == 2
    assert result.output.startswith("error: linkz: ")


def test_a_model_and_objectives_must_be_known() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "h100-80gb:2"])
    assert result.exit_code == 2 and "--model" in result.output
    result = CliRunner().invoke(app, ["plan", "--model", "llama3-8b", "--gpus", "h100-80gb:2"])
    assert result.exit_code == 2 and "objectives" in result.output
