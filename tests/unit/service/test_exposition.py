"""One exposition from those of several processes, and vLLM's names for the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from disagg.service.exposition import merge_expositions
from disagg.service.metrics import OUTCOMES, FrontendMetrics, WorkerMetrics
from disagg.service.router_metrics import RouterMetrics
from disagg.types import Role, WorkerInfo, WorkerLoad


def worker(role: Role, *, used: int = 0, load: WorkerLoad | None = None) -> WorkerMetrics:
    info = WorkerInfo(f"{role.value}-0", "x", role, "127.0.0.1:1", "h", 1, 64, 16, 8, 64, 100)
    metrics = WorkerMetrics(info)
    metrics.observe_engine(load or WorkerLoad(kv_blocks_used=used), (100, 40, 1))
    return metrics


def samples(exposition: bytes, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
        if sample.name == name
    ]


def value(exposition: bytes, name: str, **labels: str) -> float:
    found = [each for had, each in samples(exposition, name) if labels.items() <= had.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def cluster() -> list[tuple[str, bytes]]:
    one, two = FrontendMetrics(), FrontendMetrics()
    one.ttft.observe(0.3)
    two.ttft.observe(0.7)
    one.requests.labels("stop").inc(3)
    two.requests.labels("shed").inc(2)
    decode = worker(Role.DECODE, load=WorkerLoad(num_running=3, num_waiting=1, kv_blocks_used=80))
    prefill = worker(Role.PREFILL, load=WorkerLoad(num_running=1, num_waiting=4, kv_blocks_used=95))
    return [
        ("frontend-1", one.exposition()),
        ("frontend-2", two.exposition()),
        ("router", RouterMetrics().exposition({}, {("prefix_aware", "local"): 5}, 2)),
        ("prefill-0", prefill.exposition()),
        ("decode-0", decode.exposition()),
    ]


def test_every_family_stands_once_and_every_sample_tells_its_process() -> None:
    merged = merge_expositions(cluster())
    headers = [line for line in merged.decode().splitlines() if line.startswith("# TYPE")]
    assert len(headers) == len(set(headers))
    for family in text_string_to_metric_families(merged.decode()):
        assert family.samples and all(sample.labels["process"] for sample in family.samples), family.name


def test_merging_changes_no_value_and_loses_none() -> None:
    parts = cluster()
    merged = merge_expositions(parts)
    after = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(merged.decode())
        for sample in family.samples
    }
    before = {
        (sample.name, tuple(sorted({**sample.labels, "process": process}.items()))): sample.value
        for process, exposition in parts
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert after == before


def test_front_ends_stay_apart_so_that_a_sum_counts_each_once() -> None:
    merged = merge_expositions(cluster())
    counts = samples(merged, "disagg_time_to_first_token_seconds_count")
    assert [(labels["process"], count) for labels, count in counts] == [("frontend-1", 1), ("frontend-2", 1)]


def test_odd_label_values_survive() -> None:
    registry = CollectorRegistry()
    odd = 'a"b} 1 {c\\d\n'
    Counter("disagg_odd", "Odd.", ("value",), registry=registry).labels(odd).inc()
    assert samples(merge_expositions([("p", generate_latest(registry))]), "disagg_odd_total") == [
        ({"value": odd, "process": "p"}, 1.0)
    ]


def test_a_process_without_an_answer_hides_no_other() -> None:
    merged = merge_expositions([("router", b""), *cluster()[:1]])
    assert value(merged, "disagg_requests_total", outcome="stop") == 3


def test_aliases_are_there_only_when_asked_for() -> None:
    assert b"vllm:" not in merge_expositions(cluster())
    assert b"vllm:" in merge_expositions(cluster(), vllm_model="m")


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("vllm:num_requests_running", {}, 4),
        ("vllm:num_requests_waiting", {}, 5),
        ("vllm:kv_cache_usage_perc", {}, 0.8),
        ("vllm:gpu_cache_usage_perc", {}, 0.8),
        ("vllm:request_success_total", {"finished_reason": "stop", "process": "frontend-1"}, 3),
        ("vllm:time_to_first_token_seconds_sum", {"process": "frontend-2"}, 0.7),
        ("vllm:time_to_first_token_seconds_bucket", {"process": "frontend-2", "le": "0.5"}, 0),
        ("vllm:prefix_cache_queries_total", {}, 100),
        ("vllm:prefix_cache_hits_total", {}, 40),
        ("vllm:num_preemptions_total", {"worker": "decode-0"}, 1),
    ],
)
def test_vllm_alias(name: str, labels: dict[str, str], expected: float) -> None:
    merged = merge_expositions(cluster(), vllm_model='my "model"')
    assert value(merged, name, model_name='my "model"', engine="0", **labels) == pytest.approx(expected)


def test_kv_use_of_prefill_workers_counts_where_no_other_decodes() -> None:
    merged = merge_expositions([("prefill-0", worker(Role.PREFILL, used=30).exposition())], vllm_model="m")
    assert value(merged, "vllm:kv_cache_usage_perc") == pytest.approx(0.3)


def test_no_family_has_an_alias_whose_type_differs() -> None:
    merged = merge_expositions(cluster(), vllm_model="m").decode()
    kinds: dict[str, str] = {family.name: family.type for family in text_string_to_metric_families(merged)}
    assert kinds["vllm:e2e_request_latency_seconds"] == "histogram"
    assert kinds["vllm:prompt_tokens"] == "counter"
    assert kinds["vllm:num_requests_running"] == "gauge"


def test_counters_of_rare_events_begin_at_zero() -> None:
    """An alert on a rise can't see the first event of a series that is born with it."""
    merged = merge_expositions(cluster())
    assert {labels["outcome"] for labels, _ in samples(merged, "disagg_requests_total")} == set(OUTCOMES)
    assert len(samples(merged, "disagg_slo_attained_total")) == 2 * 4
    assert value(merged, "disagg_kv_transfer_failures_total", worker="decode-0", reason="kv_lost") == 0
    assert value(merged, "disagg_kv_lease_expiries_total", worker="prefill-0") == 0


def test_an_unknown_reason_can_not_make_a_new_series() -> None:
    metrics = worker(Role.DECODE)
    before = metrics.exposition().count(b"disagg_kv_transfer_failures_total{")
    metrics.observe_failed_pull("something a peer made up")
    exposition = metrics.exposition()
    assert exposition.count(b"disagg_kv_transfer_failures_total{") == before
    assert value(exposition, "disagg_kv_transfer_failures_total", reason="internal_error") == 1


def test_what_is_configured_is_shown() -> None:
    metrics = FrontendMetrics()
    connected = [True]
    pools: dict[Role, int] = {Role.PREFILL: 2, Role.DECODE: 3}
    goals: dict[str, Any] = {"ttft": 0.5, "tpot": None}
    metrics.describe("1.2", lambda role: pools.get(role, 0), goals, lambda: connected[0])
    assert value(metrics.exposition(), "disagg_pool_replicas", role="decode") == 3
    pools[Role.DECODE] = 4
    assert value(metrics.exposition(), "disagg_pool_replicas", role="decode") == 4
    assert value(metrics.exposition(), "disagg_slo_objective_seconds") == 0.5
    assert value(metrics.exposition(), "disagg_router_connected") == 1
    connected[0] = False
    assert value(metrics.exposition(), "disagg_router_connected") == 0
