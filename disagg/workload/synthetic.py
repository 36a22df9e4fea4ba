"""Made-up workloads: an arrival process, two length distributions and, if wanted, shared prefixes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from disagg.workload.types import TimedRequest, Workload, WorkloadError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Arrivals(Protocol):
    """When requests come."""

    def times(self, count: int, rng: np.random.Generator) -> Floats:
        """`count` arrival times in seconds, not decreasing; the first is 0."""
        ...


class Lengths(Protocol):
    """How many tokens a prompt or an answer has."""

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        """`count` lengths in tokens, each at least 1."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Independent users: gaps between arrivals are exponential with mean 1 / rate."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)

    def times(self, count: int, rng: np.random.Generator) -> Floats:
        return _from_gaps(rng.exponential(1 / self.rate_per_s, max(count - 1, 0)))


@dataclass(frozen=True)
class GammaBursts:
    """Gaps are gamma distributed with shape `burstiness` and mean 1 / rate.

    1 is a Poisson process, below 1 arrivals clump (coefficient of variation 1 / sqrt(burstiness)), above
    1 they even out. The same meaning as vLLM's `--burstiness`.
    """

    rate_per_s: float
    burstiness: float

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise WorkloadError("burstiness", f"must be finite and above 0, got {self.burstiness}")

    def times(self, count: int, rng: np.random.Generator) -> Floats:
        scale = 1 / (self.rate_per_s * self.burstiness)
        return _from_gaps(rng.gamma(self.burstiness, scale, max(count - 1, 0)))


@dataclass(frozen=True)
class Diurnal:
    """A Poisson process whose rate follows a sine: rate * (1 + amplitude * sin(2 pi t / period)).

    `rate_per_s` is the mean over a period, `amplitude` from 0 (Poisson) to 1 (down to nothing at night).
    """

    rate_per_s: float
    amplitude: float = 0.5
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)
        if not 0 <= self.amplitude <= 1:
            raise WorkloadError("amplitude", f"must be in [0, 1], got {self.amplitude}")
        if not (math.isfinite(self.period_s) and self.period_s > 0):
            raise WorkloadError("period_s", f"must be finite and above 0, got {self.period_s}")

    def times(self, count: int, rng: np.random.Generator) -> Floats:
        # Unit-rate arrivals, mapped through the inverse of the expected count by time t.
        expected = _from_gaps(rng.exponential(1.0, max(count - 1, 0)))
        angular = 2 * math.pi / self.period_s
        low, high = np.zeros(count), expected / self.rate_per_s + self.period_s
        for _ in range(64):
            middle = (low + high) / 2
            swing = self.amplitude / angular * (1 - np.cos(angular * middle))
            early = self.rate_per_s * (middle + swing) < expected
            low, high = np.where(early, middle, low), np.where(early, high, middle)
        times: Floats = np.maximum.accumulate(high) - high[0]
        return times


@dataclass(frozen=True)
class ConstantRate:
    """One arrival every 1 / rate seconds."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _check_rate(self.rate_per_s)

    def times(self, count: int, rng: np.random.Generator) -> Floats:
        return np.arange(count, dtype=np.float64) / self.rate_per_s


@dataclass(frozen=True)
class AllAtOnce:
    """Everything at time 0: offline throughput."""

    def times(self, count: int, rng: np.random.Generator) -> Floats:
        return np.zeros(count)


@dataclass(frozen=True)
class FixedLength:
    """Always `tokens`."""

    tokens: int

    def __post_init__(self) -> None:
        _check_tokens("tokens", self.tokens)

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class UniformLength:
    """Every length from `low` to `high`, both included, is as likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_tokens("low", self.low)
        if self.high < self.low:
            raise WorkloadError("high", f"must be at least low ({self.low}), got {self.high}")

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        return rng.integers(self.low, self.high, count, endpoint=True, dtype=np.int64)


@dataclass(frozen=True)
class LogNormalLength:
    """Log-normal, as real prompts and answers roughly are: many short ones, a long tail.

    `mean` is the mean in tokens before rounding and capping, `cv` the standard deviation over the mean.
    """

    mean: float
    cv: float
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1):
            raise WorkloadError("mean", f"must be finite and at least 1, got {self.mean}")
        if not (math.isfinite(self.cv) and self.cv > 0):
            raise WorkloadError("cv", f"must be finite and above 0, got {self.cv}")
        if self.max_tokens is not None:
            _check_tokens("max_tokens", self.max_tokens)

    def sample(self, count: int, rng: np.random.Generator) -> Ints:
        variance = math.log1p(self.cv**2)
        drawn = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        most = math.inf if self.max_tokens is None else self.max_tokens
        return np.clip(np.rint(drawn), 1, most).astype(np.int64)


@dataclass(frozen=True)
class SharedPrefix:
    """Each prompt starts with the `tokens`-long prefix of one of `groups` groups, drawn evenly.

    The prefix comes on top of the prompt length that is drawn, as with vLLM's `--random-prefix-len`.
    """

    groups: int
    tokens: int

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise WorkloadError("groups", f"must be at least 1, got {self.groups}")
        _check_tokens("tokens", self.tokens)


def synthesize(
    count: int,
    arrivals: Arrivals,
    prompt: Lengths,
    output: Lengths,
    rng: np.random.Generator,
    prefix: SharedPrefix | None = None,
    name: str = "synthetic",
) -> Workload:
    """A workload of `count` requests. The same arguments and seed give the same requests."""
    if count < 1:
        raise WorkloadError("count", f"must be at least 1, got {count}")
    # A stream for each draw, so that another length distribution leaves the arrival times as they were.
    arrival_rng, prompt_rng, output_rng, group_rng = rng.spawn(4)
    times = arrivals.times(count, arrival_rng).tolist()
    prompts = prompt.sample(count, prompt_rng).tolist()
    outputs = output.sample(count, output_rng).tolist()
    if prefix is None:
        return Workload(name, tuple(map(TimedRequest, times, prompts, outputs)))
    groups = group_rng.integers(0, prefix.groups, count).tolist()
    requests = (
        TimedRequest(time, prefix.tokens + own, out, (group,), prefix.tokens, session=group)
        for time, own, out, group in zip(times, prompts, outputs, groups, strict=True)
    )
    return Workload(name, tuple(requests))


def parse_lengths(text: str, field: str) -> Lengths:
    """A distribution written as `512`, `64-1024` (uniform) or `lognormal:MEAN,CV`."""
    try:
        if text.startswith("lognormal:"):
            mean, cv = text.removeprefix("lognormal:").split(",")
            return LogNormalLength(float(mean), float(cv))
        if "-" in text[1:]:
            low, high = text.split("-")
            return UniformLength(int(low), int(high))
        return FixedLength(int(text))
    except WorkloadError as error:
        raise WorkloadError(field, f"{text!r}: {error}") from None
    except ValueError:
        raise WorkloadError(field, f"{text!r} is none of N, LOW-HIGH and lognormal:MEAN,CV") from None


def _from_gaps(gaps: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(gaps)))


def _check_rate(rate_per_s: float) -> None:
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise WorkloadError("rate_per_s", f"must be finite and above 0, got {rate_per_s}")


def _check_tokens(field: str, tokens: int) -> None:
    if tokens < 1:
        raise WorkloadError(field, f"must be at least 1, got {tokens}")
