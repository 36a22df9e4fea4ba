"""Pipeline parallelism in the simulator: latency of one batch, throughput of many, GPUs and blocks."""

from __future__ import annotations

import pytest
from sim_support import pool, requests, spec_of

from disagg.sim.pipeline import Pipeline
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec
from disagg.sim.summary import summarize


def test_a_step_passes_every_stage_and_stages_hold_one_step_at_a_time() -> None:
    pipeline = Pipeline(2)
    assert pipeline.enter(0.0, 4.0) == 4.0
    assert pipeline.open_at == 2.0
    # Of a shorter step the second stage is still waited for.
    assert pipeline.enter(2.0, 2.0) == 5.0
    assert pipeline.open_at == 3.0


def _spec(stages: int) -> SimSpec:
    # A step of 1,000 tokens takes a second.
    return spec_of({"mixed": pool("mixed", pipeline_parallel_size=stages)}, engine=_ENGINE)


_ENGINE = {"max_num_seqs": 1, "max_num_batched_tokens": 2048}


def test_one_request_is_no_faster_and_many_are() -> None:
    alone, ten = requests((0.0, 2000, 1)), requests(*[(0.0, 2000, 1)] * 10)
    single, double = (Simulation(_spec(stages), alone) for stages in (1, 2))
    assert single.run().ttft()[0] == pytest.approx(double.run().ttft()[0])
    spans = []
    for stages in (1, 2):
        records = Simulation(_spec(stages), ten).run()
        spans.append(max(records.finished))
    # Ten steps in turn, against eleven halves.
    assert spans[1] / spans[0] == pytest.approx(11 / 20)


def test_a_pipeline_counts_its_gpus_and_shares_its_blocks() -> None:
    simulation = Simulation(_spec(2), requests((0.0, 50, 5), (0.0, 50, 5)))
    simulation.run()
    workers = list(simulation.workers.values())
    assert [worker.info.kv_blocks_total for worker in workers] == [200, 200]
    summary = summarize(simulation)
    assert summary["pools"]["mixed"]["gpus"] == summary["cost"]["gpus"] == 2
    assert all(worker.usage.num_steps for worker in workers)


def test_free_steps_leave_only_the_other_phase() -> None:
    spec = spec_of(
        {
            "prefill": pool("prefill", cost={"kind": "free"}, num_kv_blocks=10_000),
            "decode": pool("decode"),
        },
        links={"bandwidth_gb_s": 1e9, "sharing": "private"},
    )
    records = Simulation(spec, requests((0.0, 500, 20), (0.0, 500, 20))).run()
    assert max(records.ttft()) < 1e-6
    assert min(records.tpot()) > 1e-3
