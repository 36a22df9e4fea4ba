"""What the simulator says: parity with splitwise-sim, what its model leaves out, and policies side by side.

    python benchmarks/simulator_study.py --traces FOLDER --plots FOLDER --json out.json

FOLDER holds azure/, mooncake/ and splitwise-sim/ as their projects publish them. Three parts, --only picks:

    parity    splitwise-sim's model on the Azure 2023 conversation trace, bloom-176b on 40 H100 machines,
              beside the figures of its own run
    features  one thing at a time that such simulators leave out, on the Mooncake conversation trace
    policies  goodput of each placement policy over the rate of arrivals, on both traces
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine
from disagg.routing.policies import POLICIES
from disagg.sim.plot import require_matplotlib
from disagg.sim.simulation import Simulation
from disagg.sim.spec import parse_spec
from disagg.sim.summary import summarize
from disagg.workload import TraceFormat, Workload, read_trace

GIB = 1024**3
Row = dict[str, Any]

# splitwise-sim's own run, ms: P50, P90, P99 of TTFT and of TBT (decode time over all output tokens).
PUBLISHED = {
    "colocated": ((134, 388, 679), (35.1, 35.5, 38.3)),
    "25_prefill_15_decode": ((132, 385, 658), (35.3, 35.8, 37.0)),
}
PERCENTILES = (50, 90, 99)
PARITY_LIMIT = 0.03


def row(name: str, value: float, unit: str, **more: Any) -> Row:
    return {"name": f"simulator_study/{name}", "value": round(value, 4), "unit": unit, "runs": 1, **more}


# -- parity --------------------------------------------------------------------------------------------


def splitwise_cluster(table: Path, pools: dict[str, int]) -> dict[str, Any]:
    """splitwise-sim's model: prompts are never split, links private, hand-offs pushed, no reports."""
    machine = {"hardware": "h100-80gb", "tensor_parallel_size": 8, "memory_share": 1.0}
    return {
        "model": "bloom-176b",
        "cost": {"kind": "table", "file": str(table)},
        "pools": {role: {"role": role, "replicas": count, **machine} for role, count in pools.items()},
        "links": {"bandwidth_gb_s": 200 * GIB / 1e9, "sharing": "private", "handoff": "push"},
        "engine": {"max_num_seqs": 512, "max_num_batched_tokens": 100_000, "block_size": 64},
        "router": {"policy": "splitwise_jsq", "heartbeat_s": 1e9},
    }


def parity(traces: Path, console: Console) -> list[Row]:
    load = read_trace(traces / "azure" / "AzureLLMInferenceTrace_conv.csv", TraceFormat.AZURE)
    table, rows = traces / "splitwise-sim" / "perf_model.csv", []
    shown = Table("splitwise-sim's model, ms", "P50", "P90", "P99", title="ours (published, ratio)")
    for name, pools in (
        ("colocated", {"mixed": 40}),
        ("25_prefill_15_decode", {"prefill": 25, "decode": 15}),
    ):
        records = Simulation(parse_spec(splitwise_cluster(table, pools)), load).run()
        ttft = records.ttft()
        tbt = (records.e2e() - ttft) / np.array(records.output_tokens)
        for metric, values, published in zip(("ttft", "tbt"), (ttft, tbt), PUBLISHED[name], strict=True):
            cells = []
            for percent, peer in zip(PERCENTILES, published, strict=True):
                value = float(np.percentile(values, percent)) * 1000
                ratio = round(value / peer, 4)
                cells.append(f"{value:.1f} ({peer}, {ratio:.3f})")
                rows.append(row(f"parity/{name}/{metric}_p{percent}", value, "ms", peer=peer, ratio=ratio))
            shown.add_row(f"{name} {metric}", *cells)
    console.print(shown)
    return rows


# -- what others leave out -----------------------------------------------------------------------------

