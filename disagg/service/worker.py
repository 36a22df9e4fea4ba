"""Worker: one thread steps the engine; the asyncio side enqueues commands and forwards what a step made.

    front end ══Session══►  asyncio loop  ──commands──►  engine thread
              ◄═outputs═══                ◄──one call per step──

The engine thread owns the engine: nothing else touches it. Commands are closures on a queue, on which the
thread sleeps when there is no work, so an idle worker uses no CPU. Everything else here (sessions, leases,
pulls) belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import grpc
import grpc.aio

from disagg.engine.engine import Engine, Progress, Reservation
from disagg.errors import DisaggError, InvalidRequestError, KVLostError, LayoutMismatchError
from disagg.hashing import BlockHash
from disagg.service import wire
from disagg.service.metrics import WorkerMetrics
from disagg.service.receiver import Incoming, KVPuller, KVReceiver
from disagg.types import KVHandle, Request, Role, StepOutput, WorkerInfo, WorkerLoad, WorkerStatus
from disagg.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

# Placements that were made before the router heard of a drain arrive within this time.
DRAIN_QUIET_S = 0.5

Context = grpc.aio.ServicerContext[Any, Any]


class KVPublisher(Protocol):
    """The side of a hand-off that computed the KV. num_expired: leases that ran out so far."""

    @property
    def num_expired(self) -> int: ...

    def open(self, request_id: str, key: bytes, num_tokens: int) -> KVHandle:
        """Open a lease on KV that is yet to be computed. The owner is told once, through its callback, when
        it has ended. Raises InvalidRequestError.
        """
        ...

    def progress(self, request_id: str, epoch: int, block_ids: Sequence[int], *, complete: bool) -> None:
        """Let peers read what is computed by now; from `complete` on only the lease keeps the blocks."""
        ...

    def withdraw(self, request_id: str) -> None:
        """Let nobody read a request's blocks, from now on; on any thread."""
        ...

    def drop(self, request_id: str) -> None:
        """End a lease from the owner's side."""
        ...


class StateReporter(Protocol):
    """Whoever tells the router how this worker is."""

    def report(
        self,
        status: WorkerStatus,
        load: WorkerLoad,
        *,
        stored: Sequence[BlockHash] = (),
        removed: Sequence[BlockHash] = (),
    ) -> None: ...

    def relabel(self, info: WorkerInfo) -> None:
        """Tell the router at once of another role."""
        ...


@dataclass(slots=True)
class _Session:
    """One front end's stream, and which requests it owns."""

    outbox: asyncio.Queue[worker_pb2.SequenceOutput] = field(default_factory=asyncio.Queue)
    requests: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Tracked:
    """What the loop knows of a request inside the engine."""

    session: _Session
    published: bool = False
    incoming: Incoming | None = None

    @property
    def receiving(self) -> bool:
        """Whether its KV is still on its way."""
        return self.incoming is not None and not (self.incoming.task is None or self.incoming.task.done())


@dataclass(frozen=True, slots=True)
class _StepReport:
    """What one step hands from the engine thread to the loop."""

    outputs: list[StepOutput]
    progress: list[Progress]
    load: WorkerLoad
    step_s: float | None
    stored: list[BlockHash]
    removed: list[BlockHash]


