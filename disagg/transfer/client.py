"""The side of a hand-off that goes on: pulls a peer's blocks into its own cache.

    keep_alive ──► started ──► pull = (locate ─► read)* ─► release ──► "live until now" ? the bytes count
             └───► leave

A pull follows the peer's computing: each `locate` waits for blocks that are not here yet, and its answer says
whether what was read before it was still the request's (the lease lives, in the same epoch). When a pull
fails or is given up, the lease is left to whoever may try next: only its owner, whom the front end tells,
knows that nobody will.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from disagg.config import KVTransport
from disagg.errors import InvalidRequestError, KVLostError, KVWithdrawnError
from disagg.tls import ClusterTLS
from disagg.transfer.agreement import Device
from disagg.transfer.calls import DamagedKVError, PeerUnreachableError, answered, peer_errors
from disagg.transfer.connections import Connection, Connections, Opener, Peer, Resolve
from disagg.transfer.keeper import LeaseKeeper
from disagg.transfer.segment import SharedSegment
from disagg.transfer.wire import canary_bytes, handle_to_proto, probe_handle
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2

logger = logging.getLogger(__name__)

# Renewals a lease's life: two may be lost before it ends.
RENEWALS_PER_LEASE = 3
# Bytes damaged once may come whole the second time, and a connection that broke be there again; after that
# another worker or recomputing is surer.
PULL_ATTEMPTS = 2
RETRY_DELAY_S = 0.05
# How long a peer may wait for blocks before it answers that there are none yet; a part of the time-out.
WAIT_SHARE = 0.2
UNKNOWN_EPOCH = -1
# Before a peer is asked again that had no news, which it should have waited for.
NO_NEWS_DELAY_S = 0.005


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull moved. seconds: spent on copying. exposed_s: from the peer's word that all is computed, or
    the pull's beginning where that was later, to its end, the lease released.
    """

    transport: str
    num_bytes: int
    seconds: float
    exposed_s: float


@dataclass(slots=True)
class _Pull:
    """How far a pull has come. num_right: blocks that are here and known to be right; num_copied: that were
    copied after them in `epoch`, which the peer's next word confirms. complete_at: when the peer said that
    all is computed, the pull's beginning if it said so at once.
    """

    handle: KVHandle
    first_block: int
    local_block_ids: Sequence[int]
    began: float
    on_copied: Callable[[int, int], None]
    epoch: int = UNKNOWN_EPOCH
    num_right: int = 0
    num_copied: int = 0
    busy_s: float = 0.0
    complete_at: float | None = None

    @property
    def position(self) -> int:
        return self.first_block + self.num_right + self.num_copied

    @property
    def knows_epoch(self) -> bool:
        return self.epoch != UNKNOWN_EPOCH


class KVTransferClient:
    """Pulls into `segment`. Create it on the event loop that uses it.

    resolve: address and incarnation of a worker as the cluster knows them; a handle's word is not taken.
    pull_timeout_s: bound on each step of a pull, probe and release. on_retry: called before a second attempt.
    device, openers: see Connections. Raises ConfigError for a transport that isn't here.
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
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_retry = on_retry
        self._wait_s = WAIT_SHARE * pull_timeout_s
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

    # -- pulling -------------------------------------------------------------------------------------

    async def started(self, handle: KVHandle) -> None:
        """Return once its owner computes the handle's blocks.

        Raises KVLostError, also where nobody opens such a lease soon, or LayoutMismatchError.
        """
        with peer_errors(handle.worker_id):
            connection = await self._connections.connect((handle.worker_id, handle.incarnation))
            epoch = UNKNOWN_EPOCH
            while True:
                located = await self._locate(connection, handle, 0, epoch, until_begun=True)
                epoch = located.epoch
                if located.begun:
                    return
                await asyncio.sleep(NO_NEWS_DELAY_S)

    async def completed(self, handle: KVHandle) -> None:
        """Return once all of the handle's blocks are computed. Raises as `started` does."""
        with peer_errors(handle.worker_id):
            connection = await self._connections.connect((handle.worker_id, handle.incarnation))
            position, epoch = 0, UNKNOWN_EPOCH
            while True:
                located = await self._locate(connection, handle, position, epoch)
                if located.complete:
                    return
                position = len(located.block_ids) + (position if located.epoch == epoch else 0)
                epoch = located.epoch
                await asyncio.sleep(NO_NEWS_DELAY_S)

    async def pull(
        self,
        handle: KVHandle,
        first_block: int,
        local_block_ids: Sequence[int],
        on_copied: Callable[[int, int], None] = lambda _start, _count: None,
    ) -> PullResult:
        """Copy the handle's blocks from `first_block` on into `local_block_ids`, and end the lease.

        Those that the peer still computes are waited for, for as long as it answers. on_copied: called with a
        position in local_block_ids and how many from there on have come; they may come again. Raises
        KVWithdrawnError where the peer took blocks back meanwhile, KVLostError where they can't be had (the
        lease lives as long as it would: another worker may try), LayoutMismatchError, and
        InvalidRequestError naming a block id that this worker doesn't have; what was written until then means
        nothing. When this returns or raises, cancellation included, nothing is being written any more.
        """
        self._check_local(local_block_ids)
        self._keeper.keep(handle)
        pull = _Pull(handle, first_block, local_block_ids, time.monotonic(), on_copied)
        try:
            for attempt in range(1, PULL_ATTEMPTS + 1):
                try:
                    with peer_errors(handle.worker_id):
                        return await self._pull(pull)
                except (DamagedKVError, PeerUnreachableError) as error:
                    logger.warning("KV from %s, attempt %d: %s", handle.worker_id, attempt, error.message)
                    if attempt == PULL_ATTEMPTS:
                        raise
                    self._on_retry()
                    await asyncio.sleep(RETRY_DELAY_S)
            raise AssertionError("unreachable")
        finally:
            self._keeper.stop(handle)

    def _check_local(self, local_block_ids: Sequence[int]) -> None:
        limit = self._segment.num_blocks
        bad = next((block for block in local_block_ids if not 0 <= block < limit), None)
        if bad is not None:
            raise InvalidRequestError(
                f"local_block_ids must be in [0, {limit - 1}], got {bad}", param="local_block_ids"
            )

    async def _pull(self, pull: _Pull) -> PullResult:
        """Locate what is computed, copy it, ask again: the next answer says whether the copy was right."""
        handle = pull.handle
        connection = await self._connections.connect((handle.worker_id, handle.incarnation))
        pull.num_copied = 0
        complete = False
        while not complete:
            located = await self._locate(connection, handle, pull.position, pull.epoch)
            if pull.knows_epoch and located.epoch != pull.epoch and not located.complete:
                raise KVWithdrawnError(f"{handle.worker_id} took its blocks back")
            if pull.knows_epoch and located.epoch != pull.epoch:
                # Located after blocks that may be wrong.
                pull.epoch, pull.num_copied = located.epoch, 0
                await asyncio.sleep(NO_NEWS_DELAY_S)
                continue
            complete = located.complete
            if complete and pull.complete_at is None:
                pull.complete_at = time.monotonic() if pull.knows_epoch else pull.began
            pull.epoch = located.epoch
            pull.num_right += pull.num_copied
            pull.num_copied = 0
            if not located.block_ids and not complete:
                await asyncio.sleep(NO_NEWS_DELAY_S)
            try:
                with peer_errors(handle.worker_id):
                    await self._copy(connection, pull, located)
            except KVLostError:
                # Who sends refuses blocks of an epoch that has passed; then the next answer says what to do.
                if (await self._locate_now(connection, handle)).epoch == pull.epoch:
                    raise
                complete = False
        if not await self._release(connection, handle, pull.epoch):
            raise KVLostError("the lease ended while its blocks were copied")
        num_bytes = len(pull.local_block_ids) * self._block_bytes
        exposed_s = time.monotonic() - (pull.complete_at or pull.began)
        return PullResult(connection.reader.transport, num_bytes, pull.busy_s, exposed_s)

    async def _copy(self, connection: Connection, pull: _Pull, located: worker_pb2.LocateResponse) -> None:
        target_rows = pull.local_block_ids[pull.num_right :]
        missing = len(target_rows) - len(located.block_ids)
        if missing < 0 or (located.complete and missing > 0):
            raise KVLostError(f"{pull.handle.worker_id} located other blocks than the handle covers")
        if not located.block_ids:
            return
        target_rows = target_rows[: len(located.block_ids)]
        began = time.monotonic()
        async with asyncio.timeout(self._timeout_s):
            await connection.reader.read(
                pull.handle,
                pull.position,
                self._segment.blocks,
                target_rows,
                source_rows=located.block_ids,
                epoch=located.epoch,
            )
        pull.num_copied = len(target_rows)
        pull.on_copied(pull.num_right, pull.num_copied)
        pull.busy_s += time.monotonic() - began

    async def _locate(
        self,
        connection: Connection,
        handle: KVHandle,
        first_block: int,
        epoch: int,
        *,
        until_begun: bool = False,
    ) -> worker_pb2.LocateResponse:
        request = worker_pb2.LocateRequest(
            handle=handle_to_proto(handle),
            first_block=first_block,
            wait_s=self._wait_s,
            epoch=epoch,
            until_begun=until_begun,
        )
        async with asyncio.timeout(self._timeout_s):
            return await answered(connection.stub.Locate(request, metadata=self._connections.metadata))

    async def _release(self, connection: Connection, handle: KVHandle, epoch: int) -> bool:
        request = worker_pb2.ReleaseRequest(handle=handle_to_proto(handle), epoch=epoch)
        async with asyncio.timeout(self._timeout_s):
            response = await answered(connection.stub.Release(request, metadata=self._connections.metadata))
        return response.valid

    # -- leases that wait ----------------------------------------------------------------------------

    def keep_alive(self, handle: KVHandle) -> None:
        """Renew the lease in the background until it is pulled or left."""
        self._keeper.keep(handle)

    def leave(self, handle: KVHandle) -> None:
        """Stop renewing: the lease is its owner's to end, or another worker's to pull."""
        self._keeper.stop(handle)

    async def _locate_now(self, connection: Connection, handle: KVHandle) -> worker_pb2.LocateResponse:
        request = worker_pb2.LocateRequest(handle=handle_to_proto(handle))
        async with asyncio.timeout(self._timeout_s):
            return await answered(connection.stub.Locate(request, metadata=self._connections.metadata))

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
                located = await self._locate_now(connection, handle)
                await connection.reader.read(handle, 0, canary, [0], source_rows=located.block_ids)
        if canary.tobytes() != canary_bytes(handle, self._block_bytes):
            raise DamagedKVError(f"{worker_id}: other bytes came than it holds")
        return connection.reader.transport

    def retain(self, alive: Collection[Peer]) -> None:
        """Forget every peer that is not in `alive`: pulls from it end, and its memory is unmapped."""
        self._connections.retain(alive)

    async def close(self) -> None:
        await self._keeper.close()
        await self._connections.close()
