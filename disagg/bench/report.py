"""From results to figures: what each metric means, the table and the JSON file.

All times are as the client sees them, from before it connects:

- TTFT: to the first chunk that carries a token.
- E2E: to `[DONE]`.
- TPOT: (E2E - TTFT) / (output tokens - 1), one value per request; none for answers of one token.
- ITL: the gaps between successive chunks that carry tokens, all requests together. Where a chunk carries
  several tokens the gap is counted once and not divided, so ITL says what a reader sees;
  `tokens_per_chunk` tells how often that is.
- Goodput: requests per second that meet every objective given. An answer of one token has no TPOT and
  meets that objective. Attainment: their share of all requests that ended, failed ones included.

Latencies are of the requests that succeeded; failures only count as failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from disagg.bench.client import RequestResult
from disagg.bench.machine import describe_machine
from disagg.bench.runner import Measurement

BUSY_CLIENT = 0.8
"""Share of a core from which on the client itself may be what limits."""
LATE_CLIENT_S = 0.02
MAX_REASONS = 3
"""Different messages shown for each kind of failure."""


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles (linear interpolation, as numpy's default) of `samples` values."""

    mean: float
    p50: float
    p90: float
    p99: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None if there are no values."""
        array = np.fromiter(values, dtype=np.float64)
        if not len(array):
            return None
        p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
        return cls(float(array.mean()), p50, p90, p99, len(array))

    def items(self) -> list[tuple[str, float]]:
        return [("mean", self.mean), ("p50", self.p50), ("p90", self.p90), ("p99", self.p99)]


@dataclass(frozen=True)
class Objectives:
    """Latency objectives in seconds; None: not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    @property
    def given(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def met_by(self, result: RequestResult) -> bool:
        if not result.ok:
            return False
        if self.ttft_s is not None and result.ttft_s > self.ttft_s:
            return False
        return self.tpot_s is None or result.tpot_s is None or result.tpot_s <= self.tpot_s


@dataclass(frozen=True)
class Report:
    """Every figure of one run. Times in seconds, rates per second."""

    planned: int
    ok: int
    failed: int
    unfinished: int
    interrupted: bool
    duration_s: float
    input_tokens: int
    """As counted by the server, where it says so."""
    planned_input_tokens: int
    """As asked for, of the same requests."""
    cached_tokens: int | None
    output_tokens: int
    latencies: dict[str, Distribution]
    """`ttft`, `tpot`, `itl`, `e2e`, and `send_lag`: how late the client sent."""
    tokens_per_chunk: float
    counted_by_chunks: int
    """Successful requests whose stream stated no usage."""
    failures: dict[str, int]
    reasons: dict[str, list[str]]
    objectives: Objectives
    good: int
    client_cores: float
    """Cores that the client kept busy."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return self.ok + self.failed

    @property
    def attainment(self) -> float:
        return self.good / self.finished if self.finished else 0.0

    def per_second(self, amount: float) -> float:
        return amount / self.duration_s if self.duration_s > 0 else 0.0


def summarize(
    measured: Measurement, objectives: Objectives, settings: dict[str, Any] | None = None
) -> Report:
    """The figures of a run."""
    good = [result for result in measured.results if result.ok]
    failures, reasons = _count_failures(measured.results)
    output_tokens = sum(result.output_tokens for result in good)
    chunks = sum(len(result.token_times) for result in good)
    cached = [result.cached_tokens for result in good if result.cached_tokens is not None]
    return Report(
        planned=measured.planned,
        ok=len(good),
        failed=measured.failed,
        unfinished=measured.unfinished,
        interrupted=measured.interrupted,
        duration_s=measured.duration_s,
        input_tokens=sum(
            result.planned_prompt_tokens if result.prompt_tokens is None else result.prompt_tokens
            for result in good
        ),
        planned_input_tokens=sum(result.planned_prompt_tokens for result in good),
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        latencies=_latencies(good, measured.results),
        tokens_per_chunk=output_tokens / chunks if chunks else 0.0,
        counted_by_chunks=sum(not result.counted_by_usage for result in good),
        failures=failures,
        reasons=reasons,
        objectives=objectives,
        good=sum(objectives.met_by(result) for result in good),
        client_cores=measured.client_cpu_s / measured.duration_s if measured.duration_s > 0 else 0.0,
        settings=settings or {},
    )


def _latencies(good: list[RequestResult], every: list[RequestResult]) -> dict[str, Distribution]:
    gaps = [np.diff(result.token_times) for result in good if len(result.token_times) > 1]
    measured = {
        "ttft": Distribution.of(result.ttft_s for result in good),
        "tpot": Distribution.of(result.tpot_s for result in good if result.tpot_s is not None),
        "itl": Distribution.of(np.concatenate(gaps)) if gaps else None,
        "e2e": Distribution.of(result.e2e_s for result in good),
        "send_lag": Distribution.of(result.lag_s for result in every),
    }
    return {name: distribution for name, distribution in measured.items() if distribution is not None}


def _count_failures(results: list[RequestResult]) -> tuple[dict[str, int], dict[str, list[str]]]:
    counts: Counter[str] = Counter()
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result.failure is None:
            continue
        label, detail = result.failure.label, result.failure.detail
        counts[label] += 1
        shown = reasons.setdefault(label, [])
        if detail not in shown and len(shown) < MAX_REASONS:
            shown.append(detail)
    return dict(counts.most_common()), reasons


def to_json(report: Report) -> dict[str, Any]:
    """The file of `--json`: `machine`, `rows` as every benchmark writes them, and `requests`."""
    return {"machine": describe_machine(), "rows": _rows(report), "requests": _requests(report)}


def _rows(report: Report) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, unit: str, samples: int) -> None:
        # One run; `samples` is how many requests (or gaps) the value is made of.
        row = {"name": f"bench_serve/{name}", "value": value, "unit": unit, "runs": 1, "samples": samples}
        rows.append(row)

    for name, distribution in report.latencies.items():
        for statistic, value in distribution.items():
            add(f"{name}/{statistic}", value * 1000, "ms", distribution.samples)
    add("request_throughput", report.per_second(report.ok), "requests/s", report.ok)
    add("input_throughput", report.per_second(report.input_tokens), "tokens/s", report.ok)
    add("output_throughput", report.per_second(report.output_tokens), "tokens/s", report.ok)
    if report.objectives.given:
        add("goodput", report.per_second(report.good), "requests/s", report.finished)
        add("slo_attainment", report.attainment, "share", report.finished)
    add("failed_requests", report.failed, "requests", report.finished)
    add("tokens_per_chunk", report.tokens_per_chunk, "tokens", report.ok)
    add("client_cpu", report.client_cores, "cores", report.finished)
    return rows


def _requests(report: Report) -> dict[str, Any]:
    objectives = report.objectives
    return {
        "planned": report.planned,
        "ok": report.ok,
        "failed": report.failed,
        "unfinished": report.unfinished,
        "interrupted": report.interrupted,
        "failures": report.failures,
        "failure_reasons": report.reasons,
        "duration_s": report.duration_s,
        "input_tokens": report.input_tokens,
        "planned_input_tokens": report.planned_input_tokens,
        "cached_tokens": report.cached_tokens,
        "output_tokens": report.output_tokens,
        "token_counts_from_chunks": report.counted_by_chunks,
        "slo": {
            "ttft_ms": None if objectives.ttft_s is None else objectives.ttft_s * 1000,
            "tpot_ms": None if objectives.tpot_s is None else objectives.tpot_s * 1000,
            "met": report.good if objectives.given else None,
        },
        "settings": report.settings,
        "warnings": warnings(report),
    }


def warnings(report: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if report.client_cores > BUSY_CLIENT:
        found.append(f"the client kept {report.client_cores:.2f} cores busy: it may be what limits")
    lag = report.latencies.get("send_lag")
    if lag is not None and lag.p99 > LATE_CLIENT_S:
        found.append(
            f"requests left late (P99 {lag.p99 * 1000:.0f} ms): for want of free places under --concurrency, "
            "or of processor time; TTFT does not hold this wait"
        )
    if report.counted_by_chunks:
        found.append(
            f"{report.counted_by_chunks} streams stated no usage: their tokens are counted as chunks"
        )
    if report.planned_input_tokens != report.input_tokens:
        found.append(
            f"the server counted {report.input_tokens} prompt tokens where {report.planned_input_tokens} "
            "were planned"
        )
    return found


def render(report: Report) -> RenderableType:
    """The report for a terminal."""
    parts: list[RenderableType] = [_totals(report)]
    if report.latencies:
        parts.append(_latency_table(report))
    parts += [Text(f"note: {warning}", style="yellow") for warning in warnings(report)]
    if report.failures:
        parts.append(_failure_table(report))
    return Group(*parts)


def _totals(report: Report) -> Table:
    title = "interrupted; measured so far" if report.interrupted else "requests"
    table = Table("", "total", "per second", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, amount: int, style: str = "") -> None:
        table.add_row(name, f"{amount:,}", f"{report.per_second(amount):,.2f}", style=style)

    add("succeeded", report.ok)
    if report.objectives.given:
        add(f"meeting {_objectives_text(report.objectives)} ({report.attainment:.1%})", report.good)
    add("failed", report.failed, "red" if report.failed else "")
    if report.unfinished:
        add("unfinished", report.unfinished)
    add("input tokens", report.input_tokens)
    if report.cached_tokens is not None:
        add("  of them cached", report.cached_tokens)
    add("output tokens", report.output_tokens)
    table.caption = (
        f"{report.duration_s:.2f} s, {report.tokens_per_chunk:.2f} tokens per chunk, "
        f"client {report.client_cores:.2f} cores"
    )
    return table


def _latency_table(report: Report) -> Table:
    table = Table("ms", "mean", "P50", "P90", "P99", "samples", title="latency", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E", "send_lag": "sent late by"}
    for name, distribution in report.latencies.items():
        values = (f"{value * 1000:,.2f}" for _, value in distribution.items())
        table.add_row(names[name], *values, f"{distribution.samples:,}")
    return table


def _failure_table(report: Report) -> Table:
    table = Table("failure", "count", "reasons", title="failures", title_justify="left", style="red")
    for label, count in report.failures.items():
        # As Text: a server's message may look like markup.
        table.add_row(label, str(count), Text("\n".join(report.reasons[label])))
    return table


def _objectives_text(objectives: Objectives) -> str:
    parts = []
    if objectives.ttft_s is not None:
        parts.append(f"TTFT {objectives.ttft_s * 1000:g} ms")
    if objectives.tpot_s is not None:
        parts.append(f"TPOT {objectives.tpot_s * 1000:g} ms")
    return " and ".join(parts)