LLAMA_70B = {
    **{"num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128},
    **{"intermediate_size": 28_672, "vocab_size": 128_256},
}
OBJECTIVES = {"ttft_ms": 5000, "tpot_ms": 40}
WHOLE_PROMPTS = 1_000_000


def long_context_cluster(change: dict[str, Any]) -> dict[str, Any]:
    """A 70B model on machines of 8 H100, and what splitwise-sim leaves out left out, but for `change`."""
    machine = {"hardware": "h100-80gb", "tensor_parallel_size": 8}
    base: dict[str, Any] = {
        "model": {**LLAMA_70B, "num_kv_heads": 64},
        "cost": {"kind": "roofline", "decode_context": False},
        "pools": {
            "prefill": {"role": "prefill", "replicas": 4, **machine},
            "decode": {"role": "decode", "replicas": 5, **machine},
        },
        "links": {"bandwidth_gb_s": 200 * GIB / 1e9, "sharing": "private", "handoff": "push"},
        "engine": {"max_num_seqs": 256, "max_num_batched_tokens": WHOLE_PROMPTS, "block_size": 128},
        "router": {"policy": "least_loaded"},
        "objectives": OBJECTIVES,
    }
    return {
        key: {**value, **change.get(key, {})} if isinstance(value, dict) else value
        for key, value in base.items()
    }


GQA = {"model": {"num_kv_heads": 8}}
CONTEXT = {"cost": {"decode_context": True}}
CHUNKS = {"engine": {"max_num_batched_tokens": 2048}}
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "gqa_kv": GQA,
    "decode_context": CONTEXT,
    "shared_50": {"links": {"bandwidth_gb_s": 50, "sharing": "shared"}},
    "shared_25": {"links": {"bandwidth_gb_s": 25, "sharing": "shared"}},
    "chunked_prefill": CHUNKS,
    "shared_25_overlapped": {"links": {"bandwidth_gb_s": 25, "sharing": "shared", "handoff": "overlapped"}},
    "all": {
        **{**GQA, **CONTEXT, **CHUNKS},
        "links": {"bandwidth_gb_s": 25, "sharing": "shared", "handoff": "overlapped"},
    },
}


def features(traces: Path, seconds: float, plots: Path | None, console: Console) -> list[Row]:
    path = traces / "mooncake" / "conversation_trace.jsonl"
    load = read_trace(path, TraceFormat.MOONCAKE, duration_s=seconds)
    columns = {
        "ttft_p99": "ms",
        "handoff_p99": "ms",
        "tpot_mean": "ms",
        "tpot_p99": "ms",
        "itl_p99": "ms",
        "ttft_attained": "",
        "tpot_attained": "",
        "both_attained": "",
    }
    made: dict[str, dict[str, float]] = {}
    shown = Table("switched on", *columns, title=f"{load.name}, {seconds:g} s")
    rows = []
    for name, change in FEATURES.items():
        simulation = Simulation(parse_spec(long_context_cluster(change)), load)
        simulation.run()
        made[name] = _feature_figures(summarize(simulation))
        shown.add_row(name, *(f"{made[name][column]:.3g}" for column in columns))
        rows += [
            row(f"features/{name}/{column}", made[name][column], unit or "share")
            for column, unit in columns.items()
        ]
    console.print(shown)
    if plots is not None:
        plot_features(made, list(columns), plots / "simulator_features.png")
    return rows


def _feature_figures(summary: dict[str, Any]) -> dict[str, float]:
    latency, objectives = summary["latency"], summary["objectives"]
    return {
        "ttft_p99": latency["ttft"]["p99"] * 1000,
        "handoff_p99": latency["handoff"]["p99"] * 1000,
        "tpot_mean": latency["tpot"]["mean"] * 1000,
        "tpot_p99": latency["tpot"]["p99"] * 1000,
        "itl_p99": latency["itl"]["p99"] * 1000,
        "ttft_attained": objectives["ttft_attainment"],
        "tpot_attained": objectives["tpot_attainment"],
        "both_attained": objectives["attainment"],
    }


def plot_features(made: dict[str, dict[str, float]], columns: list[str], path: Path) -> None:
    figure = require_matplotlib()(figsize=(15, 7), layout="constrained")
    for axis, column in zip(figure.subplots(2, 4).flat, columns, strict=True):
        axis.barh(list(made), [item[column] for item in made.values()])
        axis.invert_yaxis()
        axis.set_title(column if "attained" in column else f"{column}, ms (log)")
        axis.set_xscale("linear" if "attained" in column else "log")
    figure.savefig(path, dpi=110)


# -- policies ------------------------------------------------------------------------------------------


def policy_cluster(policy: str, objectives: dict[str, float]) -> dict[str, Any]:
    machine = {"hardware": "h100-80gb", "tensor_parallel_size": 4}
    return {
        "model": "llama3-70b",
        "pools": {
            "prefill": {"role": "prefill", "replicas": 6, **machine},
            "decode": {"role": "decode", "replicas": 4, **machine},
        },
        "links": {"bandwidth_gb_s": 50},
        "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "block_size": 128},
        "router": {"policy": policy},
        "objectives": objectives,
    }


