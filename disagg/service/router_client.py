"""RouterClient: a front end's side of the router, with a router of its own for when that is away.

The client feeds every ClusterView that it receives into a local Router. While the stream stands, the global
router decides; while it does not, the local one does, on the last view. A router that was just restarted
knows only the workers that found it already; until those known before have joined it, or had time to, they
stay in the view and the local router decides.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import grpc
import grpc.aio

from disagg.config import RouterConfig
from disagg.errors import InvalidRequestError, NoCapacityError, OverloadedError, WorkerLostError
from disagg.routing.router import Router
from disagg.routing.types import Placement, PlacementKind, PlacementRequest, WorkerReport
from disagg.routing.view import ClusterView
from disagg.rpc import secret_metadata
from disagg.service import wire_router as wire
from disagg.service.membership import WorkerMembership
from disagg.service.router_link import CONNECT_TIMEOUT_S, GetAddress, RouterLink, cancelled_from_outside
from disagg.tls import ClusterTLS
from disagg.types import Role, WorkerStatus
from disagg.v1 import router_pb2, router_pb2_grpc, worker_pb2

ReportKind: TypeAlias = router_pb2.ReportKind.ValueType

__all__ = ["RouterClient", "WorkerMembership"]

logger = logging.getLogger(__name__)

# Decisions take microseconds; a router that does not answer in this time is as good as away.
PLACE_TIMEOUT_S = 1.0
# Placements name workers that the view has yet to hear of, if they joined this moment.
VIEW_LAG_S = 0.5


class _RouterAway(Exception):
    """The global router can't decide now."""


