"""How many GPUs Ray is asked for, by configuration and by how many there are."""

from __future__ import annotations

import pytest

from disagg.cluster.gpus import gpus_per_worker
from disagg.config import parse_config
from disagg.types import Role


def asked(gpus: float, role: Role = Role.PREFILL, **settings) -> float:
    return gpus_per_worker(parse_config(settings), role, gpus)


def test_a_pool_s_own_number_counts_first():
    assert asked(0, prefill={"num_gpus": 0.25}) == 0.25
    assert asked(8, prefill={"num_gpus": 2}, engine={"device": "cpu"}) == 2


def test_a_named_device():
    assert asked(8, engine={"device": "cpu"}) == 0
    # Nodes with GPUs may join a cluster later: Ray waits for one.
    assert asked(0, engine={"device": "cuda"}) == 1


@pytest.mark.parametrize("gpus, expected", [(0, 0), (1, 1 / 2), (2, 1), (8, 1)])
def test_auto_gives_each_worker_a_gpu_or_a_share(gpus, expected):
    assert asked(gpus) == expected


@pytest.mark.parametrize("workers, gpus", [(6, 4), (5, 4), (9, 4), (3, 2), (7, 1)])
def test_shares_all_find_a_place(workers, gpus):
    share = asked(gpus, prefill={"replicas": workers - 1}, decode={"replicas": 1})
    assert int(1 / share + 1e-9) * gpus >= workers


def test_auto_leaves_gpus_alone_that_it_could_not_use():
    assert asked(8, model={"quantization": "int8"}) == 0
    assert asked(8, engine={"kernels": "native"}) == 0
    assert asked(8, prefill={"resources": {"rack_1": 1}}) == 0


def test_workers_that_the_autoscaler_may_add_count():
    assert asked(4, autoscaler={"enabled": True, "max_workers": 8}) == 1 / 2
    assert asked(4, autoscaler={"enabled": True, "max_workers": 4}) == 1
