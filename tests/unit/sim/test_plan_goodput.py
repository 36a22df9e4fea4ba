"""Goodput: what counts as good, traffic at any rate, and the search for the largest rate."""

from __future__ import annotations

import pytest
from sim_support import pool, requests, spec_of, workload

from disagg.errors import ConfigError
from disagg.sim.planner.goodput import Bisection, Criterion, Load, is_good
from disagg.sim.records import Outcome, Records
from disagg.workload import SharedPrefix


def _records(*rows: tuple[float, float, Outcome]) -> Records:
    """(TTFT, TPOT, outcome) of requests with two output tokens each."""
    records = Records([0.0] * len(rows), [10] * len(rows), [2] * len(rows))
    for index, (ttft, tpot, outcome) in enumerate(rows):
        records.first_token[index] = ttft
        records.end(index, outcome, ttft + tpot)
    return records


GOOD, SLOW_FIRST, SLOW_REST = (
    (0.1, 0.01, Outcome.DONE),
    (0.9, 0.01, Outcome.DONE),
    (0.1, 0.9, Outcome.DONE),
)


def test_joint_attainment_asks_both_of_the_same_requests() -> None:
    records = _records(*[GOOD] * 8, SLOW_FIRST, SLOW_REST)
    assert Criterion(0.2, 0.05, 0.9, joint=False).met_by(records)
    assert not Criterion(0.2, 0.05, 0.9, joint=True).met_by(records)
    assert Criterion(0.2, 0.05, 0.8, joint=True).met_by(records)
    assert Criterion(0.2, None, 0.9).met_by(records)


def test_a_request_that_was_refused_meets_nothing() -> None:
    records = _records(*[GOOD] * 8, (0.0, 0.0, Outcome.SHED), (0.0, 0.0, Outcome.SHED))
    assert not Criterion(0.2, 0.05, 0.9, joint=False).met_by(records)


def test_one_token_has_no_tpot_to_miss() -> None:
    records = Records([0.0], [10], [1])
    records.first_token[0] = 0.1
    records.end(0, Outcome.DONE, 0.1)
    assert Criterion(0.2, 0.05).met_by(records)


@pytest.mark.parametrize(
    ("values", "named"), [((None, None, 0.9), "objectives"), ((1, 1, 1.5), "attainment")]
)
def test_a_criterion_without_sense_is_refused(values: tuple[float, float, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Criterion(*values)


def test_load_keeps_its_requests_and_scales_its_gaps() -> None:
    load = Load(workload(50), seed=3, num_requests=40, min_seconds=0)
    slow, fast = load.at(2.0), load.at(8.0)
    assert [one.prompt_tokens for one in slow] == [one.prompt_tokens for one in fast]
    assert [one.arrival_s for one in slow] == pytest.approx([4 * one.arrival_s for one in fast])
    assert slow.rate_per_s == pytest.approx(2.0, rel=0.4)
    assert load.at(2.0) == slow


def test_load_lasts_long_enough_and_starts_over_when_drawn_out() -> None:
    load = Load(workload(50), num_requests=10, min_seconds=30)
    long = load.at(4.0)
    assert len(long) == 120
    first, second = ([one.prompt_tokens for one in long][part] for part in (slice(50), slice(50, 100)))
    assert sorted(first) == sorted(second) == sorted(one.prompt_tokens for one in workload(50))
    assert first != second


def test_shared_prefixes_are_never_repeated() -> None:
    shared = workload(30, prefix=SharedPrefix(2, 64))
    run = Load(shared, num_requests=500, min_seconds=60).at(10.0)
    assert [one.block_ids for one in run] == [one.block_ids for one in shared]


def test_prefill_alone_answers_with_one_token() -> None:
    assert {one.output_tokens for one in Load(workload(20)).of_one_token().at(1.0)} == {1}


def test_no_requests_no_load() -> None:
    with pytest.raises(ConfigError, match="workload"):
        Load(requests())


@pytest.mark.parametrize("limit", [0.02, 0.7, 3.3, 41.0])
def test_bisection_finds_the_limit(limit: float) -> None:
    found = Bisection(high=1.0, share=0.01).largest(lambda rate: rate <= limit, num_gpus=2)
    assert limit * 0.98 <= found <= limit


def test_bisection_ends_where_nothing_is_good() -> None:
    assert Bisection(high=1.0).largest(lambda _rate: False, num_gpus=1) == 0.0


def test_a_guess_saves_runs() -> None:
    def runs(guess: float | None) -> int:
        tried: list[float] = []
        Bisection(high=0.01).largest(lambda rate: tried.append(rate) or rate <= 50.0, 1, guess)  # type: ignore[func-returns-value]
        return len(tried)

    assert runs(52.0) < runs(None)


def test_distserves_steps() -> None:
    # Up to 5 per GPU, until the interval is below 0.25: steps of 5 / 32.
    search = Bisection(high=5.0, width=0.25, share=0.0, grow=False)
    assert search.largest(lambda rate: rate / 3 <= 1.6, num_gpus=3) / 3 == pytest.approx(1.5625)
    assert search.largest(lambda _rate: True, num_gpus=1) == pytest.approx(5 - 5 / 32)


def test_a_run_is_good_below_what_a_cluster_can_do() -> None:
    spec = spec_of({"mixed": pool("mixed")})
    load = Load(workload(200), num_requests=100, min_seconds=0)
    criterion = Criterion(0.5, 0.05)
    assert is_good(spec, load, criterion, 1.0, seed=0)
    assert not is_good(spec, load, criterion, 2000.0, seed=0)
