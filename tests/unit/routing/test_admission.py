"""Admission over a router whose workers take known times: 1 ms a prompt token, 10 ms and more a step."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from routing_fakes import DECODE, PREFILL, report, request

from disagg.config import AdmissionConfig, RouterConfig
from disagg.errors import DeadlineExceededError, NoCapacityError, OverloadedError
from disagg.routing.admission import HIT_MEMORY_S, MAX_HOLD_S, Admission, Reason
from disagg.routing.router import Router
from disagg.routing.types import BlockEvents, Placement, StepSample

_TOKEN_S, _STEP_S, _SEQUENCE_S = 1e-3, 0.01, 1e-3


def _samples() -> list[StepSample]:
    """Steps of both kinds, enough for the fits to count as measured."""
    steps = []
    for number in range(1, 65):
        tokens = 8 * number
        attended = tokens * tokens // 2
        steps.append(StepSample(0.002 + _TOKEN_S * tokens, num_tokens=tokens, attended=attended))
        batch = 1 + number % 16
        steps.append(StepSample(_STEP_S + _SEQUENCE_S * batch, num_decodes=batch, context=16 * (number % 7)))
    return steps


def admission(
    *, fitted: bool = True, prefill: int = 1, decode: int = 1, budget: int = 32, **config: Any
) -> Admission:
    """budget: prompt tokens a step; few, so that two steps are less than any backlog_s here."""
    made = Router(RouterConfig(policy="prefix_aware"), random.Random(7))
    for role, count in ((PREFILL, prefill), (DECODE, decode)):
        for index in range(count):
            name = f"{role.value}-{index}"
            made.worker_report(report(name, role, max_num_batched_tokens=budget), 0.0)
            if fitted:
                for _ in range(3):
                    steps = report(name, role, steps=_samples(), max_num_batched_tokens=budget)
                    made.worker_report(steps, 0.0)
    return Admission(AdmissionConfig(**config), made)


def flood(gate: Admission, now: float = 0.0, *, count: int = 1000, name: str = "r", **fields: Any) -> int:
    """Ask until refused; return how many got in, placed or queued."""
    for number in range(count):
        try:
            gate.ask(request(f"{name}{number}", **fields), now)
        except OverloadedError:
            return number
    return count


def serve(gate: Admission, request_id: str, now: float, num_tokens: int = 32) -> None:
    gate.prefilled(request_id, now)
    gate.finished(request_id, now, num_tokens)


def test_an_idle_cluster_refuses_nobody() -> None:
    """Not even those whose objectives it can't meet: an objective is no reason to serve nobody."""
    for number, objectives in enumerate(
        ({}, {"slo_ttft_s": 1e-6}, {"slo_tpot_s": 1e-6}, {"timeout_s": 1e-3})
    ):
        gate = admission()
        assert isinstance(gate.ask(request(f"r{number}", 512, **objectives), 0.0), Placement)


def test_guesses_refuse_nobody() -> None:
    gate = admission(fitted=False)
    assert flood(gate, slo_ttft_s=0.3, count=500) == 500
    assert len(gate.queue) == 0


def test_switched_off_it_refuses_nobody() -> None:
    gate = admission(enabled=False)
    assert flood(gate, slo_ttft_s=0.3, count=500) == 500


def test_refuses_whose_first_token_would_be_late_and_says_when_to_return() -> None:
    gate = admission(backlog_s=60.0)
    taken = flood(gate, num_tokens=100, slo_ttft_s=1.0)
    assert 5 <= taken <= 10, "each takes 0.1 s, the last one must start within 0.9 s"
    with pytest.raises(OverloadedError) as refusal:
        gate.ask(request("again", 100, slo_ttft_s=1.0), 0.0)
    assert gate.refused == {Reason.TTFT: 2}
    wait = refusal.value.retry_after
    assert 0.01 < wait < 0.5
    for number in range(taken):
        serve(gate, f"r{number}", 0.1 * number)
    assert isinstance(gate.ask(request("again", 100, slo_ttft_s=1.0), 1.0), Placement)


