"""Brake: a fresh refusal stands for whoever is like the refused and asks for no less, and for nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from routing_fakes import request

from disagg.routing.brake import Brake

ASKED: dict[str, Any] = {
    "num_tokens": 100,
    "slo_ttft_s": 1.0,
    "slo_tpot_s": 0.1,
    "tenant": "a",
    "priority": 0,
}


@pytest.fixture
def brake() -> Brake:
    made = Brake()
    made.refused(request("r", **ASKED), "no", 2.0, 0.1, 10.0)
    return made


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_tokens": 200},
        {"slo_ttft_s": 0.5},
        {"slo_tpot_s": 0.01},
        {"priority": 3},
        {"slo_ttft_s": 1.01},
    ],
)
def test_no_less_is_refused_with_what_is_left_of_the_wait(brake: Brake, more: dict[str, Any]) -> None:
    refusal = brake.check(request("other", **{**ASKED, **more}), 10.05)
    assert refusal == ("no", pytest.approx(1.95))
    assert brake.check(request("other", **{**ASKED, **more}), 10.2) is None


@pytest.mark.parametrize(
    "more",
    [
        {"num_tokens": 50},
        {"num_tokens": 500},
        {"slo_ttft_s": 2.0},
        {"slo_ttft_s": 0.4},
        {"slo_ttft_s": None},
        {"slo_tpot_s": None},
        {"priority": -1},
        {"tenant": "b"},
        {"service_tier": "flex"},
        {"resumed": True},
    ],
)
def test_whoever_is_different_may_ask(brake: Brake, more: dict[str, Any]) -> None:
    assert brake.check(request("other", **{**ASKED, **more}), 10.05) is None


def test_memory_is_bounded() -> None:
    brake = Brake()
    for number in range(10_000):
        brake.refused(request(f"r{number}", tenant=str(number)), "no", 1.0, 1.0, 0.0)
    assert len(brake._refused) <= 32
    brake.refused(request("r", tenant="a"), "no", 1.0, 0.0, 0.0)
    assert brake.check(request("s", tenant="a"), 0.0) is None
