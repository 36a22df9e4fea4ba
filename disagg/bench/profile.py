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
import math
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np

from disagg.bench.client import RequestResult, StreamRequest
from disagg.bench.failures import BenchError
from disagg.bench.prompts import RequestBuilder
from disagg.workload import TimedRequest

PROMPTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
STREAMS = (1, 2, 4, 8)
STREAM_IN, STREAM_OUT = 32, 48
LONE_OUT = 3
# Streams beside which prompts are sent, and how many one after another: to take each in slows these too.
BESIDE, IN_TURN = (1, 2), 4
# Times the time that they take alone for which streams beside them last.
MOST_BESIDE = 2
# Times the usual step that an interrupted one counts for at most.
MOST_USUAL = 1.5

Send = Callable[[int, StreamRequest], Awaitable[RequestResult]]
Features = tuple[float, ...]
Key = TypeVar("Key", int, float, Features)


@dataclass
class Samples:
    """(features, seconds) of each kind; see the module's formulas. steps: means, one of each probe.

    beside: (tokens, TTFT) of prompts beside streams. disturbed, calm: (streams, gap) of these meanwhile, and
    otherwise.
    """

    prompts: list[tuple[Features, float]] = field(default_factory=list)
    steps: list[tuple[Features, float]] = field(default_factory=list)
    second_gaps: list[tuple[int, float]] = field(default_factory=list)
    beside: list[tuple[int, float]] = field(default_factory=list)
    disturbed: list[tuple[int, float]] = field(default_factory=list)
    calm: list[tuple[int, float]] = field(default_factory=list)

    def extend(self, others: Samples) -> None:
        """Take over what another profile of the same cluster has."""
        for name in ("prompts", "steps", "second_gaps", "beside", "disturbed", "calm"):
            getattr(self, name).extend(getattr(others, name))


class Profiler:
    """Sends probes one after another. max_tokens: of the longest prompt; repeats: of each probe."""

    def __init__(self, send: Send, builder: RequestBuilder, *, max_tokens: int, repeats: int) -> None:
        self._send = send
        self._builder = builder
        self._prompts = [size for size in PROMPTS if size <= max_tokens] or [max_tokens]
        self._repeats = repeats
        # A number of its own for each prompt ever sent: a later profile would find an earlier one's in the
        # prefix cache, and take prefill to cost nothing.
        self._sent = secrets.randbelow(2**48)
        # Of the last stream that ran alone: seconds to its first token, and of a step.
        self._lone_s = self._step_s = 0.0
        self.samples = Samples()

    async def run(self, on_progress: Callable[[float], None] = lambda share: None) -> Samples:
        """Take all probes. Raises BenchError where a stream fails."""
        long = self._prompts[-1] // 2
        # One stream of a kind first: it tells how long several have to be.
        kinds = [(min(STREAM_IN, long), k) for k in STREAMS] + [(long, k) for k in STREAMS[::2]]
        await self._streams(self._prompts[0], 1, LONE_OUT)  # connections, caches
        total = self._repeats * (len(self._prompts) + len(kinds) + len(BESIDE))
        done = 0
        for _ in range(self._repeats):
            # Round by round, so that a machine that changes its pace does so for all probes.
            for size in self._prompts:
                self._note_lone(size, (await self._streams(size, 1, LONE_OUT))[0])
                on_progress((done := done + 1) / total)
            for size, count in kinds:
                await self._decoding(size, count)
                on_progress((done := done + 1) / total)
            for count in BESIDE:
                await self._beside_streams(self._prompts[-3:][0], count, long)
                on_progress((done := done + 1) / total)
        return self.samples

    async def _decoding(self, size: int, count: int) -> None:
        """Take the steps of `count` streams, of which one had its prompt computed after the other."""
        tokens = STREAM_OUT
        if count > 1:
            # At most as many more as the prompt has: so the longest stream that was asked for has them too.
            tokens += min(size, math.ceil((count - 1) * self._lone_s / self._step_s))
        results = await self._streams(size, count, tokens)
        if count == 1:
            self._note_lone(size, results[0])
            self._lone_s = results[0].ttft_s
            self._step_s = max(1e-6, (results[0].end_s - results[0].token_times[0]) / (tokens - 1))
        if all(len(result.token_times) == tokens for result in results):
            self._note_steps(size, results)  # else tokens came many at a time: their gaps are not steps

    async def _beside_streams(self, size: int, count: int, stream_in: int) -> None:
        """Send prompts, of which only the first token is wanted, in turn while `count` streams decode."""
        lone_s = median(seconds for (_, tokens, _), seconds in self.samples.prompts if tokens == size)
        wait_s = 1.5 * count * self._lone_s  # until these do
        tokens = math.ceil((wait_s + MOST_BESIDE * IN_TURN * lone_s) / self._step_s)
        tokens = min(tokens, stream_in + STREAM_OUT)
        streams = asyncio.ensure_future(self._streams(stream_in, count, tokens))
        try:
            await asyncio.sleep(wait_s)
            prompts = [(await self._streams(size, 1, 1))[0] for _ in range(IN_TURN)]
        finally:
            others = await streams
        if any(len(other.token_times) < tokens for other in others):
            return
        begin, end = prompts[0].sent_s, prompts[-1].token_times[0]
        first, last = _together(others)
        if first > begin or last < end:
            return  # they did not run all the time
        self.samples.beside += [(size, prompt.ttft_s) for prompt in prompts]
        for other in others:
            for before, after in pairwise(other.token_times):
                if before >= begin and after <= end:
                    self.samples.disturbed.append((count, after - before))
                elif first <= before and after <= last and (after <= begin or before >= end):
                    self.samples.calm.append((count, after - before))

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

    def _note_steps(self, size: int, results: Sequence[RequestResult]) -> None:
        """Take the gaps in which all streams ran."""
        begin, end = _together(results)
        gaps, contexts = [], []
        for result in results:
            for index, (before, after) in enumerate(pairwise(result.token_times), 1):
                if before >= begin and after <= end:
                    gaps.append(after - before)
                    contexts.append(len(results) * (size + index))
        if gaps:
            # A request's time per token is a mean of gaps, and that is above the usual one.
            most = MOST_USUAL * median(gaps)
            usual = mean(min(gap, most) for gap in gaps)
            self.samples.steps.append(((1.0, len(results), mean(contexts)), usual))


