"""A plan as files: for `disagg simulate`, for `disagg serve --config` and as values of the Helm chart."""

from __future__ import annotations

from typing import Any

import yaml

from disagg.errors import ConfigError
from disagg.sim.planner.space import Plan, PoolPlan, Space
from disagg.types import Role

_HEAD = "# Written by `disagg plan`: {plan}\n"


def cluster_file(space: Space, plan: Plan) -> str:
    """Return the cluster file of `disagg simulate`; of one node where the plan repeats a node."""
    spec = space.spec(plan.pools)
    data = spec.model_dump(mode="json", exclude_defaults=True)
    return _text(plan, data)


def serve_config(plan: Plan) -> str:
    """Return a file for `disagg serve --config`. Raises ConfigError for a plan that can't be served."""
    _refuse_pipelines(plan)
    data: dict[str, Any] = {role.value: {"replicas": 0} for role in (Role.PREFILL, Role.DECODE)}
    for pool in plan.pools:
        degree = pool.shape.tensor_parallel
        data[pool.role.value] = {
            "replicas": pool.replicas * plan.nodes,
            "tensor_parallel_size": degree,
            "num_gpus": degree,
        }
    return _text(plan, data)


def helm_values(plan: Plan) -> str:
    """Return values for the Helm chart. Raises ConfigError for a plan that it can't express."""
    _refuse_pipelines(plan)
    if plan.colocated:
        raise ConfigError(
            "values: the chart has pools for prefill and for decode, and this plan is colocated",
            param="values",
        )
    return _text(plan, {pool.role.value: _chart_pool(pool, plan.nodes) for pool in plan.pools})


def _chart_pool(pool: PoolPlan, nodes: int) -> dict[str, Any]:
    return {
        "replicas": pool.replicas * nodes,
        "tensorParallelSize": pool.shape.tensor_parallel,
        "gpu": {"enabled": True},
    }


def _refuse_pipelines(plan: Plan) -> None:
    if any(pool.shape.pipeline_parallel > 1 for pool in plan.pools):
        raise ConfigError(
            "pp: pipeline parallelism can be simulated, but not served; plan with --pp 1", param="pp"
        )


def _text(plan: Plan, data: dict[str, Any]) -> str:
    return _HEAD.format(plan=plan) + yaml.safe_dump(data, sort_keys=False)
