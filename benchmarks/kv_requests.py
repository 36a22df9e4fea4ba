"""What a hand-off costs a request: a part of benchmarks/kv_transfer.py, see there."""

from __future__ import annotations

import http.client
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from local_cluster import LocalCluster, PromptSource, checkpoint, serving
from rich.console import Console
from rich.table import Table

from disagg.config import KVTransport

SHAPE = "llama-81m"
LENGTHS = (128, 512, 1024, 2048, 4096)
# As rows call them. On CPUs what moves blocks for nccl is Gloo.
TRANSPORTS: dict[str, KVTransport] = {"shm": "shm", "grpc": "grpc", "gloo": "nccl"}
OUTPUT_TOKENS = 4
TIMEOUT_S = 120.0
# Of exposed time in TTFT, for prompts of LIMITED_FROM tokens and more.
LIMIT = 0.05
LIMITED_FROM = 2048


@dataclass(frozen=True)
class Pulls:
    """What the cluster has counted of pulls, in all or for one request: how many, and their seconds."""

    num_total: float
    num_exposed: float
    total_s: float
    exposed_s: float

    @classmethod
    def of(cls, exposition: str) -> Pulls:
        def summed(name: str) -> float:
            return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)", exposition, re.M)))

        return cls(
            summed("disagg_kv_transfer_seconds_count"),
            summed("disagg_kv_transfer_exposed_seconds_count"),
            summed("disagg_kv_transfer_seconds_sum"),
            summed("disagg_kv_transfer_exposed_seconds_sum"),
        )

    def since(self, before: Pulls) -> Pulls:
        return Pulls(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))


@dataclass(frozen=True)
class HandOff:
    """One request: seconds to its first token as its client has it, and of its pull."""

    ttft_s: float
    total_s: float
    exposed_s: float


class Client:
    """One request at a time, over a connection that stands."""

    def __init__(self, cluster: LocalCluster) -> None:
        address = urlsplit(cluster.url)
        self._cluster = cluster
        self._connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
        self._pulls = Pulls.of(cluster.metrics())

    def ask(self, body: bytes) -> HandOff:
        """Stream one answer. Raises RuntimeError where it is none, or its KV was not handed over once."""
        started = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = self._connection.getresponse()
        line = response.readline()
        ttft_s = time.perf_counter() - started
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {line.decode(errors='replace')}")
        response.read()
        before, self._pulls = self._pulls, Pulls.of(self._cluster.metrics())
        pull = self._pulls.since(before)
        if (pull.num_total, pull.num_exposed) != (1, 1):
            raise RuntimeError(f"one request, but {pull}")
        return HandOff(ttft_s, pull.total_s, pull.exposed_s)

    def close(self) -> None:
        self._connection.close()


def measure(transports: Sequence[str], rounds: int, progress: Console) -> list[dict[str, Any]]:
    """Return rows for each transport and prompt length; a first round of each transport warms up."""
    rows: list[dict[str, Any]] = []
    with checkpoint(SHAPE) as model:
        for name in transports:
            progress.print(f"{name}: {rounds + 1} rounds of prompts of {LENGTHS} tokens", style="dim")
            rows.extend(rows_of(name, measure_transport(model, TRANSPORTS[name], rounds)))
    return rows


def measure_transport(model: Path, transport: KVTransport, rounds: int) -> dict[int, list[HandOff]]:
    """Return the requests by prompt length; lengths take turns."""
    one = {"replicas": 1, "threads": 1}
    settings = {
        "engine": {"kv_cache_memory": 1 << 29},
        "prefill": one,
        "decode": one,
        "transfer": {"kv_transport": transport},
        "router": {"local_prefill": False},
    }
    measured: dict[int, list[HandOff]] = {length: [] for length in LENGTHS}
    with serving(model, settings) as cluster:
        prompts, client = PromptSource(cluster.vocab_size, seed=11), Client(cluster)
        for number in range(1 + rounds):
            for length in LENGTHS:
                hand_off = client.ask(prompts.request(length, OUTPUT_TOKENS).body)
                if number > 0:
                    measured[length].append(hand_off)
        client.close()
    return measured


def rows_of(transport: str, measured: dict[int, list[HandOff]]) -> list[dict[str, Any]]:
    """Return medians, those of shares over single requests' own."""
    rows: list[dict[str, Any]] = []
    for length, requests in measured.items():
        name = f"kv_transfer/{transport}/request/{length}_tokens"
        for what in fields(HandOff):
            value = statistics.median(getattr(each, what.name) for each in requests)
            rows.append(_row(f"{name}/{what.name.removesuffix('_s')}", value, "s", requests))
        total = statistics.median(each.total_s / each.ttft_s for each in requests)
        exposed = statistics.median(each.exposed_s / each.ttft_s for each in requests)
        rows.append(_row(f"{name}/total_share", total, "of TTFT", requests))
        limited = {"limit": LIMIT, "share": round(exposed / LIMIT, 3)} if length >= LIMITED_FROM else {}
        rows.append({**_row(f"{name}/exposed_share", exposed, "of TTFT", requests), **limited})
    return rows


def _row(name: str, value: float, unit: str, requests: list[HandOff]) -> dict[str, Any]:
    return {"name": name, "value": round(value, 6), "unit": unit, "runs": len(requests)}


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    values = {row["name"]: row["value"] for row in rows}
    columns = ("TTFT", "transfer", "exposed", "transfer", "exposed")
    table = Table("", *columns, title=f"{title}; ms, and shares of TTFT")
    for name in dict.fromkeys(row["name"].rpartition("/")[0] for row in rows):
        seconds = [f"{values[f'{name}/{what}'] * 1e3:.2f}" for what in ("ttft", "total", "exposed")]
        shares = [f"{values[f'{name}/{what}_share']:.2%}" for what in ("total", "exposed")]
        table.add_row(name.removeprefix("kv_transfer/"), *seconds, *shares)
    console.print(table)
