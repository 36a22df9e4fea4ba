"""The policy `slo`: when a decode worker prefills itself, whom it spares, and how decodes are spread."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from routing_fakes import DECODE, PREFILL, report, request, router

from disagg.routing.estimates import predict
from disagg.routing.router import Router
from disagg.routing.types import PlacementKind, StepSample
from disagg.types import Role, WorkerLoad

STEP_S, PER_SEQUENCE_S, PER_TOKEN_S = 0.010, 1e-4, 2e-4


def measured(factor: float = 1.0) -> list[StepSample]:
    """Steps of a worker that takes 0.2 ms a prompt token, and 10 ms a decode step."""
    prompts = [StepSample(factor * (0.004 + PER_TOKEN_S * n), n, n * n // 2) for n in (16, 128, 256, 512)]
    decodes = [
        StepSample(
            factor * (STEP_S + PER_SEQUENCE_S * batch + 1e-8 * batch * each), 0, 0, batch, batch * each
        )
        for batch in (1, 4, 16)
        for each in (50, 500)
    ]
    return [*prompts, *decodes] * 3


def cluster(prefill: int = 1, decode: int = 1, *, queued: int = 0) -> Router:
    """Measured workers; the first prefill worker has so many prompts of 500 tokens before it."""
    made = router("slo", prefill=prefill, decode=decode)
    for worker_id, state in list(made.view.workers.items()):
        told(made, worker_id, state.info.role, 0.0, steps=measured())
    for number in range(queued):
        charge(made, f"queued-{number}", 500)
    return made


def told(made: Router, worker_id: str, role: Role, now: float, **more: Any) -> None:
    """A report of a worker that nothing fills up."""
    made.worker_report(report(worker_id, role, kv_blocks_total=10**6, max_num_seqs=1024, **more), now)


def charge(made: Router, request_id: str, num_tokens: int) -> None:
    """Place where no policy is asked."""
    prefill, decode = made.view.slot("prefill-0"), made.view.slot("decode-0")
    assert prefill is not None and decode is not None
    wanted = request(request_id, num_tokens)
    prediction = predict(wanted, made.view, prefill, decode, (0, 0))
    made.view.charge(wanted, prefill, decode, (0, 0), 0.1, prediction)


def test_a_prompt_that_would_be_late_goes_to_streams_that_can_spare_the_time() -> None:
    made = cluster(queued=40)
    for number in range(4):
        made.place(request(f"stream-{number}", slo_tpot_s=0.05), 0.1)
        made.prefilled(f"stream-{number}")
    late = request("late", 600, slo_ttft_s=1.0, slo_tpot_s=0.05)
    assert made.place(late, 0.2).kind is PlacementKind.LOCAL
    unhurried = request("unhurried", 600, slo_ttft_s=30.0, slo_tpot_s=0.05)
    assert made.place(unhurried, 0.2).kind is PlacementKind.DISAGGREGATED


def test_nobody_is_made_to_miss_for_a_prompt_that_would_be_late() -> None:
    made = cluster(queued=40)
    made.place(request("stream", slo_tpot_s=0.0115), 0.1)
    made.prefilled("stream")
    late = request("late", 600, slo_ttft_s=1.0, slo_tpot_s=0.05)
    assert made.place(late, 0.2).kind is PlacementKind.DISAGGREGATED
    made.finished("stream")
    made.finished("late")
    assert made.place(late, 0.3).kind is PlacementKind.LOCAL


def test_streams_spare_only_so_much_of_their_time_and_have_it_back_later() -> None:
    made = cluster(queued=120)
    made.place(request("stream", slo_tpot_s=0.03), 0.1)
    made.prefilled("stream")

    def burst(name: str, now: float) -> int:
        local = 0
        for number in range(60):
            late = request(f"{name}-{number}", 512, slo_ttft_s=2.0, slo_tpot_s=0.03)
            local += made.place(late, now).kind is PlacementKind.LOCAL
            made.finished(late.request_id, now)
        return local

    assert 5 <= burst("first", 0.2) <= 40
    told(made, "decode-0", DECODE, 30.0, load=WorkerLoad(1))
    assert 5 <= burst("later", 30.0) <= 40


def test_a_hopeless_prompt_is_not_put_on_streams() -> None:
    made = cluster(queued=40)
    made.place(request("stream", slo_tpot_s=0.05), 0.1)
    hopeless = request("hopeless", 4000, slo_ttft_s=0.2, slo_tpot_s=0.05)
    assert made.place(hopeless, 0.2).kind is PlacementKind.DISAGGREGATED


def test_few_tokens_behind_a_long_hand_off_stay_where_they_are_prefilled() -> None:
    made = cluster()
    brief = request("brief", 2000, max_new_tokens=4, slo_ttft_s=5.0, slo_tpot_s=0.03)
    assert made.place(brief, 0.2).kind is PlacementKind.LOCAL
    long = request("long", 2000, max_new_tokens=400, slo_ttft_s=5.0, slo_tpot_s=0.03)
    assert made.place(long, 0.2).kind is PlacementKind.DISAGGREGATED


def test_equal_decode_workers_have_equal_prices_whatever_each_was_measured_at() -> None:
    made = cluster(prefill=2, decode=4)
    for beat in range(12):
        for number in range(4):
            # Of one kind: what each says of its own batches must not tell them apart.
            batch = 1 if number % 2 else 16
            took = STEP_S + PER_SEQUENCE_S * batch + 1e-8 * 500 * batch
            steps = [StepSample(took, 0, 0, batch, 500 * batch)] * 12
            told(made, f"decode-{number}", DECODE, 0.2 + beat, steps=steps)
    slots = [made.view.slot(f"decode-{number}") for number in range(4)]
    costs = [made.view.costs(slot).step_s for slot in slots if slot is not None]
    assert max(costs) == pytest.approx(min(costs), rel=0.005)


def test_a_slower_worker_gets_less() -> None:
    made = cluster(prefill=2, decode=2)
    for _ in range(20):
        told(made, "prefill-0", PREFILL, 0.2, steps=measured(3.0))
        told(made, "prefill-1", PREFILL, 0.2, steps=measured())
    placed = Counter(made.place(request(f"r{i}", 400), 0.3).prefill_worker for i in range(40))
    assert placed["prefill-0"] < placed["prefill-1"] / 2


def test_who_waits_for_a_long_prefill_does_not_fill_the_batch_yet() -> None:
    made = cluster(queued=200)
    slot = made.view.slot("decode-0")
    assert slot is not None
    made.view.expected_tokens = 100
    before = made.view.costs(slot).step_s
    for number in range(60):
        charge(made, f"r{number}", 500)
    assert made.view.costs(slot).step_s < before + 20 * PER_SEQUENCE_S
    for number in range(60):
        made.prefilled(f"r{number}")
    assert made.view.costs(slot).step_s > STEP_S + 60 * PER_SEQUENCE_S
