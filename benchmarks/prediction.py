"""How well the router foresees TTFT and TPOT of live traffic under a steady load.

    python benchmarks/prediction.py --json out.json
    python benchmarks/prediction.py --shape llama-81m --rates 1 2

Chats and long prompts arrive at random at `disagg serve` with one prefill and one decode worker, as in
goodput.py. Errors are the router's own metric, disagg_router_prediction_error_ratio: predicted over actual,
less 1, of every placement, as the router saw it. The median of absolute errors is read off its buckets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from pathlib import Path
from typing import Any

from goodput import Load
from local_cluster import BUNDLED, LocalCluster, checkpoint, serving
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine

METRIC = "disagg_router_prediction_error_ratio"
LIMITS = {"ttft": 0.15, "tpot": 0.10}
Buckets = dict[float, float]


def errors(cluster: LocalCluster) -> dict[str, Buckets]:
    """Return {"ttft" | "tpot": {upper edge: count up to there}}."""
    found: dict[str, Buckets] = {}
    for family in text_string_to_metric_families(cluster.metrics()):
        for sample in family.samples:
            if sample.name == f"{METRIC}_bucket":
                edges = found.setdefault(sample.labels["what"], {})
                edge = float(sample.labels["le"])
                edges[edge] = edges.get(edge, 0.0) + sample.value
    return found


def since(after: dict[str, Buckets], before: dict[str, Buckets]) -> dict[str, Buckets]:
    """Return what came between two readings."""
    return {
        what: {edge: count - before.get(what, {}).get(edge, 0.0) for edge, count in edges.items()}
        for what, edges in after.items()
    }


def below(buckets: Buckets, value: float) -> float:
    """Return how many are at most `value`, on the line between two edges."""
    edges = sorted(edge for edge in buckets if math.isfinite(edge))
    last_edge, last_count = edges[0], buckets[edges[0]]
    if value < last_edge:
        return last_count * max(0.0, 1 - (last_edge - value) / (1 + last_edge))
    for edge in edges[1:]:
        if value <= edge:
            return last_count + (buckets[edge] - last_count) * (value - last_edge) / (edge - last_edge)
        last_edge, last_count = edge, buckets[edge]
    return last_count


def median_absolute(buckets: Buckets) -> float:
    """Return the error that half of all stay within, either way; inf where more lie beyond the buckets."""
    total = max(buckets.values(), default=0.0)
    low, high = 0.0, max((edge for edge in buckets if math.isfinite(edge)), default=0.0)
    if not total or below(buckets, high) - below(buckets, -high) < total / 2:
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        if below(buckets, middle) - below(buckets, -middle) < total / 2:
            low = middle
        else:
            high = middle
    return high


async def measure(cluster: LocalCluster, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    load = Load(cluster, None)
    await load.warm_up()
    await load.calibrate(min(arguments.rates), arguments.seconds, arguments.slack)
    rows = []
    for rate in arguments.rates:
        before = errors(cluster)
        outcome = await load.run(rate, arguments.seconds)
        await asyncio.sleep(1.0)
        for what, buckets in sorted(since(errors(cluster), before).items()):
            value, limit = median_absolute(buckets), LIMITS[what]
            rows.append(
                {
                    "name": f"prediction/{arguments.policy}/{what}/{rate:g}_per_s",
                    "value": round(value, 4),
                    "unit": "median absolute error over actual",
                    "runs": 1,
                    "limit": limit,
                    "share": round(value / limit, 3),
                    "samples": int(max(buckets.values())),
                    "goodput": round(outcome.goodput, 3),
                    "failed": sum(outcome.failures.values()),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=BUNDLED, help=f"{BUNDLED}, or one of benchmarks/engine.py")
    parser.add_argument("--policy", default="slo")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0], help="requests/s")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each rate")
    parser.add_argument(
        "--slack", type=float, default=4.0, help="objectives: times the 90th percentile at the lowest rate"
    )
    parser.add_argument("--chunk", type=int, default=128, help="token budget of a step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = {
        "engine": {"max_num_batched_tokens": arguments.chunk, "kv_cache_memory": 1 << 28},
        "prefill": {"replicas": 1, "threads": 1},
        "decode": {"replicas": 1, "threads": 1},
        "router": {"policy": arguments.policy},
    }
    with checkpoint(arguments.shape) as model, serving(model, settings) as cluster:
        rows = asyncio.run(measure(cluster, arguments))
    console, shown = Console(), Table("what", "median error", "limit", "samples", "goodput", "failed")
    for row in rows:
        shown.add_row(
            row["name"].removeprefix("prediction/"),
            f"{row['value']:.1%}",
            f"{row['limit']:.0%}",
            *(str(row[key]) for key in ("samples", "goodput", "failed")),
        )
    machine = {**describe_machine(), "shape": arguments.shape}
    console.print(shown)
    console.print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']}", style="dim")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
