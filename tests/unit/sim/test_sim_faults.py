"""Faults: what they cost is checked by hand, that nothing is lost over random histories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_support import KV_BYTES, pool, requests, spec_of, workload

from disagg.errors import ConfigError
from disagg.service import orchestrator
from disagg.sim import simulation as simulation_module
from disagg.sim.records import Outcome, Records
from disagg.sim.simulation import RETRY_DELAY_S, Simulation
from disagg.workload import SharedPrefix

# Prefill: 10 ms and 0.1 ms a token. Decode: 20 ms a step.
PROFILE = '{"prefill": {"a": 0.01, "b": 1e-4, "c": 0}, "decode": {"a": 0.02, "b": 0, "c": 0}}'
TWO = {"p": pool("prefill", 2), "d": pool("decode", 2)}
HANDOFFS = ("serial", "push", "overlapped")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(PROFILE)
    return path


def run(faults: list[dict[str, Any]], load: Any, pools: dict[str, Any] = TWO, **more: Any) -> Simulation:
    fast = more.pop("fast", True)
    simulation = Simulation(spec_of(pools, faults=faults, **more), load, fast=fast)
    simulation.run()  # checks the invariants
    return simulation


def loss(worker: str, at_s: float, **more: Any) -> dict[str, Any]:
    return {"kind": "worker_loss", "worker": worker, "at_s": at_s, **more}


def done(records: Records) -> bool:
    return set(records.outcome) == {Outcome.DONE}


# -- by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("detect_s", [0.0, 0.3])
def test_lost_decode_worker_costs_a_prefill_of_the_tokens_so_far(
    profile: Path, fast: bool, detect_s: float
) -> None:
    """200 in, 11 out: first token at 30 ms, the next at 50, 70, 90; the worker dies at 95 ms."""
    pools = {"m": pool("mixed", 2)}
    fault = loss("m-0", 0.095, detect_s=detect_s), loss("m-1", 0.0, for_s=0.01)
    simulation = run(list(fault), requests((0.0, 200, 11)), pools, profile=profile, fast=fast)
    records = simulation.records
    assert done(records) and list(records.resumes) == [1]
    assert records.ttft()[0] == pytest.approx(0.030)
    again = 0.095 + detect_s + RETRY_DELAY_S
    # 204 tokens are known; their prefill makes the fifth, and six more follow.
    assert records.e2e()[0] == pytest.approx(again + 0.010 + 0.0204 + 6 * 0.020)
    assert simulation.gaps.count == 10
    assert simulation.gaps.percentile(100) == pytest.approx(again - 0.095 + 0.0304, rel=0.01)


@pytest.mark.parametrize("fast", [True, False])
def test_prefill_worker_lost_before_the_first_token(profile: Path, fast: bool) -> None:
    pools = {"p": pool("prefill", 1), "d": pool("decode", 1)}
    fault = loss("p-0", 0.02, for_s=0.01)
    simulation = run([fault], requests((0.0, 200, 3)), pools, profile=profile, fast=fast)
    records = simulation.records
    assert done(records) and list(records.resumes) == [1]
    assert records.ttft()[0] == pytest.approx(0.02 + RETRY_DELAY_S + 0.030)


def test_prefill_worker_lost_while_its_kv_is_pulled_makes_decode_compute(profile: Path) -> None:
    pools = {"p": pool("prefill", 1), "d": pool("decode", 1)}
    links = {"bandwidth_gb_s": KV_BYTES * 200 / 0.5 / 1e9}
    fault = loss("p-0", 0.2)
    simulation = run([fault], requests((0.0, 200, 3)), pools, profile=profile, links=links)
    records = simulation.records
    assert done(records) and list(records.resumes) == [1]
    # The KV of 200 prompt tokens and of the first answer's: 201 tokens, whose step makes the second.
    assert records.e2e()[0] == pytest.approx(0.2 + 0.010 + 0.0201 + 0.020)
    assert simulation.workers["d-0"].usage.prompt_tokens == 201


def test_pushed_kv_lost_on_its_way_is_computed_elsewhere(profile: Path) -> None:
    links = {"bandwidth_gb_s": KV_BYTES * 200 / 0.5 / 1e9, "handoff": "push"}
    router = {"policy": "round_robin"}
    simulation = run([loss("p-0", 0.2)], requests((0.0, 200, 3)), profile=profile, links=links, router=router)
    assert done(simulation.records) and list(simulation.records.resumes) == [1]
    assert simulation.workers["p-1"].usage.prompt_tokens == 201


def test_without_a_worker_left_requests_are_refused() -> None:
    faults = [loss(worker, 1.0) for worker in ("p-0", "p-1", "d-0", "d-1")]
    simulation = run(faults, workload(60, rate=30.0))
    outcomes = simulation.records.outcome
    assert outcomes.count(Outcome.NO_CAPACITY) > 20 and outcomes.count(Outcome.DONE) > 0
    assert outcomes.count(Outcome.NO_CAPACITY) + outcomes.count(Outcome.DONE) == 60


def test_without_decode_workers_prefill_does_it_all() -> None:
    simulation = run([loss("d-0", 1.0), loss("d-1", 1.0)], workload(60, rate=30.0))
    assert done(simulation.records)
    assert simulation.frontend.placements["least_loaded", "degraded"] > 20


@pytest.mark.parametrize("fast", [True, False])
def test_slow_worker(profile: Path, fast: bool) -> None:
    """Steps that begin in [0.1, 0.3) take twice as long."""
    fault = {"kind": "slow_worker", "worker": "m-0", "at_s": 0.1, "for_s": 0.2, "factor": 2}
    pools = {"m": pool("mixed")}
    simulation = run([fault], requests((0.0, 200, 21)), pools, profile=profile, fast=fast)
    # Steps begin at 30, 50, 70, 90; then 110, 150, 190, 230, 270; eleven more from 310 on.
    assert simulation.records.e2e()[0] == pytest.approx(0.310 + 11 * 0.020)


@pytest.mark.parametrize(("sharing", "seconds"), [("shared", 0.3 + 0.2 * 4), ("private", 0.5)])
def test_slow_link(profile: Path, sharing: str, seconds: float) -> None:
    """From 330 ms on a quarter of the bandwidth; a private transfer keeps what it began with."""
    links = {"bandwidth_gb_s": KV_BYTES * 200 / 0.5 / 1e9, "sharing": sharing}
    fault = {"kind": "slow_link", "worker": "d-0", "at_s": 0.33, "factor": 4}
    pools = {"p": pool("prefill"), "d": pool("decode")}
    simulation = run([fault], requests((0.0, 200, 3)), pools, profile=profile, links=links)
    assert simulation.records.transfer[0] == pytest.approx(seconds)


def test_front_end_places_by_its_last_view_while_the_router_is_away() -> None:
    load = workload(120, rate=30.0)
    simulation = run([{"kind": "router_restart", "at_s": 1.0, "for_s": 1.0}], load)
    assert done(simulation.records) and not sum(simulation.records.resumes)
    placements = simulation.frontend.placements
    stale = sum(1 for item in load if 1.0 <= item.arrival_s < 2.0)
    # Until the new router has heard of all workers, within a heartbeat.
    settled = sum(1 for item in load if 2.0 <= item.arrival_s < 2.5)
    assert stale <= placements["least_loaded", "stale_view"] <= stale + settled
    assert sum(placements.values()) == len(load)


def test_restarted_router_learns_what_is_cached() -> None:
    fault = {"kind": "router_restart", "at_s": 3.0, "for_s": 0.2}
    load = workload(150, rate=20.0, prefix=SharedPrefix(2, 128), prompt=100)
    simulation = run([fault], load, router={"policy": "prefix_aware"})
    router = simulation.frontend.router
    assert done(simulation.records)
    assert router is not None and len(router.index) > 0
    late = [record for item, record in zip(load, simulation.records.cached_tokens, strict=True)
            if item.arrival_s > 4.0]  # fmt: skip
    assert np.mean(np.array(late) > 0) > 0.9


def test_detection_delays_everything_that_follows() -> None:
    quick, slow = (
        run([loss("d-0", 2.0, detect_s=delay)], workload(150, rate=30.0)).records for delay in (0.0, 2.0)
    )
    assert done(quick) and done(slow)
    assert sum(slow.resumes) > sum(quick.resumes) > 0
    assert np.percentile(slow.e2e(), 99) > np.percentile(quick.e2e(), 99) + 1.0


# -- in general ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("handoff", HANDOFFS)
def test_fast_path_is_the_exact_path_under_faults(handoff: str) -> None:
    faults = [
        loss("d-0", 1.0, for_s=0.7),
        loss("p-1", 1.5, for_s=2.0, detect_s=0.1),
        {"kind": "slow_worker", "worker": "d-1", "at_s": 0.5, "for_s": 1.0, "factor": 3},
        {"kind": "slow_link", "worker": "p-0", "at_s": 0.2, "for_s": 2.0, "factor": 10},
        {"kind": "router_restart", "at_s": 2.0, "for_s": 0.5},
    ]
    links = {"handoff": handoff, "bandwidth_gb_s": 0.01}
    exact, fast = (run(faults, workload(150, rate=50.0), links=links, fast=fast) for fast in (False, True))
    assert done(exact.records) and sum(exact.records.resumes) > 5
    for column in ("first_token", "finished", "transfer", "resumes"):
        expected = np.array(getattr(exact.records, column))
        assert np.array(getattr(fast.records, column)) == pytest.approx(expected, abs=1e-9), column
    assert fast.frontend.placements == exact.frontend.placements
    assert fast.gaps.count == exact.gaps.count


FAULTS = st.one_of(
    st.builds(
        loss,
        st.sampled_from(["p-0", "p-1", "d-0", "d-1", "m-0"]),
        st.floats(0, 4),
        for_s=st.one_of(st.none(), st.floats(0.2, 2)),
        detect_s=st.floats(0, 0.19),
    ),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["slow_worker", "slow_link"]),
            "worker": st.sampled_from(["p-0", "d-1", "m-0"]),
            "at_s": st.floats(0, 4),
            "for_s": st.floats(0.1, 2),
            "factor": st.floats(0.5, 20),
        }
    ),
    st.fixed_dictionaries(
        {"kind": st.just("router_restart"), "at_s": st.floats(0, 4), "for_s": st.floats(0.01, 2)}
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    faults=st.lists(FAULTS, min_size=1, max_size=6),
    handoff=st.sampled_from(HANDOFFS),
    fast=st.booleans(),
    prefixes=st.booleans(),
)
def test_every_request_ends_once_whatever_fails(
    faults: list[dict[str, Any]], handoff: str, fast: bool, prefixes: bool
) -> None:
    pools = {"p": pool("prefill", 2), "d": pool("decode", 2, num_kv_blocks=150), "m": pool("mixed")}
    prefix = SharedPrefix(3, 64) if prefixes else None
    load = workload(60, rate=20.0, prompt=100, prefix=prefix)
    links = {"handoff": handoff, "bandwidth_gb_s": 0.005}
    simulation = run(faults, load, pools, links=links, fast=fast)
    assert set(simulation.records.outcome) <= {Outcome.DONE, Outcome.NO_CAPACITY}
    if not any(fault["kind"] == "worker_loss" for fault in faults):
        assert done(simulation.records)


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        (loss("d-7", 1.0), "faults.0.worker"),
        (loss("d-0", -1.0), "faults.0.worker_loss.at_s"),
        (loss("d-0", 1.0, for_s=1.0, detect_s=1.0), "faults.0.worker_loss"),
        ({"kind": "flood", "at_s": 1.0}, "faults.0"),
        ({"kind": "router_restart", "at_s": 1.0, "for_s": None}, "faults.0.router_restart.for_s"),
        ({"kind": "slow_link", "worker": "d-0", "at_s": 1, "factor": 0}, "faults.0.slow_link.factor"),
    ],
)
def test_errors_name_the_fault(fault: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        run([fault], requests((0.0, 10, 2)))
    assert error.value.param == field


def test_retries_wait_as_long_as_live_ones() -> None:
    assert simulation_module.RETRY_DELAY_S == orchestrator.RETRY_DELAY_S