def test_late_answers_under_load_put_no_objective_out_of_reach() -> None:
    """What requests took longer than predicted is learned as a constant, but no idle worker takes so long."""
    gate = admission(backlog_s=60.0)
    for number in range(40):
        gate.ask(request(f"late{number}", 100 + number), 0.0)
        gate.prefilled(f"late{number}", 3.0, 3.0 + 0.001 * number)
        gate.finished(f"late{number}", 60.0, 30, 57.0)
    asked = request("probe", 100, slo_ttft_s=0.8, slo_tpot_s=0.2)
    _, prediction = gate.router.consider(asked)
    assert prediction.service_s > 0.8 and prediction.idle_tpot > 0.2, "else this tests nothing"
    assert prediction.least_ttft < 0.2 and prediction.least_tpot < 0.1
    assert flood(gate, num_tokens=100, slo_ttft_s=0.8) <= 8
    assert gate.refused[Reason.TTFT] > 0


def test_what_can_never_be_met_waits_no_longer_than_anything_else_may() -> None:
    gate = admission(backlog_s=60.0, max_wait_s=2.0)
    taken = flood(gate, num_tokens=100, slo_ttft_s=1e-3)
    assert 10 < taken < 30, "each takes 0.1 s"
    assert set(gate.refused) == {Reason.WAIT}


def test_a_refusal_holds_for_others_unless_their_prompts_may_be_cached() -> None:
    gate = admission(backlog_s=60.0)
    flood(gate, num_tokens=100, slo_ttft_s=1.0)

    def refused() -> OverloadedError:
        with pytest.raises(OverloadedError) as refusal:
            gate.ask(request("again", 160, slo_ttft_s=1.0), 0.0)
        return refusal.value

    assert 0 < refused().hold_s <= min(MAX_HOLD_S, refused().retry_after)
    stored = BlockEvents(1, stored=(7,), snapshot=True)
    gate.router.worker_report(report("prefill-0", PREFILL, blocks=stored), 0.0)
    with pytest.raises(OverloadedError):
        gate.ask(request("follow-up", 160, slo_ttft_s=1.0, block_hashes=(7, 8)), 0.0)
    assert refused().hold_s == 0
    with pytest.raises(OverloadedError) as refusal:
        gate.ask(request("later", 160, slo_ttft_s=0.2), HIT_MEMORY_S)
    assert refusal.value.hold_s > 0


def test_a_looser_objective_gets_in_where_a_tight_one_does_not() -> None:
    gate = admission()
    flood(gate, num_tokens=100, slo_ttft_s=1.0)
    assert gate.ask(request("loose", 100, slo_ttft_s=10.0), 0.0) is None
    assert len(gate.queue) > 0


@pytest.mark.parametrize("budget", [64, 256, 512])
def test_short_prompts_that_come_at_once_share_the_next_step(budget: int) -> None:
    """As many are with the worker when that begins as it has room for, behind a long one or not."""
    gate = admission(backlog_s=0.0, budget=budget)
    gate.ask(request("long", 2048), 0.0)
    outcomes = [gate.ask(request(f"short{number}", 64), 0.0) for number in range(20)]
    placed = sum(isinstance(outcome, Placement) for outcome in outcomes)
    room = budget // 64
    assert room <= placed <= 2 * room
    assert outcomes[placed:] == [None] * (20 - placed)


def test_without_objectives_only_a_long_wait_is_refused() -> None:
    gate = admission(max_wait_s=5.0)
    taken = flood(gate, num_tokens=100)
    assert gate.refused == {Reason.WAIT: 1}
    assert 30 <= taken <= 70, "5 s of work, each is a tenth and the answers' share"
    gate = admission(max_wait_s=5.0, tier_max_wait_s={"flex": 1.0})
    assert flood(gate, num_tokens=100, service_tier="flex") < taken / 2


def test_what_nobody_asked_for_is_no_reason_to_refuse() -> None:
    """A burst of unlike prompts that takes minutes, where waiting so long is allowed."""
    gate = admission(backlog_s=0.5, max_wait_s=600.0)
    sizes = random.Random(3)
    for number in range(400):
        gate.ask(request(f"r{number}", sizes.choice((16, 100, 900)), timeout_s=600.0), 0.01 * number)
    assert not gate.refused


def test_the_queue_is_bounded() -> None:
    gate = admission(max_queue=20, max_wait_s=1e6)
    flood(gate, num_tokens=100)
    assert len(gate.queue) <= 20
    assert gate.refused == {Reason.QUEUE_FULL: 1}