class RouterClient:
    """Places requests, and tells the router what became of them. All methods belong to the event loop.

    stale_placements: decisions made on the last view; on_stale_placement is called with each of them.
    report: answers what the others ask through the router: a kind and its argument.
    connected: whether the stream to the router stands. router_pid: of the last router, 0 before the first.
    """

    def __init__(
        self,
        frontend_id: str,
        get_address: GetAddress,
        secret: str,
        config: RouterConfig,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_stale_placement: Callable[[Placement], None] | None = None,
        tls: ClusterTLS | None = None,
        report: Callable[[ReportKind, str], bytes] | None = None,
    ) -> None:
        self.frontend_id = wire.checked_id("frontend_id", frontend_id)
        self.connected = False
        self.router_pid = 0
        self.stale_placements = 0
        self._metadata = secret_metadata(secret)
        self._config = config
        self._clock = clock
        self._on_stale_placement = on_stale_placement
        self._report = report
        self._local = Router(config, rng or random.Random())
        self._link = RouterLink(get_address, self._attach, tls)
        self._stub: router_pb2_grpc.RouterAsyncStub | None = None
        self._router_incarnation = ""
        self._pool_sizes: dict[Role, int] = {}
        # Until when workers stay in the view that a restarted router does not list.
        self._settles_at: float | None = None
        self._events: list[router_pb2.RequestEvent] = []
        self._answers: list[router_pb2.ReportAnswer] = []
        # Requests that the router knows of.
        self._told: set[str] = set()
        self._events_ready = asyncio.Event()
        self._changed = asyncio.Event()
        self._callbacks: list[Callable[[ClusterView], None]] = []

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to attach, in the background."""
        self._link.start()

    async def close(self) -> None:
        """Detach: the router drops the charges of this front end."""
        await self._link.close()

    @property
    def view(self) -> ClusterView:
        """The cluster as last heard. The object stays the same and changes; read only."""
        return self._local.view

    @property
    def pool_sizes(self) -> Mapping[Role, int]:
        """Workers that each pool is to have, as last heard; empty before the controller has told."""
        return self._pool_sizes

    def on_view_change(self, callback: Callable[[ClusterView], None]) -> None:
        """Call back whenever a worker came, went, restarted or changed its status."""
        self._callbacks.append(callback)

    async def wait_ready(self, timeout: float) -> ClusterView:
        """Return the view once a worker takes requests. Raises NoCapacityError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not any(s.status is WorkerStatus.READY for s in self.view.workers.values()):
                    await self._changed.wait()
                return self.view
        except TimeoutError:
            raise NoCapacityError(f"no worker was ready within {timeout:g} s") from None

    # -- requests ------------------------------------------------------------------------------------

    async def place(self, request: PlacementRequest) -> Placement:
        """Decide where a request runs, which may have to wait for its turn.

        Raises NoCapacityError, InvalidRequestError, OverloadedError or DeadlineExceededError.
        """
        self._told.add(request.request_id)
        try:
            placement = await self._ask(request)
        except _RouterAway:
            return self._place_alone(request)
        except OverloadedError:
            # The router has nothing to forget of it.
            self._told.discard(request.request_id)
            raise
        await self._wait_until_known(placement)
        return placement

    async def _ask(self, request: PlacementRequest) -> Placement:
        if self._stub is None or self._settles_at is not None:
            raise _RouterAway
        message, stub = wire.request_to_proto(request), self._stub
        answer = await self._call_place(stub, message)
        while answer.waiting:
            if self._stub is not stub:
                raise _RouterAway
            answer = await self._call_place(stub, message)
        return wire.placement_from_proto(answer)

    async def _call_place(
        self, stub: router_pb2_grpc.RouterAsyncStub, message: router_pb2.PlaceRequest
    ) -> router_pb2.PlaceResponse:
        try:
            return await stub.Place(message, timeout=PLACE_TIMEOUT_S, metadata=self._metadata)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            # The link closed the channel under this call.
            raise _RouterAway from None
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequestError(error.details() or "the router refused the request") from None
            logger.warning("placing on the last view: %s: %s", error.code().name, error.details())
            raise _RouterAway from None

    def _place_alone(self, request: PlacementRequest) -> Placement:
        decided = self._local.place(request, self._clock())
        placement = decided._replace(kind=PlacementKind.STALE_VIEW)
        self.stale_placements += 1
        if self._on_stale_placement is not None:
            self._on_stale_placement(placement)
        return placement

    async def _wait_until_known(self, placement: Placement) -> None:
        """The answer may overtake the view in which its workers appear."""
        workers = self.view.workers
        try:
            async with asyncio.timeout(VIEW_LAG_S):
                while placement.prefill_worker not in workers or placement.decode_worker not in workers:
                    await self._changed.wait()
        except TimeoutError:
            return  # gone again; the caller finds out

    def prefilled(self, request_id: str, seconds: float = 0.0) -> None:
        """The request's first token is out.

        seconds: since it asked for a place, 0 where it has asked more than once.
        """
        self._local.prefilled(request_id)
        self._send(request_id, router_pb2.RequestEvent.KIND_PREFILLED, seconds=seconds)

    def finished(self, request_id: str, num_tokens: int = 0, seconds: float = 0.0) -> None:
        """The request has ended, however.

        num_tokens: of an answer that ended by itself. seconds: from the first of them to the last.
        """
        self._local.finished(request_id)
        if request_id not in self._told:
            return
        self._told.discard(request_id)
        self._send(request_id, router_pb2.RequestEvent.KIND_FINISHED, num_tokens, seconds)

    def _send(
        self,
        request_id: str,
        kind: router_pb2.RequestEvent.Kind.ValueType,
        num_tokens: int = 0,
        seconds: float = 0.0,
    ) -> None:
        # A router to which no stream stands has dropped this front end's charges already.
        if self._stub is not None:
            self._events.append(
                router_pb2.RequestEvent(
                    request_id=request_id, kind=kind, num_tokens=num_tokens, seconds=seconds
                )
            )
            self._events_ready.set()

    async def scrape(self, timeout: float) -> bytes:
        """Return the router's Prometheus exposition. Raises grpc.RpcError, or WorkerLostError if away."""
        stub = self._stub
        if stub is None:
            raise WorkerLostError("the router is away", worker_id="router")
        try:
            response = await stub.Scrape(worker_pb2.ScrapeRequest(), timeout=timeout, metadata=self._metadata)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            raise WorkerLostError("the router went away", worker_id="router") from None
        return response.exposition

    async def gather(self, kind: ReportKind, timeout: float, argument: str = "") -> dict[str, bytes]:
        """Return the answers of all other front ends by id. Raises as `scrape` does."""
        stub = self._stub
        if stub is None:
            raise WorkerLostError("the router is away", worker_id="router")
        request = router_pb2.GatherRequest(frontend_id=self.frontend_id, kind=kind, argument=argument)
        try:
            response = await stub.Gather(request, timeout=timeout, metadata=self._metadata)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            raise WorkerLostError("the router went away", worker_id="router") from None
        return {report.process: report.body for report in response.reports}

    # -- stream --------------------------------------------------------------------------------------

    async def _attach(self, stub: router_pb2_grpc.RouterAsyncStub) -> None:
        call = stub.Attach(metadata=self._metadata)
        writer = asyncio.create_task(self._send_events(call))
        patience = CONNECT_TIMEOUT_S
        try:
            while True:
                async with asyncio.timeout(patience):
                    message = await call.read()
                if not isinstance(message, router_pb2.ClusterView):
                    return
                self._on_view(message)
                self._stub, self.connected, self._link.answered = stub, True, True
                # The router speaks every heartbeat; one that is silent is stuck, whatever TCP says.
                patience = max(CONNECT_TIMEOUT_S, self._config.dead_after_s)
        finally:
            self._stub, self.connected = None, False
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._events.clear()
            self._answers.clear()
            call.cancel()

    async def _send_events(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        await call.write(router_pb2.FrontendReport(frontend_id=self.frontend_id))
        while True:
            await self._events_ready.wait()
            self._events_ready.clear()
            for answer in self._take_answers():
                await call.write(router_pb2.FrontendReport(answers=[answer]))
            while self._events:
                batch = self._events[: wire.MAX_REQUEST_EVENTS]
                del self._events[: len(batch)]
                await call.write(router_pb2.FrontendReport(events=batch))

    def _take_answers(self) -> list[router_pb2.ReportAnswer]:
        answers, self._answers = self._answers, []
        return answers

    def _answer(self, questions: Iterable[router_pb2.ReportQuestion]) -> None:
        for question in questions:
            body = b"" if self._report is None else self._report(question.kind, question.argument)
            self._answers.append(router_pb2.ReportAnswer(number=question.number, body=body))
            self._events_ready.set()

    def _on_view(self, message: router_pb2.ClusterView) -> None:
        self._answer(message.questions)
        if message.pool_sizes:
            self._pool_sizes = {role: message.pool_sizes.get(role.value, 0) for role in Role}
        states = {state.info.worker_id: state for state in map(wire.state_from_proto, message.workers)}
        now, before = self._clock(), self.view.version
        self._follow_router(message, now)
        missing = [state for key, state in self.view.workers.items() if key not in states]
        if self._settles_at is not None and (not missing or now >= self._settles_at):
            self._settles_at = None
        for state in states.values():
            if self.view.workers.get(state.info.worker_id) != state:
                self._local.worker_report(WorkerReport(state.info, state.status, state.load), now)
        if self._settles_at is None:
            for state in missing:
                self._local.worker_left(state.info.worker_id, state.info.incarnation)
        if self.view.version != before:
            self._tell()

    def _follow_router(self, message: router_pb2.ClusterView, now: float) -> None:
        self.router_pid = message.router_pid
        if message.router_incarnation != self._router_incarnation:
            if self._router_incarnation:
                self._settles_at = now + self._config.dead_after_s
            self._router_incarnation = message.router_incarnation

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        for callback in self._callbacks:
            callback(self.view)
