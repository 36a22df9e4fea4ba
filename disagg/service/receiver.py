"""The decode side of a hand-off in a worker: a request's way from a peer's handle to blocks that hold its KV.

    handle ──► peer has begun ──► added to the engine ──► blocks reserved ──► pulled ──token──► activated
                    ▲                                                           │
                    └──────────── early, and the peer took its blocks back ◄────┘

An early request comes while its peer still computes it: its blocks are reserved and filled meanwhile, and the
token that the peer draws comes last. Whatever fails before then costs the early start and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from disagg.engine.engine import Reservation
from disagg.errors import (
    DisaggError,
    KVLostError,
    KVWithdrawnError,
    LayoutMismatchError,
    OverloadedError,
)
from disagg.service.metrics import WorkerMetrics
from disagg.types import KVHandle, Request
from disagg.v1 import worker_pb2

logger = logging.getLogger(__name__)

# Stands for the token that is yet to be drawn; every model has it.
STAND_IN = 0


class PullResult(Protocol):
    """What a pull moved. seconds: spent on copying; exposed_s: from when all was computed to the end."""

    @property
    def transport(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def exposed_s(self) -> float: ...


class KVPuller(Protocol):
    """The side of a hand-off that goes on."""

    def keep_alive(self, handle: KVHandle) -> None:
        """Renew the lease in the background until it is pulled or left."""
        ...

    def leave(self, handle: KVHandle) -> None:
        """Stop renewing a lease: it is its owner's to end, or another worker's to pull."""
        ...

    async def started(self, handle: KVHandle) -> None:
        """Return once the handle's blocks are being computed. Raises as pull does."""
        ...

    async def pull(self, handle: KVHandle, first_block: int, local_block_ids: Sequence[int]) -> PullResult:
        """Copy blocks, as they are computed, and end the lease.

        Raises KVWithdrawnError, KVLostError or LayoutMismatchError; then nothing counts.
        """
        ...

    async def probe(self, worker_id: str) -> str:
        """Exercise a hand-off from a peer; return the transport's name. Raises as pull does."""
        ...


class EngineCommands(Protocol):
    """The engine, told from the loop; commands are carried out in this order, a moment later."""

    def add(self, request: Request, *, remote_kv: int, awaits_token: bool) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def token_came(self, request_id: str, token_id: int) -> None: ...
    def activate(self, request_id: str, num_computed_tokens: int) -> None: ...


@dataclass(slots=True)
class Incoming:
    """A request whose KV comes from a peer.

    request: with a stand-in for its last token until `token` resolves. gives_up: without the KV it ends with
    an error instead of being computed here. reserved: its blocks, once the engine has it; early: it was asked
    for them before the token came.
    """

    request: Request
    handle: KVHandle
    token: asyncio.Future[int]
    gives_up: bool = False
    reserved: asyncio.Future[Reservation] | None = None
    early: bool = False
    task: asyncio.Task[None] | None = None
    report: worker_pb2.TransferReport = field(default_factory=worker_pb2.TransferReport)

    @property
    def request_id(self) -> str:
        return self.request.request_id


