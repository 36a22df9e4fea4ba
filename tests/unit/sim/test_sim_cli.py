from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from disagg.cli.main import app

CLUSTER = """\
model: llama3-8b
pools:
  prefill: {role: prefill, replicas: 1, hardware: h100-80gb}
  decode: {role: decode, replicas: 1, hardware: a100-80gb}
links: {bandwidth_gb_s: 25}
objectives: {ttft_ms: 200, tpot_ms: 20}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return path


def simulate(cluster: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", str(cluster), *map(str, arguments)])


def figures(cluster: Path, *arguments: object) -> dict[str, Any]:
    path = cluster.parent / "out.json"
    result = simulate(cluster, "--json", path, *arguments)
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def test_report_and_json(cluster: Path) -> None:
    path = cluster.parent / "out.json"
    result = simulate(cluster, "--num-requests", 200, "--request-rate", 5, "--json", path)
    assert result.exit_code == 0, result.output
    for text in (
        "200 of 200 served",
        "goodput",
        "attainment",
        "ttft",
        "itl",
        "KV transfer",
        "USD/h",
        "decode",
    ):
        assert text in result.output
    summary = json.loads(path.read_text())
    assert summary["requests"]["done"] == 200
    assert summary["latency"]["ttft"]["p50"] < summary["latency"]["ttft"]["p99"]
    assert 0 < summary["objectives"]["attainment"] <= summary["objectives"]["ttft_attainment"] <= 1
    goodput = summary["objectives"]["attainment"] * 200 / summary["duration_s"]
    assert summary["objectives"]["goodput"] == pytest.approx(goodput)
    assert 0 < summary["pools"]["prefill"]["utilisation"] < summary["pools"]["decode"]["utilisation"] <= 1
    assert summary["cost"] == {
        "gpus": 2,
        "usd_per_hour": pytest.approx(6.96),
        "usd": pytest.approx(6.96 * summary["duration_s"] / 3600),
        "usd_per_million_output_tokens": pytest.approx(6.96 / 3600 / summary["output_tokens_per_s"] * 1e6),
        "power_w": pytest.approx(1275 + 812.5),
    }
    kv_bytes = 2 * 32 * 8 * 128 * 2
    assert summary["transfer"]["bytes"] <= summary["pools"]["prefill"]["prompt_tokens"] * kv_bytes * 1.001


def test_same_seed_same_bytes_and_another_one_not(cluster: Path) -> None:
    written = []
    for seed in (1, 1, 2):
        figures(cluster, "--num-requests", 50, "--seed", seed)
        written.append((cluster.parent / "out.json").read_bytes())
    assert written[0] == written[1] != written[2]


def test_fast_and_exact_agree(cluster: Path) -> None:
    fast, exact = (figures(cluster, "--num-requests", 50, *flag) for flag in ((), ("--exact",)))
    assert fast["latency"]["e2e"] == pytest.approx(exact["latency"]["e2e"])
    assert fast["pools"] == {name: pytest.approx(pool) for name, pool in exact["pools"].items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n"
                  "2023-11-16 18:17:03,480,10\n2023-11-16 18:17:05,80,4\n"),
        ("burstgpt", "Timestamp,Model,Request tokens,Response tokens\n5,x,480,10\n7,y,80,4\n"),
        ("mooncake", '{"timestamp": 0, "input_length": 480, "output_length": 10, "hash_ids": [1]}\n'
                     '{"timestamp": 2000, "input_length": 80, "output_length": 4, "hash_ids": [1]}\n'),
        ("bailian", '{"timestamp": 1.5, "input_length": 480, "output_length": 10, "hash_ids": [1, 2]}\n'
                    '{"timestamp": 3.5, "input_length": 80, "output_length": 4, "hash_ids": [1, 2]}\n'),
    ],
)  # fmt: skip
def test_traces(cluster: Path, name: str, text: str) -> None:
    trace = cluster.parent / "trace"
    trace.write_text(text)
    summary = figures(cluster, "--trace", trace, "--trace-format", name, "--rate-scale", 2)
    assert summary["requests"]["done"] == 2
    assert summary["request_rate"] == 2.0
    hits = {"mooncake": 64, "bailian": 32}.get(name, 0)
    assert summary["pools"]["prefill"]["prompt_tokens"] == 560 - hits


def test_prefixes_and_arrivals(cluster: Path) -> None:
    shared = figures(cluster, "--num-requests", 60, "--prefix-len", 512, "--prefix-groups", 2)
    assert shared["pools"]["prefill"]["prefix_hit_share"] > 0.2
    calm = figures(cluster, "--num-requests", 300, "--arrivals", "constant", "--request-rate", 10)
    bursts = figures(cluster, "--duration", 30, "--arrivals", "bursts", "--burstiness", 0.1)
    assert calm["requests"]["planned"] == bursts["requests"]["planned"] == 300
    assert calm["latency"]["queue"]["p90"] < bursts["latency"]["queue"]["p90"]
    diurnal = figures(
        cluster, "--arrivals", "diurnal", "--period", 20, "--amplitude", 1, "--num-requests", 50
    )
    assert diurnal["requests"]["done"] == 50


def test_flags_stand_over_the_file(cluster: Path) -> None:
    arguments = ("--num-requests", 20, "--policy", "round_robin", "--slo-ttft-ms", 1)
    summary = figures(cluster, *arguments)
    assert summary["policy"] == "round_robin"
    assert list(summary["placements"]) == ["round_robin/disaggregated"]
    assert summary["objectives"]["ttft_ms"] == 1 and summary["objectives"]["tpot_ms"] == 20
    assert summary["objectives"]["attainment"] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--policy", "best"), "router.policy"),
        (("--trace", "x"), "--trace-format"),
        (("--trace-format", "azure"), "--trace-format"),
        (("--trace", "x", "--trace-format", "azure", "--request-rate", "3"), "--request-rate"),
        (("--trace", "missing", "--trace-format", "azure"), "missing"),
        (("--input-len", "many"), "--input-len"),
        (("--burstiness", "0.5", "--arrivals", "constant"), "--burstiness"),
        (("--period", "5"), "--period"),
        (("--prefix-groups", "5"), "--prefix-groups"),
        (("--duration", "5", "--num-requests", "5"), "--duration"),
        (("--duration", "0"), "--duration"),
        (("--request-rate", "-1"), "--request-rate"),
        (("--max-input-len", "0"), "--max-input-len"),
        (("--num-requests", "0"), "--num-requests"),
        (("--slo-ttft-ms", "-1"), "objectives.ttft_ms"),
        (("--json", "/no/such/folder/x.json"), "--json"),
    ],
)
def test_errors_name_the_flag(cluster: Path, arguments: tuple[str, ...], text: str) -> None:
    result = simulate(cluster, *arguments)
    assert result.exit_code == 2
    assert text in result.output and "Traceback" not in result.output


def test_plot_without_matplotlib_says_so(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = simulate(cluster, "--plot", cluster.parent / "x.png")
    assert result.exit_code == 2
    assert "matplotlib" in result.output and "pip install" in result.output
    assert not (cluster.parent / "x.png").exists()


class _Axis:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self._calls.append(name)


def test_plot_draws_four_panels(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked without matplotlib, which tests don't install: what is drawn, not how it looks."""
    calls: list[str] = []

    class Figure:
        def __init__(self, **_: object) -> None: ...

        def subplots(self, rows: int, columns: int) -> list[list[_Axis]]:
            return [[_Axis(calls) for _ in range(columns)] for _ in range(rows)]

        def savefig(self, path: Path) -> None:
            path.write_text("picture")

    module = ModuleType("matplotlib.figure")
    module.Figure = Figure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    picture = cluster.parent / "x.png"
    result = simulate(cluster, "--num-requests", 20, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_text() == "picture"
    assert (calls.count("plot"), calls.count("axvline"), calls.count("step")) == (3, 2, 1)
