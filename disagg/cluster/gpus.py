"""How many of Ray's GPUs a worker asks for: Ray shows an actor only those that it asked for."""

from __future__ import annotations

import math

from disagg.config import ClusterConfig
from disagg.types import Role


def gpus_per_worker(config: ClusterConfig, role: Role, gpus_in_cluster: float) -> float:
    """Return Ray's num_gpus for one worker of a pool.

    A pool's own num_gpus counts first. device cuda: one per rank. device auto: the same where there are
    enough for every worker, else all share what there is, or compute on CPUs where there is none; and nothing
    in pools that are kept to nodes by custom resources, which may be others than those with the GPUs.
    """
    pool, engine = config.pool(role), config.engine
    if pool.num_gpus > 0:
        return pool.num_gpus
    if engine.device == "cpu":
        return 0.0
    ranks = pool.tensor_parallel_size
    if engine.device == "cuda":
        return float(ranks)
    cpu_only = config.model.quantization is not None or engine.kernels == "native"
    if cpu_only or pool.resources or gpus_in_cluster < 1:
        return 0.0
    pools = [config.pool(one) for one in Role]
    wanted = sum(one.replicas * one.tensor_parallel_size for one in pools)
    if config.autoscaler.enabled:
        wanted = max(wanted, config.autoscaler.max_workers * max(one.tensor_parallel_size for one in pools))
    if wanted <= gpus_in_cluster:
        return float(ranks)
    if ranks > 1:
        return 0.0
    # One over a whole number: of two thirds of a GPU each, only one fits on any.
    return 1 / math.ceil(wanted / int(gpus_in_cluster))
