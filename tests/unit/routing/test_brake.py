"""Brake: a fresh refusal stands for whoever is like the refused and asks for no less, and for nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from disagg.errors import OverloadedError
from disagg.routing.brake import Brake, Demand

ASKED: dict[str, Any] = {"size": 100, "in_tokens": True, "ttft_s": 1.0, "tpot_s": 0.1, "tenant": "a"}
INF = float("inf")


@pytest.fixture
def brake() -> Brake:
    made = Brake()
    made.refused(Demand(**ASKED), OverloadedError("no", retry_after=2.0, hold_s=0.1), 10.0)
    return made


@pytest.mark.parametrize("more", [{}, {"size": 200}, {"ttft_s": 0.5}, {"tpot_s": 0.01}, {"priority": 3}])
def test_no_less_is_refused_with_what_is_left_of_the_wait(brake: Brake, more: dict[str, Any]) -> None:
    with pytest.raises(OverloadedError) as refusal:
        brake.check(Demand(**{**ASKED, **more}), 10.05)
    assert refusal.value.retry_after == pytest.approx(1.95)
    assert refusal.value.message == "no"
    brake.check(Demand(**{**ASKED, **more}), 10.2)


@pytest.mark.parametrize(
    "more",
    [
        {"size": 50},
        {"size": 500},
        {"in_tokens": False},
        {"ttft_s": 2.0},
        {"ttft_s": 0.4},
        {"ttft_s": INF},
        {"tpot_s": INF},
        {"priority": -1},
        {"tenant": "b"},
        {"tier": "flex"},
    ],
)
def test_whoever_is_different_may_ask(brake: Brake, more: dict[str, Any]) -> None:
    brake.check(Demand(**{**ASKED, **more}), 10.05)


def test_without_objectives_the_rest_decides() -> None:
    brake = Brake()
    brake.refused(Demand(100, True), OverloadedError("no", retry_after=2.0, hold_s=0.1), 0.0)
    with pytest.raises(OverloadedError):
        brake.check(Demand(100, True), 0.05)
    brake.check(Demand(99, True), 0.05)


def test_memory_is_bounded_and_one_refusal_does_not_hide_another() -> None:
    brake = Brake()
    for number in range(10_000):
        error = OverloadedError("no", retry_after=1.0, hold_s=1.0)
        brake.refused(Demand(1, True, tenant=str(number)), error, 0.0)
    assert len(brake._refused) <= 32
    brake.refused(Demand(1, True, tenant="brief"), OverloadedError("no", retry_after=1.0, hold_s=0.1), 0.0)
    brake.check(Demand(1, True, tenant="brief"), 0.5)
    with pytest.raises(OverloadedError):
        brake.check(Demand(1, True, tenant="9999"), 0.5)


def test_a_refusal_that_holds_for_nobody_else_is_not_kept() -> None:
    brake = Brake()
    brake.refused(Demand(1, True), OverloadedError("no", retry_after=1.0), 0.0)
    brake.check(Demand(1, True), 0.0)