class Worker(worker_pb2_grpc.WorkerServicer):
    """Serves sessions over one engine. Create it on the loop that will run it."""

    def __init__(
        self,
        info: WorkerInfo,
        engine: Engine,
        publisher: KVPublisher,
        puller: KVPuller,
        reporter: StateReporter,
        metrics: WorkerMetrics,
        clock: Callable[[], float] = time.monotonic,
        on_engine_thread: Callable[[], None] = lambda: None,
        on_pulled: Callable[[float, int, int], None] = lambda seconds, num_tokens, num_others: None,
    ) -> None:
        self.info = info
        self._on_engine_thread = on_engine_thread
        self._engine = engine
        engine.on_hold_lost(publisher.withdraw)
        engine.on_scheduled(self._on_scheduled)
        self._publisher = publisher
        self._puller = puller
        self._reporter = reporter
        self._metrics = metrics
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._receiver = KVReceiver(self, puller, info.block_size, lambda: self._metrics, on_pulled)
        self._tracked: dict[str, _Tracked] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        # Set while no request is here in any state, published KV included.
        self._idle = asyncio.Event()
        self._idle.set()
        self._status = WorkerStatus.READY
        # As of the last step or command; the loop's copy.
        self.load = WorkerLoad()
        # Resolves when the engine thread ends, with its exception if it died of one.
        self.stopped: asyncio.Future[None] = self._loop.create_future()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._reporter.report(self._status, WorkerLoad())

    async def drain(self) -> None:
        """Take no new placements; return when everything that was placed here has ended.

        What was placed before the router heard of it is still served, and `enlist` ends it at any time.
        """
        self._set_status(WorkerStatus.DRAINING)
        while True:
            await self._idle.wait()
            await asyncio.sleep(DRAIN_QUIET_S)
            if self._idle.is_set():
                return

    def enlist(self, role: Role, max_prefill_tokens: int | None) -> None:
        """Take placements as a member of `role`'s pool, with its budget for prompts beside streams."""
        self.info = replace(self.info, role=role, max_prefill_tokens=max_prefill_tokens or 0)
        self._commands.put(lambda: self._engine.limit_prefill(max_prefill_tokens))
        self._metrics = self._metrics.under(self.info)
        self._reporter.relabel(self.info)
        self._set_status(WorkerStatus.READY)

    def _set_status(self, status: WorkerStatus) -> None:
        self._status = status
        self._reporter.report(status, self.load)

    async def stop(self) -> None:
        """End the engine thread after its current step. Requests in it are cut off; sessions see EOF."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fail(self, error: Exception) -> None:
        """End `stopped` with what the runner found out between steps; from any thread."""
        self._to_loop(self._set_stopped, error)

    def on_lease_ended(self, request_id: str) -> None:
        """Give the blocks of published KV back, if it has any by now; the publisher calls this once per
        lease, on the loop.
        """
        self._forget(request_id)
        self.abort(request_id)

    def note_pulled_again(self) -> None:
        """Count a pull that the puller tries once more."""
        self._metrics.observe_recovery("pull_again")

    # -- engine thread ---------------------------------------------------------------------------

    def _run_engine(self) -> None:
        error: BaseException | None = None
        try:
            self._on_engine_thread()
            while self._apply_commands():
                if self._engine.has_work():
                    started = self._clock()
                    outputs = self._engine.step(started)
                    step_s = self._clock() - started
                    outputs = [_with_last_step(output, step_s) for output in outputs]
                    self._to_loop(self._after_step, self._step_report(outputs, step_s))
        except BaseException as caught:
            # A step's own failure is handled by the engine; reaching this point is a defect, and a worker
            # whose engine is gone must not look healthy.
            logger.exception("engine thread died")
            error = caught
        self._to_loop(self._set_stopped, error)

    def _apply_commands(self) -> bool:
        """Run queued commands; sleep for one if the engine has nothing to do. False means stop."""
        ran = False
        while True:
            try:
                command = self._commands.get(block=not ran and not self._engine.has_work())
            except queue.Empty:
                break
            if command is None:
                return False
            command()
            ran = True
        if ran and not self._engine.has_work():
            # Nothing will step, yet loads and blocks may have changed (a release, an abort).
            self._to_loop(self._after_step, self._step_report([]))
        return True

    def _on_scheduled(self) -> None:
        """Tell before the step what need not wait for its end: peers may pull while it is computed."""
        reservations, progress = self._engine.take_reservations(), self._engine.take_progress()
        if reservations or progress:
            self._to_loop(self._after_schedule, reservations, progress)

    def _step_report(self, outputs: list[StepOutput], step_s: float | None = None) -> _StepReport:
        events = self._engine.block_events()
        return _StepReport(
            outputs=outputs,
            progress=self._engine.take_progress(),
            load=self._engine.load(),
            step_s=step_s,
            stored=list(events.stored),
            removed=list(events.removed),
        )

    def _to_loop(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed: the process is going away and nobody is left to tell.
            logger.debug("loop closed before the engine thread ended")

    # -- loop side: what a step made ---------------------------------------------------------------

    def _set_stopped(self, error: BaseException | None) -> None:
        if self.stopped.done():
            return
        if error is None:
            self.stopped.set_result(None)
        else:
            self.stopped.set_exception(error)

    def _after_schedule(self, reservations: list[Reservation], progress: list[Progress]) -> None:
        # One that needed no copy runs already, and may even end in this step: its outputs come later.
        for reservation in reservations:
            self._reserved(reservation)
        self._publish(progress)

    def _publish(self, progress: list[Progress]) -> None:
        for step in progress:
            self._publisher.progress(step.request_id, step.epoch, step.block_ids, complete=step.complete)

    def _after_step(self, report: _StepReport) -> None:
        for output in report.outputs:
            self._forward(output)
        self._publish(report.progress)
        self.load = report.load
        self._metrics.observe_engine(report.load, self._engine_counters())
        if report.step_s is not None:
            self._metrics.observe_step(report.step_s)
        self._reporter.report(self._status, report.load, stored=report.stored, removed=report.removed)

    def _engine_counters(self) -> tuple[int, int, int]:
        counters = self._engine.counters
        return counters.prefix_queries, counters.prefix_hits, counters.preemptions

    def _forward(self, output: StepOutput) -> None:
        tracked = self._tracked.get(output.request_id)
        if tracked is None:
            # Cancelled while the step ran; its abort is on the queue, and so is the release of held blocks.
            return
        tracked.session.outbox.put_nowait(wire.output_to_proto(output))
        if output.finish_reason is not None:
            self._leave(output.request_id, tracked)

    def _leave(self, request_id: str, tracked: _Tracked) -> None:
        """Forget a request that the engine has not, or not any more."""
        self._forget(request_id)
        if tracked.published:
            # Nothing will be held: it ended with its first token, a deadline or an error.
            self._publisher.drop(request_id)
        if tracked.receiving:
            self._spawn(self._stop_receiving(tracked))

    def _forget(self, request_id: str) -> None:
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            tracked.session.requests.discard(request_id)
        if not self._tracked:
            self._idle.set()

    # -- loop side: commands -----------------------------------------------------------------------

    def _submit(self, session: _Session, message: worker_pb2.Submit) -> None:
        try:
            request = wire.request_from_proto(message, now=self._clock())
            handle = wire.handle_from_proto(message.handle) if message.HasField("handle") else None
            if request.request_id in self._tracked:
                raise InvalidRequestError("request_id is in use", param="request_id")
            if message.awaits_token and handle is None:
                raise InvalidRequestError("awaits_token without a handle", param="awaits_token")
            if handle is not None and handle.num_tokens >= len(request.token_ids) + message.awaits_token:
                raise InvalidRequestError("handle covers more than the request's tokens", param="handle")
            if message.hold_key and handle is None:
                self._publisher.open(request.request_id, message.hold_key, len(request.token_ids))
        except DisaggError as error:
            session.outbox.put_nowait(wire.error_to_proto(message.request_id, error))
            return
        tracked = self._tracked[request.request_id] = _Tracked(session)
        self._idle.clear()
        session.requests.add(request.request_id)
        if handle is not None:
            tracked.incoming = self._receiver.incoming(
                request, handle, awaits_token=message.awaits_token, gives_up=message.gives_up
            )
            tracked.incoming.task = self._spawn(self._receive(tracked, tracked.incoming))
            return
        tracked.published = bool(message.hold_key)
        self._commands.put(lambda: self._add(request, hold=tracked.published))

    def _add(
        self, request: Request, *, hold: bool = False, remote_kv: int = 0, awaits_token: bool = False
    ) -> None:
        try:
            self._engine.add(
                request, now=self._clock(), hold=hold, remote_kv=remote_kv, awaits_token=awaits_token
            )
        except DisaggError as error:
            self._to_loop(self._refuse, request.request_id, error)

    def _refuse(self, request_id: str, error: DisaggError) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if tracked.incoming is not None:
            self._receiver.refused(tracked.incoming, error)
            return
        tracked.session.outbox.put_nowait(wire.error_to_proto(request_id, error))
        self._leave(request_id, tracked)

    def _proceed(self, message: worker_pb2.Proceed) -> None:
        tracked = self._tracked.get(message.request_id)
        if tracked is not None and tracked.incoming is not None:
            self._receiver.token_came(tracked.incoming, message.token_id)

    def _cancel(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if tracked.published:
            # Ends the lease, which aborts the request and so frees its blocks.
            self._publisher.drop(request_id)
            return
        if not tracked.receiving:
            self.abort(request_id)
        self._leave(request_id, tracked)

    async def _stop_receiving(self, tracked: _Tracked) -> None:
        """Free a receiving request's blocks once nobody writes into them any more.

        Its lease is not ended: the front end may be cut off from this worker alone, and another one pull by
        now. Where the front end is gone too, the prefill worker knows and drops it.
        """
        incoming = tracked.incoming
        if incoming is None or incoming.task is None:
            return
        incoming.task.cancel()
        await asyncio.gather(incoming.task, return_exceptions=True)
        self.abort(incoming.request_id)
        self._puller.leave(incoming.handle)

    # -- loop side: the engine's commands ------------------------------------------------------------

    def add(self, request: Request, *, remote_kv: int, awaits_token: bool) -> None:
        self._commands.put(lambda: self._add(request, remote_kv=remote_kv, awaits_token=awaits_token))

    def abort(self, request_id: str) -> None:
        self._commands.put(lambda: _ignore(self._engine.abort(request_id)))

    def token_came(self, request_id: str, token_id: int) -> None:
        self._commands.put(lambda: self._engine.token_came(request_id, token_id))

    def activate(self, request_id: str, num_computed_tokens: int) -> None:
        self._commands.put(lambda: self._engine.activate(request_id, num_computed_tokens, self._clock()))

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- loop side: hand-off -----------------------------------------------------------------------

    def _reserved(self, reservation: Reservation) -> None:
        tracked = self._tracked.get(reservation.request_id)
        if tracked is None or tracked.incoming is None or tracked.incoming.reserved is None:
            return  # cancelled meanwhile; the abort is on the queue
        if not tracked.incoming.reserved.done():
            tracked.incoming.reserved.set_result(reservation)

    async def _receive(self, tracked: _Tracked, incoming: Incoming) -> None:
        request_id = incoming.request_id
        try:
            await self._receiver.receive(incoming)
        except Exception as error:
            if not isinstance(error, DisaggError):
                logger.exception("request %s: its hand-off failed", request_id)
                error = DisaggError(f"the hand-off failed: {type(error).__name__}")
            self.abort(request_id)
            tracked.session.outbox.put_nowait(wire.error_to_proto(request_id, error))
            self._forget(request_id)
            return
        output = worker_pb2.SequenceOutput(request_id=request_id, transfer=incoming.report)
        tracked.session.outbox.put_nowait(output)

    # -- gRPC --------------------------------------------------------------------------------------

    # Writes instead of yielding: a generator that waits in `yield` when its peer vanishes is finalised only
    # some time later, and its requests would run on until then.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[worker_pb2.SessionRequest], context: Context
    ) -> None:
        session = _Session()
        reader = self._spawn(self._read_session(session, request_iterator))
        writer = self._spawn(self._write_session(session, context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The front end is gone or done: whatever it still runs here would be computed for nobody.
            reader.cancel()
            writer.cancel()
            for request_id in list(session.requests):
                self._cancel(request_id)

    @staticmethod
    async def _write_session(session: _Session, context: Context) -> None:
        """Send everything that is queued as one message, again and again."""
        while True:
            outputs = [await session.outbox.get()]
            while not session.outbox.empty():
                outputs.append(session.outbox.get_nowait())
            await context.write(worker_pb2.SessionResponse(outputs=outputs))

    async def _read_session(
        self, session: _Session, messages: AsyncIterator[worker_pb2.SessionRequest]
    ) -> None:
        async for message in messages:
            if message.HasField("submit"):
                self._submit(session, message.submit)
            elif message.HasField("proceed"):
                if message.proceed.request_id in session.requests:
                    self._proceed(message.proceed)
            elif message.cancel.request_id in session.requests:
                self._cancel(message.cancel.request_id)

    async def Probe(self, request: worker_pb2.ProbeRequest, context: Context) -> worker_pb2.ProbeResponse:
        try:
            transport = await self._puller.probe(request.worker_id)
        except (KVLostError, LayoutMismatchError) as error:
            return worker_pb2.ProbeResponse(ok=False, error=error.message)
        return worker_pb2.ProbeResponse(ok=True, transport=transport)

    async def Scrape(self, request: worker_pb2.ScrapeRequest, context: Context) -> worker_pb2.ScrapeResponse:
        self._metrics.observe_expired_leases(self._publisher.num_expired)
        return worker_pb2.ScrapeResponse(exposition=self._metrics.exposition())


def _with_last_step(output: StepOutput, step_s: float) -> StepOutput:
    """Return the output with the step that made the first token in its prefill: the engine's `now` is that
    step's beginning.
    """
    return output if output.prefill_s is None else output._replace(prefill_s=output.prefill_s + step_s)


def _ignore(_value: object) -> None:
    """Drop a command's result, so that it fits the queue's type."""
