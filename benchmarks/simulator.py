"""How fast the simulator is: 1,000 GPUs for an hour, the fast path beside the exact one, and splitwise-sim.

    python benchmarks/simulator.py --json out.json
    python benchmarks/simulator.py --peer ~/splitwise-sim --peer-python ~/splitwise-sim/.venv/bin/python

Every simulation runs in a process of its own, on one core; its CPU time is that process's, imports left out.
The peer is a checkout of Mutinifni/splitwise-sim with its requirements installed. It gets the same requests,
machines and step times as ours, and its figure is the CPU time of its process, less that of a run that begins
in the same way and has one request.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec, parse_spec
from disagg.workload import LogNormalLength, Poisson, Workload, synthesize

# Means of the Azure 2023 conversation trace, which itself is not in the repository.
PROMPT = LogNormalLength(1155, 1.1, 14_000)
OUTPUT = LogNormalLength(211, 0.9, 1500)
MACHINES, GPUS_PER_MACHINE = 125, 8
RATE = 250.0
HOUR_S = 3600.0
# What the project asks of the hour.
MOST_SECONDS, MOST_MIB = 300, 2048
PEER_MACHINES = 40
# (requests per second on 40 machines, times as long): nearly all that they can serve, half, and a twentieth.
PEER_CASES = {"near_saturation": (130.0, 1), "half": (70.0, 1), "idle": (7.0, 10)}
# Before it splitwise-sim has no instances, and fails where a request arrives.
PEER_START_S = 1.0
PARTS = ("hour", "fast_path", "peer")


@dataclass(frozen=True)
class Run:
    """One simulation's cost."""

    requests: int
    wall_s: float
    cpu_s: float
    memory_mib: float
    events: int


def workload(rate: float, seconds: float) -> Workload:
    count = max(1, round(rate * seconds))
    return synthesize(count, Poisson(rate), PROMPT, OUTPUT, np.random.default_rng(0))


def thousand_gpus() -> SimSpec:
    """50 machines prefill and 75 decode bloom-176b, with 50 GB/s links that transfers share."""
    machine = {"hardware": "h100-80gb", "tensor_parallel_size": GPUS_PER_MACHINE}
    return parse_spec(
        {
            "model": "bloom-176b",
            "pools": {
                "prefill": {"role": "prefill", "replicas": 50, **machine},
                "decode": {"role": "decode", "replicas": MACHINES - 50, **machine},
            },
            "links": {"bandwidth_gb_s": 50, "sharing": "shared"},
            "engine": {"max_num_seqs": 512, "max_num_batched_tokens": 2048, "block_size": 256},
            "router": {"policy": "least_loaded"},
        }
    )


def peer_cluster(table: Path) -> SimSpec:
    """splitwise-sim's Baseline-H100, as tests/unit/sim/splitwise_compat.py has it."""
    machine = {"hardware": "h100-80gb", "tensor_parallel_size": GPUS_PER_MACHINE, "memory_share": 1.0}
    return parse_spec(
        {
            "model": "bloom-176b",
            "cost": {"kind": "table", "file": str(table)},
            "pools": {"mixed": {"role": "mixed", "replicas": PEER_MACHINES, **machine}},
            "engine": {"max_num_seqs": 512, "max_num_batched_tokens": 100_000, "block_size": 256},
            "router": {"policy": "least_loaded"},
        }
    )


