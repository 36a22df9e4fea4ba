"""What a worker notes of its steps, also of those that run while the next one is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from disagg.config import EngineConfig
from disagg.engine.overlap import OverlappedEngine, engine_for
from disagg.engine.runner import AsyncRunner, Batch, PendingStep
from disagg.routing.types import StepSample
from disagg.service.step_samples import AsyncStepRecorder, StepRecorder, profile, recorder_of
from disagg.types import Request, SampledToken, SamplingParams


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Device:
    """Computes one batch after another, each in step_s; waiting for one passes the time until it is done."""

    clock: Clock
    step_s: float = 0.5
    free_at: float = 0.0
    batches: list[int] = field(default_factory=list)

    def check_request(self, request: Request) -> None: ...

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        return self.submit(batch).result()

    def submit(self, batch: Batch) -> PendingStep:
        self.batches.append(len(batch.items))
        self.free_at = max(self.free_at, self.clock.now) + self.step_s
        return _Step(self.clock, self.free_at, [SampledToken(7) if i.samples else None for i in batch.items])


@dataclass
class _Step:
    clock: Clock
    ends: float
    sampled: list[SampledToken | None]

    def result(self) -> list[SampledToken | None]:
        self.clock.now = max(self.clock.now, self.ends)
        return self.sampled


class Plain:
    def check_request(self, request: Request) -> None: ...

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        return []


CONFIG = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=16)


def engine_over(recorder: StepRecorder) -> OverlappedEngine:
    engine = engine_for(CONFIG, recorder, num_blocks=32, max_model_len=64, hash_model="m", eos_token_ids=())
    assert isinstance(engine, OverlappedEngine)
    return engine


def test_a_recorder_computes_in_the_background_where_its_runner_does():
    assert isinstance(recorder_of(Device(Clock())), AsyncRunner)
    assert not isinstance(recorder_of(Plain()), AsyncRunner)


def test_steps_that_overlap_are_noted_with_the_device_s_time_and_their_own_work():
    clock = Clock(100.0)
    recorder = AsyncStepRecorder(Device(clock), clock)
    engine = engine_over(recorder)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    engine.add(Request("r", (1, 2, 3, 4, 5), 5, params), now=clock.now)
    while engine.has_work():
        engine.step(clock.now)
    samples, _ = recorder.take()
    assert samples == [
        StepSample(0.5, num_tokens=5, attended=12),
        *(StepSample(0.5, num_decodes=1, context=context) for context in (6, 7, 8)),
    ]


def test_a_profile_leaves_nothing_behind_in_an_overlapped_engine():
    clock = Clock()
    device = Device(clock, step_s=0.07)
    recorder = AsyncStepRecorder(device, clock)
    engine = engine_over(recorder)
    profile(engine, CONFIG, clock)
    assert len(device.batches) > 5 and recorder.take()[0]
    assert not engine.has_work() and engine.load().kv_blocks_used == 0
    engine.check_integrity()
