"""The same trace against a real 1P+1D cluster on this machine and against the simulator.

    python benchmarks/live_vs_sim.py --json out.json

`disagg bench profile` measures the cluster; then a Poisson trace of made-up lengths is sent to it, open loop,
and the simulator replays that trace on the measured profile with the same engine settings. This is repeated
--rounds times, each trace between two profiles of which it gets both, since a machine's pace changes between
minutes; figures are medians over the rounds. The rate follows from the first profile, so that the load is
--load on any machine. What is left between the two: the machine's pace changes within a round too, and what
the client and the front end take from the workers is in the profile only as far as its probes show it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from engine import console_of
from local_cluster import BUNDLED, LocalCluster, PromptSource, checkpoint, serving
from rich.console import Console
from rich.table import Table

from disagg.bench.client import Client, Endpoint, RequestResult
from disagg.bench.machine import describe_machine
from disagg.bench.profile import Profiler, Samples, fit_profile
from disagg.bench.serve import ServeOptions, prepare
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec, parse_spec
from disagg.workload import LogNormalLength, Poisson, TimedRequest, Workload, synthesize

LIMIT = 0.10
MAX_PROMPT, MAX_OUTPUT = 512, 96
CHUNK = 512
BLOCK_SIZE, KV_BLOCKS, MAX_SEQS = 16, 4096, 32
METRICS = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p90")

Times = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def trace(rate: float, count: int, seed: int) -> Workload:
    lengths = LogNormalLength(180, 0.7, MAX_PROMPT), LogNormalLength(40, 0.5, MAX_OUTPUT)
    return synthesize(count, Poisson(rate), *lengths, np.random.default_rng(seed))


def settings(policy: str) -> dict[str, Any]:
    one = {"replicas": 1, "threads": 1}
    return {
        "engine": {
            "max_num_batched_tokens": CHUNK,
            "max_num_seqs": MAX_SEQS,
            "num_kv_blocks": KV_BLOCKS,
            "block_size": BLOCK_SIZE,
        },
        "router": {"policy": policy},
        "prefill": one,
        "decode": one,
    }


async def profile(cluster: LocalCluster) -> Samples:
    endpoint = Endpoint.parse(cluster.url)
    longest = Workload("profile", (TimedRequest(0.0, MAX_PROMPT, MAX_OUTPUT),))
    client = Client(endpoint, 300.0)
    builder = prepare(ServeOptions(url=cluster.url, vocab_size=cluster.vocab_size), longest, endpoint)
    try:
        profiler = Profiler(client.stream, builder, max_tokens=MAX_PROMPT, repeats=3)
        return await profiler.run()
    finally:
        client.close()


async def replay(cluster: LocalCluster, load: Workload, seed: int) -> Times:
    """Send the trace at its own times; return what the client saw. Raises the first failure."""
    client, prompts = Client(Endpoint.parse(cluster.url), 300.0), PromptSource(cluster.vocab_size, seed)
    requests = [prompts.request(item.prompt_tokens, item.output_tokens) for item in load]
    loop = asyncio.get_running_loop()
    start = loop.time()
    tasks: list[asyncio.Task[RequestResult]] = []
    try:
        for index, (item, request) in enumerate(zip(load, requests, strict=True)):
            await asyncio.sleep(max(0.0, start + item.arrival_s - loop.time()))
            tasks.append(asyncio.create_task(client.stream(index, request)))
        results = await asyncio.gather(*tasks)
    finally:
        client.close()
    for result in results:
        if result.failure is not None:
            raise result.failure
    ttft = np.array([result.ttft_s for result in results])
    e2e = np.array([result.end_s - result.sent_s for result in results])
    return _times(ttft, e2e, load)


def _times(ttft: Any, e2e: Any, load: Workload) -> Times:
    gaps = np.array([item.output_tokens - 1 for item in load])
    many = gaps > 0
    return {"ttft": ttft, "tpot": ((e2e - ttft)[many] / gaps[many]), "e2e": e2e}


def simulated(spec: SimSpec, load: Workload) -> Times:
    records = Simulation(spec, load).run()
    return _times(records.ttft(), records.e2e(), load)


def cluster_file(measured: dict[str, Any], model: Path, path: Path, policy: str) -> SimSpec:
    """Return the simulator's cluster: the live settings, and a profile that it reads from `path`."""
    path.write_text(json.dumps(measured))
    shape = json.loads((model / "config.json").read_text())
    heads, layers = shape["num_attention_heads"], shape["num_hidden_layers"]
    kv_heads = shape.get("num_key_value_heads", heads)
    head_dim = shape.get("head_dim", shape["hidden_size"] // heads)
    kv_bytes = 2 * layers * kv_heads * head_dim * 4
    # Below a nanosecond per token the wire can't be told from the rest.
    bandwidth = kv_bytes / max(measured["handoff"]["b"], 1e-9)
    worker = {"replicas": 1, "hardware": "here", "num_kv_blocks": KV_BLOCKS - 1}
    return parse_spec(
        {
            "model": {
                "num_layers": layers,
                "hidden_size": shape["hidden_size"],
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": head_dim,
                "intermediate_size": shape["intermediate_size"],
                "vocab_size": shape["vocab_size"],
                "dtype_bytes": 4,
            },
            "hardware": {"here": {"flops": 1e11, "bandwidth": 1e10, "memory": 1e10}},
            "cost": {"kind": "profile", "file": str(path)},
            "pools": {
                role: {"role": role, "slowed_by_others": measured["interference"][role], **worker}
                for role in ("prefill", "decode")
            },
            "links": {"bandwidth_gb_s": bandwidth / 1e9, "sharing": "shared", "handoff": "overlapped"},
            "engine": {
                "max_num_batched_tokens": CHUNK,
                "max_num_seqs": MAX_SEQS,
                "block_size": BLOCK_SIZE,
            },
            "router": {"policy": policy},
            "admission": {},
            "overheads": {
                "request_ms": measured["request"]["a"] * 1e3,
                "handoff_ms": measured["handoff"]["a"] * 1e3,
            },
        }
    )


def prefill_s(measured: dict[str, Any], count: int) -> float:
    """Return how long a prompt of the trace takes on average."""
    a, b, c = (measured["prefill"][key] for key in "abc")
    sizes = [item.prompt_tokens for item in trace(1.0, count, 0)]
    return statistics.mean(a + b * size + c * size * size / 2 for size in sizes)


def figures(times: Times) -> dict[str, float]:
    return {
        f"{metric}_{name}": float(
            times[metric].mean() if name == "mean" else np.percentile(times[metric], 90)
        )
        for metric in METRICS
        for name in STATISTICS
    }


def compare(arguments: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    live: list[dict[str, float]] = []
    sim: list[dict[str, float]] = []
    measured: dict[str, Any] = {}
    with (
        checkpoint(arguments.shape) as model,
        tempfile.TemporaryDirectory() as scratch,
        serving(model, settings(arguments.policy)) as cluster,
    ):
        before = asyncio.run(profile(cluster))
        rate = arguments.rate or arguments.load / prefill_s(fit_profile(before), arguments.requests)
        for number in range(arguments.rounds):
            load = trace(rate, arguments.requests, number)
            live.append(figures(asyncio.run(replay(cluster, load, number))))
            after = asyncio.run(profile(cluster))
            around = Samples()
            around.extend(before)
            around.extend(after)
            measured, before = fit_profile(around), after
            spec = cluster_file(measured, model, Path(scratch) / "profile.json", arguments.policy)
            sim.append(figures(simulated(spec, load)))
            console.print(f"round {number + 1}: {rate:.2f} requests/s, profile {measured}", style="dim")
            ratios = {name: round(sim[-1][name] / live[-1][name], 3) for name in live[-1]}
            console.print(f"round {number + 1}: simulated / live {ratios}", style="dim")
    rows = []
    for name in live[0]:
        value = statistics.median(item[name] for item in sim)
        peer = statistics.median(item[name] for item in live)
        ratio = statistics.median(a[name] / b[name] for a, b in zip(sim, live, strict=True))
        rows.append(
            {
                "name": f"live_vs_sim/{name}",
                "value": round(value, 5),
                "unit": "s",
                "runs": arguments.rounds,
                "peer": round(peer, 5),
                "ratio": round(ratio, 3),
            }
        )
    return rows, measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-81m", help=f"{BUNDLED}, or a shape of engine.py")
    parser.add_argument("--load", type=float, default=0.35, help="share of prefill's time")
    parser.add_argument("--rate", type=float, help="requests per second, in place of --load")
    parser.add_argument("--requests", type=int, default=60, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="least_loaded")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, machine = Console(stderr=True), describe_machine()
    rows, measured = compare(arguments, console)
    title = f"{machine['cpu']}, {machine['cores']} cores, {arguments.rounds} rounds"
    table = Table(
        "figure", "live, ms", "simulated, ms", "simulated / live", f"within {LIMIT:.0%}", title=title
    )
    for row in rows:
        held = "yes" if abs(row["ratio"] - 1) <= LIMIT else "no"
        table.add_row(
            row["name"], f"{row['peer'] * 1e3:.1f}", f"{row['value'] * 1e3:.1f}", f"{row['ratio']:.3f}", held
        )
    console_of(sys.stdout).print(table)
    if arguments.json:
        content = {"machine": machine, "rows": rows, "profile": measured}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
