"""Shares of tenants over time, and what the router learns from its own promises."""

from __future__ import annotations

import random

import pytest

from disagg.routing.caution import Caution
from disagg.routing.shares import MAX_TENANTS, MEMORY_S, Shares

KEPT = 0.95


def test_alone_nobody_has_too_much() -> None:
    shares = Shares()
    shares.asked("a", 0.0)
    shares.served("a", 100.0, 0.0)
    assert shares.lead_s("a", 0.0) == 0.0


def test_the_lead_is_over_the_fair_share_and_fades() -> None:
    shares = Shares(lambda tenant: 3.0 if tenant == "a" else 1.0)
    for tenant, work_s in (("a", 9.0), ("b", 7.0)):
        shares.asked(tenant, 0.0)
        shares.served(tenant, work_s, 0.0)
    assert shares.lead_s("a", 0.0) == 0.0, "its share is 12 of 16 s"
    assert shares.lead_s("b", 0.0) == pytest.approx(3.0)
    assert shares.lead_s("b", MEMORY_S) == pytest.approx(3.0 / 2.718, rel=0.01)


def test_whoever_asks_no_more_has_no_claim() -> None:
    shares = Shares()
    shares.asked("b", 0.0)
    shares.asked("a", 0.0)
    shares.served("a", 5.0, 0.0)
    assert shares.lead_s("a", 1.0) > 0
    shares.asked("a", MEMORY_S + 1.0)
    assert shares.lead_s("a", MEMORY_S + 1.0) == 0.0


def test_memory_is_bounded_and_sums_stay_right() -> None:
    shares, rng = Shares(), random.Random(3)
    now = 0.0
    for number in range(20_000):
        now += rng.expovariate(50.0)
        tenant = f"t{rng.randrange(10_000)}"
        shares.asked(tenant, now)
        shares.served(tenant, rng.random(), now)
        if number % 1000 == 0:
            assert len(shares._asked) <= MAX_TENANTS
            assert shares._total == pytest.approx(sum(shares._used.values()))
            assert shares._weights == pytest.approx(len(shares._asked))


@pytest.mark.parametrize("scale", [0.9, 1.0, 1.5])
def test_caution_keeps_the_share_of_promises_that_it_should(scale: float) -> None:
    caution, rng, kept = Caution(KEPT), random.Random(1), 0
    for number in range(4000):
        now = number * 0.02
        actual = scale * rng.lognormvariate(0.0, 0.15)
        kept += number >= 2000 and actual <= caution.factor(now)
        caution.learn(1.0, actual, now)
    assert kept / 2000 == pytest.approx(KEPT, abs=0.05)


def test_caution_is_bounded_and_fades() -> None:
    caution = Caution(KEPT)
    for number in range(1000):
        caution.learn(0.01, 100.0, number * 0.001)
    assert 1.9 < caution.factor(1.0) <= 2.0
    assert caution.factor(200.0) == pytest.approx(1.0, abs=0.01)


def test_nothing_is_promised_to_be_shorter_than_predicted() -> None:
    caution = Caution(0.5)
    for number in range(1000):
        caution.learn(1.0, 0.9, number * 0.02)
    assert caution.factor(20.0) == 1.0
