"""What `disagg doctor` says of GPUs, on machines with and without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from disagg.cli import doctor


@pytest.fixture
def machine(monkeypatch):
    def make(*capabilities: tuple[int, int]) -> list[doctor.Finding]:
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(cuda, "mem_get_info", lambda index: (70 * 2**30, 80 * 2**30))
        monkeypatch.setattr(
            cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(
                name="NVIDIA Test", major=capabilities[index][0], minor=capabilities[index][1]
            ),
        )
        return [finding for finding in doctor.inspect_machine() if finding.what.startswith("GPU")]

    return make


def test_without_a_gpu_it_says_that_workers_compute_on_the_cpu(machine):
    (finding,) = machine()
    assert finding.ok is None and "workers compute on the CPU" in finding.detail


def test_each_gpu_has_a_line_with_its_memory_and_what_it_is_too_old_for(machine):
    new, old = machine((9, 0), (7, 5))
    assert (new.what, new.ok, old.what, old.ok) == ("GPU 0", True, "GPU 1", None)
    assert "NVIDIA Test" in new.detail and "9.0" in new.detail and "70 of 80 GiB" in new.detail
    assert "dtype float16" in old.detail


def test_a_gpu_without_triton_is_no_good_news(machine, monkeypatch):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    (finding,) = machine((9, 0))
    assert finding.ok is None and "plain torch" in finding.detail