def test_running_streams_keep_their_pace() -> None:
    """A newcomer that would slow streams below their objective is refused though it asks for nothing."""
    gate = admission()
    for number in range(10):
        gate.ask(request(f"s{number}", 16, slo_tpot_s=0.0209), 0.0)
        gate.prefilled(f"s{number}", 0.0)
    with pytest.raises(OverloadedError):
        gate.ask(request("late", 16, slo_tpot_s=0.0209), 0.0)
    assert gate.refused == {Reason.TPOT: 1}
    with pytest.raises(OverloadedError):
        gate.ask(request("careless", 16), 0.0)
    assert gate.refused[Reason.STREAMS] == 1
    for number in range(10):
        gate.finished(f"s{number}", 1.0, 32)
    assert isinstance(gate.ask(request("careless", 16), 1.0), Placement)


def test_decode_load_is_that_of_the_time_when_prefill_ends() -> None:
    """The same batch on the decode worker refuses a short prompt and takes one whose prefill lasts."""
    gate = admission(backlog_s=60.0)
    gate.router.view.expected_tokens = 20.0
    for number in range(10):
        gate.ask(request(f"s{number}", 16, slo_tpot_s=0.03), 0.0)
        gate.prefilled(f"s{number}", 0.0)
    with pytest.raises(OverloadedError):
        gate.ask(request("short", 16, max_new_tokens=1000, slo_tpot_s=0.0205), 0.0)
    assert gate.ask(request("long", 400, max_new_tokens=1000, slo_tpot_s=0.0205), 0.0)


def test_the_resumed_are_never_refused_and_never_wait() -> None:
    gate = admission(max_queue=1)
    flood(gate, num_tokens=400, slo_ttft_s=1.0)
    flood(gate, num_tokens=400, name="queued")
    for number in range(50):
        placed = gate.ask(request(f"resumed{number}", 400, slo_ttft_s=0.5, resumed=True), 0.0)
        assert isinstance(placed, Placement)


def test_priority_comes_first_and_deadlines_within_it() -> None:
    gate = admission(backlog_s=0.1)
    for number in range(4):
        gate.ask(request(f"first{number}", 100), 0.0)
    waiting = [item.request.request_id for item in gate.queue]
    assert gate.ask(request("idler", 100, priority=1, slo_ttft_s=2.0), 0.0) is None
    assert gate.ask(request("late", 100, slo_ttft_s=8.0), 0.0) is None
    assert gate.ask(request("early", 100, slo_ttft_s=3.0), 0.0) is None
    for number in range(4 - len(waiting)):
        serve(gate, f"first{number}", 0.5)
    order: list[str] = []
    now = 0.5
    while len(gate.queue):
        for released in gate.release(now):
            assert isinstance(released.outcome, Placement)
            order.append(released.request.request_id)
        now += 0.1
        serve(gate, order[-1], now)
    assert order == ["early", "late", *waiting, "idler"]


def test_the_expired_never_start() -> None:
    gate = admission(backlog_s=0.1)
    flood(gate, num_tokens=400, count=3)
    assert gate.ask(request("brief", 400, timeout_s=5.0), 0.0) is None
    released = {item.request.request_id: item.outcome for item in gate.release(6.0)}
    assert isinstance(released["brief"], DeadlineExceededError)
    assert gate.refused[Reason.DEADLINE] == 1
    assert "brief" not in gate.queue


def test_a_deadline_that_would_pass_in_the_queue_is_refused_at_once() -> None:
    gate = admission(backlog_s=0.1)
    flood(gate, num_tokens=400, count=10)
    with pytest.raises(OverloadedError):
        gate.ask(request("brief", 400, timeout_s=0.5), 0.0)


def test_who_left_does_not_come_back() -> None:
    gate = admission(backlog_s=0.1)
    flood(gate, num_tokens=400, count=5)
    waiting = [item.request.request_id for item in gate.queue]
    assert len(waiting) >= 2
    gate.finished(waiting[0], 0.1)
    assert waiting[0] not in gate.queue
    gate.frontend_left("front")
    assert len(gate.queue) == 0
    assert gate.router.view.num_charges == 0
    assert not gate._promises
    assert not any(gate._streams.values())


