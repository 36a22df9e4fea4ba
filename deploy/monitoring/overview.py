"""The first page: is the service well, and if not, is it the queue, prefill, the wire or decode?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard

from deploy.monitoring.panels import (
    BAD,
    GOOD,
    JOB,
    RATE,
    WARN,
    Series,
    lines,
    mean,
    number,
    page,
    quantiles,
    states,
)
from deploy.monitoring.rules import BUDGET

_ATTAINED = ((None, BAD), (1 - 3 * BUDGET, WARN), (1 - BUDGET, GOOD))
_BUDGET_LEFT = ((None, BAD), (0.0, WARN), (0.25, GOOD))
_AT_LEAST_ONE = ((None, BAD), (1.0, GOOD))
# A request's parts in the order in which they pass.
_PARTS = (
    ("queue", "disagg_request_queue_seconds"),
    ("prefill", "disagg_request_prefill_seconds"),
    ("transfer", "disagg_request_kv_transfer_seconds"),
    ("first decode step", "disagg_request_first_decode_seconds"),
)
# What clients call queueing begins with their first byte; the front end's own work is a part of it.
_FRONTEND = mean("disagg_request_frontend_seconds")
_QUEUE = (
    Series(_FRONTEND, "front end"),
    Series(f"{mean('disagg_request_queue_seconds')} - {_FRONTEND}", "queue"),
)


def overview() -> dashboard.Dashboard:
    """Return the page."""
    built = page(
        "disagg-overview",
        "disagg / overview",
        "Prefill and decode in separate pools: what clients see, where their time goes, how the pools do.",
    )
    rows: Sequence[tuple[str, Sequence[Any]]] = (
        ("At a glance", _glance()),
        ("Where the time goes", _waterfall()),
        ("What clients see", _latency()),
        ("Traffic", _traffic()),
        ("Pools", _pools()),
        ("KV transfer and router", _transfer()),
    )
    for title, panels in rows:
        built = built.with_row(dashboard.Row(title))
        for panel in panels:
            built = built.with_panel(panel)
    return built


def _attained(slo: str) -> Series:
    return Series(f'1 - max(disagg:slo_miss:ratio_rate1h{{{JOB},slo="{slo}"}})', "met")


def _glance() -> Sequence[Any]:
    return (
        number(
            "Requests",
            "reqps",
            "Requests that ended, of all front ends.",
            Series(f"sum(rate(disagg_requests_total{{{JOB}}}{RATE}))", "requests"),
        ),
        number(
            "TTFT met, 1 h",
            "percentunit",
            "Share of the requests with a TTFT objective that met it.",
            _attained("ttft"),
            _ATTAINED,
        ),
        number(
            "TPOT met, 1 h",
            "percentunit",
            "Share of the requests with a TPOT objective that met it.",
            _attained("tpot"),
            _ATTAINED,
        ),
        number(
            "Answered, 1 h",
            "percentunit",
            "Share of requests that were neither shed, nor failed, nor ran out of time.",
            _attained("availability"),
            _ATTAINED,
        ),
        number(
            "Error budget left, 3 d",
            "percentunit",
            f"Of the {BUDGET:.0%} of requests that may miss an objective; the least of all objectives.",
            Series(f"min(1 - disagg:slo_miss:ratio_rate3d{{{JOB}}} / {BUDGET})", "left"),
            _BUDGET_LEFT,
        ),
        number(
            "In flight",
            "short",
            "Requests that run or wait anywhere.",
            Series(f"sum(disagg_num_requests_in_flight{{{JOB}}})", "requests"),
        ),
        *(
            number(
                f"{role.capitalize()} workers",
                "short",
                f"{role.capitalize()} workers that are ready.",
                Series(f'sum(disagg_workers{{{JOB},role="{role}",state="ready"}})', "ready"),
                _AT_LEAST_ONE,
            )
            for role in ("prefill", "decode")
        ),
        states(
            "Alerts",
            "Alerts of this cluster that fire or are about to.",
            Series(
                'max by (alertname, severity) (ALERTS{alertname=~"Disagg.*"}) or vector(0)',
                "{{alertname}} {{severity}}",
            ),
        ),
    )


def _waterfall() -> Sequence[Any]:
    return (
        lines(
            "Time to the second token, mean",
            "s",
            "front end + queue + prefill is the time to the first token, which the prefill worker sends. "
            "What follows is the gap to the second: the KV's way to the decode worker and its first step.",
            *_QUEUE,
            *(Series(mean(metric), name) for name, metric in _PARTS[1:]),
            stacked=True,
        ),
        lines(
            "Each part, P99",
            "s",
            "P99 of each part by itself: they do not add up to the P99 of the whole. queue here includes the "
            "front end.",
            *(
                Series(f"histogram_quantile(0.99, sum by (le) (rate({metric}_bucket{{{JOB}}}{RATE})))", name)
                for name, metric in (("front end", "disagg_request_frontend_seconds"), *_PARTS)
            ),
        ),
        lines(
            "Whole request, mean",
            "s",
            "The parts of a request from its arrival to its end; they add up to what the client saw.",
            *_QUEUE,
            *(Series(mean(metric), name) for name, metric in _PARTS[1:3]),
            Series(mean("disagg_request_decode_seconds"), "decode"),
            stacked=True,
        ),
    )


def _latency() -> Sequence[Any]:
    return (
        lines(
            "Time to first token",
            "s",
            "From a request's first byte at the front end to its first token.",
            *quantiles("disagg_time_to_first_token_seconds"),
            Series(f'max(disagg_slo_objective_seconds{{{JOB},slo="ttft"}})', "objective"),
        ),
        lines(
            "Time per output token",
            "s",
            "Mean over a request of the gaps between its tokens, the first gap included.",
            *quantiles("disagg_time_per_output_token_seconds"),
            Series(f'max(disagg_slo_objective_seconds{{{JOB},slo="tpot"}})', "objective"),
        ),
        lines(
            "Inter-token latency",
            "s",
            "Every single gap. Its P99 is what a reader sees as a stutter.",
            *quantiles("disagg_inter_token_latency_seconds"),
        ),
        lines(
            "Whole request",
            "s",
            "From arrival to end.",
            *quantiles("disagg_e2e_request_latency_seconds"),
        ),
        lines(
            "Objectives missed, 5 min",
            "percentunit",
            f"Share of requests that missed an objective; {BUDGET:.0%} is what the budget allows.",
            Series(f"max by (slo) (disagg:slo_miss:ratio_rate5m{{{JOB}}})", "{{slo}}"),
            top=1,
        ),
        lines(
            "Budget burn rate",
            "none",
            "How many times faster than allowed the budget is spent; 1 is exactly all of it.",
            Series(f"max by (slo) (disagg:slo_miss:ratio_rate5m{{{JOB}}}) / {BUDGET}", "{{slo}} 5 min"),
            Series(f"max by (slo) (disagg:slo_miss:ratio_rate1h{{{JOB}}}) / {BUDGET}", "{{slo}} 1 h"),
        ),
    )


def _traffic() -> Sequence[Any]:
    return (
        lines(
            "Requests by outcome",
            "reqps",
            "stop and length are whole answers; abort is a client that left.",
            Series(f"sum by (outcome) (rate(disagg_requests_total{{{JOB}}}{RATE}))", "{{outcome}}"),
            stacked=True,
        ),
        lines(
            "Tokens",
            "short",
            "Tokens per second.",
            Series(f"sum(rate(disagg_prompt_tokens_total{{{JOB}}}{RATE}))", "prompt"),
            Series(f"sum(rate(disagg_generation_tokens_total{{{JOB}}}{RATE}))", "output"),
        ),
        lines(
            "Sheds and resumes",
            "reqps",
            "shed: answered 429, by admission or by a worker whose queue is full. worker_lost: went on "
            "elsewhere. kv_lost: the prompt was computed again.",
            Series(f'sum(rate(disagg_requests_total{{{JOB},outcome="shed"}}{RATE}))', "shed"),
            Series(f"sum by (cause) (rate(disagg_request_resumes_total{{{JOB}}}{RATE}))", "{{cause}}"),
        ),
        lines(
            "Refused by admission",
            "reqps",
            "ttft, tpot: it would have missed that objective. streams: it would have made running streams "
            "miss theirs. wait, queue_full: too much waits. deadline: its time ran out while it waited.",
            Series(f"sum by (reason) (rate(disagg_router_refusals_total{{{JOB}}}{RATE}))", "{{reason}}"),
            stacked=True,
        ),
    )


def _pools() -> Sequence[Any]:
    return (
        lines(
            "KV use, fullest worker",
            "percentunit",
            "Blocks that requests hold; what is merely cached does not count.",
            Series(f"max by (role) (disagg_kv_cache_usage_ratio{{{JOB}}})", "{{role}}"),
            top=1,
        ),
        lines(
            "Waiting",
            "short",
            "Requests that admission has wait at the router, those that wait in a worker to be scheduled, "
            "and prefilled ones that wait for a decode worker.",
            Series(f"sum(disagg_router_queue_requests{{{JOB}}})", "router"),
            Series(f"sum by (role) (disagg_num_requests_waiting{{{JOB}}})", "{{role}}"),
            Series(f"sum by (role) (disagg_num_requests_held{{{JOB}}})", "{{role}}, held"),
        ),
        lines(
            "Running",
            "short",
            "Requests in the running batches.",
            Series(f"sum by (role) (disagg_num_requests_running{{{JOB}}})", "{{role}}"),
        ),
        lines(
            "P:D balance",
            "percentunit",
            "Share of the time that a pool's engines compute. Far apart, one is too large for the other.",
            Series(f"avg by (role) (rate(disagg_engine_step_seconds_sum{{{JOB}}}{RATE}))", "{{role}}"),
            top=1,
        ),
        lines(
            "Workers ready",
            "short",
            "Ready workers, and how many there are to be.",
            Series(f'sum by (role) (disagg_workers{{{JOB},state="ready"}}) > 0', "{{role}}"),
            Series(f"max by (role) (disagg_pool_replicas{{{JOB}}}) > 0", "{{role}}, wanted"),
        ),
        lines(
            "Prefix cache",
            "percentunit",
            "Share of looked-up tokens that were cached already.",
            Series(
                f"sum by (role) (rate(disagg_prefix_cache_hits_total{{{JOB}}}{RATE}))"
                f" / (sum by (role) (rate(disagg_prefix_cache_queries_total{{{JOB}}}{RATE})) > 0)",
                "{{role}}",
            ),
            top=1,
        ),
    )


def _transfer() -> Sequence[Any]:
    return (
        lines(
            "KV moved",
            "Bps",
            "Bytes that decode workers received, by transport.",
            Series(
                f"sum by (transport) (rate(disagg_kv_transfer_bytes_total{{{JOB}}}{RATE}))", "{{transport}}"
            ),
        ),
        lines(
            "Exposed transfer",
            "s",
            "The part of a hand-off that was not hidden behind prefill.",
            *quantiles("disagg_kv_transfer_exposed_seconds"),
        ),
        lines(
            "Transfer failures and expired leases",
            "ops",
            "Pulls that failed, whose prompts were computed again; leases that nobody claimed in time.",
            Series(f"sum by (reason) (rate(disagg_kv_transfer_failures_total{{{JOB}}}{RATE}))", "{{reason}}"),
            Series(f"sum(rate(disagg_kv_lease_expiries_total{{{JOB}}}{RATE}))", "lease expired"),
        ),
        lines(
            "Placements",
            "ops",
            "stale_view: decided by a front end while the router was away. degraded: a pool was empty.",
            Series(f"sum by (kind) (rate(disagg_router_placements_total{{{JOB}}}{RATE}))", "{{kind}}"),
            stacked=True,
        ),
        lines(
            "Decision time",
            "s",
            "Time that the router takes to place one request.",
            *quantiles("disagg_router_decision_seconds"),
        ),
        lines(
            "Front ends",
            "short",
            "Front ends attached to the router, and those that say they have none.",
            Series(f"max(disagg_router_frontends{{{JOB}}})", "attached"),
            Series(f"count(disagg_router_connected{{{JOB}}} == 0) or vector(0)", "without a router"),
        ),
    )
