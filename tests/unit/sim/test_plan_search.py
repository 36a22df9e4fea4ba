"""Placement search: shapes that fit, both of DistServe's algorithms, demands, budgets, and files of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sim_support import GPU, SHAPE, workload

from disagg.config import parse_config
from disagg.errors import ConfigError
from disagg.sim.planner import outputs
from disagg.sim.planner.goodput import Bisection, Criterion, Load, is_good
from disagg.sim.planner.plot import plot_ratios
from disagg.sim.planner.search import Result, Search, pair_plan
from disagg.sim.planner.space import Limits, Plan, PoolPlan, Space, WorkerShape
from disagg.sim.spec import load_spec
from disagg.types import Role

BASE: dict[str, Any] = {
    "model": SHAPE,
    "hardware": {
        "gpu": {**GPU, "memory": 2e7},
        "cheap": {**GPU, "memory": 2e7, "flops": 2e14, "price_per_hour": 0.5},
        "small": {**GPU, "memory": 1e5},
    },
    # A few requests per second and GPU, so that few requests are a while.
    "cost": {"kind": "roofline", "step_overhead_ms": 20},
    "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
    "router": {"policy": "least_loaded"},
    "objectives": {"ttft_ms": 1000, "tpot_ms": 50},
}
ONE = WorkerShape("gpu", 1)
CRITERION = Criterion(1.0, 0.05)


def _search(limits: Limits, **more: Any) -> Search:
    load = Load(workload(100), num_requests=60, min_seconds=0)
    return Search(Space({**BASE, **more}, limits), load, CRITERION, bisection=Bisection(4.0, share=0.1))


def _limits(gpus: int = 4, **more: Any) -> Limits:
    return Limits({"gpu": gpus}, **{"tensor_parallel": (1, 2), **more})


# -- space ---------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_left_out_with_the_reason() -> None:
    space = Space(BASE, Limits({"gpu": 2, "small": 4}, tensor_parallel=(1, 2, 8)))
    assert space.shapes == [ONE, WorkerShape("gpu", 2)]
    assert {str(shape) for shape in space.left_out} == {"small TP1", "small TP2"}
    assert all("memory" in reason for reason in space.left_out.values())


def test_a_space_without_shapes_says_why() -> None:
    with pytest.raises(ConfigError, match=r"gpus: .*memory"):
        Space(BASE, Limits({"small": 1}, tensor_parallel=(1,)))
    with pytest.raises(ConfigError, match="no 'nothing'"):
        Space(BASE, Limits({"nothing": 1}))


def test_tensor_parallelism_stays_within_a_node() -> None:
    space = Space(BASE, _limits(8, gpus_per_node=2, tensor_parallel=(1, 2, 4)))
    assert max(shape.tensor_parallel for shape in space.shapes) == 2


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        (_limits(3), True),
        (_limits(2), False),
        (_limits(3, usd_per_hour=6.0), True),
        (_limits(3, usd_per_hour=5.9), False),
        (_limits(3, power_w=1400.0), False),
    ],
)
def test_limits_bound_number_price_and_power(limits: Limits, allowed: bool) -> None:
    plan = Plan((PoolPlan(Role.PREFILL, ONE, 2), PoolPlan(Role.DECODE, ONE, 1)))
    space = Space(BASE, limits)
    assert space.allows(plan) is allowed
    assert space.price(plan) == (6.0, 1500.0)


# -- search --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> tuple[Search, Result]:
    search = _search(_limits(4))
    return search, search.run("high")


def test_plans_come_best_first(found: tuple[Search, Result]) -> None:
    _, result = found
    goodputs = [plan.goodput or 0.0 for plan in result.plans]
    assert goodputs == sorted(goodputs, reverse=True) and goodputs[-1] > 0
    assert any(plan.colocated for plan in result.plans)
    for plan in result.plans:
        if plan.estimate is not None and plan.goodput is not None:
            # More than one worker at a queue helps, waiting for the other phase hinders: neither by far.
            assert plan.estimate / 2 < plan.goodput < plan.estimate * 1.5


def test_the_sweep_holds_the_number_of_gpus_and_has_the_plan_in_it(found: tuple[Search, Result]) -> None:
    _, result = found
    best = next(plan for plan in result.plans if not plan.colocated)
    per_worker = {pool.role: pool.shape.gpus for pool in best.pools}
    for point in result.ratios:
        gpus = point.prefill * per_worker[Role.PREFILL] + point.decode * per_worker[Role.DECODE]
        assert best.gpus - per_worker[Role.DECODE] < gpus <= best.gpus
    counts = best.replicas(Role.PREFILL), best.replicas(Role.DECODE)
    (own,) = [point for point in result.ratios if (point.prefill, point.decode) == counts]
    assert own.goodput == best.goodput


def test_the_same_search_finds_the_same(found: tuple[Search, Result]) -> None:
    assert _search(_limits(4)).run("high") == found[1]


def test_a_demand_is_served_at_the_lowest_price() -> None:
    search = _search(_limits(12))
    single = search.phase_goodput(Role.PREFILL, ONE)
    demand = 2.5 * single
    best = search.run("high", demand).plans[0]
    assert (best.goodput or 0.0) >= demand * 0.9
    assert best.replicas(Role.PREFILL) + best.replicas(Role.MIXED) >= 3
    load = Load(workload(100), num_requests=60, min_seconds=0)
    if not best.colocated:
        assert is_good(search.space.spec(best.pools), load, CRITERION, demand, 0)


def test_a_demand_beyond_the_limits_is_refused() -> None:
    with pytest.raises(ConfigError, match="demand: nothing within the limits serves 1e"):
        _search(_limits(2)).run("high", 1e9)


def test_objectives_that_nothing_meets_are_refused() -> None:
    load = Load(workload(100), num_requests=20, min_seconds=0)
    search = Search(Space(BASE, _limits(2)), load, Criterion(1e-6, 1e-6))
    with pytest.raises(ConfigError, match="no plan within the limits"):
        search.run("high")


def test_a_plan_needs_both_objectives() -> None:
    with pytest.raises(ConfigError, match="both ttft_ms and tpot_ms"):
        Search(Space(BASE, _limits(2)), Load(workload(10)), Criterion(0.1, None))


def test_low_affinity_keeps_a_request_within_a_node() -> None:
    search = _search(_limits(8, gpus_per_node=2))
    plans = list(search.low_affinity(None))
    best = max(plans, key=lambda plan: plan.goodput or 0.0)
    assert best.nodes == 4 and best.gpus == 8
    assert all(sum(pool.gpus for pool in plan.pools) <= 2 for plan in plans)
    one = search.whole_goodput(best.pools, None)
    assert best.goodput == pytest.approx(4 * one, rel=0.15)


def test_low_affinity_pairs_are_distserves_configurations() -> None:
    search = _search(_limits(4, gpus_per_node=4, tensor_parallel=(1, 2), pipeline_parallel=(1, 2)))
    pairs = {
        tuple((pool.shape.tensor_parallel, pool.shape.pipeline_parallel) for pool in plan.pools)
        for plan in search.low_affinity(None, pairs_only=True)
    }
    within = {(1, 1), (1, 2), (2, 1)}
    assert pairs == {(first, second) for first in within for second in within}


def test_a_budget_may_mix_kinds_of_gpu() -> None:
    limits = Limits({"gpu": 4, "cheap": 4}, tensor_parallel=(1,), usd_per_hour=4.0)
    plans = _search(limits).run("high").plans
    kinds = {tuple(pool.shape.hardware for pool in plan.pools) for plan in plans if not plan.colocated}
    assert ("gpu", "cheap") in kinds
    space = Space(BASE, limits)
    assert all(space.price(plan)[0] <= 4.0 for plan in plans)


# -- files ---------------------------------------------------------------------------------------------

PAIR = pair_plan(WorkerShape("gpu", 1), 2, 10.0, WorkerShape("gpu", 1), 3, 10.0)


def test_a_plan_is_a_cluster_file(tmp_path: Path) -> None:
    space = Space(BASE, _limits(8))
    path = tmp_path / "cluster.yaml"
    path.write_text(outputs.cluster_file(space, PAIR))
    assert load_spec(path) == space.spec(PAIR.pools)


def test_a_plan_is_a_configuration_that_serve_takes() -> None:
    data = yaml.safe_load(outputs.serve_config(PAIR))
    config = parse_config(data)
    assert (config.prefill.replicas, config.decode.replicas, config.mixed.replicas) == (2, 3, 0)
    assert config.prefill.num_gpus == 1
    colocated = yaml.safe_load(outputs.serve_config(Plan((PoolPlan(Role.MIXED, ONE, 4),), nodes=2)))
    config = parse_config(colocated)
    assert (config.prefill.replicas, config.decode.replicas, config.mixed.replicas) == (0, 0, 8)


def test_a_plan_is_values_of_the_chart() -> None:
    values = yaml.safe_load(outputs.helm_values(PAIR))
    assert values["prefill"] == {"replicas": 2, "tensorParallelSize": 1, "gpu": {"enabled": True}}
    assert values["decode"]["replicas"] == 3


def test_what_can_not_be_served_is_not_written() -> None:
    staged = pair_plan(WorkerShape("gpu", 1, 2), 1, 1.0, ONE, 1, 1.0)
    with pytest.raises(ConfigError, match="pp: "):
        outputs.serve_config(staged)
    with pytest.raises(ConfigError, match="pp: "):
        outputs.helm_values(staged)
    with pytest.raises(ConfigError, match="colocated"):
        outputs.helm_values(Plan((PoolPlan(Role.MIXED, ONE, 4),)))


def test_the_sweep_is_plotted(found: tuple[Search, Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_ratios(found[1], tmp_path / "ratios.svg")
    text = (tmp_path / "ratios.svg").read_text()
    assert "<svg" in text
