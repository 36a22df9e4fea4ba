"""What `disagg plan` writes is taken by the chart and by the program, and asks for what was planned."""

from __future__ import annotations

import pytest
import yaml
from chart_support import check_object, pod_templates, render, serve_config

from disagg.config import parse_config
from disagg.errors import ConfigError
from disagg.sim.planner.outputs import helm_values
from disagg.sim.planner.outputs import serve_config as serve_file
from disagg.sim.planner.space import Plan, PoolPlan, WorkerShape
from disagg.types import Role


def plan_of(
    prefill: tuple[str, int, int], decode: tuple[str, int, int], nodes: int = 1, stages: int = 1
) -> Plan:
    """Return a plan; each side: kind of GPU, tensor parallelism, workers of a node."""
    sides = ((Role.PREFILL, prefill), (Role.DECODE, decode))
    pools = (
        PoolPlan(role, WorkerShape(kind, degree, stages), count) for role, (kind, degree, count) in sides
    )
    return Plan(tuple(pools), nodes=nodes)


H100, A100 = "h100-80gb", "a100-80gb"
PLANS = [
    plan_of((H100, 1, 1), (H100, 1, 1)),
    plan_of((H100, 4, 6), (A100, 8, 4)),
    plan_of((H100, 2, 1), (H100, 1, 2), nodes=3),
    plan_of(("l4-24gb", 1, 2), ("l40s-48gb", 2, 1)),
    plan_of(("mi300x-192gb", 1, 2), ("mi300x-192gb", 1, 2)),
    plan_of(("our-own-gpu", 1, 2), ("our-own-gpu", 2, 2)),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_chart_takes_the_values(plan: Plan) -> None:
    objects = render(yaml.safe_load(helm_values(plan)))
    for item in objects:
        check_object(item)
    config = parse_config(serve_config(objects)["applications"][0]["args"])
    for pool in plan.pools:
        served = config.pool(pool.role)
        assert served.replicas == plan.replicas(pool.role)
        assert served.tensor_parallel_size == served.num_gpus == pool.shape.tensor_parallel


def test_each_pool_runs_on_its_kind_of_gpu() -> None:
    templates = pod_templates(render(yaml.safe_load(helm_values(PLANS[1]))))
    asked = {role: templates[role]["spec"].get("nodeSelector") for role in ("prefill", "decode")}
    assert asked == {
        "prefill": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "decode": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
    }


@pytest.mark.parametrize("plan", [*PLANS, Plan((PoolPlan(Role.MIXED, WorkerShape(H100, 2), 3),))], ids=str)
def test_the_program_takes_the_configuration(plan: Plan) -> None:
    config = parse_config(yaml.safe_load(serve_file(plan)))
    assert {role: config.pool(role).replicas for role in Role} == {role: plan.replicas(role) for role in Role}


def test_what_can_not_be_served_is_refused() -> None:
    staged = plan_of((H100, 1, 1), (H100, 1, 1), stages=2)
    for write in (helm_values, serve_file):
        with pytest.raises(ConfigError, match="pipeline parallelism"):
            write(staged)
    with pytest.raises(ConfigError, match="colocated"):
        helm_values(Plan((PoolPlan(Role.MIXED, WorkerShape(H100, 1), 1),)))
