"""A profile of a cluster whose step times are known, down to what the simulator makes of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disagg.bench.client import RequestResult, StreamRequest
from disagg.bench.failures import BenchError
from disagg.bench.profile import BESIDE_OUT, STREAMS, Profiler, Samples, fit_profile
from disagg.bench.prompts import EndpointKind, RequestBuilder, RequestOptions, TokenPrompts
from disagg.sim.costs.base import Chunk
from disagg.sim.costs.profile import load_profile
from disagg.workload import TimedRequest, Workload

# Seconds: a + b * tokens + c * tokens * context, and as much for decode and the hand-off.
REQUEST_S = 0.008
PREFILL = (0.012, 1.5e-3, 4e-7)
DECODE = (0.010, 2e-3, 1e-6)
HANDOFF = (0.005, 2e-5)


class Cluster:
    """Answers as one with these coefficients would, each stream among as many as are open."""

    def __init__(
        self, *, jitter: float = 0.0, lump: bool = False, beside: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self._open = 0
        self.bodies: list[bytes] = []
        self._beside = beside
        self._num_prompts, self._prompt_ends = 0, 0.0
        self._jitter, self._lump = jitter, lump
        self._rng = np.random.default_rng(0)

    async def send(self, index: int, request: StreamRequest) -> RequestResult:
        self._open += 1
        self.bodies.append(request.body)
        await asyncio.sleep(0)
        streams, size, tokens = self._open, request.prompt_tokens, request.expected_tokens or 1
        await asyncio.sleep(0)
        self._open -= 1
        a, b, c = PREFILL
        times = [REQUEST_S + self._took(a + b * size + c * size * size / 2)]
        for number in range(1, tokens):
            a, b, c = DECODE
            step = a + b * streams + c * streams * (size + number)
            handoff = HANDOFF[0] + HANDOFF[1] * size if number == 1 else 0.0
            times.append(times[-1] + self._took(step) + handoff)
        if self._lump:
            times = times[:1] + times[-1:]
        return RequestResult(index, 0.0, 0.0, times[-1], size, token_times=times, output_tokens=tokens)

    async def send_at(self, index: int, request: StreamRequest) -> RequestResult:
        """As `send`, but prompts of one token come after a second and slow the streams that run then."""
        tokens = request.expected_tokens or 1
        if tokens == BESIDE_OUT:
            before = self._num_prompts
            while self._num_prompts == before:
                await asyncio.sleep(0)
            times = [0.5]
            for _ in range(1, tokens):
                slower = 1 + self._beside[1] if 1.0 <= times[-1] < self._prompt_ends else 1.0
                times.append(times[-1] + 0.014 * slower)
            return RequestResult(index, 0.0, 0.0, times[-1], 0, token_times=times, output_tokens=tokens)
        result = await self.send(index, request)
        if tokens == 1:
            self._num_prompts += 1
            ttft = (result.token_times[0] - REQUEST_S) * (1 + self._beside[0]) + REQUEST_S
            self._prompt_ends = 1.0 + ttft
            return RequestResult(index, 1.0, 1.0, 1.0 + ttft, 0, token_times=[1.0 + ttft], output_tokens=1)
        return result

    def _took(self, seconds: float) -> float:
        # Every tenth step is interrupted for a long time.
        late = 5.0 if self._rng.random() < 0.1 and self._jitter else 1.0
        return seconds * late * (1 + self._jitter * float(self._rng.standard_normal()))


def builder() -> RequestBuilder:
    load = Workload("probe", (TimedRequest(0.0, 16, 2),))
    options = RequestOptions(EndpointKind.COMPLETIONS, "m", 0.0, True, True)
    return RequestBuilder(load, TokenPrompts(np.arange(100), 0), options)


def measured(cluster: Cluster, *, repeats: int = 1) -> dict[str, Any]:
    profiler = Profiler(cluster.send, builder(), max_tokens=1024, repeats=repeats, sleep=at_once)
    return fit_profile(asyncio.run(profiler.run()))


async def at_once(_seconds: float) -> None:
    """Pass no time: the cluster's is made up."""


def test_coefficients_are_found_and_read_by_the_simulator(tmp_path: Path) -> None:
    made = measured(Cluster())
    assert [made["decode"][key] for key in "abc"] == pytest.approx(DECODE, rel=1e-6)
    assert (made["prefill"]["b"], made["prefill"]["c"]) == pytest.approx(PREFILL[1:], rel=1e-6)
    # A lone prompt can't tell the request's time from the step's; their sum is what it is.
    assert made["prefill"]["a"] + made["request"]["a"] == pytest.approx(REQUEST_S + PREFILL[0])
    assert made["prefill"]["a"] == pytest.approx(DECODE[0] + DECODE[1])
    assert (made["handoff"]["a"], made["handoff"]["b"]) == pytest.approx(HANDOFF, rel=1e-3)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(made))
    cost = load_profile(path)
    assert cost.step_s((), 4, 1000) == pytest.approx(0.010 + 4 * 2e-3 + 1e-3)
    assert cost.step_s([Chunk(100, 0)], 0, 0) == pytest.approx(0.012 + 0.15 + 4e-7 * 5000)


def test_interrupted_steps_move_little() -> None:
    made = measured(Cluster(jitter=0.02), repeats=5)
    decode, prefill = made["decode"], made["prefill"]
    for streams in STREAMS:
        true = DECODE[0] + DECODE[1] * streams + DECODE[2] * streams * 60
        found = decode["a"] + decode["b"] * streams + decode["c"] * streams * 60
        assert found == pytest.approx(true, rel=0.05)
    true = REQUEST_S + PREFILL[0] + PREFILL[1] * 300 + PREFILL[2] * 45_000
    found = made["request"]["a"] + prefill["a"] + prefill["b"] * 300 + prefill["c"] * 45_000
    assert found == pytest.approx(true, rel=0.05)
    assert 0 < made["measured"]["decode_error"] < 0.1


def test_coefficients_are_never_negative() -> None:
    samples = Samples()
    for size in (16, 64, 256, 1024):
        samples.prompts.append(((1.0, size, size * size / 2), 0.5 - size / 1e4))
        samples.gaps.append(((1.0, 1, size), 0.02 - size * 1e-6))
    made = fit_profile(samples)
    assert min(made[phase][key] for phase in ("prefill", "decode") for key in "abc") >= 0


def test_tokens_that_come_in_lumps_are_no_steps() -> None:
    with pytest.raises(BenchError, match="too few tokens"):
        measured(Cluster(lump=True))


def test_what_prompts_and_streams_cost_each_other_is_found() -> None:
    cluster = Cluster(beside=(0.25, 0.5))
    profiler = Profiler(cluster.send_at, builder(), max_tokens=512, repeats=2, sleep=at_once)
    samples = asyncio.run(profiler.run())
    assert {size for size, _ in samples.beside} == {128, 256}
    made = fit_profile(samples)["interference"]
    assert made["prefill"] == pytest.approx(0.25, abs=0.03)
    assert made["decode"] == pytest.approx(0.5, abs=0.03)
    twice = Samples()
    twice.extend(samples)
    twice.extend(samples)
    assert fit_profile(twice)["interference"] == pytest.approx(made)


def test_streams_that_end_before_the_prompt_tell_nothing() -> None:
    assert measured(Cluster())["interference"] == {"prefill": 0.0, "decode": 0.0}


def test_a_later_profile_finds_no_prompt_in_the_prefix_cache() -> None:
    cluster = Cluster()
    measured(cluster)
    measured(cluster)
    assert len(set(cluster.bodies)) == len(cluster.bodies)
