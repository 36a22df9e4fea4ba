"""The fast path: decode steps of one engine that need no decision, taken many at a time.

Once the live Scheduler has put every running sequence into a batch of decodes, it would choose the same
batch again until a sequence ends, blocks run short, or a command brings it something to admit. A DecodeRun
repeats that choice. It decides nothing itself: as soon as there is anything to decide, the engine is brought
up to date and its Scheduler asked.

    leg    steps from one boundary at which something happened to the next
    lag    steps that a sequence has made and its engine does not know of yet

Tokens, blocks and hashes are accounted for late, through the engine's own pool and `Scheduler.advance`, and
a sequence that ends goes through `Engine.update`. What the engine says of itself is the same as if every
step had been taken singly; a test compares the two. This module alone reads the engine's inside.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from disagg.engine.engine import Engine
from disagg.engine.runner import ScheduledSequence
from disagg.engine.sequence import Sequence, SequenceStatus
from disagg.engine.waiting_queue import rank
from disagg.types import SampledToken

OUTPUT_TOKEN = -1
SAMPLED = SampledToken(OUTPUT_TOKEN)


class DecodeRun:
    """The running sequences of one engine that decode, each of which takes part in every step.

    size: how many there are. context: tokens that they attend to in the next step, summed.
    """

    def __init__(self, engine: Engine, *, hashing: bool) -> None:
        self._engine = engine
        self._scheduler = engine._scheduler
        self._pool = engine._pool
        # With a prefix cache it matters in which order blocks are taken, so nothing may lag then.
        self._may_lag = not hashing
        # The step up to which each sequence's engine state is true.
        self._members: dict[Sequence, int] = {}
        self._ends: list[tuple[int, tuple[int, float, int], Sequence]] = []
        self._steps = 0
        self._settled_at = 0
        # Blocks of the longest sequence that was ever added.
        self._longest = 0
        self.size = 0
        self.context = 0
        # The leg under way.
        self.leg_steps = 0
        self._start = 0.0
        self._fixed = 0.0
        self._slope = 0.0

    # -- who takes part ------------------------------------------------------------------------------

    def expect(self, max_num_tokens: int) -> None:
        """Note a request that may join one day, and how long it may get."""
        num_blocks = -(-max_num_tokens // self._pool.block_size)
        if num_blocks > self._longest:
            self._longest = num_blocks

    def without(self, items: Iterable[ScheduledSequence]) -> list[ScheduledSequence]:
        """Return the items of sequences that don't take part."""
        members = self._members
        return [item for item in items if item.seq not in members]

    def join(self, seq: Sequence) -> None:
        """Let a running sequence whose last token alone is to be computed take part from now on."""
        self._members[seq] = self._steps
        last = self._steps + seq.max_num_tokens - len(seq.token_ids)
        heapq.heappush(self._ends, (last, rank(seq), seq))
        self.size += 1
        self.context += len(seq.token_ids)

    def join_if_ready(self, request_id: str) -> None:
        """Let a request take part if it runs and decodes; else the Scheduler has to look at it."""
        seq = self._engine._sequences.get(request_id)
        if (
            seq is not None
            and seq not in self._members
            and seq.status is SequenceStatus.RUNNING
            and seq.num_uncomputed_tokens == 1
            and len(seq.token_ids) > seq.request.num_prompt_tokens
        ):
            self.join(seq)

    def keep(self, seqs: Iterable[Sequence]) -> None:
        """Leave only these, which are a part of those that take part; all must be settled."""
        kept = set(seqs)
        self._members = {seq: step for seq, step in self._members.items() if seq in kept}
        self._ends = [entry for entry in self._ends if entry[2] in kept]
        heapq.heapify(self._ends)
        self.size = len(self._members)
        self.context = sum(len(seq.token_ids) for seq in self._members)

    # -- is there anything to decide? ----------------------------------------------------------------

    @property
    def engine_is_empty(self) -> bool:
        """Whether nothing runs or waits, so that the Scheduler need not be asked."""
        return not self._scheduler.running and not self._scheduler.waiting.size

    def goes_on(self) -> bool:
        """Return whether the Scheduler would choose exactly these sequences again, whatever it looked at."""
        scheduler = self._scheduler
        return (
            self.size == len(scheduler.running) > 0
            and not scheduler.waiting.size
            and not scheduler._reservations
            and self._may_lag
            and self._growth(1) <= self._pool.num_free
        )

    @property
    def only_newcomers_matter(self) -> bool:
        """Whether of the next step nothing is to be decided but who joins it.

        That is so where all that runs takes part and what lags, runs and waits fits into what is free: then
        nobody is preempted and everybody is admitted whom the number of sequences allows. So the Scheduler
        decides on the engine's state, though that lags, as it would on the true one.
        """
        scheduler = self._scheduler
        if self.size != len(scheduler.running) or not self._may_lag:
            return False
        newcomers = scheduler.waiting.size * self._longest + len(scheduler.receiving)
        return self._growth(1) + self.size + newcomers <= self._pool.num_free

    def newcomers(self, now: float) -> tuple[ScheduledSequence, ...]:
        """Let the Scheduler decide who joins these sequences in the next step."""
        return self._scheduler.schedule_beside(self.size, now).items

    def _growth(self, steps: int) -> int:
        """Return how many blocks these sequences take at most in their lag and so many steps more."""
        lag = self._steps - self._settled_at
        return self.size * ((lag + steps) // self._pool.block_size + 1)

    # -- legs ----------------------------------------------------------------------------------------

    def begin(self, now: float, fixed: float, slope: float, *, single: bool) -> float:
        """Begin a leg of one step, or of as many as surely need no decision; return when it ends.

        Step i of it costs fixed + slope * (context + i * size), i from 0.
        """
        self._start, self._fixed, self._slope = now, fixed, slope
        if single:
            self.leg_steps = 1
            return now + fixed + slope * self.context
        steps = self._ends[0][0] - self._steps
        free = self._pool.num_free
        if self._growth(steps) > free:
            # A sequence may start a block at once, then one every `size` steps.
            lag, size = self._steps - self._settled_at, self._pool.block_size
            steps = min(steps, max(1, (free // self.size - 1) * size - lag))
        self.leg_steps = steps
        return now + steps * (fixed + slope * (self.context + self.size * (steps - 1) / 2))

    def seconds(self, steps: int) -> float:
        """Return how long the first `steps` steps of the leg take."""
        return steps * (self._fixed + self._slope * (self.context + self.size * (steps - 1) / 2))

    def steps_done(self, now: float) -> int:
        """Return how many steps of the leg have ended by `now`."""
        elapsed = now - self._start
        bend = self._slope * self.size / 2
        linear = self._fixed + self._slope * self.context - bend
        if bend > 0:
            guess = (math.sqrt(linear * linear + 4 * bend * elapsed) - linear) / (2 * bend)
        else:
            guess = elapsed / linear
        steps = min(int(guess), self.leg_steps)
        while steps < self.leg_steps and self.seconds(steps + 1) <= elapsed:
            steps += 1
        while steps > 0 and self.seconds(steps) > elapsed:
            steps -= 1
        return steps

    def cut(self, now: float) -> float | None:
        """End the leg with the step that runs at `now`, and return when; None if that is its last anyway."""
        if self.leg_steps == 1:
            return None
        steps = self.steps_done(now) + 1
        if steps >= self.leg_steps:
            return None
        self.leg_steps = steps
        return self._start + self.seconds(steps)

    def split(self, steps: int) -> None:
        """Count the first `steps` steps of the leg as made; more must follow."""
        self._start += self.seconds(steps)
        self._pass(steps)
        self.leg_steps -= steps

    def end(self) -> list[ScheduledSequence]:
        """End the leg. Return the last step of each sequence that ends with it, for Engine.update."""
        self._pass(self.leg_steps)
        ending = []
        while self._ends and self._ends[0][0] == self._steps:
            seq = heapq.heappop(self._ends)[2]
            self._advance(seq, self._steps - self._members.pop(seq) - 1, ahead=1)
            self.size -= 1
            self.context -= len(seq.token_ids) + 1
            ending.append(ScheduledSequence(seq, 1))
        return ending

    def _pass(self, steps: int) -> None:
        self._steps += steps
        self.context += steps * self.size

    # -- accounting ----------------------------------------------------------------------------------

    @property
    def must_settle(self) -> bool:
        """Whether what the engine says of itself needs more than a count of blocks to be up to date."""
        return not self._may_lag

    def missing_blocks(self) -> int:
        """Return how many blocks these sequences have, amid a leg, that the engine does not know of yet."""
        size, steps = self._pool.block_size, self._steps
        return sum(
            [
                -((step - steps - len(seq.token_ids)) // size) - len(seq.block_table)
                for seq, step in self._members.items()
            ]
        )

    def settle(self, *, in_flight: bool = False) -> None:
        """Bring the engine up to date. in_flight: the next step has begun, so there are blocks for it."""
        now, ahead = self._steps, int(in_flight)
        for seq, step in self._members.items():
            if step != now or in_flight:
                self._advance(seq, now - step, ahead)
                self._members[seq] = now
        self._settled_at = now

    def _advance(self, seq: Sequence, steps: int, ahead: int) -> None:
        """Give a sequence `steps` tokens and the blocks for them."""
        if steps:
            seq.token_ids += [OUTPUT_TOKEN] * steps
        missing = -(-(len(seq.token_ids) - 1 + ahead) // self._pool.block_size) - len(seq.block_table)
        if missing > 0:
            blocks = self._pool.allocate(missing)
            if blocks is None:
                raise RuntimeError(f"no blocks for {seq.request_id} in a run that had room")
            seq.block_table += blocks
        if steps:
            self._scheduler.advance(seq, steps)


def num_tokens(engine: Engine) -> dict[str, int]:
    """Return the tokens, prompt and output, of each request in an engine that is up to date."""
    return {request_id: len(seq.token_ids) for request_id, seq in engine._sequences.items()}
