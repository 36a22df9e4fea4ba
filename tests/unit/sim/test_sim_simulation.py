from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_support import KV_BYTES, SharedPrefix, pool, requests, spec_of, workload

from disagg.sim.records import Outcome, Records
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec
from disagg.workload import Workload

PROFILE = '{"prefill": {"a": 0.01, "b": 1e-4, "c": 0}, "decode": {"a": 0.02, "b": 0, "c": 0}}'
SPLIT = {"p": pool("prefill"), "d": pool("decode")}
MIXED = {"m": pool("mixed")}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Prefill takes 10 ms and 0.1 ms a token, a decode step 20 ms whatever is in it."""
    path = tmp_path / "profile.json"
    path.write_text(PROFILE)
    return path


def run(spec: SimSpec, load: Workload, **options: Any) -> tuple[Simulation, Records]:
    simulation = Simulation(spec, load, **options)
    return simulation, simulation.run()


# -- one request, by hand ------------------------------------------------------------------------------


def test_colocated_request_takes_prefill_and_steps(profile: Path) -> None:
    _, records = run(spec_of(MIXED, profile=profile), requests((1.0, 200, 11)))
    assert records.ttft()[0] == pytest.approx(0.030)
    assert records.e2e()[0] == pytest.approx(0.030 + 10 * 0.020)
    assert records.tpot()[0] == pytest.approx(0.020)
    assert records.transfer[0] == 0


@pytest.mark.parametrize("sharing", ["private", "shared"])
@pytest.mark.parametrize("handoff", ["serial", "push"])
def test_handed_off_request_waits_for_its_kv(profile: Path, sharing: str, handoff: str) -> None:
    links = {
        "bandwidth_gb_s": KV_BYTES * 200 / 0.5 / 1e9,
        "sharing": sharing,
        "handoff": handoff,
        "latency_ms": 7,
    }
    simulation, records = run(spec_of(SPLIT, profile=profile, links=links), requests((0.0, 200, 11)))
    assert records.ttft()[0] == pytest.approx(0.030)
    assert records.transfer[0] == pytest.approx(0.507)
    assert records.e2e()[0] == pytest.approx(0.030 + 0.507 + 10 * 0.020)
    assert simulation.network.num_bytes == pytest.approx(200 * KV_BYTES)


def test_overlapped_hand_off_exposes_the_last_layer_or_what_prefill_did_not_cover(profile: Path) -> None:
    for total_s, exposed in ((0.030, 0.003), (0.300, 0.300 - 0.030)):
        links = {"bandwidth_gb_s": KV_BYTES * 200 / total_s / 1e9, "handoff": "overlapped"}
        simulation, records = run(spec_of(SPLIT, profile=profile, links=links), requests((0.0, 200, 11)))
        assert records.transfer[0] == pytest.approx(exposed)
        assert simulation.network.num_bytes == pytest.approx(200 * KV_BYTES)


@pytest.mark.parametrize("fast", [True, False])
def test_pushed_requests_that_fill_the_cache_all_get_on(profile: Path, fast: bool) -> None:
    """More wait than may receive at once: each is admitted when those before it are active."""
    pools = {"p": pool("prefill", 8), "d": pool("decode", num_kv_blocks=100)}
    links = {"handoff": "push", "bandwidth_gb_s": 1000}
    spec = spec_of(pools, profile=profile, links=links, router={"policy": "round_robin"})
    _, records = run(spec, requests(*[(0.0, 200, 20)] * 16), fast=fast)
    assert set(records.outcome) == {Outcome.DONE}


def test_answer_of_one_token_is_not_handed_off(profile: Path) -> None:
    simulation, records = run(spec_of(SPLIT, profile=profile), requests((0.0, 200, 1)))
    assert simulation.network.num_bytes == 0
    assert records.e2e()[0] == records.ttft()[0]
    assert np.isnan(records.tpot()[0])


def test_overheads_are_added_where_they_belong(profile: Path) -> None:
    overheads = {"request_ms": 3, "handoff_ms": 5}
    links = {"bandwidth_gb_s": 1e6}
    spec = spec_of(SPLIT, profile=profile, overheads=overheads, links=links)
    _, records = run(spec, requests((0.0, 200, 11)))
    assert records.ttft()[0] == pytest.approx(0.033)
    assert records.e2e()[0] == pytest.approx(0.033 + 0.005 + 0.200, abs=1e-6)


def test_two_prompts_share_a_step_and_long_ones_are_chunked(profile: Path) -> None:
    _, records = run(spec_of(MIXED, profile=profile), requests((0, 100, 1), (0, 100, 1), (0, 400, 1)))
    # The first is alone, since nobody had come; then 256 of 500 tokens, then 244.
    ends = [0.020, 0.020 + 0.010 + 0.0256, 0.020 + 2 * 0.010 + 0.050]
    assert list(records.ttft()) == pytest.approx(ends)


# -- what must hold in every run -----------------------------------------------------------------------

CLUSTERS: dict[str, dict[str, Any]] = {
    "mixed": {"m": pool("mixed", 2)},
    "split": {"p": pool("prefill", 2), "d": pool("decode", 2)},
    "all": {"p": pool("prefill"), "m": pool("mixed"), "d": pool("decode")},
    "prefill only": {"p": pool("prefill", 2)},
    "short of blocks": {"p": pool("prefill", num_kv_blocks=130), "d": pool("decode", num_kv_blocks=150)},
}
HANDOFFS = ("serial", "push", "overlapped")


@pytest.mark.parametrize("handoff", HANDOFFS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_fast_path_is_the_exact_path(cluster: str, handoff: str) -> None:
    spec = spec_of(CLUSTERS[cluster], links={"handoff": handoff, "bandwidth_gb_s": 0.01})
    load = workload(150, rate=60.0)
    (exact, slow), (leaping, fast) = (run(spec, load, fast=fast) for fast in (False, True))
    for column in ("first_token", "finished", "queued", "prefill", "transfer"):
        expected = np.array(getattr(slow, column))
        assert np.array(getattr(fast, column)) == pytest.approx(expected, abs=1e-9), column
    assert fast.outcome == slow.outcome
    assert leaping.frontend.placements == exact.frontend.placements
    for worker_id, worker in exact.workers.items():
        other = leaping.workers[worker_id]
        assert other.usage.busy_s == pytest.approx(worker.usage.busy_s)
        assert other.usage.num_steps == worker.usage.num_steps
        assert other.usage.output_tokens == worker.usage.output_tokens
        assert other.counters == worker.counters
    assert leaping.gaps.count == exact.gaps.count
    assert leaping.gaps.mean == pytest.approx(exact.gaps.mean)


def test_fast_path_has_few_events() -> None:
    events = []
    for fast in (False, True):
        simulation, _ = run(spec_of(SPLIT), requests((0.0, 100, 1000), (0.1, 100, 1000)), fast=fast)
        events.append(simulation.loop.num_events)
    assert events[1] < events[0] / 20


def test_fast_path_preempts_as_the_exact_one_does() -> None:
    spec = spec_of({"m": pool("mixed", num_kv_blocks=100)})
    load = requests(*((number * 0.05, 16, 150 + 7 * number) for number in range(20)))
    (exact, slow), (leaping, fast) = (run(spec, load, fast=fast) for fast in (False, True))
    assert exact.workers["m-0"].counters.preemptions > 0
    assert leaping.workers["m-0"].counters == exact.workers["m-0"].counters
    assert np.array(fast.finished) == pytest.approx(np.array(slow.finished), abs=1e-9)


def test_fast_path_with_prefix_cache_and_preemption() -> None:
    pools = {"p": pool("prefill", 2), "d": pool("decode", 2, num_kv_blocks=150), "m": pool("mixed")}
    spec = spec_of(pools, router={"policy": "prefix_aware"})
    load = workload(150, rate=60.0, prefix=SharedPrefix(3, 128), prompt=100)
    (exact, slow), (leaping, fast) = (run(spec, load, fast=fast) for fast in (False, True))
    assert np.array(fast.finished) == pytest.approx(np.array(slow.finished), abs=1e-9)
    assert fast.cached_tokens == slow.cached_tokens
    assert sum(fast.cached_tokens) > 0.3 * sum(fast.prompt_tokens)
    assert leaping.frontend.placements == exact.frontend.placements


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "prefix_aware"])
def test_same_seed_same_bytes(policy: str) -> None:
    spec = spec_of(CLUSTERS["all"], router={"policy": policy})
    load = workload(100, prefix=SharedPrefix(5, 64))
    (_, first), (_, second) = (run(spec, load, seed=3) for _ in range(2))
    for column in ("first_token", "finished", "transfer", "cached_tokens"):
        assert getattr(first, column).tobytes() == getattr(second, column).tobytes()


def test_seed_matters_where_choices_are_drawn() -> None:
    spec = spec_of({"m": pool("mixed", 8)})
    counts = []
    for seed in (0, 1):
        simulation, _ = run(spec, workload(100), seed=seed)
        counts.append([worker.usage.prompt_tokens for worker in simulation.workers.values()])
    assert counts[0] != counts[1]
    assert sum(counts[0]) == sum(counts[1])


def test_predicting_policy_learns_what_steps_and_pulls_take(profile: Path) -> None:
    """The profile is linear, so that what the live predictors should find is known."""
    links = {"bandwidth_gb_s": 1e-3 * KV_BYTES}  # a microsecond a token
    pools = {"p": pool("prefill"), "d": pool("decode")}
    spec = spec_of(pools, profile=profile, links=links, router={"policy": "slo", "local_prefill": False})
    simulation, records = run(spec, workload(200, rate=8.0))
    router = simulation.frontend.router
    assert set(records.outcome) == {Outcome.DONE} and router is not None
    states, predictors = router.view.workers, router.view.predictors
    a, b, c = predictors.of(router.view.slot("p-0") or 0, states["p-0"].info).prefill.coefficients
    assert a + 200 * b + c * 2e4 == pytest.approx(0.030, rel=0.05)
    a, b, c = predictors.of(router.view.slot("d-0") or 0, states["d-0"].info).decode.coefficients
    assert a + 8 * b + c * 2000 == pytest.approx(0.020, rel=0.05)
    assert simulation.frontend.placements["slo", "disaggregated"] == 200


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 900), st.integers(1, 120)), min_size=1, max_size=25
    ),
    cluster=st.sampled_from(sorted(CLUSTERS)),
    handoff=st.sampled_from(HANDOFFS),
    fast=st.booleans(),
)
def test_every_request_ends_once_and_gives_everything_back(
    rows: list[tuple[float, int, int]], cluster: str, handoff: str, fast: bool
) -> None:
    spec = spec_of(CLUSTERS[cluster], links={"handoff": handoff, "bandwidth_gb_s": 0.05})
    simulation, records = run(spec, requests(*sorted(rows)), fast=fast)  # run() checks the invariants
    assert set(records.outcome) == {Outcome.DONE}
    produced = sum(worker.usage.output_tokens for worker in simulation.workers.values())
    preempted = sum(worker.counters.preemptions for worker in simulation.workers.values())
    if not preempted:
        assert produced == sum(row[2] - 1 for row in rows)
    assert (records.ttft() > 0).all() and (records.e2e() >= records.ttft()).all()


# -- refusals ------------------------------------------------------------------------------------------


def test_too_long_request_is_refused_and_the_rest_runs() -> None:
    _, records = run(spec_of(SPLIT), requests((0.0, 50, 5), (0.1, 500_000, 5), (0.2, 50, 5)))
    assert list(records.outcome) == [Outcome.DONE, Outcome.INVALID, Outcome.DONE]


def test_full_queue_sheds() -> None:
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 256, "max_waiting": 2}
    for pools in (MIXED, SPLIT):
        _, records = run(spec_of(pools, engine=engine), requests(*[(0.0, 300, 50)] * 6))
        assert records.outcome.count(Outcome.SHED) > 0
        assert records.outcome.count(Outcome.DONE) + records.outcome.count(Outcome.SHED) == 6


def test_invariants_are_checked() -> None:
    simulation = Simulation(spec_of(MIXED), requests((0.0, 50, 5)))
    simulation.run()
    simulation.workers["m-0"].engine._pool.allocate(1)
    with pytest.raises(AssertionError):
        simulation.check_invariants()
    simulation = Simulation(spec_of(MIXED), requests((0.0, 50, 5)))
    with pytest.raises(AssertionError, match="1 requests came, 0 have ended"):
        simulation.check_invariants()
    with pytest.raises(AssertionError, match="ended twice"):
        simulation.run().end(0, Outcome.DONE, 1.0)


def test_progress_reaches_the_end() -> None:
    seen: list[int] = []
    run(spec_of(MIXED), requests((0.0, 50, 5), (0.1, 50, 5)), on_progress=seen.append)
    assert seen[-1] == 2
