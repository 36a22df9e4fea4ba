"""RouterServer: gRPC around the pure Router.

    worker    ══Join════►  reports in   │        │  peers out, on every change
    front end ══Attach══►  events in    │ Router │  view out, on every change and every heartbeat
    front end ──Place───►  one decision │        │

A stream is its peer's life: when it ends, however it ends, the router acts at once. Nothing polls; one timer
looks for workers that fell silent on a stream that stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from disagg.config import AdmissionConfig, RouterConfig
from disagg.errors import DisaggError, InvalidRequestError
from disagg.routing.admission import Admission
from disagg.routing.router import Router
from disagg.routing.types import WorkerReport
from disagg.rpc import cluster_server, listen
from disagg.service import wire_router as wire
from disagg.service.gathering import Gathering
from disagg.service.router_metrics import RouterMetrics
from disagg.service.waiting_room import WaitingRoom
from disagg.tls import ClusterTLS
from disagg.types import Role, WorkerInfo
from disagg.v1 import router_pb2, router_pb2_grpc, worker_pb2

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
STOP_GRACE_S = 0.2
# A front end answers from memory; one that does not is left out rather than waited for.
GATHER_TIMEOUT_S = 1.0


class _Peer:
    """One open stream: `wake` makes its writer send."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.wake.set()
        self.info: WorkerInfo | None = None
        self.want_snapshot = False
        self.ending = False
        self.superseded = asyncio.Event()
        self.questions: list[router_pb2.ReportQuestion] = []


