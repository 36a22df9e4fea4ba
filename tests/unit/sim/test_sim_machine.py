"""Workers that share a machine: how steps slow each other down, exactly, and what that does to a cluster."""

from __future__ import annotations

import pytest
from sim_support import pool, requests, spec_of

from disagg.errors import ConfigError
from disagg.sim.events import EventLoop
from disagg.sim.machine import Machine
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec


def test_steps_are_slower_exactly_while_they_overlap() -> None:
    loop = EventLoop()
    machine = Machine(loop)
    ended: dict[str, tuple[float, float]] = {}

    def begin(step: tuple[str, float, float]) -> None:
        name, seconds, slowed = step
        machine.run(seconds, slowed, lambda took: ended.update({name: (loop.now, took)}))

    loop.at(0.0, begin, ("long", 10.0, 1.0))
    loop.at(4.0, begin, ("short", 2.0, 0.5))
    loop.run()
    assert ended["short"] == pytest.approx((7.0, 3.0))
    # 4 s alone, 3 s at half its pace, and what is left alone again.
    assert ended["long"] == pytest.approx((11.5, 11.5))


def test_a_step_that_is_dropped_never_ends_and_slows_nobody() -> None:
    loop = EventLoop()
    machine = Machine(loop)
    ended: list[str] = []
    lost = machine.run(5.0, 1.0, lambda _: ended.append("lost"))
    machine.run(2.0, 1.0, lambda _: ended.append(f"other at {loop.now}"))
    loop.at(2.0, machine.drop, lost)
    loop.run()
    machine.drop(lost)
    assert ended == ["other at 3.0"]


def _spec(slowed: float, **more: object) -> SimSpec:
    pools = {role: pool(role, slowed_by_others=slowed) for role in ("prefill", "decode")}
    return spec_of(pools, engine={"max_num_seqs": 4, "max_num_batched_tokens": 2048}, **more)


def test_prefill_takes_longer_beside_decode_and_alone_it_does_not() -> None:
    # The second prompt comes while the first request decodes.
    load = requests((0.0, 500, 400), (0.5, 500, 1))
    calm, shared = (Simulation(_spec(slowed), load).run() for slowed in (0.0, 0.5))
    assert shared.ttft()[0] == pytest.approx(calm.ttft()[0])
    assert 1.3 < shared.ttft()[1] / calm.ttft()[1] <= 1.5 + 1e-9
    assert shared.tpot()[0] > calm.tpot()[0]


def test_losing_a_worker_leaves_the_other_at_full_pace() -> None:
    faults = [{"kind": "worker_loss", "worker": "decode-0", "at_s": 1.0, "for_s": 1.0}]
    records = Simulation(_spec(0.5, faults=faults), requests((0.0, 500, 400), (0.9, 500, 3))).run()
    assert records.num_ended == 2
    assert sum(records.resumes) >= 1


def test_a_shared_machine_and_pipelines_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"pools\.prefill: pipeline_parallel_size .* slowed_by_others"):
        spec_of({"prefill": pool("mixed", slowed_by_others=0.1, pipeline_parallel_size=2)})
