"""The last minutes: what is kept each period, how front ends' rows add up, and what the page gets."""

from __future__ import annotations

import pytest

from disagg.service.history import LENGTH, PERIOD_S, History, load, merge, quantile, summarize
from disagg.service.metrics import FrontendMetrics


def test_a_row_holds_what_was_added_since_the_last() -> None:
    metrics = FrontendMetrics()
    metrics.requests.labels("stop").inc(5)
    history = History(metrics)
    history.sample(1)
    metrics.requests.labels("stop").inc(20)
    metrics.generation_tokens.inc(300)
    metrics.queue.observe(0.2)
    metrics.queue.observe(0.4)
    metrics.frontend.observe(0.04)
    metrics.frontend.observe(0.06)
    history.sample(2)
    history.sample(3)
    first, second, third = map(summarize, history.rows())
    assert first["outcomes"] == {} and third["outcomes"] == {}
    assert second["t"] == 2 * PERIOD_S
    assert second["outcomes"]["stop"] == 20 / PERIOD_S
    assert second["generation_tokens"] == 300 / PERIOD_S
    assert (second["frontend"], second["queue"]) == (pytest.approx(0.05), pytest.approx(0.25))
    assert third["queue"] is None and third["ttft"] == [None, None, None]


def test_rows_of_several_front_ends_add_up_before_quantiles_are_taken() -> None:
    fast, slow = FrontendMetrics(), FrontendMetrics()
    histories = [History(fast), History(slow)]
    for _ in range(98):
        fast.ttft.observe(0.015)
    for _ in range(2):
        slow.ttft.observe(9.0)
    for history in histories:
        history.sample(7)
    rows = merge([histories[0].rows(), load(histories[1].dump())])
    assert len(rows) == 1
    p50, p90, p99 = summarize(rows[0])["ttft"]
    assert 0.01 < p50 < p90 <= 0.02
    assert 7.5 < p99 <= 10.0


def test_a_front_end_that_began_later_leaves_the_older_periods_alone() -> None:
    first, second = History(FrontendMetrics()), History(FrontendMetrics())
    for period in (1, 2, 3):
        first.sample(period)
    second.sample(3)
    assert [row["t"] for row in merge([first.rows(), second.rows()])] == [1, 2, 3]


def test_the_past_is_bounded() -> None:
    history = History(FrontendMetrics())
    for period in range(3 * LENGTH):
        history.sample(period)
    assert len(history.rows()) == len(merge([history.rows(), history.rows()])) == LENGTH


@pytest.mark.parametrize(("q", "expected"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 2.0), (1.0, 2.0)])
def test_quantile_interpolates_and_ends_at_the_last_bound(q: float, expected: float) -> None:
    """Two of four up to 1, one up to 2, one above."""
    assert quantile({"1.0": 2, "2.0": 3, "+Inf": 4, "sum": 99.0}, q) == pytest.approx(expected)


def test_quantile_of_nothing_is_nothing() -> None:
    assert quantile({}, 0.5) is None


@pytest.mark.parametrize("body", [b"{}", b"[1]", b'[{"x": 1}]', b"[", b'"rows"'])
def test_what_is_no_history_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        load(body)


def test_no_answer_is_an_empty_history() -> None:
    assert load(b"") == []


def test_who_waits_for_a_place_is_told_for_all_front_ends_together() -> None:
    first, second = FrontendMetrics(), FrontendMetrics()
    histories = [History(first), History(second)]
    with (
        first.placing.track_inprogress(),
        first.placing.track_inprogress(),
        second.placing.track_inprogress(),
    ):
        for history in histories:
            history.sample(1)
    for history in histories:
        history.sample(2)
    waits, gone = merge([histories[0].rows(), load(histories[1].dump())])
    assert summarize(waits)["placing"] == 3
    assert summarize(gone)["placing"] == 0
