"""What `disagg status` and `disagg top` show: pools, workers, links and objectives, as rich tables."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

_STATE_STYLE = {"ready": "green", "starting": "yellow", "draining": "yellow", "dead": "bold red"}
_FULL, _CROWDED = 0.95, 0.8
_BAR_CELLS = 8
# Columns of a terminal below which pids and hosts are left out: names and load matter more.
_WIDE = 100
_Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reading:
    """The cluster at one moment. at: seconds on this process's clock. metrics: sums of counters by labels."""

    at: float
    status: dict[str, Any]
    metrics: dict[str, dict[_Labels, float]] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a counter's samples that have the given labels."""
        wanted = labels.items()
        return sum(value for own, value in self.metrics.get(name, {}).items() if wanted <= dict(own).items())


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """Return the cluster's state. Exits with 1 and one line where it can't be had."""
    report: dict[str, Any] = _get(url, "/status", api_key).json()
    return report


def read(url: str, api_key: str | None) -> Reading:
    """Return state and metrics. Exits as `fetch` does."""
    status = fetch(url, api_key)
    return Reading(time.monotonic(), status, parse(_get(url, "/metrics", api_key).text))


def _get(url: str, path: str, api_key: str | None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url.rstrip('/')}{path}", headers=headers, timeout=10, trust_env=False)
        response.raise_for_status()
        if path == "/status":
            response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] can't read {url}{path}: {error}", highlight=False)
        raise typer.Exit(1) from None
    return response


def parse(exposition: str) -> dict[str, dict[_Labels, float]]:
    """Return {sample name: {labels: value}} of a Prometheus exposition; labels are sorted pairs."""
    found: dict[str, dict[_Labels, float]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def render(now: Reading, before: Reading | None = None, *, width: int = _WIDE) -> RenderableType:
    """Return everything as one renderable for so many columns; rates need an earlier reading."""
    parts = (_pools(now), _workers(now, before, wide=width >= _WIDE), _figures(now, before))
    return Group(*(part for pair in zip(parts, [Text()] * len(parts), strict=True) for part in pair))


def _pools(now: Reading) -> Table:
    table = _table("pool", "ready", "running", "waiting", "held", "blocks", title=_title(now))
    for role in ("prefill", "decode", "mixed"):
        members = [worker for worker in now.status["workers"] if worker["role"] == role]
        if not members:
            continue
        states = Counter(worker["state"] for worker in members)
        used, total = (sum(item[f"kv_blocks_{what}"] for item in members) for what in ("used", "total"))
        table.add_row(
            role,
            _share_of(states["ready"], len(members)),
            *(str(sum(item[f"num_{what}"] for item in members)) for what in ("running", "waiting", "held")),
            _bar(used, total),
        )
    return table


def _title(now: Reading) -> str:
    return f"model {now.status.get('model', '?')}"


def _share_of(ready: int, size: int) -> Text:
    return Text(
        f"{ready} of {size}", style="green" if ready == size else "bold red" if not ready else "yellow"
    )


def _workers(now: Reading, before: Reading | None, *, wide: bool) -> Table:
    where = ("pid", "host") if wide else ()
    load = ("running", "waiting", "held")
    table = _table("worker", "role", "state", *where, *load, "KV blocks", "KV in")
    for worker in now.status["workers"]:
        table.add_row(
            worker["id"],
            worker["role"],
            Text(worker["state"], style=_STATE_STYLE.get(worker["state"], "")),
            *(str(worker[name]) for name in where),
            *(str(worker[f"num_{name}"]) for name in load),
            _bar(worker["kv_blocks_used"], worker["kv_blocks_total"]),
            _link(now, before, worker["id"]),
        )
    return table


def _link(now: Reading, before: Reading | None, worker_id: str) -> str:
    """Return the KV that a worker pulled, per second between two readings or else in all, and by what."""
    name = "disagg_kv_transfer_bytes_total"
    if before is None:
        moved = _bytes(now.total(name, worker=worker_id))
    else:
        moved = f"{_bytes(_rate(now, before, name, worker=worker_id))}/s"
    series = (dict(labels) for labels in now.metrics.get(name, {}))
    used = {own["transport"] for own in series if own.get("worker") == worker_id and "transport" in own}
    return " ".join((moved, *sorted(used)))


def _figures(now: Reading, before: Reading | None) -> Table:
    """Return one line per objective and rate."""
    figures = Table.grid(padding=(0, 2))
    router = now.status["router"]
    link = "connected" if router["connected"] else "away: placing by the last view"
    style = "" if router["connected"] else "bold red"
    figures.add_row("router", Text(f"pid {router['pid']}, {link}", style=style))
    figures.add_row("objectives", _attainment(now, before))
    outcomes = {
        outcome: now.total("disagg_requests_total", outcome=outcome)
        for outcome in ("stop", "length", "shed", "deadline", "abort", "error")
    }
    told = ", ".join(f"{count:.0f} {name}" for name, count in outcomes.items() if count)
    figures.add_row("requests", told or "none yet")
    if before is not None:
        prompt, output = (
            _rate(now, before, f"disagg_{what}_tokens_total") for what in ("prompt", "generation")
        )
        figures.add_row("tokens", f"{prompt:.0f} prompt/s, {output:.0f} output/s")
    return figures


def _attainment(now: Reading, before: Reading | None) -> Text:
    """Return the share of requests that met each objective, lately if there is an earlier reading."""
    parts = []
    for slo in ("ttft", "tpot"):
        met, missed = (
            now.total("disagg_slo_attained_total", slo=slo, met=value)
            - (0 if before is None else before.total("disagg_slo_attained_total", slo=slo, met=value))
            for value in ("true", "false")
        )
        if met + missed:
            parts.append(f"{slo.upper()} met by {met / (met + missed):.1%} of {met + missed:.0f}")
    return Text(", ".join(parts) or "no request with objectives has ended" + (" lately" if before else ""))


def _rate(now: Reading, before: Reading, name: str, **labels: str) -> float:
    # A process that was replaced counts from 0 again.
    more = max(0.0, now.total(name, **labels) - before.total(name, **labels))
    return more / max(1e-3, now.at - before.at)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}"


def _bar(used: int, total: int) -> Text:
    share = used / max(1, total)
    cells = min(_BAR_CELLS, -(-used * _BAR_CELLS // max(1, total)))
    style = "bold red" if share > _FULL else "yellow" if share > _CROWDED else "green"
    return Text.assemble(("█" * cells, style), ("·" * (_BAR_CELLS - cells), "dim"), f" {used} / {total}")


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    right = {"running", "waiting", "held", "pid", "KV in"}
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table