class KVReceiver:
    """Receives for one worker. on_pulled: told (exposed seconds, tokens, pulls beside it) of each success."""

    def __init__(
        self,
        engine: EngineCommands,
        puller: KVPuller,
        block_size: int,
        metrics: Callable[[], WorkerMetrics],
        on_pulled: Callable[[float, int, int], None],
    ) -> None:
        self._engine = engine
        self._puller = puller
        self._block_size = block_size
        self._metrics = metrics
        self._on_pulled = on_pulled
        self._num_pulling = 0

    def incoming(self, request: Request, handle: KVHandle, *, awaits_token: bool, gives_up: bool) -> Incoming:
        """Return what is to be given to `receive`."""
        token = asyncio.get_running_loop().create_future()
        if awaits_token:
            request = replace(request, token_ids=[*request.token_ids, STAND_IN])
        else:
            token.set_result(request.token_ids[-1])
        return Incoming(request, handle, token, gives_up)

    def token_came(self, incoming: Incoming, token_id: int) -> None:
        """Take the token that the peer drew."""
        if incoming.token.done():
            return
        tokens = [*incoming.request.token_ids[:-1], token_id]
        incoming.request = replace(incoming.request, token_ids=tokens)
        incoming.token.set_result(token_id)
        self._engine.token_came(incoming.request_id, token_id)

    def refused(self, incoming: Incoming, error: DisaggError) -> None:
        """Take the engine's word that it does not take a request."""
        if incoming.reserved is not None and not incoming.reserved.done():
            incoming.reserved.set_exception(error)

    async def receive(self, incoming: Incoming) -> None:
        """Return when the engine was told to go on; `report` says how it went.

        Raises KVLostError where the KV can't be had and the request gives up then, and whatever the engine
        refused it with. When this returns or raises, cancellation included, nobody writes into the request's
        blocks; its lease lives on where it was not released.
        """
        while not await self._received(incoming):
            pass

    async def _received(self, incoming: Incoming) -> bool:
        """False: what was copied early does not count; begin anew."""
        self._puller.keep_alive(incoming.handle)
        if not incoming.token.done():
            await self._peer_begun(incoming)
        try:
            reservation = await self._reserve(incoming)
        except DisaggError as error:
            if incoming.early and isinstance(error, OverloadedError):
                await incoming.token
                return False
            self._puller.leave(incoming.handle)
            raise
        num_cached = reservation.num_cached_tokens
        try:
            result = await self._pull(incoming.handle, reservation)
        except Exception as error:
            if incoming.early and (isinstance(error, KVWithdrawnError) or not incoming.token.done()):
                logger.info("%s: its early pull ended: %s", incoming.request_id, error)
                self._engine.abort(incoming.request_id)
                if not isinstance(error, KVWithdrawnError):
                    self._metrics().observe_recovery("pull_again")
                    await incoming.token
                return False
            self._note_failure(incoming, error)
            num_computed = num_cached
        else:
            await incoming.token
            num_computed = incoming.handle.num_tokens
            self._note(incoming, result, num_computed - num_cached)
        incoming.report.local_tokens = num_cached
        self._engine.activate(incoming.request_id, num_computed)
        return True

    async def _peer_begun(self, incoming: Incoming) -> None:
        """Wait until the peer computes, or the token is there; a peer that can't be asked is no reason."""
        begun = asyncio.ensure_future(self._puller.started(incoming.handle))
        try:
            either: set[asyncio.Future[Any]] = {begun, incoming.token}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if begun.done() and begun.exception() is not None:
                logger.info("%s: no early pull: %s", incoming.request_id, begun.exception())
                await incoming.token
        finally:
            begun.cancel()
            await asyncio.gather(begun, return_exceptions=True)

    async def _reserve(self, incoming: Incoming) -> Reservation:
        incoming.reserved = asyncio.get_running_loop().create_future()
        incoming.early = not incoming.token.done()
        self._engine.add(incoming.request, remote_kv=incoming.handle.num_tokens, awaits_token=incoming.early)
        return await incoming.reserved

    async def _pull(self, handle: KVHandle, reservation: Reservation) -> PullResult:
        first_block = reservation.num_cached_tokens // self._block_size
        self._num_pulling += 1
        try:
            return await self._puller.pull(handle, first_block, reservation.block_ids[first_block:])
        finally:
            self._num_pulling -= 1

    # -- what became of it ---------------------------------------------------------------------------

    def _note(self, incoming: Incoming, result: PullResult, num_tokens: int) -> None:
        report = incoming.report
        report.transport, report.bytes = result.transport, result.num_bytes
        report.seconds, report.exposed_s = result.seconds, result.exposed_s
        self._metrics().observe_pull(result.transport, result.num_bytes, result.seconds)
        self._on_pulled(result.exposed_s, num_tokens, self._num_pulling)

    def _note_failure(self, incoming: Incoming, error: Exception) -> None:
        """Raises KVLostError where nothing is to be computed here instead."""
        # Whatever went wrong, the tokens are known: a defect in a transport costs time, not the request.
        expected = isinstance(error, KVLostError | LayoutMismatchError)
        logger.warning("%s: KV not received: %s", incoming.request_id, error, exc_info=not expected)
        report = incoming.report
        report.reason = error.type if isinstance(error, DisaggError) else "internal_error"
        self._metrics().observe_failed_pull(report.reason)
        if incoming.gives_up:
            raise KVLostError(f"KV of {incoming.handle.worker_id} can't be had: {error}")
        report.recomputed = True
        self._metrics().observe_recovery("recompute")
