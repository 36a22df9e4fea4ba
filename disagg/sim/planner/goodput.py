"""Goodput of a simulated cluster: the largest rate of requests at which its objectives are met."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from disagg.errors import ConfigError
from disagg.sim.records import Records
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec
from disagg.workload import TimedRequest, Workload

# Doublings of a first guess after which a cluster is taken to serve any rate.
_MAX_DOUBLINGS = 24


@dataclass(frozen=True)
class Criterion:
    """When a run counts as good. ttft_s, tpot_s: objectives, seconds; None asks for nothing.

    joint: at least `attainment` of all requests meet both objectives. Otherwise each objective is met by that
    share of them, not necessarily the same ones: DistServe's criterion, which is the weaker one.
    """

    ttft_s: float | None
    tpot_s: float | None
    attainment: float = 0.9
    joint: bool = True

    def __post_init__(self) -> None:
        if self.ttft_s is None and self.tpot_s is None:
            raise ConfigError(
                "objectives: give ttft_ms or tpot_ms; goodput has no meaning without", param="objectives"
            )
        if not 0 < self.attainment <= 1:
            raise ConfigError(
                f"attainment: must be above 0 and at most 1, got {self.attainment}", param="attainment"
            )

    def met_by(self, records: Records) -> bool:
        """Whether a run was good. A request that was not served meets nothing."""
        tpot = records.tpot()
        # An answer of one token has no TPOT that could be missed.
        tpot = np.where(np.isnan(tpot), 0.0, tpot)
        within = []
        for values, limit in ((records.ttft(), self.ttft_s), (tpot, self.tpot_s)):
            if limit is not None:
                within.append(records.done & (values <= limit))
        if self.joint:
            within = [np.logical_and.reduce(within)]
        return all(float(each.mean()) >= self.attainment for each in within)


@dataclass(frozen=True)
class Load:
    """One kind of traffic at any rate: the same requests and the same relative gaps, faster or slower.

    num_requests: of a run, at least; min_seconds: that its arrivals take, at least, so that a large cluster
    has time to fall behind. Gaps are exponential. Requests are drawn from `workload` without putting back
    until all were drawn; where they share prefixes they come in their own order, and none comes twice.
    """

    workload: Workload
    seed: int = 0
    num_requests: int = 500
    min_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not len(self.workload):
            raise ConfigError("workload: it has no request", param="workload")

    def of_one_token(self) -> Load:
        """Return the same requests, answered with one token: what prefill alone has to do."""
        return replace(self, workload=self.workload.cap_lengths(None, 1))

    def at(self, rate: float) -> Workload:
        """Return the requests at `rate` per second."""
        count = max(self.num_requests, math.ceil(rate * self.min_seconds))
        shared = any(request.block_ids for request in self.workload)
        if shared:
            count = min(count, len(self.workload))
        gaps = np.random.default_rng(self.seed).exponential(1.0, count)
        arrivals = ((np.cumsum(gaps) - gaps[0]) / rate).tolist()
        requests = self.workload.requests if shared else self._draw(count)
        return Workload(
            f"{rate:g}/s",
            tuple(replace(request, arrival_s=at) for request, at in zip(requests, arrivals, strict=False)),
        )

    def _draw(self, count: int) -> list[TimedRequest]:
        requests, rng = self.workload.requests, np.random.default_rng(self.seed + 1)
        drawn: list[TimedRequest] = []
        while len(drawn) < count:
            drawn += [requests[index] for index in rng.permutation(len(requests)).tolist()]
        return drawn[:count]


def is_good(spec: SimSpec, load: Load, criterion: Criterion, rate: float, seed: int) -> bool:
    """Run a cluster at a rate and judge it."""
    return criterion.met_by(Simulation(spec, load.at(rate), seed=seed).run())


@dataclass(frozen=True)
class Bisection:
    """How a largest rate is looked for, all per GPU and second.

    high: where it begins; grow: double that while it is good itself. It ends when the interval is narrower
    than `width` or than `share` of its upper end, or when nothing above a hundredth of `high` is good.
    DistServe's search is Bisection(high=5, width=0.25, share=0, grow=False).
    """

    high: float = 1.0
    width: float = 0.0
    share: float = 0.04
    grow: bool = True

    def largest(self, good: Callable[[float], bool], num_gpus: int, guess: float | None = None) -> float:
        """Return the largest rate, per second, that was found good; 0 where none was.

        guess: a rate that it might be, in place of `high`.
        """
        low, high = 0.0, self.high * num_gpus if guess is None or not self.grow else guess
        least = min(high, self.high * num_gpus) / 100
        for _ in range(_MAX_DOUBLINGS if self.grow else 0):
            if not good(high):
                break
            low, high = high, 2 * high
        while high - low >= max(self.width * num_gpus, self.share * high) and high > least:
            middle = (low + high) / 2
            if good(middle):
                low = middle
            else:
                high = middle
        return low
