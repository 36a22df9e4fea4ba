"""A page for single workers: which of them is unlike the others?"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard, timeseries

from deploy.monitoring.panels import RATE, WORKER, Series, label_values, lines, page


def workers() -> dashboard.Dashboard:
    """Return the page."""
    built = page(
        "disagg-workers", "disagg / workers", "Each prefill and decode worker by itself."
    ).with_variable(
        label_values("worker", "Worker", 'disagg_num_requests_running{job=~"$job"}', include_all=True)
    )
    for panel in (
        _gauge("KV use", "percentunit", "disagg_kv_cache_usage_ratio", "Blocks in use.", top=1),
        _gauge("Running", "short", "disagg_num_requests_running", "Requests in the running batch."),
        _gauge("Waiting", "short", "disagg_num_requests_waiting", "Requests waiting to be scheduled."),
        _gauge("Held", "short", "disagg_num_requests_held", "Prefilled requests whose KV awaits its pull."),
        lines(
            "Busy",
            "percentunit",
            "Share of the time that the engine computes.",
            Series(f"sum by (worker) (rate(disagg_engine_step_seconds_sum{{{WORKER}}}{RATE}))", "{{worker}}"),
            top=1,
        ),
        *(
            lines(
                f"Step time, P{quantile * 100:g}",
                "s",
                "Duration of engine steps; on a decode worker, a gap between the tokens of its streams.",
                Series(
                    f"histogram_quantile({quantile}, sum by (le, worker) "
                    f"(rate(disagg_engine_step_seconds_bucket{{{WORKER}}}{RATE})))",
                    "{{worker}}",
                ),
            )
            for quantile in (0.5, 0.99)
        ),
        _rate("Steps", "ops", "disagg_engine_step_seconds_count", "Engine steps a second."),
        _rate(
            "Preemptions", "ops", "disagg_preemptions_total", "Sequences thrown out for want of KV blocks."
        ),
        lines(
            "Prefix cache",
            "percentunit",
            "Share of looked-up tokens that were cached already.",
            Series(
                f"sum by (worker) (rate(disagg_prefix_cache_hits_total{{{WORKER}}}{RATE}))"
                f" / (sum by (worker) (rate(disagg_prefix_cache_queries_total{{{WORKER}}}{RATE})) > 0)",
                "{{worker}}",
            ),
            top=1,
        ),
        _rate("KV received", "Bps", "disagg_kv_transfer_bytes_total", "Bytes pulled from other workers."),
        lines(
            "Pull time, P99",
            "s",
            "Duration of single pulls, hidden behind prefill or not.",
            Series(
                "histogram_quantile(0.99, sum by (le, worker) "
                f"(rate(disagg_kv_transfer_seconds_bucket{{{WORKER}}}{RATE})))",
                "{{worker}}",
            ),
        ),
        _rate(
            "Failed pulls",
            "ops",
            "disagg_kv_transfer_failures_total",
            "Pulls whose KV was computed again.",
        ),
        _rate("Expired leases", "ops", "disagg_kv_lease_expiries_total", "Published KV that nobody claimed."),
    ):
        built = built.with_panel(panel)
    return built


def _gauge(title: str, unit: str, metric: str, text: str, top: float | None = None) -> timeseries.Panel:
    series = Series(f"max by (worker) ({metric}{{{WORKER}}})", "{{worker}}")
    return lines(title, unit, text, series, top=top)


def _rate(title: str, unit: str, metric: str, text: str) -> timeseries.Panel:
    series = Series(f"sum by (worker) (rate({metric}{{{WORKER}}}{RATE}))", "{{worker}}")
    return lines(title, unit, text, series)
