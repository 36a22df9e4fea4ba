"""What the router counts, under the names of the project's contract."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from disagg.routing.admission import Reason
from disagg.types import Role, WorkerState, WorkerStatus

# A decision takes tens of microseconds with a few workers and some hundred with thousands.
DECISION_BUCKETS = (
    *(10e-6, 20e-6, 30e-6, 50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 50e-3),
)
ERROR_BUCKETS = (-0.75, -0.5, -0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0)
_STATES = (WorkerStatus.STARTING, WorkerStatus.READY, WorkerStatus.DRAINING)


class RouterMetrics:
    """One router's series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.decision = Histogram(
            "disagg_router_decision_seconds",
            "Time to place one request.",
            buckets=DECISION_BUCKETS,
            registry=self.registry,
        )
        self._placements = Counter(
            "disagg_router_placements",
            "Placements by policy and kind.",
            ("policy", "kind"),
            registry=self.registry,
        )
        self._workers = Gauge(
            "disagg_workers",
            "Workers that live, by role and state.",
            ("role", "state"),
            registry=self.registry,
        )
        self._frontends = Gauge(
            "disagg_router_frontends", "Front ends that are attached to the router.", registry=self.registry
        )
        self._error = Histogram(
            "disagg_router_prediction_error_ratio",
            "Predicted over actual time, less 1, of placements that rested on measured steps.",
            ("what",),
            buckets=ERROR_BUCKETS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "disagg_router_refusals",
            "Requests that admission did not let in, by reason.",
            ("reason",),
            registry=self.registry,
        )
        for reason in Reason:
            self._refusals.labels(reason.value)
        self._queue = Gauge(
            "disagg_router_queue_requests",
            "Requests that wait at the router for their turn.",
            registry=self.registry,
        )
        self._counted: Tally[tuple[str, str]] = Tally()
        self._refused: Tally[Reason] = Tally()

    def observe_errors(self, errors: Iterable[tuple[str, float]]) -> None:
        """Count relative errors of "ttft" and "tpot", negative where it took longer than predicted."""
        for what, error in errors:
            self._error.labels(what).observe(error)

    def observe_admission(self, refused: Mapping[Reason, int], num_waiting: int) -> None:
        """Take over how many requests were refused so far, and how many wait."""
        for reason, total in refused.items():
            self._refusals.labels(reason.value).inc(total - self._refused[reason])
            self._refused[reason] = total
        self._queue.set(num_waiting)

    def exposition(
        self,
        workers: Mapping[str, WorkerState],
        placements: Mapping[tuple[str, str], int],
        num_frontends: int,
    ) -> bytes:
        """Return everything in Prometheus' text format, with the cluster as it is now."""
        for (policy, kind), total in placements.items():
            self._placements.labels(policy, kind).inc(total - self._counted[policy, kind])
            self._counted[policy, kind] = total
        self._frontends.set(num_frontends)
        alive = Tally((state.info.role, state.status) for state in workers.values())
        for role in Role:
            for status in _STATES:
                self._workers.labels(role.value, status.value).set(alive[role, status])
        return generate_latest(self.registry)
