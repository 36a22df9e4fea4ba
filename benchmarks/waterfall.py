"""What of the time to the first token the waterfall explains, by prompt length.

    python benchmarks/waterfall.py --json out.json

Prompts that share nothing go one after the other to `disagg serve` (a prefill and a decode worker, one
compute thread each), with `x-disagg-explain: 1`. The client's own time is from before it sends the request,
over a connection that stands, to the first bytes of the stream; the parts are those of the answer to the same
request. What they lack of the client's time is outside of the front end's sight: the client itself, the
network, the proxy, and Serve's layer around the application. Shares are of the limit of 2 %.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from local_cluster import BUNDLED, LocalCluster, PromptSource, checkpoint, serving
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine

LENGTHS = {BUNDLED: (16, 100, 200, 400, 800, 1500), "llama-81m": (16, 32, 64, 128, 512, 2048)}
PARTS = ("queue", "prefill")
OUTPUT_TOKENS = 4
WARM_UPS = 2
LIMIT = 0.02
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Request:
    """Seconds that the client measured to the first token, and the parts that the answer told."""

    ttft: float
    parts: dict[str, float]

    @property
    def outside(self) -> float:
        return self.ttft - sum(self.parts[part] for part in PARTS)


def ask(connection: http.client.HTTPConnection, body: bytes) -> Request:
    """Stream one answer. Raises RuntimeError where it is no answer."""
    headers = {"content-type": "application/json", "x-disagg-explain": "1"}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", body, headers)
    response = connection.getresponse()
    line = response.readline()
    ttft = time.perf_counter() - started
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {line.decode(errors='replace')}")
    events = [line, *response.read().splitlines()]
    for event in reversed(events):
        if event.startswith(b"data: {") and "disagg" in (answer := json.loads(event[6:])):
            told = answer["disagg"]["choices"][0]["parts"]
            return Request(ttft, told)
    raise RuntimeError("the answer does not tell where its time went")


def measure(cluster: LocalCluster, lengths: tuple[int, ...], rounds: int) -> dict[int, list[Request]]:
    """Return the requests by prompt length; lengths take turns."""
    address = urlsplit(cluster.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
    prompts = PromptSource(cluster.vocab_size, seed=7)
    measured: dict[int, list[Request]] = {length: [] for length in lengths}
    for number in range(WARM_UPS + rounds):
        for length in lengths:
            request = ask(connection, prompts.request(length, OUTPUT_TOKENS).body)
            if number >= WARM_UPS:
                measured[length].append(request)
    connection.close()
    return measured


def rows_of(shape: str, measured: dict[int, list[Request]]) -> list[dict[str, Any]]:
    """Return the rows of benchmarks/README.md, medians of single requests."""
    rows: list[dict[str, Any]] = []
    for length, requests in measured.items():
        values = {
            "ttft": [each.ttft for each in requests],
            **{part: [each.parts[part] for each in requests] for part in (*PARTS, "frontend")},
            "outside": [each.outside for each in requests],
            "outside_share": [each.outside / each.ttft for each in requests],
        }
        for what, several in values.items():
            value = statistics.median(several)
            row = {"name": f"waterfall/{shape}/{length}_tokens/{what}", "value": value, "unit": "s"}
            if what == "outside_share":
                row |= {"unit": "of TTFT", "limit": LIMIT, "share": value / LIMIT}
            rows.append({**row, "runs": len(requests)})
    return rows


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    columns = ("ttft", *PARTS, "frontend", "outside", "outside_share")
    table = Table("", *columns, title="median ms, share in %; frontend is a part of queue")
    values = {row["name"]: row["value"] for row in rows}
    for name in dict.fromkeys(row["name"].rpartition("/")[0] for row in rows):
        cells = [
            f"{values[f'{name}/{column}'] * (100 if column == 'outside_share' else 1000):.2f}"
            for column in columns
        ]
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=LENGTHS, default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    one = {"replicas": 1, "threads": 1}
    settings = {"engine": {"kv_cache_memory": 1 << 29}, "prefill": one, "decode": one}
    machine = {**describe_machine(), "shape": arguments.shape}
    with checkpoint(arguments.shape) as model, serving(model, settings) as cluster:
        rows = rows_of(arguments.shape, measure(cluster, LENGTHS[arguments.shape], arguments.rounds))
    print_table(rows, Console())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
