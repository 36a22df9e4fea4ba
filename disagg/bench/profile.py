"""A cost profile of a running cluster, as its clients see it; read by the simulator's `profile` cost model.

Measured through the endpoint rather than on an engine alone: what workers, front end, router and client take
from each other on one machine is in it, and it needs nothing of a worker but that it serves.

    lone prompts     TTFT = request + prefill a + b * tokens + c * tokens * context
    k streams        gap  = decode  a + b * k      + c * cached tokens
    second tokens    gap  = decode step + hand-off a + b * tokens
    prompts beside   how much longer than a lone one's TTFT beside streams, and these streams' gaps meanwhile
      streams        than before and after: `interference` of workers that share a machine

A step with few tokens costs what a decode step does, whatever they are; what a lone prompt takes beyond that
before its first token is time outside the engine: `request`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import mean, median
from typing import Any

import numpy as np

from disagg.bench.client import RequestResult, StreamRequest
from disagg.bench.failures import BenchError
from disagg.bench.prompts import RequestBuilder
from disagg.workload import TimedRequest

PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
STREAMS = (1, 2, 4, 8)
STREAM_IN, STREAM_OUT = 32, 48
LONE_OUT = 3
# Streams beside which a prompt is sent, and their tokens: they have to last for all of its prefill.
BESIDE, BESIDE_OUT = 2, 96
# Times the usual step that an interrupted one counts for at most.
MOST_USUAL = 1.5

Send = Callable[[int, StreamRequest], Awaitable[RequestResult]]
Sleep = Callable[[float], Awaitable[None]]
Features = tuple[float, ...]


@dataclass
class Samples:
    """(features, seconds) of each kind; see the module's formulas.

    beside: (tokens, TTFT) of prompts beside streams. disturbed, calm: gaps of these meanwhile, and otherwise.
    """

    prompts: list[tuple[Features, float]] = field(default_factory=list)
    gaps: list[tuple[Features, float]] = field(default_factory=list)
    second_gaps: list[tuple[int, float]] = field(default_factory=list)
    beside: list[tuple[int, float]] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)

    def extend(self, others: Samples) -> None:
        """Take over what another profile of the same cluster has."""
        for name in ("prompts", "gaps", "second_gaps", "beside", "disturbed", "calm"):
            getattr(self, name).extend(getattr(others, name))


class Profiler:
    """Sends probes one after another. max_tokens: of the longest prompt; repeats: of each probe."""

    def __init__(
        self,
        send: Send,
        builder: RequestBuilder,
        *,
        max_tokens: int,
        repeats: int,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._send = send
        self._builder = builder
        self._prompts = [size for size in PROMPTS if size <= max_tokens] or [max_tokens]
        self._repeats = repeats
        # A number of its own for each prompt ever sent: a later profile would find an earlier one's in the
        # prefix cache, and take prefill to cost nothing.
        self._sent = secrets.randbelow(2**48)
        self.samples = Samples()

    async def run(self, on_progress: Callable[[float], None] = lambda share: None) -> Samples:
        """Take all probes. Raises BenchError where a stream fails."""
        long = self._prompts[-1] // 2
        probes = [(size, 1, LONE_OUT) for size in self._prompts]
        probes += [(min(STREAM_IN, long), k, STREAM_OUT) for k in STREAMS]
        probes += [(long, k, STREAM_OUT) for k in STREAMS[::2]]
        await self._streams(self._prompts[0], 1, LONE_OUT)  # connections, caches
        beside = self._prompts[-3:-1]
        total = self._repeats * (len(probes) + len(beside))
        done = 0
        for _ in range(self._repeats):
            # Round by round, so that a machine that changes its pace does so for all probes.
            for size, streams, tokens in probes:
                results = await self._streams(size, streams, tokens)
                if streams == 1:
                    self._note_lone(size, results[0])
                if tokens == STREAM_OUT:
                    self._note_gaps(size, results)
                on_progress((done := done + 1) / total)
            for size in beside:
                await self._beside_streams(size, min(STREAM_IN, long))
                on_progress((done := done + 1) / total)
        return self.samples

    async def _beside_streams(self, size: int, stream_in: int) -> None:
        """Send a prompt of which only the first token is wanted while streams decode."""
        streams = asyncio.ensure_future(self._streams(stream_in, BESIDE, BESIDE_OUT))
        try:
            # Until these have begun to decode, which prompts of the least size tell.
            least_s = median(seconds for _, seconds in self.samples.prompts[: len(self._prompts)])
            await self._sleep(2 * BESIDE * least_s)
            prompt = (await self._streams(size, 1, 1))[0]
        finally:
            others = await streams
        begin, end = prompt.sent_s, prompt.token_times[0]
        if any(len(other.token_times) < BESIDE_OUT for other in others):
            return
        if any(other.token_times[1] > begin or other.token_times[-1] < end for other in others):
            return  # they did not run all the time
        self.samples.beside.append((size, end - begin))
        for other in others:
            for before, after in pairwise(other.token_times[2:]):
                if before >= begin and after <= end:
                    self.samples.disturbed.append(after - before)
                elif after <= begin or before >= end:
                    self.samples.calm.append(after - before)

    async def _streams(self, prompt: int, count: int, tokens: int) -> list[RequestResult]:
        requests = []
        for _ in range(count):
            self._sent += 1
            requests.append(
                (self._sent, self._builder.build_one(TimedRequest(0.0, prompt, tokens), self._sent))
            )
        results = await asyncio.gather(*(self._send(number, request) for number, request in requests))
        for result in results:
            if result.failure is not None:
                raise BenchError("--url", f"a probe of {prompt} tokens failed: {result.failure}")
        return list(results)

    def _note_lone(self, size: int, result: RequestResult) -> None:
        self.samples.prompts.append(((1.0, size, size * size / 2), result.ttft_s))
        if len(result.token_times) > 1:
            self.samples.second_gaps.append((size, result.token_times[1] - result.token_times[0]))

    def _note_gaps(self, size: int, results: Sequence[RequestResult]) -> None:
        """Take the gaps in which all streams ran; the first of each holds its hand-off."""
        if any(len(result.token_times) < STREAM_OUT for result in results):
            return  # tokens came many at a time: their gaps are not steps
        begin = max(result.token_times[1] for result in results)
        end = min(result.token_times[-1] for result in results)
        count = len(results)
        for result in results:
            times = result.token_times
            for index in range(2, len(times)):
                if times[index - 1] >= begin and times[index] <= end:
                    context = count * (size + index)
                    self.samples.gaps.append(((1.0, count, context), times[index] - times[index - 1]))


def fit_profile(samples: Samples) -> dict[str, Any]:
    """Return the profile. Raises BenchError where there are too few samples of a kind."""
    if len(samples.prompts) < 3 or len(samples.gaps) < 3:
        raise BenchError("--url", "too few tokens came one by one to tell how long steps take")
    # A request's time per token is a mean of gaps, and that is above the usual one.
    decode, decode_error = _fit(samples.gaps, of=_mean_of_steps)
    whole, prefill_error = _fit(samples.prompts)
    least = min(whole[0], decode[0] + decode[1])
    handoff = []
    for size, gap in samples.second_gaps:
        handoff.append(((1.0, float(size)), max(1e-6, gap - decode[0] - decode[1] - decode[2] * (size + 1))))
    (handoff_a, handoff_b), _ = _fit(handoff) if len(handoff) > 1 else ((0.0, 0.0), 0.0)
    return {
        "prefill": {"a": least, "b": whole[1], "c": whole[2]},
        "decode": dict(zip("abc", decode, strict=True)),
        "request": {"a": whole[0] - least},
        "handoff": {"a": handoff_a, "b": handoff_b},
        "interference": _interference(samples),
        "measured": {
            "prompts": len(samples.prompts),
            "gaps": len(samples.gaps),
            "prefill_error": prefill_error,
            "decode_error": decode_error,
        },
    }


def _interference(samples: Samples) -> dict[str, float]:
    """Return by what share prefill beside decode, and decode beside prefill, take longer than alone."""
    lone: dict[float, list[float]] = {}
    for (_, tokens, _), seconds in samples.prompts:
        lone.setdefault(tokens, []).append(seconds)
    ratios = [seconds / median(lone[tokens]) for tokens, seconds in samples.beside if tokens in lone]
    decode = mean(samples.disturbed) / mean(samples.calm) if samples.disturbed and samples.calm else 1.0
    return {
        "prefill": max(0.0, (median(ratios) if ratios else 1.0) - 1),
        "decode": max(0.0, decode - 1),
    }


def _mean_of_steps(seconds: Sequence[float]) -> float:
    """Return the mean, in which one that was interrupted counts for no more than MOST_USUAL usual ones."""
    most = MOST_USUAL * median(seconds)
    return mean(min(value, most) for value in seconds)


def _fit(
    samples: Sequence[tuple[Features, float]], of: Callable[[Sequence[float]], float] = median
) -> tuple[tuple[float, ...], float]:
    """Return coefficients that are not negative, with the least relative error, and that error's median.

    Samples with the same features count as one, which `of` makes of them. With three features every subset
    can be tried, which is simpler than Lawson and Hanson's NNLS.
    """
    groups: dict[Features, list[float]] = {}
    for features, seconds in samples:
        groups.setdefault(features, []).append(seconds)
    x = np.array(list(groups))
    y = np.array([of(values) for values in groups.values()])
    rows, ones = x / y[:, None], np.ones(len(y))
    best, best_error = np.zeros(x.shape[1]), np.inf
    for size in range(1, x.shape[1] + 1):
        for columns in combinations(range(x.shape[1]), size):
            picked = rows[:, columns]
            solution = np.linalg.lstsq(picked, ones, rcond=None)[0]
            error = float(((picked @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < best_error:
                best, best_error = np.zeros(x.shape[1]), error
                best[list(columns)] = solution
    return tuple(best.tolist()), float(np.median(np.abs(rows @ best - 1)))
