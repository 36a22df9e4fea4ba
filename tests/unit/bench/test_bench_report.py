import numpy as np
import pytest
from rich.console import Console

from disagg.bench.client import RequestResult
from disagg.bench.failures import FailureKind, StreamFailure
from disagg.bench.report import Distribution, Objectives, Report, render, summarize, to_json
from disagg.bench.runner import Measurement


def served(index: int, ttft_s: float, gaps_s: list[float], tokens: int | None = None) -> RequestResult:
    sent = 100.0 + index
    times = np.cumsum([sent + ttft_s, *gaps_s]).tolist()
    return RequestResult(
        index=index,
        scheduled_s=sent - 0.001,
        sent_s=sent,
        end_s=times[-1],
        planned_prompt_tokens=10,
        prompt_tokens=10,
        output_tokens=tokens or len(times),
        finish_reason="length",
        token_times=times,
    )


def failure(index: int, kind: FailureKind, status: int | None = None, detail: str = "why") -> RequestResult:
    return RequestResult(index, 0.0, 0.0, 1.0, 10, failure=StreamFailure(kind, detail, status))


def report_on(results: list[RequestResult], objectives: Objectives | None = None) -> Report:
    measured = Measurement(planned=len(results), started=len(results), results=results, duration_s=10.0)
    return summarize(measured, objectives or Objectives())


def test_percentiles_are_numpys() -> None:
    rng = np.random.default_rng(5)
    ttfts = rng.lognormal(size=301).tolist()
    gaps = [rng.exponential(0.01, 7).tolist() for _ in ttfts]
    report = report_on([served(i, t, g) for i, (t, g) in enumerate(zip(ttfts, gaps, strict=True))])
    expected = {
        "ttft": ttfts,
        "itl": np.concatenate(gaps),
        "tpot": [sum(g) / 7 for g in gaps],
        "e2e": [t + sum(g) for t, g in zip(ttfts, gaps, strict=True)],
    }
    for name, values in expected.items():
        found = report.latencies[name]
        assert found.samples == len(values)
        assert found.mean == pytest.approx(np.mean(values))
        for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
            assert value == pytest.approx(np.percentile(values, percent)), (name, percent)


def test_no_values_no_distribution() -> None:
    assert Distribution.of([]) is None


@pytest.mark.parametrize(
    ("objectives", "good"),
    [
        (Objectives(), 4),
        (Objectives(ttft_s=0.5), 3),
        (Objectives(tpot_s=0.1), 3),
        (Objectives(ttft_s=0.5, tpot_s=0.1), 2),
    ],
)
def test_goodput_counts_requests_that_meet_every_objective(objectives: Objectives, good: int) -> None:
    results = [
        served(0, 0.4, [0.05, 0.05]),
        served(1, 0.6, [0.05, 0.05]),
        served(2, 0.4, [0.05, 0.3]),
        served(3, 0.4, []),
        failure(4, FailureKind.TIMEOUT),
    ]
    report = report_on(results, objectives)
    assert report.good == good
    assert not objectives.met_by(results[-1])
    assert report.attainment == good / 5
    assert report.per_second(report.good) == good / 10


def test_chunks_of_several_tokens() -> None:
    report = report_on([served(0, 0.1, [0.2, 0.2], tokens=9)])
    assert report.tokens_per_chunk == 3
    assert report.latencies["itl"].samples == 2
    assert report.latencies["tpot"].mean == pytest.approx(0.4 / 8)


def test_failures_are_counted_by_kind_and_kept_out_of_latencies() -> None:
    results = [
        served(0, 0.1, [0.1]),
        failure(1, FailureKind.HTTP_STATUS, 429),
        failure(2, FailureKind.HTTP_STATUS, 429),
        failure(3, FailureKind.ERROR_EVENT, detail="[bold]not markup"),
    ]
    report = report_on(results)
    assert (report.ok, report.failed) == (1, 3)
    assert report.failures == {"http_429": 2, "error_event": 1}
    assert report.reasons["http_429"] == ["why"]
    assert report.latencies["ttft"].samples == 1
    console = Console(record=True, width=120)
    console.print(render(report))
    assert "[bold]not markup" in console.export_text()


def test_json_has_the_common_form() -> None:
    content = to_json(report_on([served(0, 0.25, [0.1])], Objectives(ttft_s=1.0)))
    assert content["machine"]["cores"] >= 1
    rows = {row["name"]: row for row in content["rows"]}
    assert all({"name", "value", "unit", "runs"} <= row.keys() for row in content["rows"])
    assert rows["bench_serve/ttft/p50"]["value"] == pytest.approx(250)
    assert rows["bench_serve/goodput"] | {"samples": 1} == {
        "name": "bench_serve/goodput",
        "value": 0.1,
        "unit": "requests/s",
        "runs": 1,
        "samples": 1,
    }
    assert content["requests"]["slo"] == {"ttft_ms": 1000.0, "tpot_ms": None, "met": 1}


def test_nothing_served_is_reported_too() -> None:
    report = report_on([failure(0, FailureKind.CONNECT)], Objectives(ttft_s=1.0))
    assert report.attainment == 0
    assert "ttft" not in report.latencies
    Console(record=True).print(render(report))
