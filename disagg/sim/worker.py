"""SimWorker: the live Engine stepped on virtual time. What service.Worker does with a thread and a clock.

    idle ──command──► apply ──has_work──► step in flight ──its seconds later──► update, report ─┐
                        ▲──────────────────────────────────────────────────────────────────────┘

As in the live worker, commands (add, release, activate) wait for the end of the step in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from disagg.config import EngineConfig
from disagg.engine.engine import Counters, Engine, Reservation
from disagg.engine.runner import Batch, ScheduledSequence
from disagg.errors import DisaggError
from disagg.hashing import short_hash
from disagg.routing.types import BlockEvents, WorkerReport
from disagg.sim.costs.base import Chunk, CostModel
from disagg.sim.decode_run import SAMPLED, DecodeRun, num_tokens
from disagg.sim.events import EventLoop
from disagg.sim.gaps import Gaps
from disagg.sim.machine import Job, Machine
from disagg.sim.pipeline import Pipeline
from disagg.sim.step_samples import StepSamples
from disagg.types import Request, SampledToken, StepOutput, WorkerInfo, WorkerStatus

# Empty batches in a row after which an engine is taken to be stuck: one can follow a preemption.
_MAX_EMPTY_STEPS = 64


class VirtualRunner:
    """Stands where a model would: it refuses no request, and the step that it is asked for is never run.

    Time passes between Engine.schedule and Engine.update instead, so `execute` has nothing to do.
    """

    def check_request(self, request: Request) -> None:
        pass

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        return [SAMPLED if item.samples else None for item in batch.items]


class Listener(Protocol):
    """Whoever follows the requests: the simulation."""

    def on_output(self, worker: SimWorker, output: StepOutput) -> None: ...

    def on_prefill_begun(self, worker: SimWorker, request_id: str) -> None:
        """Called where SimWorker.watch_prefills is set."""
        ...

    def on_reservation(self, worker: SimWorker, reservation: Reservation) -> None: ...

    def on_refused(self, worker: SimWorker, request_id: str, error: DisaggError) -> None: ...


@dataclass(slots=True)
class Usage:
    """Totals of one worker. busy_s: seconds in which a step ran."""

    busy_s: float = 0.0
    num_steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    decode_steps: int = 0


class SimWorker:
    """One worker. fast: take runs of decode steps as one, see disagg.sim.decode_run.

    sample_steps: report how long steps and pulls take, for routers that predict.
    arrived: KV of a hand-off is there before its request is added, so a reservation is active at once.
    pipeline: stages that its steps pass and share with other engines; machine: where they run beside those of
    other workers, and slowed, by what share of its time these then lengthen a step. Steps of either are taken
    singly. info: its incarnation changes when it is replaced. usage: over all incarnations. alive: neither
    lost nor stopped.
    """

    def __init__(
        self,
        info: WorkerInfo,
        config: EngineConfig,
        cost: CostModel,
        loop: EventLoop,
        listener: Listener,
        gaps: Gaps,
        *,
        pool: str = "",
        fast: bool = True,
        arrived: bool = False,
        watch_prefills: bool = False,
        sample_steps: bool = False,
        pipeline: Pipeline | None = None,
        machine: Machine | None = None,
        slowed: float = 0.0,
    ) -> None:
        self.info = info
        self.pool = pool
        self.usage = Usage()
        self.watch_prefills = watch_prefills
        self._samples = StepSamples() if sample_steps else None
        self._config = config
        self._cost = cost
        self._loop = loop
        self._listener = listener
        self._gaps = gaps
        self._pipeline = pipeline
        self._machine = machine
        self._slowed = slowed
        self._job: Job | None = None
        self._leaps = fast and pipeline is None and machine is None
        self._arrived = arrived
        self._slowdown = 1.0
        self._lines: dict[int, tuple[float, float]] = {}
        # Of the event that ends the step in flight; a leg that is cut short gets another.
        self._version = 0
        self._past = Counters(0, 0, 0)
        self._start()

    def _start(self) -> None:
        """Begin with nothing, as a process does."""
        info, config = self.info, self._config
        self.engine = Engine(
            config,
            VirtualRunner(),
            num_blocks=info.kv_blocks_total + 1,
            max_model_len=info.max_model_len,
            hash_model=info.model_fingerprint,
            eos_token_ids=(),
        )
        self._run = DecodeRun(self.engine, hashing=config.enable_prefix_caching) if self._leaps else None
        if self._samples is not None:
            self._samples.profile(self._cost, config)
        self._commands: list[Callable[[], None]] = []
        self._in_flight = False
        # What the step in flight computes besides the decodes of the run.
        self._items: list[ScheduledSequence] = []
        # When requests that were handed over had their last token, and how long that is ago for those whose
        # next one comes with the step in flight.
        self._since: dict[str, float] = {}
        self._late: list[float] = []
        self.alive = True
        self._num_reports = 0

    # -- commands ------------------------------------------------------------------------------------

    def add(self, request: Request, *, hold: bool = False, remote_kv: int = 0, since: float = 0.0) -> None:
        """Queue a request. since: where KV is to come, when its last token was out."""
        if remote_kv:
            self._since[request.request_id] = since
        self._command(lambda: self._add(request, hold, remote_kv))

    def _add(self, request: Request, hold: bool, remote_kv: int) -> None:
        if self._run is not None:
            self._run.expect(len(request.token_ids) + (request.params.max_tokens or 0))
        try:
            self.engine.add(request, now=self._loop.now, hold=hold, remote_kv=remote_kv)
        except DisaggError as error:
            self._since.pop(request.request_id, None)
            self._listener.on_refused(self, request.request_id, error)

    def release(self, request_id: str) -> None:
        self._command(lambda: _drop(self.engine.release(request_id)))

    def activate(self, request_id: str, num_computed_tokens: int) -> None:
        self._command(lambda: self._activate(request_id, num_computed_tokens))

    def _activate(self, request_id: str, num_computed_tokens: int) -> None:
        self.engine.activate(request_id, num_computed_tokens, self._loop.now)
        self._handed_over(request_id)
        if self._run is not None:
            self._run.join_if_ready(request_id)

    def _handed_over(self, request_id: str) -> None:
        since = self._since.pop(request_id, None)
        if since is not None:
            self._late.append(self._loop.now - since)

    def slow_down(self, factor: float) -> None:
        """Let every step that begins from now on take `factor` times as long."""
        self._slowdown = factor
        # A leg of many steps ends with the one that runs.
        self._command(_nothing)

    def _command(self, command: Callable[[], None]) -> None:
        if not self.alive:
            return
        self._commands.append(command)
        if not self._in_flight:
            self._continue()
        elif self._run is not None and (end := self._run.cut(self._loop.now)) is not None:
            self._version += 1
            self._loop.at(end, self._end_leg, self._version)

    # -- steps ---------------------------------------------------------------------------------------

    def _continue(self) -> None:
        """At a step's boundary: apply commands and begin the next step, if there is one."""
        # Set before commands run: what they cause must queue here rather than step inside a step.
        self._in_flight = True
        if self._pipeline is not None and self._pipeline.open_at > self._loop.now:
            self._version += 1
            self._loop.at(self._pipeline.open_at, self._resume, self._version)
            return
        for _ in range(_MAX_EMPTY_STEPS):
            while self._commands:
                commands, self._commands = self._commands, []
                for command in commands:
                    command()
            began = self._begin_step()
            self._report_reservations()
            if began:
                return
            if not self.engine.has_work() and not self._commands:
                break
        else:
            raise RuntimeError(f"{self.info.worker_id} has work and never a batch")
        self._in_flight = False

    def _resume(self, version: int) -> None:
        if version == self._version:
            self._continue()

    def _begin_step(self) -> bool:
        """Begin a step, or a leg of many; False where the Scheduler has nothing to run."""
        run = self._run
        if run is None:
            batch = self._next_batch()
            if batch.items:
                self._begin_exact(batch)
                return True
        elif run.goes_on():
            self._begin_leg(run, [], single=False)
            return True
        elif not run.engine_is_empty:
            items = self._beside(run)
            if items or run.size:
                single = bool(items or self.engine._scheduler._reservations)
                self._begin_leg(run, items, single=single)
                return True
        return False

    def _next_batch(self) -> Batch:
        now = self._loop.now
        batch = self.engine.schedule(now)
        # Room for one more may show only once those before it are active.
        while self._arrived and self._take_arrived():
            batch = self.engine.schedule(now)
        return batch

    def _beside(self, run: DecodeRun) -> list[ScheduledSequence]:
        """See that the run has exactly the next step's decodes; return the rest: chunks of prompts."""
        if run.only_newcomers_matter:
            items = run.newcomers(self._loop.now)
            if not self._arrived or not self._take_arrived():
                return self._join(run, items)
        else:
            run.settle()
        batch = self._next_batch()
        chunks = self._join(run, run.without(batch.items))
        if run.size != len(batch.items) - len(chunks):
            others = {item.seq for item in chunks}
            run.keep(item.seq for item in batch.items if item.seq not in others)
        return chunks

    @staticmethod
    def _join(run: DecodeRun, items: Iterable[ScheduledSequence]) -> list[ScheduledSequence]:
        """Let those of newcomers join the run that decode; return the others."""
        chunks = []
        for item in items:
            if _is_decode(item):
                run.join(item.seq)
            else:
                chunks.append(item)
        return chunks

    def _begin_leg(self, run: DecodeRun, items: list[ScheduledSequence], *, single: bool) -> None:
        if items:
            chunks = self._chunks(items)
            seconds = self._cost.step_s(chunks, run.size, run.context)
            if self._samples is not None:
                self._samples.step(seconds * self._slowdown, chunks, run.size, run.context)
            fixed, slope = seconds, 0.0
        else:
            line = self._lines.get(run.size)
            if line is None:
                line = self._lines[run.size] = self._cost.decode_line(run.size)
            fixed, slope = line
            if self._samples is not None:
                self._samples.step((fixed + slope * run.context) * self._slowdown, (), run.size, run.context)
        self._items = items
        end = run.begin(self._loop.now, fixed * self._slowdown, slope * self._slowdown, single=single)
        self._version += 1
        self._loop.at(end, self._end_leg, self._version)

    def _end_leg(self, version: int) -> None:
        run = self._run
        if version != self._version or run is None:
            return
        self._count(run.leg_steps, run.seconds(run.leg_steps), run.size)
        prompts = self._items
        items = run.end() + prompts
        if not items:
            self._continue()
            return
        self._items = []
        sampled = [SAMPLED if item.samples else None for item in items]
        outputs = self.engine.update(Batch(tuple(items)), sampled, self._loop.now)
        for item in prompts:
            run.join_if_ready(item.seq.request.request_id)
        self._after_step(outputs)

    def _begin_exact(self, batch: Batch) -> None:
        decodes = [item.seq for item in batch.items if _is_decode(item)]
        chunks = self._chunks([item for item in batch.items if not _is_decode(item)])
        context = sum(len(seq.token_ids) for seq in decodes)
        seconds = self._cost.step_s(chunks, len(decodes), context) * self._slowdown
        if self._samples is not None:
            self._samples.step(seconds, chunks, len(decodes), context)
        self._version += 1
        version, now = self._version, self._loop.now
        if self._machine is not None:
            self._job = self._machine.run(
                seconds, self._slowed, lambda took: self._end_exact((batch, version, took, len(decodes)))
            )
            return
        end = now + seconds if self._pipeline is None else self._pipeline.enter(now, seconds)
        self._loop.at(end, self._end_exact, (batch, version, seconds, len(decodes)))

    def _end_exact(self, event: tuple[Batch, int, float, int]) -> None:
        batch, version, seconds, num_decodes = event
        if version == self._version:
            self._count(1, seconds, num_decodes)
            sampled = [SAMPLED if item.samples else None for item in batch.items]
            self._after_step(self.engine.update(batch, sampled, self._loop.now))

    def _chunks(self, items: list[ScheduledSequence]) -> list[Chunk]:
        chunks = []
        for item in items:
            seq = item.seq
            chunks.append(Chunk(item.num_tokens, seq.num_computed_tokens))
            self.usage.prompt_tokens += item.num_tokens
            if self.watch_prefills and seq.hold:
                self._listener.on_prefill_begun(self, seq.request.request_id)
        return chunks

    def _count(self, steps: int, seconds: float, num_decodes: int) -> None:
        usage = self.usage
        usage.busy_s += seconds
        usage.num_steps += steps
        if num_decodes:
            usage.decode_steps += steps
            usage.output_tokens += steps * num_decodes
            step_s = seconds / steps
            late = self._late
            self._gaps.add(step_s, steps * num_decodes - len(late))
            if late:
                for waited in late:
                    self._gaps.add(waited + step_s, 1)
                self._late = []

    def _after_step(self, outputs: list[StepOutput]) -> None:
        # Links follow a prefill by its times, see links.py, not by its blocks.
        self.engine.take_progress()
        for output in outputs:
            self._listener.on_output(self, output)
        self._continue()

    # -- hand-off ------------------------------------------------------------------------------------

    def _report_reservations(self) -> None:
        if not self.engine._scheduler._reservations:
            return
        for reservation in self.engine.take_reservations():
            self._listener.on_reservation(self, reservation)

    def _take_arrived(self) -> list[str]:
        """Activate what was just reserved, since its KV is here; return whose that was."""
        reservations = self.engine.take_reservations()
        for reservation in reservations:
            received = len(reservation.block_ids) * self.info.block_size
            self._listener.on_reservation(self, reservation)
            self.engine.activate(reservation.request_id, received, self._loop.now)
            self._handed_over(reservation.request_id)
        return [reservation.request_id for reservation in reservations]

    # -- state ---------------------------------------------------------------------------------------

    def report(self, *, with_blocks: bool, snapshot: bool = False) -> WorkerReport:
        """Return what a live worker's heartbeat says now. snapshot: of its blocks, all that it has."""
        run, lagging = self._run, 0
        if run is not None:
            if self._in_flight:
                self._count_ended_steps(run)
            if run.must_settle:
                run.settle(in_flight=self._in_flight)
            elif run.size:
                lagging = run.missing_blocks()
        load = self.engine.load()
        if lagging:
            load = load._replace(kv_blocks_used=load.kv_blocks_used + lagging)
        blocks = self._block_events(snapshot) if with_blocks else None
        if self._samples is None:
            return WorkerReport(self.info, WorkerStatus.READY, load, blocks)
        steps, transfers = self._samples.take()
        return WorkerReport(self.info, WorkerStatus.READY, load, blocks, steps, transfers)

    def pulled(self, seconds: float, num_tokens: int, num_others: int) -> None:
        """Note how long a pull took, beside so many others."""
        if self._samples is not None:
            self._samples.pull(seconds, num_tokens, num_others)

    def _count_ended_steps(self, run: DecodeRun) -> None:
        steps = min(run.steps_done(self._loop.now), run.leg_steps - 1)
        if steps > 0:
            self._count(steps, run.seconds(steps), run.size)
            run.split(steps)

    def _block_events(self, snapshot: bool) -> BlockEvents | None:
        events = self.engine.block_events()
        snapshot = snapshot or self._num_reports == 0
        if not snapshot and not events.stored and not events.removed:
            return None
        self._num_reports += 1
        return BlockEvents(
            self._num_reports - 1,
            [short_hash(item) for item in (self.engine.cached_hashes() if snapshot else events.stored)],
            [] if snapshot else [short_hash(item) for item in events.removed],
            snapshot=snapshot,
        )

    @property
    def counters(self) -> Counters:
        """The engine's totals, over all incarnations."""
        return _sum(self._past, self.engine.counters)

    # -- death ---------------------------------------------------------------------------------------

    def die(self) -> dict[str, int]:
        """Stop for good: nothing that is in flight ends, no command is taken.

        Returns how many tokens, prompt and output, each of its requests had.
        """
        if self._run is not None:
            if self._in_flight:
                self._count_ended_steps(self._run)
            self._run.settle(in_flight=self._in_flight)
        self.alive = False
        self._version += 1
        if self._machine is not None and self._job is not None:
            self._machine.drop(self._job)
        return num_tokens(self.engine)

    def replace(self) -> None:
        """Begin anew under another incarnation, after `die`."""
        self._past = self.counters
        self.info = replace(self.info, incarnation=str(int(self.info.incarnation) + 1))
        self._start()

    @property
    def busy(self) -> bool:
        """Whether a step is in flight."""
        return self.alive and self._in_flight


def _is_decode(item: ScheduledSequence) -> bool:
    """Return whether an item computes the token that its sequence drew last, and no more."""
    return item.num_tokens == 1 and len(item.seq.token_ids) > item.seq.request.num_prompt_tokens


def _nothing() -> None:
    """Make a command that only cuts the leg."""


def _sum(one: Counters, other: Counters) -> Counters:
    return Counters(
        one.prefix_queries + other.prefix_queries,
        one.prefix_hits + other.prefix_hits,
        one.preemptions + other.preemptions,
    )


def _drop(_value: object) -> None:
    """Make a command of a call whose result says only whether there was anything to do."""
