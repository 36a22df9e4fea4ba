"""How many placements a second one router process decides, and how long the slowest take.

    python benchmarks/router.py --json out.json

Against 2, 64, 1,024 and 10,000 workers, with an index of 10 million KV blocks. A decision is what a live
router does for one request: place it, hear that its prefill is done, hear of its end, and take in as many
worker reports as come meanwhile at the rate that is asked for (each worker reports twice a second, with the
blocks that it stored and evicted since, and its step times). Left out is what gRPC and protobuf take.
P99 is of Router.place alone. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine
from disagg.config import RouterConfig
from disagg.routing.router import Router
from disagg.routing.types import BlockEvents, PlacementRequest, StepSample, WorkerReport
from disagg.types import Role, WorkerInfo, WorkerLoad, WorkerStatus

Hashes = npt.NDArray[np.uint64]

BLOCK = 16
# A conversation has so many blocks, of which the first ones are a system prompt that many share.
CHAIN, SYSTEM, NUM_SYSTEMS = 64, 12, 200
TURN_BLOCKS = 4
HEARTBEAT_S = 0.5
SEQUENCES_PER_WORKER, MOST_IN_FLIGHT = 8, 50_000
# Entries that the blocks of requests in flight take on both of their workers.
ROOM_IN_FLIGHT = 2 * (CHAIN + TURN_BLOCKS) * MOST_IN_FLIGHT
# Number of workers -> decisions per second asked for (None: nothing is), and in how many seconds P99 is due.
ASKED: dict[int, tuple[float | None, float | None]] = {
    2: (None, None),
    64: (20_000, None),
    1024: (None, None),
    10_000: (2_000, 2e-3),
}
# Rate at which reports are mixed in where none is asked for.
USUAL_RATE = 5_000.0


@dataclass(frozen=True)
class Measured:
    """Of one case. Seconds and MiB; index_mib: what the full index added to the process."""

    decisions_per_s: float
    place_p50_s: float
    place_p99_s: float
    index_mib: float
    rss_mib: float
    blocks: int
    local: float
    reports_per_decision: float


def chain_hashes(conversation: int, count: int) -> Hashes:
    """Return the hashes of a conversation's blocks; those of its system prompt are shared with others."""
    seeds = np.arange(count, dtype=np.uint64) + np.uint64((conversation + NUM_SYSTEMS) << 12)
    seeds[:SYSTEM] = np.arange(SYSTEM, dtype=np.uint64)[:count] + np.uint64(conversation % NUM_SYSTEMS << 12)
    # splitmix64 (Steele, Lea and Flood 2014): the index sees what it would of real hashes.
    mixed = seeds * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Cluster:
    """A router with workers that hold `blocks` blocks in all, and a load on them."""

    def __init__(self, policy: str, num_workers: int, blocks: int, seed: int) -> None:
        config = RouterConfig.model_validate({"policy": policy})
        self.rng = random.Random(seed)
        self.router = Router(config, random.Random(seed), max_index_entries=3 * blocks + ROOM_IN_FLIGHT)
        per_worker = 2 * blocks // num_workers
        capacity = max(4096, 2 * per_worker)
        self.infos = [
            WorkerInfo(
                worker_id=f"worker-{number}",
                incarnation="one",
                role=Role.PREFILL if number % 2 else Role.DECODE,
                address="127.0.0.1:1",
                host="here",
                pid=1,
                max_model_len=32_768,
                block_size=BLOCK,
                max_num_seqs=256,
                max_num_batched_tokens=2048,
                kv_blocks_total=capacity,
            )
            for number in range(num_workers)
        ]
        self.sequence = [0] * num_workers
        self.stored: list[deque[list[int]]] = [deque() for _ in range(num_workers)]
        self.held: list[list[int]] = [[] for _ in range(num_workers)]
        self._next_conversation = 0
        for number in range(num_workers):
            self._report(number, 0.0)
        before = rss_mib()
        for number in range(num_workers):
            self._fill(number, per_worker)
        self.index_mib = rss_mib() - before

    def _fill(self, number: int, blocks: int) -> None:
        """Have a worker report its whole cache: each conversation is on one prefill and one decode one."""
        own = CHAIN - SYSTEM
        count = -(-blocks // own)
        first = (number // 2) * count
        conversations = range(first, first + count)
        self._next_conversation = max(self._next_conversation, first + count)
        hashes = np.concatenate([chain_hashes(item, CHAIN) for item in conversations])
        # In messages of what a wire takes at once.
        for start in range(0, len(hashes), 2**16):
            self._report(number, 0.0, hashes[start : start + 2**16].tolist(), first=start == 0)
        self.held[number] = list(conversations)

    def _report(
        self, number: int, now: float, stored: list[int] | None = None, *, first: bool = False
    ) -> None:
        events = None
        if stored is not None:
            removed = [] if first or len(self.stored[number]) < 8 else self.stored[number].popleft()
            events = BlockEvents(self.sequence[number], stored, removed, snapshot=first)
            self.sequence[number] += 1
        running = self.rng.randrange(SEQUENCES_PER_WORKER)
        steps = [
            StepSample(0.020 + 1e-4 * 500, num_tokens=500, attended=125_000),
            StepSample(0.012 + 2e-4 * running, num_decodes=running + 1, context=1000 * (running + 1)),
        ]
        load = WorkerLoad(running, 0, waiting_tokens=0, kv_blocks_used=64 * running)
        report = WorkerReport(self.infos[number], WorkerStatus.READY, load, events, steps)
        if self.router.worker_report(report, now):
            raise AssertionError("the index lost count of a worker's events")

    def heartbeat(self, number: int, now: float) -> None:
        """A report as it comes twice a second, with the blocks of what this worker did meanwhile."""
        conversation = self.rng.choice(self.held[number])
        stored = [self.rng.getrandbits(64) for _ in range(TURN_BLOCKS)]
        stored += chain_hashes(conversation, CHAIN)[-TURN_BLOCKS:].tolist()
        self._report(number, now, stored)
        self.stored[number].append(stored[:TURN_BLOCKS])

    def requests(self, count: int) -> list[PlacementRequest]:
        """Half are a next turn of a conversation that is cached, half a new one behind a system prompt."""
        made = []
        for number in range(count):
            follows = self.rng.random() < 0.5
            last = self._next_conversation
            conversation = self.rng.randrange(last) if follows else last + number + 1
            known = CHAIN if follows else self.rng.randrange(SYSTEM + 1, CHAIN)
            hashes = [*chain_hashes(conversation, known).tolist()]
            hashes += [self.rng.getrandbits(64) for _ in range(TURN_BLOCKS)] if follows else []
            made.append(
                PlacementRequest(
                    request_id=f"request-{number}",
                    frontend_id=f"front-{number % 4}",
                    num_tokens=len(hashes) * BLOCK + 5,
                    max_new_tokens=256,
                    block_hashes=tuple(hashes),
                    slo_ttft_s=1.0,
                    slo_tpot_s=0.05,
                )
            )
        return made


def measure(policy: str, num_workers: int, blocks: int, seconds: float, seed: int) -> Measured:
    """Run one case in this process."""
    cluster = Cluster(policy, num_workers, blocks, seed)
    router, perf = cluster.router, time.perf_counter
    rate = ASKED.get(num_workers, (None, None))[0] or USUAL_RATE
    reports_each = num_workers / HEARTBEAT_S / rate
    in_flight: deque[str] = deque()
    most = min(SEQUENCES_PER_WORKER * num_workers, MOST_IN_FLIGHT)
    for request in cluster.requests(most):
        warm = f"warm-{request.request_id}"
        router.place(
            PlacementRequest(
                warm, "front-0", request.num_tokens, request.max_new_tokens, request.block_hashes
            ),
            0.0,
        )
        router.prefilled(warm)
        in_flight.append(warm)
    requests = cluster.requests(20_000)
    gc.collect()
    gc.freeze()
    times, spent, decided, owed, number = [], 0.0, 0, 0.0, 0
    while spent < seconds:
        if decided and decided % len(requests) == 0:
            # The same ids again, long finished; other lengths of a turn don't matter to the router.
            requests = cluster.requests(len(requests))
        request, now = requests[decided % len(requests)], 1.0 + spent
        started = perf()
        router.place(request, now)
        placed = perf()
        router.prefilled(request.request_id, 0.1)
        in_flight.append(request.request_id)
        router.finished(in_flight.popleft(), 200, 4.9)
        ended = perf()
        times.append(placed - started)
        spent += ended - started
        decided += 1
        owed += reports_each
        while owed >= 1:
            owed -= 1
            spent += _timed_heartbeat(cluster, number, now)
            number = (number + 1) % num_workers
    router.take_errors()
    kinds = router.counters
    return Measured(
        decisions_per_s=decided / spent,
        place_p50_s=float(np.percentile(times, 50)),
        place_p99_s=float(np.percentile(times, 99)),
        index_mib=cluster.index_mib,
        rss_mib=rss_mib(),
        blocks=router.index.num_blocks,
        local=sum(count for (_, kind), count in kinds.items() if kind == "local") / max(1, kinds.total()),
        reports_per_decision=reports_each,
    )


def _timed_heartbeat(cluster: Cluster, number: int, now: float) -> float:
    """Return the seconds that the router takes for a report, without those that it takes to make one up."""
    taken = 0.0
    real = cluster.router.worker_report

    def timed(report: WorkerReport, at: float) -> bool:
        nonlocal taken
        started = time.perf_counter()
        answer = real(report, at)
        taken = time.perf_counter() - started
        return answer

    cluster.router.worker_report = timed  # type: ignore[method-assign]
    try:
        cluster.heartbeat(number, now)
    finally:
        del cluster.router.worker_report  # type: ignore[method-assign]
    return taken


def rss_mib() -> float:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_a_process(*arguments: Any) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def rows_of(policy: str, num_workers: int, runs: list[Measured]) -> list[dict[str, Any]]:
    """The default policy's names are the short ones."""
    default = policy == RouterConfig().policy
    name = f"router/place{'' if default else '_' + policy}/{num_workers}_workers"
    asked_rate, asked_p99 = ASKED.get(num_workers, (None, None))
    rate = statistics.median(run.decisions_per_s for run in runs)
    p99 = statistics.median(run.place_p99_s for run in runs) * 1e6
    p50 = statistics.median(run.place_p50_s for run in runs) * 1e6
    rows = [
        _row(name, rate, "decisions/s", len(runs), asked_rate),
        _row(f"{name}/p99", p99, "us", len(runs), asked_p99 and asked_p99 * 1e6),
        _row(f"{name}/p50", p50, "us", len(runs)),
        _row(f"{name}/index_memory", max(run.index_mib for run in runs), "MiB", len(runs)),
        _row(f"{name}/memory", max(run.rss_mib for run in runs), "MiB", len(runs)),
    ]
    return rows


def _row(name: str, value: float, unit: str, runs: int, limit: float | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "value": round(value, 2), "unit": unit, "runs": runs}
    return row if limit is None else {**row, "limit": limit, "share": round(value / limit, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=list(ASKED))
    parser.add_argument("--policies", nargs="+", default=["prefix_aware", "slo"])
    parser.add_argument("--blocks", type=int, default=10_000_000, help="different KV blocks in the index")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the router's time, in each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, rows = Console(), []
    shown = Table("policy", "workers", "decisions/s", "place P50", "place P99", "index", "process", "blocks")
    for policy in arguments.policies:
        for count in arguments.workers:
            runs = [
                in_a_process(policy, count, arguments.blocks, arguments.seconds, seed)
                for seed in range(arguments.runs)
            ]
            found = rows_of(policy, count, runs)
            rows += found
            values = [item["value"] for item in found]
            shown.add_row(
                policy,
                f"{count:,}",
                f"{values[0]:,.0f}",
                f"{values[2]:.0f} us",
                f"{values[1]:.0f} us",
                f"{values[3]:.0f} MiB",
                f"{values[4]:.0f} MiB",
                f"{runs[0].blocks / 1e6:.1f} M",
            )
            console.print(f"{policy}, {count} workers: {runs}", style="dim")
    machine = describe_machine()
    console.print(shown)
    console.print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average']}", style="dim")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
