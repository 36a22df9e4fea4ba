"""Recording rules and alerts; generate.py writes them for the chart. Each alert names its runbook.

Burn rates follow the multi-window scheme of the Google SRE workbook, chapter 5: a budget that is spent N
times too fast is told of by a long window, and by a short one that ends the alert soon after the trouble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Share of requests that may miss an objective. Change it here and in no other place.
BUDGET = 0.01
SHORT_WINDOWS = ("5m", "30m", "1h")
# Long ranges are dear to read and slow to change.
LONG_WINDOWS = ("2h", "6h", "1d", "3d")
RUNBOOKS = "deploy/runbooks.md"

Rule = dict[str, Any]

# (severity, long window, short window, burn rate)
_BURN_RATES = (
    ("critical", "1h", "5m", 14.4),
    ("critical", "6h", "30m", 6),
    ("warning", "1d", "2h", 3),
    ("warning", "3d", "6h", 1),
)
_FAILED = 'outcome=~"error|shed|deadline"'
# A client's own mistake and a client that left say nothing of the service.
_COUNTED = 'outcome!~"invalid|abort"'


def rule_file() -> dict[str, Any]:
    """Return the content of a Prometheus rule file."""
    return {
        "groups": [
            {"name": "disagg-slo-short", "interval": "30s", "rules": _recording(SHORT_WINDOWS)},
            {"name": "disagg-slo-long", "interval": "2m", "rules": _recording(LONG_WINDOWS)},
            {"name": "disagg-slo-alerts", "rules": _burn_rate_alerts()},
            {"name": "disagg-alerts", "rules": _alerts()},
        ]
    }


def _recording(windows: Sequence[str]) -> list[Rule]:
    rules: list[Rule] = []
    for window in windows:
        name = f"disagg:slo_miss:ratio_rate{window}"
        missed = f'sum by (job, slo) (rate(disagg_slo_attained_total{{met="false"}}[{window}]))'
        asked = f"sum by (job, slo) (rate(disagg_slo_attained_total[{window}]))"
        failed = f"sum by (job) (rate(disagg_requests_total{{{_FAILED}}}[{window}]))"
        counted = f"sum by (job) (rate(disagg_requests_total{{{_COUNTED}}}[{window}]))"
        rules += [
            {"record": name, "expr": f"{missed} / ({asked} > 0)"},
            {
                "record": name,
                "labels": {"slo": "availability"},
                "expr": f"{failed} / ({counted} > 0)",
            },
        ]
    return rules


def _burn_rate_alerts() -> list[Rule]:
    rules = []
    for severity, long, short, rate in _BURN_RATES:
        limit = f"{rate * BUDGET:g}"
        ratio = "disagg:slo_miss:ratio_rate"
        rules.append(
            _alert(
                "DisaggSLOBurnRate",
                f"{ratio}{long} > {limit} and {ratio}{short} > {limit}",
                severity,
                "The {{ $labels.slo }} budget is being spent too fast",
                f"{{{{ $value | humanizePercentage }}}} of the requests of the last {long} missed their "
                f"{{{{ $labels.slo }}}} objective: {rate:g} times what {1 - BUDGET:.0%} allows, or more.",
                labels={"window": long},
            )
        )
    return rules


def _alerts() -> list[Rule]:
    return [
        _alert(
            "DisaggPoolWithoutCapacity",
            "max by (job, role) (disagg_pool_replicas) > 0"
            ' and on (job, role) sum by (job, role) (disagg_workers{state="ready"}) == 0',
            "critical",
            "No {{ $labels.role }} worker is ready",
            "The other pool serves both phases, if it has workers, and streams suffer from prompts.",
            hold="30s",
        ),
        _alert(
            "DisaggWorkersMissing",
            'sum by (job, role) (disagg_workers{state="ready"})'
            " < on (job, role) max by (job, role) (disagg_pool_replicas)",
            "warning",
            "{{ $value }} {{ $labels.role }} workers are ready, fewer than wanted",
            "A worker that died is replaced within seconds; this one is not.",
            hold="10m",
        ),
        _alert(
            "DisaggKVCacheNearFull",
            "max by (job, role, worker) (disagg_kv_cache_usage_ratio) > 0.95",
            "warning",
            "KV cache of {{ $labels.worker }} is {{ $value | humanizePercentage }} full",
            "Requests wait for blocks, and running ones may be preempted and computed again.",
            hold="5m",
        ),
        _alert(
            "DisaggKVTransferFailures",
            "sum by (job, worker) (rate(disagg_kv_transfer_failures_total[5m])) > 0.02 * ("
            "sum by (job, worker) (rate(disagg_kv_transfer_failures_total[5m]))"
            " + sum by (job, worker) (rate(disagg_kv_transfer_seconds_count[5m]))"
            " or sum by (job, worker) (rate(disagg_kv_transfer_failures_total[5m])))",
            "warning",
            "{{ $labels.worker }} fails to pull KV",
            "More than 2 % of its hand-offs failed; their prompts were computed a second time.",
            hold="2m",
        ),
        _alert(
            "DisaggKVLeaseExpiries",
            "sum by (job, worker) (increase(disagg_kv_lease_expiries_total[10m])) > 2",
            "warning",
            "KV of {{ $labels.worker }} is not fetched",
            "{{ $value | humanize }} leases ran out in 10 minutes: front ends or decode workers vanish "
            "in the middle of hand-offs.",
        ),
        _alert(
            "DisaggRouterAway",
            "min by (job) (disagg_router_connected) == 0",
            "critical",
            "A front end has no router",
            "It places requests by what it last knew. Running streams are not touched.",
            hold="30s",
        ),
        _alert(
            "DisaggRequestsShed",
            'sum by (job) (rate(disagg_requests_total{outcome="shed"}[5m])) > 0.05 * '
            f"sum by (job) (rate(disagg_requests_total{{{_COUNTED}}}[5m]))",
            "warning",
            "{{ $value | humanize }} requests a second are shed",
            "More than 5 % of the traffic gets 429: it is above what the pools can carry within the "
            "objectives. disagg_router_refusals_total says for which reason.",
            hold="5m",
        ),
        _alert(
            "DisaggMetricsAbsent",
            "absent(disagg_build_info)",
            "critical",
            "No front end of disagg is scraped",
            "All front ends are down, or Prometheus can't reach them.",
            hold="5m",
        ),
    ]


def _alert(
    name: str,
    expr: str,
    severity: str,
    summary: str,
    description: str,
    *,
    hold: str = "0s",
    labels: dict[str, str] | None = None,
) -> Rule:
    return {
        "alert": name,
        "expr": expr,
        "for": hold,
        "labels": {"severity": severity, **(labels or {})},
        "annotations": {
            "summary": summary,
            "description": description,
            "runbook_url": f"{RUNBOOKS}#{name.lower()}",
        },
    }