def measure(spec: SimSpec, load: Workload, *, fast: bool = True) -> Run:
    """Run one simulation in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (spec.model_dump(mode="json"), load, fast))


def _measure(spec: dict[str, Any], load: Workload, fast: bool) -> Run:
    cluster = parse_spec(spec)
    wall, cpu = time.perf_counter(), time.process_time()
    simulation = Simulation(cluster, load, fast=fast)
    simulation.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Run(len(load), wall, cpu, memory, simulation.loop.num_events)


# -- rows ----------------------------------------------------------------------------------------------


def row(name: str, value: float, unit: str, runs: int, **more: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "unit": unit, "runs": runs, **more}


def hour_rows(seconds: float, runs: int, console: Console) -> list[dict[str, Any]]:
    """The thousand GPUs; limit is what is asked for, scaled with the time that is simulated."""
    name = "1h" if seconds == HOUR_S else f"{seconds:g}s"
    load = workload(RATE, seconds)
    made = []
    for number in range(runs):
        made.append(measure(thousand_gpus(), load))
        console.print(f"1,000 GPUs, {name}, run {number + 1}: {made[-1]}", style="dim")
    wall = statistics.median(run.wall_s for run in made)
    memory = max(run.memory_mib for run in made)
    rate = statistics.median(run.requests / run.cpu_s for run in made)
    limit = MOST_SECONDS * seconds / HOUR_S
    prefix = f"simulator/1000_gpus_{name}"
    return [
        row(prefix, wall, "s", runs, limit=round(limit, 3), share=round(wall / limit, 3)),
        row(f"{prefix}/memory", memory, "MiB", runs, limit=MOST_MIB, share=round(memory / MOST_MIB, 3)),
        row(f"{prefix}/requests", rate, "requests/CPU s", runs),
    ]


def fast_path_row(runs: int) -> dict[str, Any]:
    """Requests per CPU second with and without the fast path, a minute of the thousand GPUs."""
    load = workload(RATE, 60)
    fast, exact = (
        statistics.median(
            run.requests / run.cpu_s
            for run in [measure(thousand_gpus(), load, fast=fast) for _ in range(runs)]
        )
        for fast in (True, False)
    )
    ratio = round(fast / exact, 2)
    return row("simulator/fast_path", fast, "requests/CPU s", runs, peer=round(exact, 3), ratio=ratio)


# -- splitwise-sim -------------------------------------------------------------------------------------


def peer_rows(folder: Path, python: str, seconds: float, runs: int, console: Console) -> list[dict[str, Any]]:
    rows = []
    first = workload(1.0, 1.0)
    for case, (rate, longer) in PEER_CASES.items():
        load = workload(rate, longer * seconds)
        theirs, ours = [], []
        for _ in range(runs):
            # In turn, so that whatever else the machine does meets both.
            start_s = peer_cpu_seconds(folder, python, first)
            theirs.append(len(load) / (peer_cpu_seconds(folder, python, load) - start_s))
            run = measure(peer_cluster(folder / "data" / "perf_model.csv"), load)
            ours.append(run.requests / run.cpu_s)
        value, peer = statistics.median(ours), statistics.median(theirs)
        ratio = round(value / peer, 2)
        console.print(f"{case}: {value:.0f} against {peer:.0f} requests per CPU second", style="dim")
        name = f"simulator/against_splitwise_sim/{case}"
        rows.append(row(name, value, "requests/CPU s", runs, peer=round(peer, 3), ratio=ratio))
    return rows


def peer_cpu_seconds(folder: Path, python: str, load: Workload) -> float:
    """Run splitwise-sim's Baseline-H100 on the same requests; return the CPU seconds of its process."""
    with tempfile.TemporaryDirectory() as scratch:
        write_peer_trace(Path(scratch) / "load.csv", load)
        command = [
            *(python, "run.py", "applications.0.scheduler=token_jsq", "cluster=half_half"),
            *("cluster.servers.0.count=0", f"cluster.servers.1.count={PEER_MACHINES}"),
            *("start_state=baseline", "performance_model=db", "seed=0"),
            *(f"trace.dir={scratch}", "trace.filename=load", f"output_dir={scratch}/results"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != 0:
        raise SystemExit(f"--peer: splitwise-sim failed in {folder}:\n{result.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_peer_trace(path: Path, load: Workload) -> None:
    """Write requests in splitwise-sim's format; it asks for two tokens at least."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("request_id", "request_type", "application_id", "arrival_timestamp", "batch_size"),
                *("prompt_size", "token_size"),
            ]
        )
        for number, request in enumerate(load):
            tokens = max(2, request.output_tokens)
            at = PEER_START_S + request.arrival_s
            writer.writerow([number, 2, 0, at, 1, request.prompt_tokens, tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="of each case; medians are reported")
    parser.add_argument("--seconds", type=float, default=HOUR_S, help="simulated time of the 1,000 GPUs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peer", type=Path, help="folder of a checkout of splitwise-sim")
    parser.add_argument("--peer-python", default=sys.executable, help="with splitwise-sim's requirements")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="simulated time of its cases")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.peer is not None and not (arguments.peer / "run.py").is_file():
        parser.error(f"--peer: {arguments.peer} has no run.py")
    machine, log = describe_machine(), Console(stderr=True)
    rows: list[dict[str, Any]] = []
    if "hour" in arguments.only:
        rows += hour_rows(arguments.seconds, arguments.runs, log)
    if "fast_path" in arguments.only:
        rows.append(fast_path_row(max(3, arguments.runs)))
    if "peer" in arguments.only and arguments.peer is not None:
        rows += peer_rows(
            arguments.peer, arguments.peer_python, arguments.peer_seconds, max(3, arguments.runs), log
        )
    table = Table("what", "value", "limit or peer", title=f"{machine['cpu']}, {machine['cores']} cores")
    for item in rows:
        beside = item.get("limit", item.get("peer", ""))
        table.add_row(item["name"], f"{item['value']:.1f} {item['unit']}", str(beside))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
