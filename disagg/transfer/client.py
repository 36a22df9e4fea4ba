"""The side of a hand-off that goes on: pulls a peer's blocks into its own cache.

connect once per (peer, incarnation): same layout? same host?
pull = copy (shared memory or gRPC) ──► release ──► "live until now" ? the bytes count : KVLostError
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np

from disagg.config import KVTransport
from disagg.errors import KVLostError, LayoutMismatchError
from disagg.rpc import cluster_channel, secret_metadata
from disagg.transfer.segment import PeerSegment, SharedSegment, host_id, map_peer
from disagg.transfer.wire import check_same_layout, handle_to_proto, layout_to_proto, probe_handle
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

MAX_PEER_BLOCKS = 2**31
# Renewals a lease's life: two may be lost before it ends.
RENEWALS_PER_LEASE = 3
# A copy of this size takes about 50 ms; in between, a cancelled pull can stop.
COPY_PIECE_BYTES = 256 * 1024 * 1024

Peer = tuple[str, str]


@dataclass(frozen=True, slots=True)
class PullResult:
    """What a pull moved. seconds: the whole pull, connecting included."""

    transport: str
    num_bytes: int
    seconds: float


@dataclass(slots=True)
class _Connection:
    """A peer, agreed upon. segment: its mapped memory, None where blocks travel over gRPC."""

    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.KVTransferAsyncStub
    segment: PeerSegment | None = None

    @property
    def transport(self) -> str:
        return "grpc" if self.segment is None else "shm"


class KVTransferClient:
    """Pulls into `segment`. Lives on one event loop.

    resolve: address and incarnation of a worker as the cluster knows them; a handle's word is not taken.
    """

    def __init__(
        self,
        layout: KVLayout,
        segment: SharedSegment,
        *,
        worker_id: str,
        incarnation: str,
        secret: str,
        resolve: Callable[[str], tuple[str, str] | None],
        transport: KVTransport = "auto",
        lease_s: float = 5.0,
        pull_timeout_s: float = 10.0,
    ) -> None:
        self._layout = layout
        self._segment = segment
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._metadata = secret_metadata(secret)
        self._resolve = resolve
        self._transport = transport
        self._renew_period_s = lease_s / RENEWALS_PER_LEASE
        self._timeout_s = pull_timeout_s
        self._host_id = host_id()
        self._connections: dict[Peer, asyncio.Task[_Connection]] = {}
        self._waiting: dict[Peer, dict[str, KVHandle]] = {}
        self._renewers: dict[Peer, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    # -- pulling -------------------------------------------------------------------------------------

    async def pull(self, handle: KVHandle, first_block: int, local_block_ids: Sequence[int]) -> PullResult:
        """Copy the handle's blocks from `first_block` on into `local_block_ids`, and end the lease.

        Raises KVLostError or LayoutMismatchError; what was written until then means nothing. When this
        returns or raises, cancellation included, nothing is being written any more.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect(handle)
                if local_block_ids:
                    await self._copy(connection, handle, first_block, local_block_ids)
                await self._release(connection, handle)
        except TimeoutError:
            raise KVLostError(f"no KV from {handle.worker_id} within {self._timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise _lost(handle.worker_id, error) from None
        finally:
            self._stop_renewing(handle)
        num_bytes = len(local_block_ids) * self._layout.block_bytes
        return PullResult(connection.transport, num_bytes, time.monotonic() - started)

    async def _release(self, connection: _Connection, handle: KVHandle) -> None:
        request = worker_pb2.ReleaseRequest(handle=handle_to_proto(handle))
        response = await connection.stub.Release(request, metadata=self._metadata)
        if not response.valid:
            raise KVLostError("the lease ended while its blocks were copied")

    async def _copy(
        self, connection: _Connection, handle: KVHandle, first_block: int, local: Sequence[int]
    ) -> None:
        if connection.segment is None:
            await self._copy_stream(connection, handle, first_block, local)
        else:
            await self._copy_shared(connection, connection.segment, handle, first_block, local)

    async def _copy_shared(
        self,
        connection: _Connection,
        segment: PeerSegment,
        handle: KVHandle,
        first_block: int,
        local: Sequence[int],
    ) -> None:
        request = worker_pb2.LocateRequest(handle=handle_to_proto(handle), first_block=first_block)
        response = await connection.stub.Locate(request, metadata=self._metadata)
        remote = list(response.block_ids)
        if len(remote) != len(local) or not all(0 <= block < len(segment.blocks) for block in remote):
            raise KVLostError("the peer located other blocks than the handle covers")
        # Off the loop, since copying a long prompt takes tens of milliseconds; and in pieces, each waited for
        # even when this task is cancelled, since nobody may write into blocks that have been given back.
        step = max(1, COPY_PIECE_BYTES // self._layout.block_bytes)
        for start in range(0, len(remote), step):
            piece = slice(start, start + step)
            await _uninterrupted(
                asyncio.to_thread(
                    _copy_runs, segment.blocks, remote[piece], self._segment.blocks, local[piece]
                )
            )

    async def _copy_stream(
        self, connection: _Connection, handle: KVHandle, first_block: int, local: Sequence[int]
    ) -> None:
        request = worker_pb2.PullRequest(handle=handle_to_proto(handle), first_block=first_block)
        call = connection.stub.Pull(request, metadata=self._metadata)
        size, received = self._layout.block_bytes, 0
        try:
            async for chunk in call:
                count = len(chunk.checksums)
                if chunk.first_block != first_block + received or len(chunk.data) != count * size:
                    raise KVLostError("a chunk is missing, repeated, out of order or of a wrong size")
                if not 0 < count <= len(local) - received:
                    raise KVLostError("the peer sent more blocks than the handle covers")
                data = np.frombuffer(chunk.data, np.uint8).reshape(count, size)
                for row, checksum in zip(data, chunk.checksums, strict=True):
                    if zlib.crc32(row.data) != checksum:
                        raise KVLostError("a block failed its checksum")
                self._segment.blocks[list(local[received : received + count])] = data
                received += count
        finally:
            call.cancel()
        if received != len(local):
            raise KVLostError(f"the peer sent {received} of {len(local)} blocks")

    # -- leases that wait ----------------------------------------------------------------------------

    def keep_alive(self, handle: KVHandle) -> None:
        """Renew the lease in the background until it is pulled or let go."""
        peer = (handle.worker_id, handle.incarnation)
        self._waiting.setdefault(peer, {})[handle.request_id] = handle
        if peer not in self._renewers:
            self._renewers[peer] = asyncio.create_task(self._renew(peer))

    async def let_go(self, handle: KVHandle) -> None:
        """Stop renewing and end the lease, as far as its owner can be reached."""
        self._stop_renewing(handle)
        with contextlib.suppress(KVLostError, LayoutMismatchError, grpc.RpcError, TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._release(await self._connect(handle), handle)

    def _stop_renewing(self, handle: KVHandle) -> None:
        waiting = self._waiting.get((handle.worker_id, handle.incarnation))
        if waiting is not None:
            waiting.pop(handle.request_id, None)

    async def _renew(self, peer: Peer) -> None:
        """Renew all of a peer's waiting leases with one call a period; end when none waits."""
        try:
            while True:
                await asyncio.sleep(self._renew_period_s)
                handles = list(self._waiting.get(peer, {}).values())
                if not handles:
                    return
                await self._renew_once(handles)
        finally:
            self._waiting.pop(peer, None)
            self._renewers.pop(peer, None)

    async def _renew_once(self, handles: Sequence[KVHandle]) -> None:
        request = worker_pb2.RenewRequest(handles=[handle_to_proto(handle) for handle in handles])
        try:
            async with asyncio.timeout(self._renew_period_s):
                connection = await self._connect(handles[0])
                await connection.stub.Renew(request, metadata=self._metadata)
        except (KVLostError, LayoutMismatchError, grpc.RpcError, TimeoutError) as error:
            # The pull will find out whether the lease is still there.
            logger.warning("can't renew leases of %s: %s", handles[0].worker_id, error)

    # -- peers ---------------------------------------------------------------------------------------

    async def _connect(self, handle: KVHandle) -> _Connection:
        """Return the agreed connection to a handle's worker. Raises KVLostError, LayoutMismatchError."""
        known = self._resolve(handle.worker_id)
        if known is None or known[1] != handle.incarnation:
            raise KVLostError(f"worker {handle.worker_id} has left or was restarted")
        peer = (handle.worker_id, handle.incarnation)
        task = self._connections.get(peer)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._connections[peer] = asyncio.create_task(self._agree(peer, known[0]))
        return await asyncio.shield(task)

    async def _agree(self, peer: Peer, address: str) -> _Connection:
        channel = cluster_channel(address)
        stub = worker_pb2_grpc.KVTransferStub(channel)
        try:
            request = worker_pb2.ConnectRequest(
                worker_id=self._worker_id,
                incarnation=self._incarnation,
                layout=layout_to_proto(self._layout),
                host_id=self._host_id,
            )
            response = await stub.Connect(request, metadata=self._metadata, timeout=self._timeout_s)
            if (response.worker_id, response.incarnation) != peer:
                raise KVLostError(f"{address} answers as another worker than {peer[0]}")
            check_same_layout(self._layout, response.layout)
            return _Connection(channel, stub, self._map(response))
        except grpc.aio.AioRpcError as error:
            await channel.close()
            raise _lost(peer[0], error) from None
        except BaseException:
            await channel.close()
            raise

    def _map(self, response: worker_pb2.ConnectResponse) -> PeerSegment | None:
        """Return the peer's mapped memory where it can and may be used."""
        if self._transport == "grpc":
            return None
        offered = "shm" in response.transports and 0 < response.num_blocks < MAX_PEER_BLOCKS
        try:
            if not offered:
                raise KVLostError("the peer is on another host")
            return map_peer(response.segment, response.num_blocks, self._layout.block_bytes)
        except KVLostError as error:
            if self._transport == "shm":
                raise
            logger.info("KV from %s travels over gRPC: %s", response.worker_id, error.message)
            return None

    async def probe(self, worker_id: str) -> str:
        """Move the peer's scratch block as a hand-off would; return the transport. Raises as pull does."""
        known = self._resolve(worker_id)
        if known is None:
            raise KVLostError(f"worker {worker_id} is unknown here")
        handle = probe_handle(worker_id, known[1], self._secret)
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connect(handle)
                await self._copy(connection, handle, 0, [0])
        except TimeoutError:
            raise KVLostError(f"no answer from {worker_id} within {self._timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise _lost(worker_id, error) from None
        return connection.transport

    def retain(self, alive: Collection[Peer]) -> None:
        """Forget every peer that is not in `alive`, so that a dead worker's memory is unmapped."""
        for peer in [peer for peer in self._connections if peer not in alive]:
            self._discard(self._connections.pop(peer))

    def _discard(self, task: asyncio.Task[_Connection]) -> None:
        closing = asyncio.create_task(_close(task))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for renewer in list(self._renewers.values()):
            renewer.cancel()
        self.retain(())
        await asyncio.gather(*self._closing, return_exceptions=True)


async def _close(task: asyncio.Task[_Connection]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await (await task).channel.close()


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` to its end even if this task is cancelled meanwhile; then let the cancellation out."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _copy_runs(
    source: np.ndarray, source_ids: Sequence[int], target: np.ndarray, target_ids: Sequence[int]
) -> None:
    """Copy rows; neighbours that stay neighbours go in one piece, during which numpy lets the GIL go."""
    for start, end in _runs(source_ids, target_ids):
        count = end - start
        first, to = source_ids[start], target_ids[start]
        target[to : to + count] = source[first : first + count]


def _runs(source_ids: Sequence[int], target_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of stretches over which both sequences go up by one."""
    start = 0
    for index in range(1, len(source_ids) + 1):
        joined = (
            index < len(source_ids)
            and source_ids[index] == source_ids[index - 1] + 1
            and target_ids[index] == target_ids[index - 1] + 1
        )
        if not joined:
            yield start, index
            start = index


def _lost(worker_id: str, error: grpc.aio.AioRpcError) -> KVLostError | LayoutMismatchError:
    message = f"{worker_id}: {error.code().name}: {error.details()}"
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return LayoutMismatchError(message)
    return KVLostError(message)