def test_with_no_worker_left_the_waiting_are_told() -> None:
    gate = admission(backlog_s=0.1)
    flood(gate, num_tokens=400, count=5)
    count = len(gate.queue)
    for worker_id in list(gate.router.view.workers):
        gate.router.worker_left(worker_id, "one")
    outcomes = [released.outcome for released in gate.release(0.1)]
    assert [type(outcome) for outcome in outcomes] == [NoCapacityError] * count


def test_the_second_worker_is_found_whatever_the_policy() -> None:
    """A policy that stays with a busy worker must not have requests refused that another could serve."""
    gate = admission(prefill=2, backlog_s=60.0)
    busy = gate.ask(request("busy", 2000), 0.0)
    assert isinstance(busy, Placement)
    gate.router.policy = _Stubborn(gate.router, busy)  # type: ignore[assignment]
    placed = gate.ask(request("other", 2000, slo_ttft_s=2.5), 0.0)
    assert isinstance(placed, Placement)
    assert placed.prefill_worker != busy.prefill_worker


class _Stubborn:
    name = "stubborn"

    def __init__(self, router: Router, placement: Placement) -> None:
        self._own, self._worker = router.policy, placement.prefill_worker

    def choose(self, wanted: Any, view: Any, index: Any, rng: Any) -> Any:
        slot = view.slot(self._worker)
        return self._own.choose(wanted, view, index, rng)._replace(prefill=slot)


def _run(rates: dict[str, float], seconds: float, seed: int, **config: Any) -> dict[str, tuple[float, float]]:
    """One prefill worker that takes 0.1 s a request, first come first served.

    Return of each tenant its part of what was served, and how much of what it asked for that was.
    """
    gate, rng, now = admission(backlog_s=0.2, **config), random.Random(seed), 0.0
    arrivals = []
    for tenant, rate in rates.items():
        at = 0.0
        while (at := at + rng.expovariate(rate)) < seconds:
            arrivals.append((at, tenant))
    arrivals.sort()
    served = dict.fromkeys(rates, 0)
    busy: list[tuple[str, str]] = []
    done_at = 0.0

    def settle(until: float) -> None:
        nonlocal done_at
        while busy and done_at <= until:
            request_id, tenant = busy.pop(0)
            serve(gate, request_id, done_at, 2)
            served[tenant] += 1
            for released in gate.release(done_at):
                assert isinstance(released.outcome, Placement)
                busy.append((released.request.request_id, released.request.tenant))
            done_at += 0.1

    for number, (at, tenant) in enumerate(arrivals):
        settle(at)
        now = at
        wanted = request(f"r{number}", 98, max_new_tokens=2, tenant=tenant, slo_ttft_s=2.0)
        try:
            placed = gate.ask(wanted, now)
        except OverloadedError:
            continue
        if placed is not None:
            if not busy:
                done_at = now + 0.1
            busy.append((wanted.request_id, tenant))
    total = sum(served.values())
    assert total > 0.85 * 10 * seconds
    asked = Counter(tenant for _, tenant in arrivals)
    return {tenant: (served[tenant] / total, served[tenant] / asked[tenant]) for tenant in rates}


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_leaves_others_their_share(seed: int) -> None:
    """Tenant a sends ten times the capacity, b twice it: both get half. A third of it is served whole."""
    shares = _run({"a": 100.0, "b": 20.0}, 40.0, seed)
    assert shares["a"][0] == pytest.approx(0.5, abs=0.08)
    shares = _run({"a": 100.0, "b": 3.0}, 40.0, seed)
    assert shares["b"][1] > 0.9


def test_weights_divide_the_cluster() -> None:
    shares = _run({"a": 60.0, "b": 60.0}, 40.0, 1, tenant_weights={"a": 3.0})
    assert shares["a"][0] == pytest.approx(0.75, abs=0.08)


def test_nothing_is_left_behind() -> None:
    gate = admission()
    for number in range(200):
        try:
            gate.ask(request(f"r{number}", 64, slo_ttft_s=1.0, slo_tpot_s=0.05), 0.01 * number)
        except OverloadedError:
            continue
        for released in gate.release(0.01 * number):
            assert isinstance(released.outcome, Placement)
        if number % 2:
            serve(gate, f"r{number}", 0.01 * number)
    for number in range(200):
        gate.finished(f"r{number}", 5.0)
        gate.release(5.0)
    assert not gate._promises
    assert not any(gate._streams.values())
    assert len(gate.queue) == gate.router.view.num_charges == 0
    gate.router.view.check_integrity()
