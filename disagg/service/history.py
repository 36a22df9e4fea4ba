"""The last minutes of a front end, for the page that shows them without a Prometheus.

Every PERIOD_S the cumulative histograms are read once and what was added since is kept. Rows of several front
ends that belong to one moment are added up; quantiles are taken last, since they can't be added.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Histogram

from disagg.service.metrics import FrontendMetrics

PERIOD_S = 10
LENGTH = 90
QUANTILES = (0.5, 0.9, 0.99)
WITH_QUANTILES = ("ttft", "tpot")
WITH_MEANS = ("frontend", "queue", "prefill", "kv_transfer", "first_decode")
_INFINITY = float("inf")

# A row: {"t": period number, name: {label values: number}, name: {bucket bound: count, "sum": seconds}}.
Row = dict[str, Any]


class History:
    """Rows of one front end, oldest first. Call `sample` once a period."""

    def __init__(self, metrics: FrontendMetrics) -> None:
        self._histograms: Mapping[str, Histogram] = {
            "ttft": metrics.ttft,
            "tpot": metrics.tpot,
            "frontend": metrics.frontend,
            "queue": metrics.queue,
            "prefill": metrics.prefill,
            "kv_transfer": metrics.kv_transfer,
            "first_decode": metrics.first_decode,
        }
        self._counters: Mapping[str, Counter] = {
            "requests": metrics.requests,
            "prompt_tokens": metrics.prompt_tokens,
            "generation_tokens": metrics.generation_tokens,
            "resumes": metrics.resumes,
        }
        self._placing = metrics.placing
        self._rows: deque[Row] = deque(maxlen=LENGTH)
        self._last: dict[str, dict[str, float]] = self._read()

    def sample(self, period: int) -> None:
        """Keep what was counted since the last call as that period's row, and who waits at its end."""
        now = self._read()
        row: Row = {"t": period}
        for name, values in now.items():
            before = self._last[name]
            added = {key: value - before.get(key, 0.0) for key, value in values.items()}
            if any(added.values()):
                row[name] = added
        self._last = now
        if waiting := sum(sample.value for family in self._placing.collect() for sample in family.samples):
            row["placing"] = {"": waiting}
        self._rows.append(row)

    def _read(self) -> dict[str, dict[str, float]]:
        read: dict[str, dict[str, float]] = {}
        for name, metric in (*self._histograms.items(), *self._counters.items()):
            values = read[name] = {}
            for family in metric.collect():
                for sample in family.samples:
                    key = ",".join(sample.labels.values())
                    # Of the parts only the mean is shown.
                    whole = name in WITH_QUANTILES or key == "+Inf"
                    if sample.name.endswith("_total") or (sample.name.endswith("_bucket") and whole):
                        values[key] = sample.value
                    elif sample.name.endswith("_sum"):
                        values["sum"] = sample.value
        return read

    def dump(self) -> bytes:
        """Return the rows as JSON, for another front end's `merge`."""
        return json.dumps(list(self._rows), separators=(",", ":")).encode()

    def rows(self) -> list[Row]:
        return list(self._rows)


def load(body: bytes) -> list[Row]:
    """Read what `dump` wrote. Raises ValueError."""
    rows = json.loads(body or b"[]")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "t" in row for row in rows):
        raise ValueError("not a history")
    return rows


def merge(histories: Iterable[Sequence[Row]]) -> list[Row]:
    """Add up the rows of one period, oldest period first."""
    merged: dict[int, Row] = {}
    for row in (row for history in histories for row in history):
        total = merged.setdefault(row["t"], {"t": row["t"]})
        for name, values in row.items():
            if name == "t":
                continue
            into = total.setdefault(name, {})
            for key, value in values.items():
                into[key] = into.get(key, 0.0) + value
    return [merged[period] for period in sorted(merged)][-LENGTH:]


def summarize(row: Row) -> dict[str, Any]:
    """Return a row as the page draws it: rates a second; quantiles and means in seconds, None if empty."""
    outcomes: dict[str, float] = row.get("requests", {})
    summary: dict[str, Any] = {
        "t": row["t"] * PERIOD_S,
        "outcomes": {name: count / PERIOD_S for name, count in outcomes.items()},
        "prompt_tokens": sum(row.get("prompt_tokens", {}).values()) / PERIOD_S,
        "generation_tokens": sum(row.get("generation_tokens", {}).values()) / PERIOD_S,
        "resumes": sum(row.get("resumes", {}).values()),
        "placing": sum(row.get("placing", {}).values()),
    }
    for name in WITH_QUANTILES:
        summary[name] = [quantile(row.get(name, {}), q) for q in QUANTILES]
    for name in WITH_MEANS:
        values = row.get(name, {})
        count = values.get("+Inf", 0.0)
        summary[name] = values.get("sum", 0.0) / count if count else None
    if summary["queue"] is not None:
        # The page stacks them.
        summary["queue"] -= summary["frontend"] or 0.0
    return summary


def quantile(values: Mapping[str, float], q: float) -> float | None:
    """Return a quantile of a histogram {bucket bound: cumulative count}, interpolated as Prometheus does."""
    buckets = sorted((float(bound), count) for bound, count in values.items() if bound != "sum")
    total = values.get("+Inf", 0.0)
    if not total:
        return None
    rank, lower, below = q * total, 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if bound == _INFINITY or count == below:
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower
