"""Workers' transfer halves on loopback, without engines: a segment, a service on a port, a client."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import numpy as np

from disagg.errors import KVLostError
from disagg.rpc import cluster_server, listen
from disagg.tls import ClusterTLS
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2_grpc

SECRET = "test-secret"
# 512 bytes a block.
LAYOUT = KVLayout("tiny", "float32", block_size=4, num_layers=2, num_kv_heads=2, head_dim=4)
BLOCK_BYTES = LAYOUT.block_bytes
NUM_BLOCKS = 64


@dataclass
class Directory:
    """What the cluster's membership knows: worker_id to (address, incarnation)."""

    known: dict[str, tuple[str, str]] = field(default_factory=dict)

    def resolve(self, worker_id: str) -> tuple[str, str] | None:
        return self.known.get(worker_id)


@dataclass
class Node:
    """One worker's transfer half. released: request ids in the order in which blocks were given back."""

    segment: SharedSegment
    service: KVTransferService
    server: grpc.aio.Server
    address: str
    incarnation: str
    released: list[str]

    def publish(self, request_id: str, block_ids: Collection[int], num_tokens: int | None = None) -> KVHandle:
        count = len(block_ids) * LAYOUT.block_size if num_tokens is None else num_tokens
        return self.service.publish(request_id, secrets.token_bytes(16), list(block_ids), count)


def fill(segment: SharedSegment, seed: int) -> None:
    rng = np.random.default_rng(seed)
    segment.blocks[:] = rng.integers(0, 256, segment.blocks.shape, dtype=np.uint8)


@asynccontextmanager
async def running_node(
    directory: Directory,
    worker_id: str = "prefill-0",
    *,
    incarnation: str = "first",
    layout: KVLayout = LAYOUT,
    num_blocks: int = NUM_BLOCKS,
    lease_s: float = 30.0,
    chunk_bytes: int = 4 * BLOCK_BYTES,
    clock: Callable[[], float] | None = None,
    secret: str = SECRET,
    bulk: bool = True,
    tls: ClusterTLS | None = None,
) -> AsyncIterator[Node]:
    """Run the publishing side and enter it into the directory. bulk: it serves bulk streams too."""
    segment = SharedSegment.create(num_blocks, layout.block_bytes)
    fill(segment, seed=1)
    released: list[str] = []
    extra: dict[str, Any] = {} if clock is None else {"clock": clock}
    service = KVTransferService(
        layout,
        segment,
        worker_id=worker_id,
        incarnation=incarnation,
        secret=secret,
        lease_s=lease_s,
        chunk_bytes=chunk_bytes,
        on_released=released.append,
        tls=tls,
        **extra,
    )
    if bulk:
        await service.listen("127.0.0.1")
    async with serving(service, secret, tls) as (server, address):
        directory.known[worker_id] = (address, incarnation)
        yield Node(segment, service, server, address, incarnation, released)
        await server.stop(None)
    await service.close()
    segment.close()


@asynccontextmanager
async def serving(
    service: worker_pb2_grpc.KVTransferServicer, secret: str = SECRET, tls: ClusterTLS | None = None
) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    server = cluster_server(secret)
    port = listen(server, "127.0.0.1:0", tls)
    worker_pb2_grpc.add_KVTransferServicer_to_server(service, server)
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _unreachable(*_: object) -> Any:
    raise KVLostError("a test has closed the bulk port")


@contextmanager
def local_segment(num_blocks: int = NUM_BLOCKS) -> Iterator[SharedSegment]:
    segment = SharedSegment.create(num_blocks, BLOCK_BYTES)
    try:
        yield segment
    finally:
        segment.close()


@asynccontextmanager
async def running_client(
    directory: Directory,
    *,
    transport: str = "auto",
    layout: KVLayout = LAYOUT,
    num_blocks: int = NUM_BLOCKS,
    lease_s: float = 30.0,
    pull_timeout_s: float = 10.0,
    secret: str = SECRET,
    tls: ClusterTLS | None = None,
) -> AsyncIterator[tuple[KVTransferClient, SharedSegment]]:
    """Run the pulling side, over a segment that is filled with 0xEE.

    transport: as in the configuration, or "messages": grpc where the peer's bulk port can't be reached.
    """
    segment = SharedSegment.create(num_blocks, layout.block_bytes)
    segment.blocks[:] = 0xEE
    client = KVTransferClient(
        layout,
        segment,
        worker_id="decode-0",
        incarnation="mine",
        secret=secret,
        resolve=directory.resolve,
        transport="grpc" if transport == "messages" else transport,  # type: ignore[arg-type]
        lease_s=lease_s,
        pull_timeout_s=pull_timeout_s,
        tls=tls,
    )
    if transport == "messages":
        client._connections._bulk = _unreachable  # type: ignore[method-assign]
    try:
        yield client, segment
    finally:
        await client.close()
        segment.close()