def _together(results: Sequence[RequestResult]) -> tuple[float, float]:
    """Return since and until when all streams had each step. The first gap of each holds its hand-off."""
    return max(result.token_times[1] for result in results), min(result.token_times[-1] for result in results)


def fit_profile(samples: Samples) -> dict[str, Any]:
    """Return the profile. Raises BenchError where there are too few samples of a kind."""
    if len(samples.prompts) < 3 or len(samples.steps) < 3:
        raise BenchError("--url", "too few tokens came one by one to tell how long steps take")
    decode, decode_error = _fit(samples.steps)
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
            "steps": len(samples.steps),
            "prefill_error": prefill_error,
            "decode_error": decode_error,
        },
    }


def _interference(samples: Samples) -> dict[str, float]:
    """Return by what share prefill beside decode, and decode beside prefill, take longer than alone."""
    lone = _grouped((tokens, seconds) for (_, tokens, _), seconds in samples.prompts)
    prefill = [seconds / median(lone[tokens]) for tokens, seconds in samples.beside if tokens in lone]
    disturbed, calm = _grouped(samples.disturbed), _grouped(samples.calm)
    decode = [mean(gaps) / mean(calm[count]) for count, gaps in disturbed.items() if count in calm]
    return {
        "prefill": max(0.0, (median(prefill) if prefill else 1.0) - 1),
        "decode": max(0.0, (mean(decode) if decode else 1.0) - 1),
    }


def _grouped(samples: Iterable[tuple[Key, float]]) -> dict[Key, list[float]]:
    groups: dict[Key, list[float]] = {}
    for key, seconds in samples:
        groups.setdefault(key, []).append(seconds)
    return groups


def _fit(samples: Sequence[tuple[Features, float]]) -> tuple[tuple[float, ...], float]:
    """Return coefficients that are not negative, with the least relative error, and that error's median.

    Samples with the same features count as one, their median. With three features every subset can be tried,
    which is simpler than Lawson and Hanson's NNLS.
    """
    groups = _grouped(samples)
    x = np.array(list(groups))
    y = np.array([median(values) for values in groups.values()])
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
