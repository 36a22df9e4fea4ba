"""WorkerMembership: a worker's side of Join. Its state goes to the router, its peers come back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import grpc.aio

from disagg.errors import WorkerLostError
from disagg.hashing import BlockHash, short_hash
from disagg.routing.types import BlockEvents, StepSample, TransferSample
from disagg.rpc import secret_metadata
from disagg.service import wire_router as wire
from disagg.service.router_link import CONNECT_TIMEOUT_S, GetAddress, RouterLink
from disagg.tls import ClusterTLS
from disagg.types import WorkerInfo, WorkerLoad, WorkerStatus
from disagg.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

Peer = tuple[str, str]
# A new router learns of the workers one by one; until they had this long, those known before still count.
SETTLE_S = 3.0
# A router that can't be reached must not keep a worker from starting: it joins when there is one.
JOIN_WAIT_S = 10.0


class WorkerMembership:
    """Keeps one worker joined. All methods belong to the event loop.

    get_address: where the router is now; asked again before every attempt to connect, and may raise.
    take_samples: asked with every report for steps and pulls since the last.
    """

    def __init__(
        self,
        get_address: GetAddress,
        secret: str,
        *,
        heartbeat_s: float = 0.5,
        tls: ClusterTLS | None = None,
        take_samples: Callable[[], tuple[list[StepSample], list[TransferSample]]] | None = None,
    ) -> None:
        self._metadata = secret_metadata(secret)
        self._heartbeat_s = heartbeat_s
        self._take_samples = take_samples
        self._link = RouterLink(get_address, self._join, tls)
        self._info: WorkerInfo | None = None
        self._status = WorkerStatus.STARTING
        self._load = WorkerLoad()
        # Short hashes: everything that the worker holds, and what changed since the last report.
        self._held: set[int] = set()
        self._stored: set[int] = set()
        self._removed: set[int] = set()
        self._sequence = 0
        self._snapshot_due = True
        self._info_due = False
        self._wake = asyncio.Event()
        self._peers: dict[str, WorkerInfo] = {}
        self._listed: dict[str, WorkerInfo] = {}
        self._settling: asyncio.TimerHandle | None = None
        self._joined = asyncio.Event()
        self._changed = asyncio.Event()
        self._callbacks: list[Callable[[Collection[Peer]], None]] = []

    # -- life ----------------------------------------------------------------------------------------

    async def start(self, info: WorkerInfo) -> None:
        """Join; return when the router has answered, or after JOIN_WAIT_S while attempts go on."""
        self._info = info
        self._link.start()
        try:
            async with asyncio.timeout(JOIN_WAIT_S):
                await self._joined.wait()
        except TimeoutError:
            logger.warning("worker %s starts without a router", info.worker_id)

    async def close(self) -> None:
        """Leave: the router learns of it at once."""
        await self._link.close()
        if self._settling is not None:
            self._settling.cancel()

    # -- what goes out -------------------------------------------------------------------------------

    def report(
        self,
        status: WorkerStatus,
        load: WorkerLoad,
        *,
        stored: Sequence[BlockHash] = (),
        removed: Sequence[BlockHash] = (),
    ) -> None:
        """Note the worker's state. A change of status is sent at once, all else with the next heartbeat.

        removed is applied before stored. May be called before start, and after every step.
        """
        self._load = load
        for block in removed:
            self._remove(short_hash(block))
        for block in stored:
            self._store(short_hash(block))
        if status is not self._status:
            self._status = status
            self._wake.set()

    def relabel(self, info: WorkerInfo) -> None:
        """Take over what changed of the worker, which is its role; the router is told at once."""
        self._info = info
        self._info_due = True
        self._wake.set()

    def _store(self, block: int) -> None:
        if block in self._held:
            return
        self._held.add(block)
        if block in self._removed:
            self._removed.discard(block)
        else:
            self._stored.add(block)

    def _remove(self, block: int) -> None:
        if block not in self._held:
            return
        self._held.discard(block)
        if block in self._stored:
            self._stored.discard(block)
        else:
            self._removed.add(block)

    def _next_report(self, *, with_info: bool = False) -> router_pb2.WorkerReport:
        message = router_pb2.WorkerReport(status=self._status.value, load=wire.load_to_proto(self._load))
        if self._take_samples is not None:
            steps, transfers = self._take_samples()
            message.steps.extend(wire.steps_to_proto(steps))
            message.transfers.extend(wire.transfers_to_proto(transfers))
        if (with_info or self._info_due) and self._info is not None:
            self._info_due = False
            message.info.CopyFrom(wire.info_to_proto(self._info))
        too_many = max(len(self._stored), len(self._removed)) > wire.MAX_BLOCK_EVENTS
        if self._snapshot_due or too_many:
            blocks = list(self._held)[: wire.MAX_BLOCK_EVENTS]
            events = BlockEvents(self._sequence, blocks, snapshot=True)
        elif self._stored or self._removed:
            events = BlockEvents(self._sequence, list(self._stored), list(self._removed))
        else:
            return message
        message.blocks.CopyFrom(wire.events_to_proto(events))
        self._sequence += 1
        self._snapshot_due = False
        self._stored.clear()
        self._removed.clear()
        return message

    # -- stream --------------------------------------------------------------------------------------

    async def _join(self, stub: router_pb2_grpc.RouterAsyncStub) -> None:
        call = stub.Join(metadata=self._metadata)
        self._snapshot_due = True
        writer = asyncio.create_task(self._send_reports(call))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                message = await call.read()
            self._settle()
            while isinstance(message, router_pb2.Membership):
                self._on_membership(message)
                message = await call.read()
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()
            # What this router had listed so far says nothing of who lives when the next one answers.
            if self._settling is not None:
                self._settling.cancel()

    async def _send_reports(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        self._wake.clear()
        await call.write(self._next_report(with_info=True))
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._wake.wait()
            self._wake.clear()
            await call.write(self._next_report())

    def _settle(self) -> None:
        """On a new stream: keep the peers that it does not list yet, for a while."""
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self._settled)

    def _settled(self) -> None:
        self._settling = None
        self._set_peers(self._listed)

    def _on_membership(self, message: router_pb2.Membership) -> None:
        self._listed = {item.worker_id: wire.info_from_proto(item) for item in message.workers}
        if message.want_snapshot:
            self._snapshot_due = True
            self._wake.set()
        self._set_peers(self._listed if self._settling is None else {**self._peers, **self._listed})
        self._link.answered = True
        self._joined.set()

    def _set_peers(self, peers: dict[str, WorkerInfo]) -> None:
        if peers == self._peers:
            return
        self._peers = dict(peers)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        alive = {(info.worker_id, info.incarnation) for info in peers.values()}
        for callback in self._callbacks:
            callback(alive)

    # -- peers ---------------------------------------------------------------------------------------

    def resolve(self, worker_id: str) -> tuple[str, str] | None:
        """Return (address, incarnation) of a worker that lives, this one included; None for others."""
        info = self._peers.get(worker_id)
        return None if info is None else (info.address, info.incarnation)

    async def wait_for(self, worker_id: str, timeout: float) -> tuple[str, str]:
        """Return what `resolve` does as soon as it knows. Raises WorkerLostError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while (known := self.resolve(worker_id)) is None:
                    await self._changed.wait()
                return known
        except TimeoutError:
            raise WorkerLostError(f"worker {worker_id} is not in the cluster", worker_id=worker_id) from None

    def on_change(self, callback: Callable[[Collection[Peer]], None]) -> None:
        """Call back with all living (worker_id, incarnation) whenever they change."""
        self._callbacks.append(callback)
