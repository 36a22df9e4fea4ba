import numpy as np
import pytest

from disagg.workload import (
    AllAtOnce,
    Arrivals,
    ConstantRate,
    FixedLength,
    GammaBursts,
    LogNormalLength,
    Poisson,
    SharedPrefix,
    UniformLength,
    WorkloadError,
    parse_lengths,
    synthesize,
)

COUNT = 20_000


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [
        (Poisson(4.0), 1.0),
        (GammaBursts(4.0, 0.25), 2.0),
        (GammaBursts(4.0, 4.0), 0.5),
        (ConstantRate(4.0), 0.0),
    ],
)
def test_gaps_have_the_stated_mean_and_spread(arrivals: Arrivals, cv: float) -> None:
    times = arrivals.times(COUNT, rng())
    gaps = np.diff(times)
    assert len(times) == COUNT and times[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.04, abs=1e-6)


def test_poisson_counts_per_second_have_variance_equal_to_mean() -> None:
    times = Poisson(20.0).times(COUNT, rng())
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


def test_all_at_once() -> None:
    assert AllAtOnce().times(3, rng()).tolist() == [0, 0, 0]


def test_lengths() -> None:
    assert set(FixedLength(7).sample(5, rng()).tolist()) == {7}
    uniform = UniformLength(3, 6).sample(COUNT, rng())
    assert set(uniform.tolist()) == {3, 4, 5, 6}
    lognormal = LogNormalLength(1000, 1.5).sample(COUNT, rng())
    assert lognormal.mean() == pytest.approx(1000, rel=0.05)
    assert lognormal.std() / lognormal.mean() == pytest.approx(1.5, rel=0.15)
    capped = LogNormalLength(2, 3, max_tokens=9).sample(COUNT, rng())
    assert capped.min() == 1 and capped.max() == 9


def test_same_seed_same_requests() -> None:
    def make(seed: int, prompt: int = 9):  # type: ignore[no-untyped-def]
        return synthesize(
            50, Poisson(3), UniformLength(1, prompt), FixedLength(4), np.random.default_rng(seed)
        )

    assert make(1) == make(1)
    assert make(1) != make(2)
    assert [r.arrival_s for r in make(1)] == [r.arrival_s for r in make(1, prompt=90)]


def test_shared_prefix_comes_on_top_and_names_its_group() -> None:
    made = synthesize(400, AllAtOnce(), FixedLength(10), FixedLength(1), rng(), SharedPrefix(4, 32))
    assert {r.prompt_tokens for r in made} == {42}
    assert {r.shared_tokens for r in made} == {32}
    groups = [r.block_ids for r in made]
    assert set(groups) == {(0,), (1,), (2,), (3,)}
    assert all(60 < groups.count((g,)) < 140 for g in range(4))


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", FixedLength(512)),
        ("64-1024", UniformLength(64, 1024)),
        ("lognormal:900,1.5", LogNormalLength(900, 1.5)),
    ],
)
def test_written_lengths(text: str, lengths: object) -> None:
    assert parse_lengths(text, "f") == lengths


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "9-3", "1-2-3", "lognormal:1", "lognormal:0,1", "1.5"])
def test_wrong_lengths_name_the_field(text: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        parse_lengths(text, "--input-len")
    assert caught.value.field == "--input-len" and repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Poisson(0),
        lambda: GammaBursts(1, 0),
        lambda: ConstantRate(float("inf")),
        lambda: FixedLength(0),
        lambda: UniformLength(0, 2),
        lambda: LogNormalLength(10, 0),
        lambda: SharedPrefix(0, 1),
        lambda: synthesize(0, AllAtOnce(), FixedLength(1), FixedLength(1), rng()),
    ],
)
def test_impossible_parameters(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WorkloadError):
        make()