ATTAINMENT = 0.9
CASES: dict[str, tuple[str, TraceFormat, dict[str, float], tuple[float, ...]]] = {
    "azure_conversation": (
        "azure/AzureLLMInferenceTrace_conv.csv",
        TraceFormat.AZURE,
        {"ttft_ms": 500, "tpot_ms": 30},
        (8, 12, 16, 20),
    ),
    "mooncake_conversation": (
        "mooncake/conversation_trace.jsonl",
        TraceFormat.MOONCAKE,
        {"ttft_ms": 4000, "tpot_ms": 40},
        (0.5, 0.75, 1, 1.5, 2),
    ),
}


def policies(traces: Path, seconds: float, plots: Path | None, console: Console) -> list[Row]:
    """Requests per second within objectives by rate, and the rate up to which nine in ten meet them.

    seconds: of the trace, before it is replayed faster.
    """
    rows, curves = [], {}
    for case, (path, form, objectives, factors) in CASES.items():
        load = read_trace(traces / path, form, duration_s=seconds)
        shown = Table("policy", *(f"x{factor:g}" for factor in factors), "rate at 90 %, /s", title=case)
        curves[case] = {name: _curve(name, load, objectives, factors) for name in sorted(POLICIES)}
        for name, curve in curves[case].items():
            rate = rate_at(curve, ATTAINMENT)
            cells = (f"{goodput:.2f} ({attained:.0%})" for _, goodput, attained in curve)
            shown.add_row(name, *cells, f"{rate:.2f}")
            rows.append(row(f"policies/{case}/{name}/rate_at_90", rate, "requests/s"))
            best = max(goodput for _, goodput, _ in curve)
            rows.append(row(f"policies/{case}/{name}/best_goodput", best, "requests/s"))
        console.print(shown)
    if plots is not None:
        plot_policies(curves, plots / "simulator_policies.png")
    return rows


Curve = list[tuple[float, float, float]]


def rate_at(curve: Curve, attainment: float) -> float:
    """Return the rate at which attainment falls below a share, on the line between two points; else the last.

    Where the first point is below already, the line from full attainment at rate 0 is taken.
    """
    before = (0.0, 0.0, 1.0)
    for point in curve:
        if point[2] < attainment:
            part = (before[2] - attainment) / (before[2] - point[2])
            return before[0] + part * (point[0] - before[0])
        before = point
    return before[0]


def _curve(policy: str, load: Workload, objectives: dict[str, float], factors: tuple[float, ...]) -> Curve:
    """Return (requests/s, goodput, attainment) at each factor on the trace's rate."""
    points = []
    for factor in factors:
        scaled = load.scale_rate(factor)
        simulation = Simulation(parse_spec(policy_cluster(policy, objectives)), scaled)
        simulation.run()
        met = summarize(simulation)["objectives"]["attainment"]
        # Over the time of arrivals: how long the last answers take is not a rate.
        points.append((scaled.rate_per_s, met * scaled.rate_per_s, met))
    return points


def plot_policies(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    figure = require_matplotlib()(figsize=(12, 5), layout="constrained")
    for axis, (case, by_policy) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for name, curve in by_policy.items():
            rates, goodputs, _ = zip(*curve, strict=True)
            axis.plot(rates, goodputs, marker="o", label=name, linewidth=2.5 if name == "slo" else 1.2)
        axis.plot(rates, rates, linestyle=":", color="gray", label="all")
        axis.set(xlabel="requests/s", ylabel="requests/s within objectives", title=case)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--only", choices=("parity", "features", "policies"))
    parser.add_argument("--seconds", type=float, default=900.0, help="of the traces, but for parity")
    parser.add_argument("--plots", type=Path, help="folder for pictures; needs matplotlib")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.plots is not None:
        require_matplotlib()
        arguments.plots.mkdir(parents=True, exist_ok=True)
    console, rows = Console(), []
    if arguments.only in (None, "parity"):
        rows += parity(arguments.traces, console)
    if arguments.only in (None, "features"):
        rows += features(arguments.traces, arguments.seconds, arguments.plots, console)
    if arguments.only in (None, "policies"):
        rows += policies(arguments.traces, arguments.seconds, arguments.plots, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
