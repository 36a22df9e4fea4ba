import math

import pytest

from disagg.workload import Segment, TimedRequest, Workload, WorkloadError


def workload(*arrivals: float) -> Workload:
    return Workload("w", tuple(TimedRequest(at, 10, 5) for at in arrivals))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"arrival_s": -1.0}, "arrival_s"),
        ({"arrival_s": math.nan}, "arrival_s"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"output_tokens": 0}, "output_tokens"),
        ({"block_ids": (1,)}, "block_tokens"),
        ({"block_ids": (1, 2, 3), "block_tokens": 5}, "block_ids"),
    ],
)
def test_wrong_field_is_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        TimedRequest(**{"arrival_s": 0.0, "prompt_tokens": 10, "output_tokens": 5, **fields})  # type: ignore[arg-type]
    assert caught.value.field == named


def test_segments_cover_the_prompt() -> None:
    assert list(TimedRequest(0.0, 10, 1, (7, 8), 4).segments()) == [
        Segment(7, 4),
        Segment(8, 4),
        Segment(None, 2),
    ]
    short = TimedRequest(0.0, 6, 1, (7, 8), 4)
    assert list(short.segments()) == [Segment(7, 4), Segment(8, 2)]
    assert short.shared_tokens == 6
    assert list(TimedRequest(0.0, 6, 1).segments()) == [Segment(None, 6)]


def test_arrivals_must_be_in_order() -> None:
    with pytest.raises(WorkloadError, match="request 1"):
        workload(2.0, 1.0)


def test_window_shifts_time_and_leaves_out_its_end() -> None:
    assert [r.arrival_s for r in workload(0, 5, 7, 10, 11).window(5, 5)] == [0, 2]
    assert [r.arrival_s for r in workload(0, 5, 7).window(6)] == [1]


def test_rate_scale() -> None:
    made = workload(0, 4, 8).scale_rate(2)
    assert [r.arrival_s for r in made] == [0, 2, 4]
    assert made.rate_per_s == 0.5
    assert workload(0, 0).rate_per_s == math.inf


@pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan])
def test_rate_scale_refuses(factor: float) -> None:
    with pytest.raises(WorkloadError, match="factor"):
        workload(0).scale_rate(factor)


def test_caps_cut_blocks_too() -> None:
    request = TimedRequest(0.0, 1200, 50, (1, 2, 3), 512)
    (cut,) = Workload("w", (request,)).cap_lengths(600, 10)
    assert (cut.prompt_tokens, cut.output_tokens, cut.block_ids) == (600, 10, (1, 2))
    assert next(iter(Workload("w", (request,)).cap_lengths())) is request
    with pytest.raises(WorkloadError, match="max_prompt_tokens"):
        workload(0).cap_lengths(0)


def test_block_hits_of_an_infinite_cache() -> None:
    blocks = [(1, 2), (1, 3), (1, 2)]
    made = Workload("w", tuple(TimedRequest(0.0, 8, 1, ids, 4) for ids in blocks))
    assert made.block_hit_share() == 3 / 6
    assert workload(0).block_hit_share() == 0


def test_head_and_totals() -> None:
    made = workload(0, 1, 2).head(2)
    assert (len(made), made.span_s, made.prompt_tokens, made.output_tokens) == (2, 1, 20, 10)
