"""What each policy chooses, and whom it may not choose."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from pydantic import ValidationError
from routing_fakes import DECODE, MIXED, PREFILL, report, request, router

from disagg.config import RouterConfig
from disagg.errors import InvalidRequestError, NoCapacityError
from disagg.routing.policies import POLICIES
from disagg.routing.router import Router
from disagg.routing.types import BlockEvents, PlacementKind
from disagg.types import WorkerLoad, WorkerStatus

ALL = sorted(POLICIES)
# Those that compare all workers.
EVEN = sorted(POLICIES.keys() - {"power_of_two"})


@pytest.mark.parametrize("policy", EVEN)
def test_a_burst_spreads_evenly_before_any_report(policy: str) -> None:
    made = router(policy, prefill=4, decode=4)
    placed = [made.place(request(f"r{i}", block_hashes=(i,)), 0.0) for i in range(40)]
    assert set(Counter(p.prefill_worker for p in placed).values()) == {10}
    assert set(Counter(p.decode_worker for p in placed).values()) == {10}
    assert {p.kind for p in placed} == {PlacementKind.DISAGGREGATED}
    assert {p.policy for p in placed} == {policy}


@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
def test_ties_are_broken_fairly_and_reproducibly(policy: str) -> None:
    def firsts(seed: int) -> list[str]:
        made = Router(RouterConfig.model_validate({"policy": policy}), random.Random(seed))
        for index in range(4):
            made.worker_report(report(f"p{index}", PREFILL), 0.0)
        made.worker_report(report("d", DECODE), 0.0)
        chosen = []
        for index in range(200):
            chosen.append(made.place(request(f"r{index}"), 0.0).prefill_worker)
            made.finished(f"r{index}")
        return chosen

    assert min(Counter(firsts(1)).values()) > 25
    assert firsts(2) == firsts(2)
    assert firsts(2) != firsts(3)


@pytest.mark.parametrize("policy", ["least_loaded", "prefix_aware"])
def test_reported_load_is_avoided(policy: str) -> None:
    made = router(policy, prefill=2, decode=2)
    made.worker_report(report("prefill-0", PREFILL, load=WorkerLoad(1, 3, waiting_tokens=5000)), 0.1)
    made.worker_report(report("decode-1", DECODE, load=WorkerLoad(20, 0, kv_blocks_used=300)), 0.1)
    for index in range(5):
        placement = made.place(request(f"r{index}"), 0.2)
        assert (placement.prefill_worker, placement.decode_worker) == ("prefill-1", "decode-0")


def test_full_kv_cache_counts_more_than_running_sequences() -> None:
    made = router("least_loaded", prefill=1, decode=2)
    made.worker_report(report("decode-0", DECODE, load=WorkerLoad(2, 0, kv_blocks_used=990)), 0.1)
    made.worker_report(report("decode-1", DECODE, load=WorkerLoad(30, 0, kv_blocks_used=300)), 0.1)
    assert made.place(request("r"), 0.2).decode_worker == "decode-1"


def test_a_cached_prefix_draws_requests_to_both_sides() -> None:
    made = router(prefill=4, decode=4)
    prefix = tuple(range(1, 61))
    made.worker_report(report("prefill-2", PREFILL, blocks=BlockEvents(0, prefix, snapshot=True)), 0.1)
    made.worker_report(report("decode-3", DECODE, blocks=BlockEvents(0, prefix, snapshot=True)), 0.1)
    placement = made.place(request("r", 1000, block_hashes=(*prefix, 77, 78)), 0.2)
    assert (placement.prefill_worker, placement.decode_worker) == ("prefill-2", "decode-3")
    assert placement.cached_tokens == 960


def test_a_burst_with_a_shared_prefix_sticks_together_before_any_report() -> None:
    made = router(prefill=4, decode=4)
    prefix = tuple(range(100, 160))
    placed = [made.place(request(f"r{i}", 976, block_hashes=(*prefix, 1000 + i)), 0.0) for i in range(8)]
    assert len({p.prefill_worker for p in placed}) == 1
    assert [p.cached_tokens for p in placed] == [0, *[960] * 7]


def test_a_popular_prefix_does_not_overload_one_worker() -> None:
    made = router(prefill=4, decode=4)
    prefix = tuple(range(100, 110))
    placed = [made.place(request(f"r{i}", 560, block_hashes=prefix), 0.0) for i in range(80)]
    counts = Counter(p.prefill_worker for p in placed)
    assert len(counts) == 4
    assert max(counts.values()) <= 30


@pytest.mark.parametrize("policy", ALL)
def test_excluded_workers_are_avoided_while_others_live(policy: str) -> None:
    made = router(policy, prefill=2, decode=2)
    for index in range(12):
        placement = made.place(request(f"r{index}", excluded=("prefill-0", "decode-1", "gone")), 0.0)
        assert (placement.prefill_worker, placement.decode_worker) == ("prefill-1", "decode-0")
    other_pool = made.place(request("x", excluded=("prefill-0", "prefill-1")), 0.0)
    assert other_pool.kind is PlacementKind.DEGRADED
    assert other_pool.prefill_worker.startswith("decode")
    everyone = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    assert made.place(request("y", excluded=everyone), 0.0).kind is PlacementKind.DISAGGREGATED


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("status", [WorkerStatus.DRAINING, WorkerStatus.STARTING])
def test_only_ready_workers_take_requests(policy: str, status: WorkerStatus) -> None:
    made = router(policy, prefill=2, decode=2)
    made.worker_report(report("prefill-0", PREFILL, status=status), 0.1)
    assert {made.place(request(f"r{i}"), 0.2).prefill_worker for i in range(8)} == {"prefill-1"}
    for worker_id, role in (("prefill-1", PREFILL), ("decode-0", DECODE), ("decode-1", DECODE)):
        made.worker_report(report(worker_id, role, status=status), 0.3)
    with pytest.raises(NoCapacityError):
        made.place(request("none"), 0.4)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("left", ["prefill", "decode"])
def test_one_pool_does_all_when_the_other_is_gone(policy: str, left: str) -> None:
    made = router(policy, **{left: 2})
    placed = [made.place(request(f"r{i}"), 0.0) for i in range(8)]
    assert all(p.prefill_worker == p.decode_worker for p in placed)
    assert {p.kind for p in placed} == {PlacementKind.DEGRADED}
    assert Counter(p.prefill_worker for p in placed) == {f"{left}-0": 4, f"{left}-1": 4}
    assert made.counters == {(policy, "degraded"): 8}


@pytest.mark.parametrize("policy", ALL)
def test_mixed_workers_alone_are_colocated_serving(policy: str) -> None:
    made = router(policy, mixed=3)
    placed = [made.place(request(f"r{i}"), 0.0) for i in range(9)]
    assert {p.kind for p in placed} == {PlacementKind.LOCAL}
    if policy in EVEN:
        assert set(Counter(p.decode_worker for p in placed).values()) == {3}


def test_a_busy_mixed_worker_leaves_work_to_the_pools() -> None:
    made = router("least_loaded", prefill=1, decode=1, mixed=1)
    assert made.place(request("a"), 0.0).kind is PlacementKind.LOCAL
    busy = WorkerLoad(30, 20, waiting_tokens=9000, kv_blocks_used=500)
    made.worker_report(report("mixed-0", MIXED, load=busy), 0.1)
    placement = made.place(request("b"), 0.2)
    assert (placement.prefill_worker, placement.decode_worker) == ("prefill-0", "decode-0")


def test_splitwise_lends_workers_for_bursts_and_takes_them_back() -> None:
    made = router("splitwise_jsq", prefill=1, decode=3)
    first = [made.place(request(f"r{i}", 4000), 0.0) for i in range(2)]
    assert {p.prefill_worker for p in first} == {"prefill-0"}
    # The prefill worker's queue is long: one decode worker after the other takes prompts,
    third, fourth, fifth = (made.place(request(f"r{i}", 4000), 0.0) for i in range(2, 5))
    lent = {third.prefill_worker, fifth.prefill_worker}
    assert third.prefill_worker == fourth.prefill_worker
    assert len(lent) == 2 and "prefill-0" not in lent
    # and while it does, answers go to those that are left.
    (left,) = {"decode-0", "decode-1", "decode-2"} - lent
    assert made.place(request("short", 100), 0.0).decode_worker == left
    for number in range(5):
        made.prefilled(f"r{number}")
    later = [made.place(request(f"later-{i}", 100), 1.0) for i in range(3)]
    assert {p.prefill_worker for p in later} == {"prefill-0"}
    assert {p.decode_worker for p in later} != {left}


def test_splitwise_lends_prefill_workers_to_answers_that_fit_nowhere_else() -> None:
    made = router("splitwise_jsq", prefill=2, decode=1)
    full = WorkerLoad(10, 0, kv_blocks_used=1000)
    made.worker_report(report("decode-0", DECODE, load=full), 0.1)
    assert made.place(request("a", 160), 0.2).decode_worker.startswith("prefill")
    made.worker_report(report("decode-0", DECODE), 0.3)
    assert made.place(request("b", 160), 0.4).decode_worker == "decode-0"


def test_splitwise_with_nothing_left_to_lend_serves_as_one_pool() -> None:
    made = router("splitwise_jsq", prefill=1, decode=1)
    busy = WorkerLoad(10, 10, waiting_tokens=9000, kv_blocks_used=1000)
    for role in (PREFILL, DECODE):
        made.worker_report(report(f"{role.value}-0", role, load=busy), 0.1)
    for number in range(4):
        made.place(request(f"r{number}", 1000), 0.2)
    placed = made.place(request("last", 1000), 0.2)
    assert placed.kind is PlacementKind.LOCAL


@pytest.mark.parametrize("policy", ALL)
def test_a_prompt_goes_only_where_it_fits(policy: str) -> None:
    made = router(policy, prefill=1, decode=1)
    made.worker_report(report("long-p", PREFILL, max_model_len=9000), 0.0)
    made.worker_report(report("long-d", DECODE, max_model_len=9000), 0.0)
    for index in range(4):
        placement = made.place(request(f"r{index}", 6000), 0.0)
        assert {placement.prefill_worker, placement.decode_worker} <= {"long-p", "long-d"}
    assert made.place(request("edge", 8999), 0.0).prefill_worker in {"long-p", "long-d"}
    with pytest.raises(InvalidRequestError) as caught:
        made.place(request("too-long", 9000), 0.0)
    assert caught.value.param == "prompt"


def test_a_prompt_larger_than_every_kv_cache_is_invalid_and_not_a_matter_of_capacity() -> None:
    made = Router(RouterConfig(), random.Random(0))
    with pytest.raises(NoCapacityError):
        made.place(request("r", 100), 0.0)
    made.worker_report(report("m", MIXED, kv_blocks_total=10), 0.0)
    assert made.place(request("fits", 160), 0.0).decode_worker == "m"
    with pytest.raises(InvalidRequestError):
        made.place(request("r", 161), 0.0)
    made.worker_report(report("big", MIXED, status=WorkerStatus.DRAINING), 0.0)
    with pytest.raises(NoCapacityError):
        made.place(request("r", 161), 0.0)
    with pytest.raises(InvalidRequestError):
        made.place(request("r", 0), 0.0)


def test_unknown_policy() -> None:
    with pytest.raises(ValidationError):
        RouterConfig.model_validate({"policy": "oracle"})