class RouterServer(router_pb2_grpc.RouterServicer):
    """Serves one Router. Use it on one event loop.

    clock: seconds, for liveness and for the time that decisions take.
    """

    def __init__(
        self,
        config: RouterConfig,
        secret: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        rng: random.Random | None = None,
        tls: ClusterTLS | None = None,
        admission: AdmissionConfig | None = None,
    ) -> None:
        self.router = Router(config, rng or random.Random())
        self.admission = Admission(admission or AdmissionConfig(), self.router)
        self._room = WaitingRoom(self.admission)
        self.incarnation = uuid.uuid4().hex
        self._config = config
        self._secret = secret
        self._tls = tls
        self._clock = clock
        self._metrics = RouterMetrics()
        self._workers: dict[str, _Peer] = {}
        self._frontends: dict[str, _Peer] = {}
        self._peers: set[_Peer] = set()
        # Front ends that placed without a stream, and since when.
        self._unattached: dict[str, float] = {}
        self._gathering = Gathering()
        self._pool_sizes: dict[str, int] = {}
        self._announced = 0
        self._server: grpc.aio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def num_frontends(self) -> int:
        """Front ends that are attached now."""
        return len(self._frontends)

    def set_pool_sizes(self, sizes: Mapping[Role, int]) -> None:
        """Tell front ends, with the next heartbeat, how many workers each pool is to have."""
        self._pool_sizes = {role.value: size for role, size in sizes.items()}

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen; return host:port. Raises RuntimeError where the port can't be bound."""
        self._server = cluster_server(self._secret)
        router_pb2_grpc.add_RouterServicer_to_server(self, self._server)
        bound = listen(self._server, f"{host}:{port}", self._tls)
        await self._server.start()
        self._sweeper = asyncio.create_task(self._sweep())
        return f"{host}:{bound}"

    async def stop(self) -> None:
        """Close all streams. What is placed goes on without us."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)

    # -- placement -----------------------------------------------------------------------------------

    async def Place(self, request: router_pb2.PlaceRequest, context: Context) -> router_pb2.PlaceResponse:
        try:
            wanted = wire.request_from_proto(request)
        except InvalidRequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        started = self._clock()
        if wanted.frontend_id not in self._frontends:
            self._unattached.setdefault(wanted.frontend_id, started)
        try:
            placement = self._room.enter(wanted, started)
            self._metrics.decision.observe(self._clock() - started)
            if placement is None:
                placement = await self._room.wait(wanted.request_id)
        except DisaggError as error:
            return wire.placement_error_to_proto(error)
        return (
            router_pb2.PlaceResponse(waiting=True)
            if placement is None
            else wire.placement_to_proto(placement)
        )

    async def Scrape(self, request: worker_pb2.ScrapeRequest, context: Context) -> worker_pb2.ScrapeResponse:
        self._metrics.observe_errors(self.router.take_errors())
        self._metrics.observe_admission(self.admission.refused, len(self.admission.queue))
        exposition = self._metrics.exposition(
            self.router.view.workers, self.router.counters, self.num_frontends
        )
        return worker_pb2.ScrapeResponse(exposition=exposition)

    async def Gather(self, request: router_pb2.GatherRequest, context: Context) -> router_pb2.GatherResponse:
        others = {key: peer for key, peer in self._frontends.items() if key != request.frontend_id}
        with self._gathering.begin(others) as answers:
            for frontend_id, number in answers.numbers.items():
                peer = others[frontend_id]
                question = router_pb2.ReportQuestion(
                    number=number, kind=request.kind, argument=request.argument
                )
                peer.questions.append(question)
                peer.wake.set()
            bodies = await answers.wait(GATHER_TIMEOUT_S)
        reports = [router_pb2.ProcessReport(process=key, body=body) for key, body in bodies.items()]
        return router_pb2.GatherResponse(reports=reports)

    # -- workers -------------------------------------------------------------------------------------

    # Coroutines that write, not generators: a generator that waits in `yield` when its peer vanishes is only
    # finalised some time later, and then so would be the news of it.
    async def Join(  # type: ignore[override]
        self, request_iterator: AsyncIterator[router_pb2.WorkerReport], context: Context
    ) -> None:
        peer = _Peer()
        try:
            await self._converse(
                context,
                peer,
                self._read(request_iterator, lambda message: self._on_report(peer, message)),
                lambda: self._membership(peer),
                heartbeat_s=None,
            )
        finally:
            self._worker_gone(peer)

    def _on_report(self, peer: _Peer, message: router_pb2.WorkerReport) -> None:
        if message.HasField("info"):
            info = wire.info_from_proto(message.info)
            if peer.info is not None and (peer.info.worker_id, peer.info.incarnation) != (
                info.worker_id,
                info.incarnation,
            ):
                raise InvalidRequestError("a stream belongs to one worker", param="info.worker_id")
            peer.info = info
        if peer.info is None:
            raise InvalidRequestError("the first report must say who the worker is", param="info")
        report = WorkerReport(
            info=peer.info,
            status=wire.status_from_proto(message.status),
            load=wire.load_from_proto(message.load),
            blocks=wire.events_from_proto(message.blocks) if message.HasField("blocks") else None,
            steps=wire.steps_from_proto(message.steps),
            transfers=wire.transfers_from_proto(message.transfers),
        )
        self._take_over(peer, peer.info.worker_id)
        if self.router.worker_report(report, self._clock()):
            peer.want_snapshot = True
            peer.wake.set()
        self._room.settle(self._clock())
        self._announce()

    def _take_over(self, peer: _Peer, worker_id: str) -> None:
        """Make this stream the worker's; an older stream under the same id ends."""
        older = self._workers.get(worker_id)
        if older is not None and older is not peer:
            older.superseded.set()
        self._workers[worker_id] = peer

    def _worker_gone(self, peer: _Peer) -> None:
        info = peer.info
        if info is None or self._workers.get(info.worker_id) is not peer:
            return
        del self._workers[info.worker_id]
        logger.warning("worker %s (%s) left", info.worker_id, info.incarnation)
        self.router.worker_left(info.worker_id, info.incarnation)
        self._room.settle(self._clock())
        self._announce()

    def _membership(self, peer: _Peer) -> router_pb2.Membership:
        want, peer.want_snapshot = peer.want_snapshot, False
        view = self.router.view
        workers = [wire.info_to_proto(state.info) for state in view.workers.values()]
        return router_pb2.Membership(version=view.version, workers=workers, want_snapshot=want)

    # -- front ends ----------------------------------------------------------------------------------

    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[router_pb2.FrontendReport], context: Context
    ) -> None:
        peer = _Peer()
        attached: list[str] = []
        try:
            await self._converse(
                context,
                peer,
                self._read(request_iterator, lambda message: self._on_events(peer, attached, message)),
                lambda: self._cluster_view(peer),
                heartbeat_s=self._config.heartbeat_s,
            )
        finally:
            if attached and self._frontends.get(attached[0]) is peer:
                del self._frontends[attached[0]]
                self._room.frontend_left(attached[0])
                self._room.settle(self._clock())

    def _on_events(self, peer: _Peer, attached: list[str], message: router_pb2.FrontendReport) -> None:
        if not attached:
            frontend_id = wire.checked_id("frontend_id", message.frontend_id)
            older = self._frontends.get(frontend_id)
            if older is not None:
                older.superseded.set()
            attached.append(frontend_id)
            self._frontends[frontend_id] = peer
            self._unattached.pop(frontend_id, None)
        elif message.frontend_id and message.frontend_id != attached[0]:
            raise InvalidRequestError("a stream belongs to one front end", param="frontend_id")
        if len(message.events) > wire.MAX_REQUEST_EVENTS:
            raise InvalidRequestError(f"at most {wire.MAX_REQUEST_EVENTS} events at once", param="events")
        for answer in message.answers:
            self._gathering.answer(attached[0], answer.number, answer.body)
        now = self._clock()
        for event in message.events:
            seconds = wire.measured_seconds(event)
            if event.kind == router_pb2.RequestEvent.KIND_PREFILLED:
                self._room.prefilled(event.request_id, now, seconds)
            elif event.kind == router_pb2.RequestEvent.KIND_FINISHED:
                self._room.finished(event.request_id, now, max(0, event.num_tokens), seconds)
            else:
                raise InvalidRequestError("unknown kind of event", param="events.kind")
        self._room.settle(now)

    def _cluster_view(self, peer: _Peer) -> router_pb2.ClusterView:
        view = self.router.view
        questions, peer.questions = peer.questions, []
        return router_pb2.ClusterView(
            version=view.version,
            workers=[wire.state_to_proto(state) for state in view.workers.values()],
            router_pid=os.getpid(),
            router_incarnation=self.incarnation,
            questions=questions,
            pool_sizes=self._pool_sizes,
        )

    # -- streams -------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Wake every stream's writer if the membership has changed."""
        version = self.router.view.version
        if version != self._announced:
            self._announced = version
            for peer in self._peers:
                peer.wake.set()

    async def _converse(
        self,
        context: Context,
        peer: _Peer,
        reading: Awaitable[None],
        message: Callable[[], Any],
        *,
        heartbeat_s: float | None,
    ) -> None:
        """Read and write until the peer ends its side, sends nonsense, or opens another stream."""
        self._peers.add(peer)
        tasks = [
            asyncio.ensure_future(reading),
            asyncio.create_task(self._write(context, peer, message, heartbeat_s)),
            asyncio.create_task(peer.superseded.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            problem = self._problem(tasks)
            # A write that is cut off halfway still occupies the call, which then can't be ended in order.
            peer.ending = True
            peer.wake.set()
            await asyncio.wait(tasks[1:2], timeout=STOP_GRACE_S)
        finally:
            self._peers.discard(peer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if problem is not None:
            logger.warning("ending a stream from %s: %s", context.peer(), problem[1])
            await context.abort(*problem)

    @staticmethod
    def _problem(tasks: Sequence[asyncio.Future[Any]]) -> tuple[grpc.StatusCode, str] | None:
        for task in tasks[:2]:
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, InvalidRequestError):
                return grpc.StatusCode.INVALID_ARGUMENT, error.message
            if error is not None:
                return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
        if tasks[2].done():
            return grpc.StatusCode.ABORTED, "another stream was opened under the same id"
        return None

    @staticmethod
    async def _read(messages: AsyncIterator[Any], handle: Callable[[Any], None]) -> None:
        async for message in messages:
            handle(message)

    @staticmethod
    async def _write(
        context: Context, peer: _Peer, message: Callable[[], Any], heartbeat_s: float | None
    ) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(heartbeat_s):
                    await peer.wake.wait()
            if peer.ending:
                return
            peer.wake.clear()
            await context.write(message())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            now = self._clock()
            for worker_id in self.admission.sweep(now):
                logger.warning("worker %s has been silent for too long", worker_id)
            for frontend_id, since in list(self._unattached.items()):
                if now - since > self._config.dead_after_s:
                    del self._unattached[frontend_id]
                    self._room.frontend_left(frontend_id)
            self._room.settle(now)
            self._announce()
