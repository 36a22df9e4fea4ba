"""Which device is used: what is asked for, and what there is."""

from __future__ import annotations

import pytest
import torch

from disagg.errors import ConfigError
from disagg.model.device import check_rank_devices, describe_device, rank_device, resolve_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_takes_a_gpu_unless_only_cpus_compute_what_is_asked_for(two_gpus):
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_device("auto", quantization="int8") == torch.device("cpu")
    assert resolve_device("auto", kernels="native") == torch.device("cpu")
    assert resolve_device("auto", kernels="triton") == torch.device("cuda", 1)


def test_a_named_device_is_that_one(two_gpus):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


@pytest.mark.parametrize("wanted", ["cuda:2", "cuda:", "cuda:-1", "gpu", "", "mps", "CUDA"])
def test_what_is_not_here_or_no_device_is_refused(two_gpus, wanted):
    with pytest.raises(ConfigError) as caught:
        resolve_device(wanted)
    assert caught.value.param == "device"


def test_without_a_gpu(no_gpu):
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="cuda can't be used"):
        resolve_device("cuda")
    assert describe_device(torch.device("cpu")) == "cpu"


def test_ranks_need_a_gpu_each(two_gpus):
    check_rank_devices(torch.device("cpu"), 8)
    check_rank_devices(torch.device("cuda", 0), 2)
    assert rank_device(torch.device("cuda", 0), 1) == torch.device("cuda", 1)
    assert rank_device(torch.device("cpu"), 1) == torch.device("cpu")
    for first, size in ((0, 3), (1, 2)):
        with pytest.raises(ConfigError, match="need a GPU each; 2 are visible") as caught:
            check_rank_devices(torch.device("cuda", first), size)
        assert caught.value.param == "tensor_parallel_size"
