"""What a worker tells of its speed: samples of its steps and pulls, and a short profile when it starts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from disagg.config import EngineConfig
from disagg.engine.engine import Engine
from disagg.engine.runner import AsyncRunner, Batch, PendingStep, Runner
from disagg.errors import DisaggError
from disagg.routing.types import StepSample, TransferSample
from disagg.types import Request, SampledToken, SamplingParams

# Of each kind, between two reports; older ones give way.
MAX_SAMPLES = 12
# A profile tells a router what to expect; traffic tells the rest.
PROFILE_S = 1.0
_PROFILE_BATCHES = (1, 4, 16)
_PROFILE_STEPS = 3

T = TypeVar("T")


class StepRecorder:
    """A Runner that measures the one inside. `execute` on the engine's thread, `take` on any."""

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.perf_counter) -> None:
        self._runner = runner
        self._clock = clock
        # Long runs of decodes must not push out the few steps with prompts.
        self._prompts: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._decodes: deque[StepSample] = deque(maxlen=MAX_SAMPLES)
        self._transfers: deque[TransferSample] = deque(maxlen=MAX_SAMPLES)

    def check_request(self, request: Request) -> None:
        self._runner.check_request(request)

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        work, started = _work_of(batch), self._clock()
        sampled = self._runner.execute(batch)
        self._note(work, self._clock() - started)
        return sampled

    def _note(self, work: StepSample, seconds: float) -> None:
        (self._prompts if work.num_tokens else self._decodes).append(replace(work, seconds=seconds))

    def pulled(self, seconds: float, num_tokens: int, num_others: int) -> None:
        """Note a pull that succeeded."""
        if num_tokens > 0:
            self._transfers.append(TransferSample(seconds, num_tokens, num_others))

    def take(self) -> tuple[list[StepSample], list[TransferSample]]:
        """Return what came since the last call."""
        return [*_drain(self._prompts), *_drain(self._decodes)], _drain(self._transfers)


class AsyncStepRecorder(StepRecorder):
    """A StepRecorder of a runner that computes in the background: an AsyncRunner itself.

    A step begins when it is submitted or when the one before it has ended, whichever is later.
    """

    def __init__(self, runner: AsyncRunner, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(runner, clock)
        self._async_runner = runner
        self._last_end = 0.0

    def submit(self, batch: Batch) -> PendingStep:
        # The batch's sequences go on before the step has ended.
        work, submitted = _work_of(batch), self._clock()
        return _TimedStep(self._async_runner.submit(batch), lambda: self._ended(work, submitted))

    def _ended(self, work: StepSample, submitted: float) -> None:
        end = self._clock()
        self._note(work, end - max(submitted, self._last_end))
        self._last_end = end


class _TimedStep:
    def __init__(self, pending: PendingStep, ended: Callable[[], None]) -> None:
        self._pending = pending
        self._ended = ended

    def result(self) -> list[SampledToken | None]:
        sampled = self._pending.result()
        self._ended()
        return sampled


def recorder_of(runner: Runner) -> StepRecorder:
    """Return a recorder that computes in the background where the runner does."""
    return AsyncStepRecorder(runner) if isinstance(runner, AsyncRunner) else StepRecorder(runner)


def _work_of(batch: Batch) -> StepSample:
    """Return what a step has to compute, before it did."""
    num_tokens = attended = num_decodes = context = 0
    for item in batch.items:
        computed, count = item.seq.num_computed_tokens, item.num_tokens
        if count == 1:
            num_decodes += 1
            context += computed + 1
        else:
            num_tokens += count
            attended += count * computed + count * count // 2
    return StepSample(0.0, num_tokens, attended, num_decodes, context)


def _drain(samples: deque[T]) -> list[T]:
    # The engine's thread may append meanwhile; a deque's single operations are atomic.
    taken: list[T] = []
    for _ in range(len(samples)):
        try:
            taken.append(samples.popleft())
        except IndexError:
            break
    return taken


def profile(engine: Engine, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
    """Run a few prompts and batches through an engine that serves nobody yet; its cache is empty afterwards.

    No step begins after PROFILE_S seconds.
    """
    end = clock() + PROFILE_S
    budget = min(config.max_num_batched_tokens, engine.max_model_len // 2)
    for size in sorted({size for size in (16, budget // 4, budget // 2, budget) if size > 1}):
        _run(engine, 1, size, end, clock)
    for batch in _PROFILE_BATCHES:
        if batch <= config.max_num_seqs:
            _run(engine, batch, max(2, min(16, budget)), end, clock)
    engine.block_events()
    engine.reset_cache()
    engine.block_events()


def _run(engine: Engine, batch: int, size: int, end: float, clock: Callable[[], float]) -> None:
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=_PROFILE_STEPS + 1, ignore_eos=True)
    ids = [f"profile-{size}-{number}" for number in range(batch)]
    try:
        for number, request_id in enumerate(ids):
            if clock() > end:
                return
            # Different first tokens, or all but one would be prefix hits.
            tokens = [number % 7, *([1] * (size - 1))]
            request = Request(request_id, tokens, size, params, cache_salt=f"profile-{size}-{number}")
            engine.add(request, now=clock())
        for _ in range(_PROFILE_STEPS + 2 + batch * size // 16):
            if not engine.has_work() or clock() > end:
                break
            engine.step(clock())
    except DisaggError:
        return  # a model that takes no such prompt is measured by its traffic
    finally:
        for request_id in ids:
            engine.abort(request_id)
        while engine.has_work():  # a step that runs in the background
            engine.step(clock())
