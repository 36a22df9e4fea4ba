"""A profile of a cluster whose step times are known, down to what the simulator makes of it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disagg.bench.client import RequestResult, StreamRequest
from disagg.bench.failures import BenchError
from disagg.bench.profile import STREAMS, Profiler, Samples, fit_profile
from disagg.bench.prompts import EndpointKind, RequestBuilder, RequestOptions, TokenPrompts
from disagg.sim.costs.base import Chunk
from disagg.sim.costs.profile import load_profile
from disagg.workload import TimedRequest, Workload
from tests.virtual_loop import VirtualLoop

# Seconds: a + b * tokens + c * tokens * context, and as much for decode and the hand-off.
REQUEST_S = 0.008
PREFILL = (0.012, 1.5e-3, 4e-7)
DECODE = (0.010, 2e-3, 1e-6)
HANDOFF = (0.005, 2e-5)


class Cluster:
    """A prefill and a decode worker with these coefficients, on the running loop's time.

    beside: by what share prefill takes longer while streams decode, and these while a prompt is computed.
    lump: tokens after the first come all at once.
    """

    def __init__(
        self, *, jitter: float = 0.0, lump: bool = False, beside: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self.bodies: list[bytes] = []
        self._beside = beside
        self._prefill = asyncio.Lock()
        self._streams: dict[int, tuple[int, int, list[float]]] = {}
        self._decoding: asyncio.Task[None] | None = None
        self._jitter, self._lump = jitter, lump
        self._rng = np.random.default_rng(0)

    async def send(self, index: int, request: StreamRequest) -> RequestResult:
        self.bodies.append(request.body)
        size, tokens = request.prompt_tokens, request.expected_tokens or 1
        loop = asyncio.get_running_loop()
        sent = loop.time()
        await asyncio.sleep(REQUEST_S)
        async with self._prefill:
            a, b, c = PREFILL
            slower = 1 + self._beside[0] * bool(self._streams)
            await asyncio.sleep(slower * self._took(a + b * size + c * size * size / 2))
        times = [loop.time()]
        if tokens > 1:
            await asyncio.sleep(HANDOFF[0] + HANDOFF[1] * size)
            self._streams[index] = size, tokens, times
            if self._decoding is None or self._decoding.done():
                self._decoding = loop.create_task(self._decode())
            while index in self._streams:
                await asyncio.sleep(1e-4)
        if self._lump:
            times = times[:1] + times[-1:]
        return RequestResult(index, sent, sent, times[-1], size, token_times=times, output_tokens=tokens)

    async def _decode(self) -> None:
        while self._streams:
            members = dict(self._streams)
            context = sum(size + len(times) for size, _, times in members.values())
            a, b, c = DECODE
            slower = 1 + self._beside[1] * self._prefill.locked()
            await asyncio.sleep(slower * self._took(a + b * len(members) + c * context))
            for index, (_, tokens, times) in members.items():
                times.append(asyncio.get_running_loop().time())
                if len(times) == tokens:
                    del self._streams[index]

    def _took(self, seconds: float) -> float:
        # Every tenth step is interrupted for a long time.
        late = 5.0 if self._rng.random() < 0.1 and self._jitter else 1.0
        return seconds * late * (1 + self._jitter * float(self._rng.standard_normal()))


def builder() -> RequestBuilder:
    load = Workload("probe", (TimedRequest(0.0, 16, 2),))
    options = RequestOptions(EndpointKind.COMPLETIONS, "m", 0.0, True, True)
    return RequestBuilder(load, TokenPrompts(np.arange(100), 0), options)


def samples_of(cluster: Cluster, *, repeats: int = 1, max_tokens: int = 1024) -> Samples:
    profiler = Profiler(cluster.send, builder(), max_tokens=max_tokens, repeats=repeats)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(profiler.run())


def measured(cluster: Cluster, *, repeats: int = 1) -> dict[str, Any]:
    return fit_profile(samples_of(cluster, repeats=repeats))


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
        # An interrupted one counts for one and a half: 5 % in all, where the plain mean would have 40 %.
        assert found == pytest.approx(1.05 * true, rel=0.05)
    true = REQUEST_S + PREFILL[0] + PREFILL[1] * 300 + PREFILL[2] * 45_000
    found = made["request"]["a"] + prefill["a"] + prefill["b"] * 300 + prefill["c"] * 45_000
    assert found == pytest.approx(true, rel=0.05)
    assert 0 < made["measured"]["decode_error"] < 0.1


def test_coefficients_are_never_negative() -> None:
    samples = Samples()
    for size in (16, 64, 256, 1024):
        samples.prompts.append(((1.0, size, size * size / 2), 0.5 - size / 1e4))
        samples.steps.append(((1.0, 1, size), 0.02 - size * 1e-6))
    made = fit_profile(samples)
    assert min(made[phase][key] for phase in ("prefill", "decode") for key in "abc") >= 0


def test_tokens_that_come_in_lumps_are_no_steps() -> None:
    with pytest.raises(BenchError, match="too few tokens"):
        measured(Cluster(lump=True))


def test_streams_run_together_however_long_their_prompts_take() -> None:
    """One prompt is computed after the other: the first stream has to last until the last one runs."""
    probes = Counter(streams for (_, streams, _), _ in samples_of(Cluster()).steps)
    assert probes == {1.0: 2, 2.0: 1, 4.0: 2, 8.0: 1}


def test_what_prompts_and_streams_cost_each_other_is_found() -> None:
    samples = samples_of(Cluster(beside=(0.25, 0.5)), repeats=2, max_tokens=512)
    assert [size for size, _ in samples.beside] == [128] * 4 * 2 * 2
    assert {count for count, _ in samples.disturbed} == {count for count, _ in samples.calm} == {1, 2}
    made = fit_profile(samples)["interference"]
    assert made["prefill"] == pytest.approx(0.25, abs=0.02)
    # Between two prompts streams go undisturbed.
    assert made["decode"] == pytest.approx(0.5, abs=0.05)
    twice = Samples()
    twice.extend(samples)
    twice.extend(samples)
    assert fit_profile(twice)["interference"] == pytest.approx(made)


def test_streams_that_end_before_the_prompts_tell_nothing() -> None:
    samples = samples_of(Cluster(beside=(9.0, 0.5)), max_tokens=512)
    assert not samples.beside and not samples.disturbed and not samples.calm
    assert fit_profile(samples)["interference"] == {"prefill": 0.0, "decode": 0.0}


def test_workers_that_share_nothing_do_not_slow_each_other() -> None:
    assert measured(Cluster())["interference"] == pytest.approx({"prefill": 0.0, "decode": 0.0}, abs=0.01)


def test_a_later_profile_finds_no_prompt_in_the_prefix_cache() -> None:
    clusters = Cluster(), Cluster()
    for cluster in clusters:
        samples_of(cluster)
    bodies = [body for cluster in clusters for body in cluster.bodies]
    assert len(set(bodies)) == len(bodies)
