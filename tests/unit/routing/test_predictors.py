"""Fits of step times: what they find, what they withstand; and what placements are predicted to take."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fakes import DECODE, PREFILL, report, request, router

from disagg.routing.fit import Fit
from disagg.routing.predictors import Level
from disagg.routing.router import Router
from disagg.routing.types import PlacementKind, StepSample
from disagg.types import WorkerLoad

TRUE = (0.004, 3e-4, 2e-8)


def seconds(tokens: float, attended: float) -> float:
    return TRUE[0] + TRUE[1] * tokens + TRUE[2] * attended


def feed(fit: Fit, count: int, rng: random.Random, *, noise: float = 0.05, outliers: float = 0.0) -> None:
    for _ in range(count):
        tokens, context = rng.choice([16, 64, 128, 512]), rng.randrange(3000)
        attended = tokens * (context + tokens / 2)
        took = seconds(tokens, attended) * rng.lognormvariate(0, noise)
        fit.add(tokens, attended, took * 10 if rng.random() < outliers else took)
    fit.solve()


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_a_fit_predicts_what_it_was_not_shown(outliers: float) -> None:
    fit = Fit((256.0, 1e5))
    feed(fit, 600, random.Random(3), outliers=outliers)
    for tokens, context in ((32, 500), (256, 0), (400, 2000)):
        attended = tokens * (context + tokens / 2)
        assert fit.predict(tokens, attended) == pytest.approx(seconds(tokens, attended), rel=0.1)


def test_a_machine_that_becomes_slower_is_followed_and_dull_traffic_does_not_bend_the_fit() -> None:
    fit = Fit((256.0, 1e5), forgetting=0.999)
    feed(fit, 400, random.Random(5))
    level = Level(fit)
    for number in range(150):
        level.learn(100, 5000, 3 * seconds(100, 5000), tell_kind=number % 4 == 0)
    fit.solve()

    def predicted(x1: float, x2: float) -> float:
        c0, c1, c2 = level.coefficients
        return c0 + c1 * x1 + c2 * x2

    assert predicted(100, 5000) == pytest.approx(3 * seconds(100, 5000), rel=0.1)
    assert predicted(512, 512 * 256) == pytest.approx(3 * seconds(512, 512 * 256), rel=0.3)


def test_a_fit_knows_nothing_before_there_were_some_samples() -> None:
    fit = Fit((256.0, 1e5))
    assert not fit.fitted
    feed(fit, 10, random.Random(7))
    assert fit.fitted


@pytest.mark.parametrize("true", [0.0, 1.0, 9.0])
def test_a_line_that_may_not_be_as_steep_as_its_samples_still_runs_through_them(true: float) -> None:
    """Held to a slope, with a constant that belongs to another, it would be wrong wherever samples are."""
    fit = Fit((1.0, 1.0), slopes=(0.5, 4.0))
    for number in range(200):
        x = 0.9 + 0.01 * (number % 20)
        fit.add(x, 0.0, 10 + true * (x - 1))
    constant, slope, _ = fit.solve()
    assert slope == pytest.approx(min(4.0, max(0.5, true)), rel=0.02)
    assert constant + slope * 1.0 == pytest.approx(10, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 10**7), st.floats(0, 1e3)), max_size=60),
)
def test_coefficients_are_never_negative_nor_absurd(samples: list[tuple[int, int, float]]) -> None:
    fit = Fit((256.0, 1e5))
    for tokens, attended, took in samples:
        fit.add(tokens, attended, took)
        assert all(0 <= value < 1e9 for value in fit.solve())


def profiled(**pools: int) -> Router:
    made = router("slo", **pools)
    steps = [StepSample(seconds(n, n * n / 2), n, n * n // 2) for n in (16, 64, 128, 256, 512)] * 3
    steps += [
        StepSample(0.01 + 1e-3 * batch + 1e-7 * context, num_decodes=batch, context=context)
        for batch in (1, 4, 16)
        for context in (100, 1000, 10_000)
    ] * 2
    for worker_id, state in list(made.view.workers.items()):
        made.worker_report(report(worker_id, state.info.role, steps=steps), 0.0)
    return made


def test_predictions_follow_measured_steps_and_their_error_is_told() -> None:
    made = profiled(prefill=1, decode=1)
    placement = made.place(request("r", 400, max_new_tokens=101), 10.0)
    assert placement.prediction is not None and placement.prediction.fitted
    assert placement.kind is PlacementKind.DISAGGREGATED or placement.prefill_worker == "decode-0"
    ttft, tpot = placement.prediction.ttft, placement.prediction.tpot
    assert ttft == pytest.approx(seconds(400, 80_000), rel=0.3)
    assert tpot == pytest.approx(0.011, rel=0.3)
    made.prefilled("r", ttft * 2)
    made.finished("r", 101, 100 * tpot)
    errors = dict(made.take_errors())
    assert errors == {"ttft": pytest.approx(-0.5), "tpot": pytest.approx(0.0, abs=1e-6)}
    assert made.take_errors() == []


def test_a_sequence_pays_for_its_own_context() -> None:
    made = profiled(prefill=1, decode=1)
    short, long = (made.consider(request("r", tokens, max_new_tokens=101))[1].tpot for tokens in (16, 4016))
    assert long - short == pytest.approx(4000 * 1e-7, rel=0.05)


def test_prompts_that_are_done_before_a_hand_over_do_not_count_against_it() -> None:
    """Queued on the decode worker, and computed there while the prefill worker has the newcomer."""
    quiet, busy = (profiled(prefill=1, decode=1) for _ in range(2))
    load = WorkerLoad(num_running=1, num_waiting=1, waiting_tokens=1500)
    busy.worker_report(report("decode-0", DECODE, load=load), 0.1)
    more = {}
    for tokens in (2000, 200):
        wanted = request("r", tokens, max_new_tokens=101)
        (_, alone), (choice, beside) = (made.consider(wanted) for made in (quiet, busy))
        assert choice.prefill != choice.decode
        more[tokens] = beside.tpot - beside.stall / 100 - alone.tpot
    # Two more streams in its batch either way; of the prompts what is left after the shorter one, 0.06 s.
    assert more[2000] == pytest.approx(2e-3, rel=0.3)
    assert more[200] > more[2000] + 2e-3


def test_what_was_not_measured_teaches_nothing() -> None:
    """As where a hand-over went to another worker: the first token was out before it was placed there."""
    made = profiled(prefill=1, decode=1)
    made.place(request("r", 400, max_new_tokens=101), 10.0)
    made.prefilled("r")
    made.finished("r", 101)
    assert made.take_errors() == []


def test_nothing_is_said_of_predictions_that_rest_on_no_measurement() -> None:
    made = router("slo", prefill=1, decode=1)
    made.place(request("r"), 0.0)
    made.prefilled("r", 1.0)
    made.finished("r", 10, 1.0)
    assert made.take_errors() == []


def test_a_short_prompt_is_prefilled_on_an_idle_decode_worker_and_a_long_one_is_not() -> None:
    made = profiled(prefill=1, decode=1)
    made.worker_report(report("prefill-0", PREFILL, load=WorkerLoad(1, 2, waiting_tokens=8000)), 0.1)
    assert made.place(request("short", 64), 0.2).kind is PlacementKind.LOCAL
    assert made.place(request("long", 2000), 0.2).kind is PlacementKind.DISAGGREGATED
    made.worker_report(report("decode-0", DECODE, load=WorkerLoad(40, 0)), 0.3)
    made.worker_report(report("prefill-0", PREFILL), 0.3)
    made.finished("short")
    made.finished("long")
    assert made.place(request("beside", 64), 0.4).kind is PlacementKind.DISAGGREGATED


def test_what_every_prediction_leaves_out_is_learned() -> None:
    made = profiled(prefill=1, decode=1)
    for number in range(40):
        now, name = 100.0 * number, f"r{number}"
        prediction = made.place(request(name, 400, max_new_tokens=101), now).prediction
        assert prediction is not None
        raw = prediction.raw or prediction
        # Streams and loops add 30 ms to every first token, and a fifth to the time between tokens.
        made.prefilled(name, raw.ttft + 0.03)
        made.finished(name, 101, 100 * 1.2 * raw.tpot)
    made.take_errors()
    prediction = made.place(request("last", 400, max_new_tokens=101), 5000.0).prediction
    assert prediction is not None and prediction.raw is not None
    assert prediction.ttft == pytest.approx(prediction.raw.ttft + 0.03, rel=0.02)
    assert prediction.tpot == pytest.approx(1.2 * prediction.raw.tpot, rel=0.02)
    assert prediction.service_s == pytest.approx(prediction.ttft - prediction.wait_s)
