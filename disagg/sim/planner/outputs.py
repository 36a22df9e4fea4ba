"""A plan as files: for `disagg simulate`, for `disagg serve --config` and as values of the Helm chart."""

from __future__ import annotations

from typing import Any

import yaml

from disagg.errors import ConfigError
from disagg.sim.planner.space import Plan, PoolPlan, Space
from disagg.types import Role

_HEAD = "# Written by `disagg plan`: {plan}\n"
# How NVIDIA's GPU feature discovery labels nodes. Without it a pool might run on another pool's kind.
_PRODUCTS = {
    "a100-80gb": "NVIDIA-A100-SXM4-80GB",
    "h100-80gb": "NVIDIA-H100-80GB-HBM3",
    "h200-141gb": "NVIDIA-H200",
    "b200-180gb": "NVIDIA-B200",
    "l4-24gb": "NVIDIA-L4",
    "l40s-48gb": "NVIDIA-L40S",
}
_AMD = {"mi300x-192gb"}


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
    hardware = pool.shape.hardware
    gpu: dict[str, Any] = {"enabled": True}
    if hardware in _PRODUCTS:
        gpu["product"] = _PRODUCTS[hardware]
    elif hardware in _AMD:
        gpu["resourceName"] = "amd.com/gpu"
    return {
        "replicas": pool.replicas * nodes,
        "tensorParallelSize": pool.shape.tensor_parallel,
        "gpu": gpu,
    }


def _refuse_pipelines(plan: Plan) -> None:
    if any(pool.shape.pipeline_parallel > 1 for pool in plan.pools):
        raise ConfigError(
            "pp: pipeline parallelism can be simulated, but not served; plan with --pp 1", param="pp"
        )


def _text(plan: Plan, data: dict[str, Any]) -> str:
    return _HEAD.format(plan=plan) + yaml.safe_dump(data, sort_keys=False)
