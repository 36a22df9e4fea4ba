"""OverlappedEngine: schedules and submits step n + 1 while the device computes step n.

    host    schedule n+1 │ submit n+1 │ wait for n's tokens, account │ schedule n+2 │ ...
    device  ──── n ─────────────────────────────┤──── n+1 ─────────────────────────────┤

What step n draws is not known when step n + 1 is made, so each of its sequences goes on with a PLACEHOLDER
for a token; the runner puts the token in its place on the device (as vLLM's asynchronous scheduling and
SGLang's overlap scheduler do). Whether a token ends its sequence shows one step late: what was computed for
such a sequence meanwhile is thrown away. Where the end is known beforehand (a length, a hand-off after the
first token) nothing is submitted in vain.

All that runs ahead is taken back before a step is accounted for and put on again after it, so accounting is
the Engine's own, on the state that it had when the step was scheduled. Two rules keep that sound:
  - blocks that a submitted step may write to are free only once it is collected: a peer's KV that arrives
    in them does not wait for the device's stream;
  - nothing is preempted while a step is on its way: if blocks might run short, it is collected first.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from disagg.config import EngineConfig
from disagg.engine.engine import Engine, check_result
from disagg.engine.runner import PLACEHOLDER, AsyncRunner, Batch, PendingStep, Runner
from disagg.engine.sequence import Sequence, SequenceStatus
from disagg.errors import RunnerLostError
from disagg.types import FinishReason, StepOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Flight:
    """A submitted step. starts: each item's computed tokens when it was scheduled. freed: blocks of
    sequences that ended since, which this step may still write to.
    """

    batch: Batch
    pending: PendingStep
    starts: list[int]
    freed: list[int] = field(default_factory=list)


class OverlappedEngine(Engine):
    """An Engine over a runner that computes in the background. At most one step is ahead."""

    def __init__(
        self,
        config: EngineConfig,
        runner: AsyncRunner,
        *,
        num_blocks: int,
        max_model_len: int,
        hash_model: str,
        eos_token_ids: Collection[int],
    ) -> None:
        super().__init__(
            config,
            runner,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            hash_model=hash_model,
            eos_token_ids=eos_token_ids,
        )
        self._async_runner = runner
        self._flights: deque[_Flight] = deque()

    def has_work(self) -> bool:
        """Whether a step could make progress without an outside event; collecting one is progress."""
        return bool(self._flights) or super().has_work()

    def num_computed_tokens(self, request_id: str) -> int:
        """Return how many tokens of a request have their KV here, those on their way not counted."""
        seq = self._sequences[request_id]
        for flight in self._flights:
            for item, start in zip(flight.batch.items, flight.starts, strict=True):
                if item.seq is seq:
                    return start
        return super().num_computed_tokens(request_id)

    def step(self, now: float) -> list[StepOutput]:
        """Submit the next step, then wait for the one before it and account for that.

        Raises RunnerLostError where the runner can't compute anything from now on.
        The first step returns nothing; each later one what the step before drew, until has_work is false.
        """
        outputs = self.expire(now)
        if self._flights and not self._may_run_ahead():
            outputs += self._collect(now)
        batch = self.schedule(now)
        if batch.items:
            outputs += self._submit(batch)
        while len(self._flights) > (1 if batch.items else 0):
            outputs += self._collect(now)
        return outputs

    def _may_run_ahead(self) -> bool:
        """Whether every sequence that runs could take another block, so that none is preempted."""
        return self._pool.num_free >= len(self._scheduler.running)

    def _submit(self, batch: Batch) -> list[StepOutput]:
        try:
            pending = self._async_runner.submit(batch)
        except RunnerLostError:
            raise
        except Exception as error:
            logger.exception("a step of %d sequences could not be submitted", len(batch.items))
            return self.fail(batch, f"{type(error).__name__}: {error}")
        flight = _Flight(batch, pending, [item.seq.num_computed_tokens for item in batch.items])
        for item in batch.items:
            seq, samples = item.seq, item.samples
            seq.num_computed_tokens += item.num_tokens
            if samples and not seq.hold and seq.num_tokens + 1 < seq.max_num_tokens:
                seq.token_ids.append(PLACEHOLDER)
        self._flights.append(flight)
        return []

    def _collect(self, now: float) -> list[StepOutput]:
        """Wait for the oldest step and account for it. A failure costs the step that was built on it too."""
        flight = self._flights.popleft()
        with self._as_scheduled(flight):
            try:
                sampled = flight.pending.result()
                check_result(flight.batch, sampled)
            except RunnerLostError:
                raise
            except Exception as error:
                logger.exception("a step of %d sequences failed", len(flight.batch.items))
                outputs = self._fail_all(flight, f"{type(error).__name__}: {error}")
            else:
                outputs = self.update(flight.batch, sampled, now)
        self._pool.free(flight.freed)
        return outputs

    def _fail_all(self, flight: _Flight, error: str) -> list[StepOutput]:
        outputs = []
        for failed in (flight, *self._flights):
            outputs += self.fail(failed.batch, error)
        while self._flights:
            later = self._flights.popleft()
            with suppress(Exception):
                later.pending.result()  # until then it may write into blocks
            flight.freed += later.freed
        return outputs

    @contextmanager
    def _as_scheduled(self, flight: _Flight) -> Iterator[None]:
        """Take back what ran ahead of the flight's sequences; put it on again for those that still run."""
        ahead: list[tuple[Sequence, int, int]] = []
        for item, start in zip(flight.batch.items, flight.starts, strict=True):
            seq, num_placeholders = item.seq, 0
            while seq.token_ids[-1] == PLACEHOLDER:
                seq.token_ids.pop()
                num_placeholders += 1
            computed, seq.num_computed_tokens = seq.num_computed_tokens, start
            # One of them stands for what this step draws, which takes its place.
            own = 1 if item.samples and num_placeholders else 0
            ahead.append((seq, computed, num_placeholders - own))
        yield
        for seq, computed, num_placeholders in ahead:
            if seq.status is SequenceStatus.RUNNING:
                seq.num_computed_tokens = computed
                seq.token_ids += [PLACEHOLDER] * num_placeholders

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        if any(item.seq is seq for flight in self._flights for item in flight.batch.items):
            self._flights[-1].freed += seq.block_table
            seq.block_table = []
        super()._end(seq, reason)

    def _block_owners(self) -> Counter[int]:
        owners = super()._block_owners()
        for flight in self._flights:
            owners.update(flight.freed)
        return owners


def engine_for(
    config: EngineConfig,
    runner: Runner,
    *,
    num_blocks: int,
    max_model_len: int,
    hash_model: str,
    eos_token_ids: Collection[int],
) -> Engine:
    """Return an engine that overlaps its steps where the runner can; arguments are the Engine's."""
    if isinstance(runner, AsyncRunner):
        return OverlappedEngine(
            config,
            runner,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            hash_model=hash_model,
            eos_token_ids=eos_token_ids,
        )
    return Engine(
        config,
        runner,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        hash_model=hash_model,
        eos_token_ids=eos_token_ids,
    )
