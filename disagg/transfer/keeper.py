"""Keeps leases alive whose pull waits for room: one call per peer and period, and none when nothing waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from disagg.errors import KVLostError, LayoutMismatchError
from disagg.transfer.calls import answered, peer_errors
from disagg.transfer.connections import Connections, Peer
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2

logger = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews leases of peers every `period_s` until told to stop."""

    def __init__(self, connections: Connections, period_s: float) -> None:
        self._connections = connections
        self._period_s = period_s
        self._kept: dict[Peer, dict[str, KVHandle]] = {}
        self._renewers: dict[Peer, asyncio.Task[None]] = {}

    def keep(self, handle: KVHandle) -> None:
        peer = (handle.worker_id, handle.incarnation)
        self._kept.setdefault(peer, {})[handle.request_id] = handle
        if peer not in self._renewers:
            self._renewers[peer] = asyncio.create_task(self._renew(peer))

    def stop(self, handle: KVHandle) -> None:
        """Renew this lease no more; does nothing where it isn't kept."""
        self._kept.get((handle.worker_id, handle.incarnation), {}).pop(handle.request_id, None)

    async def close(self) -> None:
        renewers = list(self._renewers.values())
        for renewer in renewers:
            renewer.cancel()
        await asyncio.gather(*renewers, return_exceptions=True)

    async def _renew(self, peer: Peer) -> None:
        """Renew all of a peer's leases with one call a period; end when none is left."""
        try:
            while True:
                await asyncio.sleep(self._period_s)
                handles = list(self._kept[peer].values())
                if not handles:
                    return
                await self._renew_once(peer, handles)
        finally:
            del self._kept[peer], self._renewers[peer]

    async def _renew_once(self, peer: Peer, handles: Sequence[KVHandle]) -> None:
        request = worker_pb2.RenewRequest(handles=[handle_to_proto(handle) for handle in handles])
        try:
            with peer_errors(peer[0]):
                async with asyncio.timeout(self._period_s):
                    connection = await self._connections.connect(peer)
                    await answered(connection.stub.Renew(request, metadata=self._connections.metadata))
        except (KVLostError, LayoutMismatchError) as error:
            # The pull will find out whether the lease is still there.
            logger.warning("can't renew leases of %s: %s", peer[0], error.message)
