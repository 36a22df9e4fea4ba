"""Ten times too much for a simulated cluster that runs the live admission code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sim_support import pool, spec_of

from disagg.errors import ConfigError
from disagg.routing.admission import Admission
from disagg.sim.records import Outcome
from disagg.sim.simulation import Simulation
from disagg.sim.summary import summarize
from disagg.workload import LogNormalLength, Poisson, Workload, synthesize

# So long a light load, from which the router learns how long steps take (live workers measure themselves
# before they join), and so long the one that is asked for.
CALM_S, SECONDS = 3, 10
OBJECTIVES = {"ttft_ms": 500, "tpot_ms": 40}


def load(rate: float, seed: int = 0) -> Workload:
    lengths = LogNormalLength(200, 0.8, 2000), LogNormalLength(40, 0.8, 300)
    rng = np.random.default_rng(seed)
    calm = synthesize(20 * CALM_S, Poisson(20.0), *lengths, rng, None)
    wanted = synthesize(int(rate * SECONDS), Poisson(rate), *lengths, rng, None)
    later = (replace(item, arrival_s=item.arrival_s + CALM_S) for item in wanted.requests)
    return Workload("calm, then more", tuple(sorted((*calm.requests, *later), key=lambda r: r.arrival_s)))


def run(rate: float, *, admission: dict[str, Any] | None, seed: int = 0, **more: Any) -> Simulation:
    spec = spec_of(
        {"p": pool("prefill", num_kv_blocks=8000), "d": pool("decode", num_kv_blocks=8000)},
        objectives=OBJECTIVES,
        **({} if admission is None else {"admission": admission}),
        **more,
    )
    simulation = Simulation(spec, load(rate, seed), seed=seed)
    simulation.run()
    return simulation


def good_per_second(simulation: Simulation) -> np.ndarray[Any, Any]:
    """Return how many of each second's arrivals met both objectives, after the calm."""
    records = simulation.records
    good = records.done & (records.ttft() <= 0.5) & (np.nan_to_num(records.tpot()) <= 0.04)
    return np.histogram(np.array(records.arrival)[good], bins=np.arange(CALM_S, CALM_S + SECONDS + 1))[0]


@pytest.mark.parametrize("policy", ["least_loaded", "slo"])
def test_goodput_stays_at_its_peak_under_ten_times_as_much(policy: str) -> None:
    rates = (60.0, 120.0)
    runs = [run(rate, admission={}, router={"policy": policy}) for rate in rates]
    goodputs = [good_per_second(each).mean() for each in runs]
    peak = max(goodputs)
    assert peak > 15
    flooded = run(10 * rates[goodputs.index(peak)], admission={}, router={"policy": policy})
    series = good_per_second(flooded)
    assert series.mean() >= 0.9 * peak
    assert series.min() >= 0.35 * series.mean(), "an idle second would be an oscillation"
    frontend = flooded.frontend.admission
    assert type(frontend) is Admission
    outcomes = summarize(flooded)["requests"]
    assert outcomes["shed"] == sum(frontend.refused.values())
    assert outcomes["done"] + outcomes["shed"] == outcomes["planned"]


def test_without_it_goodput_is_lost() -> None:
    """What the one above would see if admission did nothing."""
    kept, lost = (run(300.0, admission=admission) for admission in ({}, None))
    # The first second of a flood is served by whoever was idle before it.
    assert good_per_second(lost)[1:].mean() < 0.3 * good_per_second(kept)[1:].mean()


def test_a_light_load_is_served_whole() -> None:
    simulation = run(5.0, admission={})
    assert simulation.records.outcome.count(Outcome.DONE) == len(simulation.records)


@pytest.mark.parametrize(
    "faults",
    [
        [{"kind": "router_restart", "at_s": 3.0, "for_s": 2.0}],
        [{"kind": "worker_loss", "worker": "d-0", "at_s": 3.0, "for_s": 2.0}],
        [{"kind": "worker_loss", "worker": "p-0", "at_s": 3.0, "for_s": 1.0}],
    ],
)
def test_every_request_ends_once_whatever_dies(faults: list[dict[str, Any]]) -> None:
    """Simulation.run checks it; nor is a request shed that had begun."""
    simulation = run(200.0, admission={"backlog_s": 0.05}, faults=faults)
    records = simulation.records
    for index, outcome in enumerate(records.outcome):
        assert not (outcome == Outcome.SHED and records.resumes[index])


def test_requests_wait_for_their_turn() -> None:
    """Without objectives to miss the queue fills, and empties."""
    spec = spec_of(
        {"p": pool("prefill", num_kv_blocks=8000), "d": pool("decode", num_kv_blocks=8000)},
        admission={"backlog_s": 0.02},
    )
    simulation = Simulation(spec, load(200.0))
    waited = 0
    follow = simulation._released

    def count(released: Any) -> None:
        nonlocal waited
        waited += 1
        follow(released)

    simulation.frontend._on_released = count
    simulation.run()
    assert waited > 20
    assert simulation.records.outcome.count(Outcome.DONE) == len(simulation.records)


def test_bad_values_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="admission"):
        spec_of({"p": pool("mixed")}, admission={"reserve": 1.5})
