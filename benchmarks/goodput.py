"""Goodput by policy under a mixed load, and what is left of it under ten times too much.

    python benchmarks/goodput.py --json out.json

Short chats with a tight time per output token and long prompts with a loose one arrive at random at `disagg
serve` on this machine. Goodput: requests per second that meet both of their objectives. Each policy sees the
same arrivals at each rate; beside the policies of two workers, one for each phase, stand colocated placement
on the same two cores and chunked prefill with a small budget. Then --overload times what the last policy
served at its best: goodput beside its peak, how long a refusal takes, which process took how much of the
processors, and the memory of each before and after. Client, front end, router, proxy and Ray share the cores
with the workers.

Objectives come from the machine: --slack times the 90th percentile of a kind at --calibrate requests a
second, of which none asks for anything.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from engine import console_of
from local_cluster import BUNDLED, LocalCluster, PromptSource, checkpoint, serving
from processes import Usage, usage
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from disagg.bench.client import Client, Endpoint, RequestResult
from disagg.bench.machine import describe_machine

REQUEST_TIMEOUT_S = 120.0
RESOLVE_S = 1.0
SHED_LIMIT_MS, KEPT_LIMIT = 50.0, 0.9
QUANTILE = 90
# Requests that objectives are taken from, at least: few of one kind come among fewer.
CALIBRATING = 30
CHUNKED_TOKENS = 32


@dataclass(frozen=True)
class Kind:
    """A kind of request. share: of all requests."""

    name: str
    prompt: int
    output: int
    share: float


KINDS = (Kind("chat", 64, 32, 0.85), Kind("long", 768, 8, 0.15))


class TimedEndpoint(Endpoint):
    """Adds the objectives, in seconds, that requests carry."""

    objectives: tuple[float, float]

    def post(self, path: str, body: bytes) -> bytes:
        head, _, rest = super().post(path, body).partition(b"\r\n\r\n")
        ttft, tpot = (round(1e3 * value, 1) for value in self.objectives)
        return head + f"\r\nx-slo-ttft-ms: {ttft}\r\nx-slo-tpot-ms: {tpot}\r\n\r\n".encode() + rest


def placements(chunk: int, policies: Sequence[str], decode: int = 1) -> dict[str, dict[str, Any]]:
    """Return settings by name: rivals first, then each policy over a prefill and so many decode workers."""
    engine = {"max_num_batched_tokens": chunk, "kv_cache_memory": 1 << 28}
    none, one, two = {"replicas": 0}, {"replicas": 1, "threads": 1}, {"replicas": 2, "threads": 1}
    apart = {"engine": engine, "prefill": one, "decode": {**one, "replicas": decode}}
    together = {"engine": engine, "prefill": none, "decode": none}
    return {
        "colocated": {**together, "mixed": {**two, "max_num_batched_tokens": 512}},
        "chunked": {**together, "mixed": {**two, "max_prefill_tokens": CHUNKED_TOKENS}},
        **{name: {**apart, "router": {"policy": name}} for name in policies},
    }


@dataclass
class Outcome:
    """What became of the requests of one run. Seconds. late: of those served, by the objective missed."""

    rate: float
    seconds: float
    good: int = 0
    served: int = 0
    late: Counter[str] = field(default_factory=Counter)
    shed_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        return self.good / self.seconds


class Load:
    """Sends what arrives. objectives: (TTFT, TPOT) by kind, set by `calibrate`."""

    def __init__(self, cluster: LocalCluster, objectives: dict[str, tuple[float, float]] | None) -> None:
        self._url = cluster.url
        # One for all runs: a prompt that an earlier one sent would be found in a prefix cache.
        self._prompts = PromptSource(cluster.vocab_size, 7)
        self.objectives = dict(objectives or {})
        self.clients: dict[str, Client] = {}
        for name in self.objectives:
            self._connect(name)

    def _connect(self, name: str) -> None:
        endpoint = TimedEndpoint(*Endpoint.parse(self._url))
        endpoint.objectives = self.objectives[name]
        self.clients[name] = Client(endpoint, REQUEST_TIMEOUT_S)

    async def warm_up(self) -> None:
        """Let the router learn how long steps take."""
        client = Client(Endpoint.parse(self._url), REQUEST_TIMEOUT_S)
        for kind in (*KINDS, *KINDS):
            requests = (self._prompts.request(kind.prompt, kind.output) for _ in range(2))
            await asyncio.gather(*(client.stream(0, request) for request in requests))
        await asyncio.sleep(RESOLVE_S)
        client.close()

    async def calibrate(self, rate: float, seconds: float, slack: float) -> None:
        """Set objectives from what requests of each kind take under a moderate load."""
        plain = Client(Endpoint.parse(self._url), REQUEST_TIMEOUT_S)
        self.clients = {kind.name: plain for kind in KINDS}
        answers = await self._send(rate, max(seconds, CALIBRATING / rate), seed=8)
        plain.close()
        for kind in KINDS:
            results = [result for of, result in answers if of is kind and result.ok]
            if not results:
                raise RuntimeError(f"no {kind.name} was served: {[str(r.failure) for _, r in answers]}")
            ttft = np.percentile([result.ttft_s for result in results], QUANTILE)
            tpot = np.percentile([result.tpot_s or 0.0 for result in results], QUANTILE)
            self.objectives[kind.name] = (slack * float(ttft), slack * float(tpot))
            self._connect(kind.name)

    async def run(self, rate: float, seconds: float) -> Outcome:
        """Send Poisson arrivals of both kinds for so long; wait for the last answer."""
        outcome = Outcome(rate, seconds)
        for kind, result in await self._send(rate, seconds, seed=1):
            self._account(outcome, kind, result)
        return outcome

    async def _send(self, rate: float, seconds: float, seed: int) -> list[tuple[Kind, RequestResult]]:
        rng = np.random.default_rng(seed)
        arrivals = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
        kinds = [KINDS[index] for index in rng.choice(len(KINDS), len(arrivals), p=[k.share for k in KINDS])]
        requests = [self._prompts.request(kind.prompt, kind.output) for kind in kinds]
        gc.collect()
        start = time.perf_counter()
        tasks = []
        for index, (at, kind, request) in enumerate(zip(arrivals, kinds, requests, strict=True)):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.clients[kind.name].stream(index, request)))
        return list(zip(kinds, await asyncio.gather(*tasks), strict=True))

    def _account(self, outcome: Outcome, kind: Kind, result: RequestResult) -> None:
        if result.failure is not None:
            if "429" in str(result.failure):
                outcome.shed_s.append(result.e2e_s)
            else:
                outcome.failures[result.failure.kind.value] += 1
            return
        outcome.served += 1
        ttft, tpot = self.objectives[kind.name]
        outcome.late["ttft"] += result.ttft_s > ttft
        outcome.late["tpot"] += (result.tpot_s or 0.0) > tpot
        outcome.good += result.ttft_s <= ttft and (result.tpot_s or 0.0) <= tpot


def usage_of(cluster: LocalCluster) -> Usage:
    """Return what workers, router, front end and all others take."""
    status = cluster.status()
    names = {worker["pid"]: worker["role"] for worker in status["workers"]}
    names |= {status["router"]["pid"]: "router", status["frontend"]["pid"]: "frontend"}
    return usage(cluster.pid, names)


@dataclass
class Overload:
    """taken: during the flood. before: it."""

    outcome: Outcome
    peak: float
    before: Usage
    taken: Usage


async def measure(
    cluster: LocalCluster,
    arguments: argparse.Namespace,
    objectives: dict[str, tuple[float, float]] | None,
    overload: bool,
) -> tuple[list[Outcome], Overload | None, dict[str, tuple[float, float]]]:
    """Run every rate, and then too much of it if asked."""
    load = Load(cluster, objectives)
    await load.warm_up()
    if objectives is None:
        await load.calibrate(arguments.calibrate, arguments.seconds, arguments.slack)
    outcomes = [await load.run(rate, arguments.seconds) for rate in arguments.rates]
    if not overload:
        return outcomes, None, load.objectives
    best = max(outcomes, key=lambda outcome: outcome.goodput)
    # The first flood touches every page of the caches for the first time; what grows from then on is a leak.
    rate = arguments.overload * best.goodput
    await load.run(rate, arguments.seconds)
    before = usage_of(cluster)
    flood = await load.run(rate, arguments.seconds)
    await asyncio.sleep(RESOLVE_S)
    taken = usage_of(cluster).since(before)
    return outcomes, Overload(flood, best.goodput, before, taken), load.objectives


def rows_of(name: str, outcomes: list[Outcome], overload: Overload | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        rows.append(
            {
                "name": f"goodput/{name}/{outcome.rate:g}_per_s",
                "value": round(outcome.goodput, 3),
                "unit": "requests/s within both objectives",
                "runs": 1,
                "limit": outcome.rate,
                "share": round(outcome.goodput / outcome.rate, 3),
                "served": outcome.served,
                "shed": len(outcome.shed_s),
                "failed": sum(outcome.failures.values()),
                "late": dict(outcome.late),
            }
        )
    return rows if overload is None else rows + rows_of_overload(name, overload)


def rows_of_overload(name: str, overload: Overload) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    flood, peak, taken = overload.outcome, max(overload.peak, 1e-9), overload.taken
    more: dict[str, tuple[float, str, float]] = {
        "goodput": (flood.goodput, "requests/s within both objectives", KEPT_LIMIT * peak),
    }
    for what, grown in taken.memory_mib.items():
        more[f"growth/{what}"] = (grown, "MiB", overload.before.memory_mib[what])
    for what, seconds in taken.cpu_s.items():
        more[f"cpu/{what}"] = (seconds / flood.seconds, "cores", len(os.sched_getaffinity(0)))
    if flood.shed_s:
        more["shed_p50"] = (1e3 * statistics.median(flood.shed_s), "ms", SHED_LIMIT_MS)
        more["shed_p99"] = (1e3 * float(np.percentile(flood.shed_s, 99)), "ms", SHED_LIMIT_MS)
    for what, (value, unit, limit) in more.items():
        row = {"name": f"goodput/{name}/overload/{what}", "value": round(value, 3), "unit": unit, "runs": 1}
        rows.append({**row, "limit": round(limit, 3), "share": round(value / max(limit, 1e-9), 3)})
    rows[0] |= {
        "rate": flood.rate,
        "served": flood.served,
        "shed": len(flood.shed_s),
        "failed": sum(flood.failures.values()),
        "late": dict(flood.late),
    }
    return rows


def print_table(rows: list[dict[str, Any]], machine: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{machine['shape']} on {machine['cpu']}, {machine['cores']} cores", title_justify="left"
    )
    table.add_column("what", no_wrap=True)
    for column in ("value", "limit", "share", "served", "shed", "failed", "late"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"].removeprefix("goodput/"),
            f"{row['value']:.2f}",
            f"{row['limit']:.2f}",
            f"{row['share']:.0%}",
            *(str(row.get(name, "")) for name in ("served", "shed", "failed")),
            " ".join(f"{what} {count}" for what, count in row.get("late", {}).items()),
        )
    console.print(table)
    for kind, (ttft, tpot) in machine["objectives"].items():
        console.print(f"{kind}: TTFT {1e3 * ttft:.0f} ms, TPOT {1e3 * tpot:.0f} ms")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=BUNDLED, help=f"{BUNDLED}, or one of benchmarks/engine.py")
    parser.add_argument(
        "--policies", nargs="*", default=["round_robin", "least_loaded", "prefix_aware", "slo"]
    )
    parser.add_argument("--decode", type=int, default=1, help="decode workers beside the prefill worker")
    parser.add_argument("--only", default="", help="placements whose names contain this")
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0, 16.0], help="requests/s")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each rate")
    parser.add_argument(
        "--slack", type=float, default=2.0, help="objectives over what requests take under a moderate load"
    )
    parser.add_argument("--calibrate", type=float, default=4.0, help="that load, in requests/s")
    parser.add_argument("--overload", type=float, default=10.0, help="times the best goodput; 0: leave out")
    parser.add_argument("--chunk", type=int, default=128, help="token budget of a step")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    machine = {**describe_machine(), "shape": arguments.shape, "chunk": arguments.chunk}
    machine["decode_workers"] = arguments.decode
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
    rows: list[dict[str, Any]] = []
    objectives: dict[str, tuple[float, float]] | None = None
    wanted = {
        name: settings
        for name, settings in placements(arguments.chunk, arguments.policies, arguments.decode).items()
        if arguments.only in name
    }
    with (
        checkpoint(arguments.shape) as model,
        Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("placements", total=len(wanted), status="")
        for number, (name, settings) in enumerate(wanted.items(), 1):
            progress.update(bar, status=name)
            flood = arguments.overload > 0 and number == len(wanted)
            with serving(model, settings) as cluster:
                outcomes, overload, objectives = asyncio.run(measure(cluster, arguments, objectives, flood))
            rows += rows_of(name, outcomes, overload)
            progress.advance(bar)
    machine["objectives"] = objectives or {}
    print_table(rows, machine, console_of(sys.stdout, 160))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
