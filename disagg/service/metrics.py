"""What workers and front ends count, under the names of the project's contract.

Every process keeps its own registry; a front end that is asked for /metrics gathers the others' and merges
them (service/exposition.py). Labels take values from closed sets (roles, worker ids, transports), never what
a client wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from disagg.types import Role, WorkerInfo, WorkerLoad

# From a cached token on a fast GPU to a long prompt behind a queue.
LATENCY_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
OTHER_FAILURE = "internal_error"
TRANSFER_FAILURES = ("kv_lost", "kv_layout_mismatch", OTHER_FAILURE)
OUTCOMES = ("stop", "length", "abort", "error", "shed", "deadline", "invalid")
# How a hand-off went on after a failed pull, in the order in which it is tried.
RECOVERY_RUNGS = ("pull_again", "other_worker", "recompute")
RESUME_CAUSES = ("worker_lost", "kv_lost")


class WorkerMetrics:
    """What one worker counts. All series carry its role and id."""

    def __init__(self, info: WorkerInfo) -> None:
        self.registry = CollectorRegistry()
        self._labels = (info.role.value, info.worker_id)
        self._blocks_total = info.kv_blocks_total
        self._running = self._gauge("disagg_num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("disagg_num_requests_waiting", "Requests waiting to be scheduled.")
        self._usage = self._gauge("disagg_kv_cache_usage_ratio", "KV blocks in use, 0 to 1.")
        self._queries = self._counter("disagg_prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = self._counter("disagg_prefix_cache_hits", "Tokens found in the prefix cache.")
        self._preemptions = self._counter("disagg_preemptions", "Sequences preempted for want of blocks.")
        self._bytes = Counter(
            "disagg_kv_transfer_bytes",
            "KV bytes received from peers.",
            ("role", "worker", "transport"),
            registry=self.registry,
        )
        self._copy = Histogram(
            "disagg_kv_transfer_seconds",
            "Duration of one pull, hidden or not.",
            ("role", "worker", "transport"),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._failures = Counter(
            "disagg_kv_transfer_failures",
            "Pulls that failed and whose KV was computed again.",
            ("role", "worker", "reason"),
            registry=self.registry,
        )
        for reason in TRANSFER_FAILURES:
            self._failures.labels(*self._labels, reason)
        self._recoveries = Counter(
            "disagg_kv_transfer_recoveries",
            "Hand-offs that went on after a failed pull, by how.",
            ("role", "worker", "rung"),
            registry=self.registry,
        )
        for rung in ("pull_again", "recompute"):
            self._recoveries.labels(*self._labels, rung)
        self._step = Histogram(
            "disagg_engine_step_seconds",
            "Duration of one engine step.",
            ("role", "worker"),
            buckets=TOKEN_BUCKETS,
            registry=self.registry,
        ).labels(*self._labels)
        self._held = self._gauge("disagg_num_requests_held", "Prefilled requests whose KV awaits its pull.")
        self._expired = self._counter("disagg_kv_lease_expiries", "Leases on published KV that ran out.")
        self._num_expired = 0
        self._totals = (0, 0, 0)
        self.observe_engine(WorkerLoad(), self._totals)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("role", "worker"), registry=self.registry).labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("role", "worker"), registry=self.registry).labels(*self._labels)

    def observe_engine(self, load: WorkerLoad, totals: tuple[int, int, int]) -> None:
        """Take over the engine's state; totals are (queries, hits, preemptions) since its start."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._held.set(load.num_held)
        self._usage.set(load.kv_blocks_used / max(1, self._blocks_total))
        for counter, new, old in zip(
            (self._queries, self._hits, self._preemptions), totals, self._totals, strict=True
        ):
            if new > old:
                counter.inc(new - old)
        self._totals = totals

    def under(self, info: WorkerInfo) -> WorkerMetrics:
        """Return the metrics with which the worker goes on in another role: series of their own, from 0."""
        others = WorkerMetrics(info)
        others._totals, others._num_expired = self._totals, self._num_expired
        return others

    def observe_pull(self, transport: str, num_bytes: int, seconds: float) -> None:
        self._bytes.labels(*self._labels, transport).inc(num_bytes)
        self._copy.labels(*self._labels, transport).observe(seconds)

    def observe_failed_pull(self, reason: str) -> None:
        """Count a pull that failed. reason: a DisaggError's type."""
        known = reason if reason in TRANSFER_FAILURES else OTHER_FAILURE
        self._failures.labels(*self._labels, known).inc()

    def observe_recovery(self, rung: str) -> None:
        """Count what came after a failed pull: one of RECOVERY_RUNGS that are a worker's."""
        self._recoveries.labels(*self._labels, rung).inc()

    def observe_step(self, seconds: float) -> None:
        self._step.observe(seconds)

    def observe_expired_leases(self, total: int) -> None:
        """Take over how many leases ran out since the worker's start."""
        self._expired.inc(total - self._num_expired)
        self._num_expired = total

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class FrontendMetrics:
    """What the clients of one front end saw.

    queue + prefill of a request are its time to the first token, kv_transfer + first_decode the gap to the
    second, and queue + prefill + kv_transfer + decode its end-to-end latency. frontend is a part of queue.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        latency, token = LATENCY_BUCKETS, TOKEN_BUCKETS
        self.ttft = self._histogram("time_to_first_token", "Arrival to first token.", latency)
        self.itl = self._histogram("inter_token_latency", "Gap between two successive outputs.", token)
        self.tpot = self._histogram("time_per_output_token", "Mean gap per token after the first.", token)
        self.e2e = self._histogram("e2e_request_latency", "Arrival to end.", latency)
        self.queue = self._histogram("request_queue", "Arrival to the start of prefill.", latency)
        self.frontend = self._histogram(
            "request_frontend", "Part of request_queue: reading, checking and tokenising it.", latency
        )
        self.prefill = self._histogram("request_prefill", "Start of prefill to first token.", latency)
        self.kv_transfer = self._histogram(
            "request_kv_transfer", "First token to decode having its KV.", latency
        )
        self.decode = self._histogram("request_decode", "Decode having its KV to the end.", latency)
        self.first_decode = self._histogram(
            "request_first_decode", "Decode having its KV to the second token.", latency
        )
        self.exposed = self._histogram(
            "kv_transfer_exposed", "Part of a KV transfer not hidden behind prefill.", latency
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished prefills.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens sent to clients.")
        self.requests = self._counter("requests", "Requests by how they ended.", ("outcome",))
        self.braked = self._counter(
            "requests_braked", "Shed without asking the router, which had just refused others like them."
        )
        self.in_flight = Gauge(
            "disagg_num_requests_in_flight", "Requests that run or wait anywhere.", registry=self.registry
        )
        self.placing = Gauge(
            "disagg_num_requests_placing",
            "Requests that wait at the router for their turn, or for its answer.",
            registry=self.registry,
        )
        self.resumes = self._counter("request_resumes", "Requests continued after a fault.", ("cause",))
        # Workers count the other rungs.
        self.recoveries = self._counter(
            "kv_transfer_recoveries", "Hand-offs that went on after a failed pull, by how.", ("rung",)
        )
        self.recoveries.labels("other_worker")
        self.slo = self._counter("slo_attained", "Requests by whether they met an objective.", ("slo", "met"))
        # The router counts its own; a front end adds those that it made while the router was away.
        self.placements = self._counter(
            "router_placements", "Placements by policy and kind.", ("policy", "kind")
        )
        # Series exist from the start, at 0: the first event of a kind must be a rise that a rate can see.
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for cause in RESUME_CAUSES:
            self.resumes.labels(cause)
        for name in ("ttft", "tpot"):
            for met in ("true", "false"):
                self.slo.labels(name, met)

    def describe(
        self,
        version: str,
        pool_size: Callable[[Role], int],
        objectives: Mapping[str, float | None],
        router_connected: Callable[[], bool],
    ) -> None:
        """Add what is configured, so that dashboards and alerts can compare with it.

        pool_size: workers wanted now in a role's pool. objectives: default objectives in seconds by name.
        """
        self._gauge("build_info", "1, labelled with the version.", ("version",)).labels(version).set(1)
        wanted = self._gauge("pool_replicas", "Workers that a pool is to have.", ("role",))
        for role in Role:
            wanted.labels(role.value).set_function(partial(pool_size, role))
        goals = self._gauge("slo_objective_seconds", "Objective of requests that name none.", ("slo",))
        for name, seconds in objectives.items():
            if seconds is not None:
                goals.labels(name).set(seconds)
        self._gauge("router_connected", "1 while the stream to the router stands.").set_function(
            lambda: float(router_connected())
        )

    def count_braked(self) -> None:
        """Count a request that was shed before it was one."""
        self.requests.labels("shed").inc()
        self.braked.inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"disagg_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"disagg_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"disagg_{name}", text, labels, registry=self.registry)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
