"""Peers, agreed upon: one connection per (worker_id, incarnation), and the transport that fits it.

connect: who answers is who was meant? same layout? same host and its memory can be mapped?
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio

from disagg.config import KVTransport
from disagg.errors import ConfigError, KVLostError
from disagg.rpc import cluster_channel, secret_metadata
from disagg.tls import ClusterTLS
from disagg.transfer.agreement import Device, Side, device_from_proto, transports_for
from disagg.transfer.bulk_reader import BulkReader
from disagg.transfer.calls import answered, peer_errors
from disagg.transfer.readers import BlockReader, SharedMemoryReader, StreamReader
from disagg.transfer.segment import host_id, map_peer
from disagg.transfer.threads import failed, looked_at
from disagg.transfer.wire import check_layout, layout_to_proto
from disagg.types import KVLayout
from disagg.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

# worker_id, incarnation
Peer = tuple[str, str]
# Returns address and incarnation of a worker as the cluster knows them.
Resolve = Callable[[str], tuple[str, str] | None]

MAX_PEER_BLOCKS = 2**31
# Copies are bound by memory bandwidth, which two threads exhaust.
COPY_THREADS = 2
# Receiving threads mostly wait; a peer that stalls holds BulkReader's streams per peer of them.
RECEIVE_THREADS = 64
# A port behind a filter answers nothing: the pull that finds out must have time left for gRPC.
BULK_DIAL_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Reached:
    """A peer that answered and has the same layout, before it is known how its blocks are read.

    address: host:port as the cluster knows it.
    """

    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.KVTransferAsyncStub
    response: worker_pb2.ConnectResponse
    address: str

    @property
    def peer(self) -> Peer:
        return self.response.worker_id, self.response.incarnation

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")


# Returns a reader by one transport, or raises KVLostError where it can't be had with this peer.
Opener = Callable[[Reached], Awaitable[BlockReader]]


@dataclass(frozen=True, slots=True)
class Connection:
    """A peer that has the same layout. reader: how its blocks are read."""

    channel: grpc.aio.Channel
    stub: worker_pb2_grpc.KVTransferAsyncStub
    reader: BlockReader


class Connections:
    """One worker's connections to its peers. own: the worker itself, as it introduces itself.

    device: where its cache is. openers: transports besides shm and grpc, which every worker on CPUs has.
    Raises ConfigError where the transport is not one of those that exist here.
    """

    def __init__(
        self,
        layout: KVLayout,
        own: Peer,
        secret: str,
        resolve: Resolve,
        *,
        transport: KVTransport,
        timeout_s: float,
        tls: ClusterTLS | None = None,
        device: Device = "cpu",
        openers: Mapping[str, Opener] | None = None,
    ) -> None:
        self._openers: dict[str, Opener] = dict(openers or {})
        if device == "cpu":
            self._openers |= {"shm": self._shared_memory, "grpc": self._over_grpc}
        if transport not in ("auto", "shm", *self._openers):
            here = ", ".join(("auto", *sorted(self._openers)))
            raise ConfigError(
                f"kv_transport: {transport} is not available here; use one of {here}", param="kv_transport"
            )
        self._layout = layout
        self._own = own
        self._secret = secret
        self.metadata = secret_metadata(secret)
        self._resolve = resolve
        self._transport = transport
        self._timeout_s = timeout_s
        self._tls = tls
        self._side = Side(host_id(), device, frozenset(self._openers))
        self._executor = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="kv-copy")
        self._receivers = ThreadPoolExecutor(RECEIVE_THREADS, thread_name_prefix="kv-receive")
        self._agreed: dict[Peer, asyncio.Task[Connection]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def incarnation(self, worker_id: str) -> str:
        """Return which incarnation of a worker lives. Raises KVLostError where none does."""
        known = self._resolve(worker_id)
        if known is None:
            raise KVLostError(f"worker {worker_id} is not in the cluster")
        return known[1]

    async def connect(self, peer: Peer) -> Connection:
        """Return the connection to a peer, a new one the first time.

        Raises KVLostError where the cluster knows no such peer or it can't be reached, LayoutMismatchError.
        """
        known = self._resolve(peer[0])
        if known is None or known[1] != peer[1]:
            raise KVLostError(f"worker {peer[0]} has left or was restarted")
        task = self._agreed.get(peer)
        if task is None or failed(task):
            task = self._agreed[peer] = asyncio.create_task(self._agree(peer, known[0]))
            task.add_done_callback(looked_at)
        # Others may wait for the same connection: one of them giving up must not end it.
        return await asyncio.shield(task)

    async def _agree(self, peer: Peer, address: str) -> Connection:
        channel = cluster_channel(address, self._tls)
        try:
            stub = worker_pb2_grpc.KVTransferStub(channel)
            with peer_errors(peer[0]):
                response = await answered(
                    stub.Connect(self._introduction(), metadata=self.metadata, timeout=self._timeout_s)
                )
            if (response.worker_id, response.incarnation) != peer:
                raise KVLostError(f"{address} does not answer as {peer[0]}")
            check_layout(self._layout, response.layout)
            reader = await self._reader(Reached(channel, stub, response, address))
            logger.info(
                "KV from %s travels by %s, from %d ranks to %d",
                peer[0],
                reader.transport,
                response.layout.tp_size,
                self._layout.tp_size,
            )
            return Connection(channel, stub, reader)
        except BaseException:
            await channel.close()
            raise

    def _introduction(self) -> worker_pb2.ConnectRequest:
        return worker_pb2.ConnectRequest(
            worker_id=self._own[0],
            incarnation=self._own[1],
            layout=layout_to_proto(self._layout),
            host_id=self._side.host_id,
        )

    async def _reader(self, reached: Reached) -> BlockReader:
        """Return a reader by the first transport that fits and works. Raises KVLostError, of the last one."""
        response = reached.response
        device = device_from_proto(response.device)
        # On a CPU the service that answered serves the blocks too.
        offered = {*response.transports, *(("grpc",) if device == "cpu" else ())}
        theirs = Side(response.host_id, device, offered)
        names = transports_for(self._transport, self._side, theirs)
        for name in names[:-1]:
            try:
                return await self._openers[name](reached)
            except KVLostError as error:
                logger.warning("KV from %s can't travel by %s: %s", reached.peer[0], name, error.message)
        return await self._openers[names[-1]](reached)

    async def _over_grpc(self, reached: Reached) -> BlockReader:
        try:
            return await self._bulk(reached.response, reached.host)
        except KVLostError as error:
            logger.warning("KV from %s travels as messages, slowly: %s", reached.peer[0], error.message)
        return StreamReader(reached.stub, self.metadata, self._layout.block_bytes)

    async def _bulk(self, response: worker_pb2.ConnectResponse, host: str) -> BulkReader:
        """Return a reader whose first stream is open. The host is the cluster's word, the port the peer's."""
        if not 0 < response.bulk_port < 2**16:
            raise KVLostError("the peer serves no bulk streams")
        reader = BulkReader(
            (host, response.bulk_port),
            (response.worker_id, response.incarnation),
            self._secret,
            self._receivers,
            self._timeout_s,
            self._tls,
        )
        try:
            async with asyncio.timeout(self._timeout_s * BULK_DIAL_SHARE):
                await reader.dial()
        except TimeoutError:
            raise KVLostError(f"port {response.bulk_port} does not answer in time") from None
        return reader

    async def _shared_memory(self, reached: Reached) -> BlockReader:
        response = reached.response
        if not 0 < response.num_blocks < MAX_PEER_BLOCKS:
            raise KVLostError(f"the peer says that it has {response.num_blocks} blocks")
        segment = map_peer(response.segment, response.num_blocks, self._layout.block_bytes)
        return SharedMemoryReader(segment, self._executor)

    def retain(self, alive: Collection[Peer]) -> None:
        """Forget every peer that is not in `alive`: calls to it end, its memory is unmapped."""
        for peer in [peer for peer in self._agreed if peer not in alive]:
            closing = asyncio.create_task(_close(self._agreed.pop(peer)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        self.retain(())
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._receivers.shutdown(wait=False, cancel_futures=True)


async def _close(task: asyncio.Task[Connection]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        connection = await task
        await connection.reader.close()
        await connection.channel.close()
