"""The side of a hand-off that goes on: pulls a peer's blocks into its own cache.

    keep_alive ──► pull = connect ─► read ─► release ──► "live until now" ? the bytes count : KVLostError
             └───► let_go

However a pull ends, its lease ends with it: on failure in the background, so that recomputing can begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from disagg.config import KVTransport
from disagg.errors import InvalidRequestError, KVLostError, LayoutMismatchError
from disagg.tls import ClusterTLS
from disagg.transfer.agreement import Device
from disagg.transfer.calls import DamagedKVError, answered, peer_errors
from disagg.transfer.connections import Connection, Connections, Opener, Peer, Resolve
from disagg.transfer.keeper import LeaseKeeper
from disagg.transfer.segment import SharedSegment
from disagg.transfer.wire import canary_bytes, handle_to_proto, probe_handle
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2

logger = logging.getLogger(__name__)

# Renewals a lease's life: two may be lost before it ends.
RENEWALS_PER_LEASE = 3
# Bytes damaged once may come whole the second time; damaged twice, recomputing is surer.
READ_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull moved. seconds: the whole pull, connecting and releasing included."""

    transport: str
    num_bytes: int
    seconds: float


class KVTransferClient:
    """Pulls into `segment`. Create it on the event loop that uses it.

    resolve: address and incarnation of a worker as the cluster knows them; a handle's word is not taken.
    pull_timeout_s: bound on each pull, probe and release. device, openers: see Connections. Raises
    ConfigError for a transport that isn't here.
    """

    def __init__(
        self,
        layout: KVLayout,
        segment: SharedSegment,
        *,
        worker_id: str,
        incarnation: str,
        secret: str,
        resolve: Resolve,
        transport: KVTransport = "auto",
        lease_s: float = 5.0,
        pull_timeout_s: float = 10.0,
        tls: ClusterTLS | None = None,
        device: Device = "cpu",
        openers: Mapping[str, Opener] | None = None,
    ) -> None:
        self._block_bytes = layout.block_bytes
        self._segment = segment
        self._secret = secret
        self._timeout_s = pull_timeout_s
        self._connections = Connections(
            layout,
            (worker_id, incarnation),
            secret,
            resolve,
            transport=transport,
            timeout_s=pull_timeout_s,
            tls=tls,
            device=device,
            openers=openers,
        )
        self._keeper = LeaseKeeper(self._connections, lease_s / RENEWALS_PER_LEASE)
        self._releases: set[asyncio.Task[None]] = set()

    async def pull(self, handle: KVHandle, first_block: int, local_block_ids: Sequence[int]) -> PullResult:
        """Copy the handle's blocks from `first_block` on into `local_block_ids`, and end the lease.

        Raises KVLostError or LayoutMismatchError, and InvalidRequestError naming a block id that this
        worker doesn't have; what was written until then means nothing. When this returns or raises,
        cancellation included, nothing is being written any more.
        """
        started = time.monotonic()
        try:
            self._check_local(local_block_ids)
            with peer_errors(handle.worker_id):
                async with asyncio.timeout(self._timeout_s):
                    transport = await self._pull(handle, first_block, local_block_ids)
        except BaseException:
            self._release_later(handle)
            raise
        finally:
            self._keeper.stop(handle)
        num_bytes = len(local_block_ids) * self._block_bytes
        return PullResult(transport, num_bytes, time.monotonic() - started)

    def _check_local(self, local_block_ids: Sequence[int]) -> None:
        limit = self._segment.num_blocks
        bad = next((block for block in local_block_ids if not 0 <= block < limit), None)
        if bad is not None:
            raise InvalidRequestError(
                f"local_block_ids must be in [0, {limit - 1}], got {bad}", param="local_block_ids"
            )

    async def _pull(self, handle: KVHandle, first_block: int, local_block_ids: Sequence[int]) -> str:
        connection = await self._connections.connect((handle.worker_id, handle.incarnation))
        # A long pull must not outlive its lease, whether or not its caller waited.
        self._keeper.keep(handle)
        if local_block_ids:
            await self._read(connection, handle, first_block, local_block_ids)
        if not await self._release(connection, handle):
            raise KVLostError("the lease ended while its blocks were copied")
        return connection.reader.transport

    async def _read(
        self, connection: Connection, handle: KVHandle, first_block: int, local_block_ids: Sequence[int]
    ) -> None:
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                await connection.reader.read(handle, first_block, self._segment.blocks, local_block_ids)
                return
            except DamagedKVError as error:
                logger.warning("KV from %s, attempt %d: %s", handle.worker_id, attempt, error.message)
                if attempt == READ_ATTEMPTS:
                    raise

    async def _release(self, connection: Connection, handle: KVHandle) -> bool:
        request = worker_pb2.ReleaseRequest(handle=handle_to_proto(handle))
        response = await answered(connection.stub.Release(request, metadata=self._connections.metadata))
        return response.valid

    # -- leases that wait ----------------------------------------------------------------------------

    def keep_alive(self, handle: KVHandle) -> None:
        """Renew the lease in the background until it is pulled or let go."""
        self._keeper.keep(handle)

    async def let_go(self, handle: KVHandle) -> None:
        """Stop renewing and end the lease, as far as its owner can be reached. Raises nothing."""
        self._keeper.stop(handle)
        with contextlib.suppress(KVLostError, LayoutMismatchError), peer_errors(handle.worker_id):
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connections.connect((handle.worker_id, handle.incarnation))
                await self._release(connection, handle)

    def _release_later(self, handle: KVHandle) -> None:
        release = asyncio.get_running_loop().create_task(self.let_go(handle))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    # -- peers ---------------------------------------------------------------------------------------

    async def probe(self, worker_id: str) -> str:
        """Move the peer's canary block as a hand-off would, and compare it; return the transport.

        Raises KVLostError or LayoutMismatchError.
        """
        handle = probe_handle(worker_id, self._connections.incarnation(worker_id), self._secret)
        canary = np.zeros((1, self._block_bytes), np.uint8)
        with peer_errors(worker_id):
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connections.connect((worker_id, handle.incarnation))
                await connection.reader.read(handle, 0, canary, [0])
        if canary.tobytes() != canary_bytes(handle, self._block_bytes):
            raise DamagedKVError(f"{worker_id}: other bytes came than it holds")
        return connection.reader.transport

    def retain(self, alive: Collection[Peer]) -> None:
        """Forget every peer that is not in `alive`: pulls from it end, and its memory is unmapped."""
        self._connections.retain(alive)

    async def close(self) -> None:
        await self._keeper.close()
        releases = list(self._releases)
        for release in releases:
            release.cancel()
        await asyncio.gather(*releases, return_exceptions=True)
        await self._connections.close()
