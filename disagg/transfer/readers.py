"""How a peer's blocks are read: by mapping its memory, or as gRPC messages. Further readers: bulk_reader.py.

A reader only moves bytes. Whether they are right is known when the lease is released, see client.py.
"""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

import grpc.aio
import numpy as np

from disagg.errors import KVLostError
from disagg.transfer.calls import DamagedKVError
from disagg.transfer.copying import copy_rows
from disagg.transfer.segment import Blocks, PeerSegment
from disagg.transfer.threads import to_its_end
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2, worker_pb2_grpc

Metadata = tuple[tuple[str, str], ...]


class BlockReader(Protocol):
    """One peer's blocks, by one transport."""

    @property
    def transport(self) -> str:
        """Its name in configuration and metrics."""
        ...

    async def read(
        self,
        handle: KVHandle,
        first_block: int,
        target: Blocks,
        target_rows: Sequence[int],
        *,
        source_rows: Sequence[int] = (),
        epoch: int = 0,
    ) -> None:
        """Copy the handle's blocks from `first_block` on into rows of `target`, uint8 [n, block_bytes].

        source_rows: where the peer said that they are, for who maps its memory. epoch: in which it said so.
        Raises KVLostError unless as many came as there are rows; what was written until then means nothing.
        When this returns or raises, cancellation included, nothing is being written any more.
        """
        ...

    async def close(self) -> None:
        """End what it holds of its own; reads that run fail once they have stopped writing."""
        ...


class SharedMemoryReader:
    """Copies out of the peer's mapped segment, on a thread, since a long prompt takes tens of ms."""

    transport = "shm"

    def __init__(self, segment: PeerSegment, executor: Executor) -> None:
        self._segment = segment
        self._executor = executor

    async def read(
        self,
        handle: KVHandle,
        first_block: int,
        target: Blocks,
        target_rows: Sequence[int],
        *,
        source_rows: Sequence[int] = (),
        epoch: int = 0,
    ) -> None:
        source, rows = self._segment.rows, list(source_rows)
        if len(rows) != len(target_rows) or not all(0 <= row < len(source) for row in rows):
            raise KVLostError("the peer located other blocks than the handle covers")
        stop = threading.Event()
        copying = asyncio.get_running_loop().run_in_executor(
            self._executor, copy_rows, source, rows, target, list(target_rows), stop
        )
        await to_its_end(copying, stop.set)

    async def close(self) -> None:
        """Nothing: copies that run end by themselves, and the mapping goes with its last user."""


class StreamReader:
    """Receives blocks as checksummed messages, for when the peer's bulk port can't be reached."""

    transport = "grpc"

    def __init__(
        self, stub: worker_pb2_grpc.KVTransferAsyncStub, metadata: Metadata, block_bytes: int
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._block_bytes = block_bytes

    async def read(
        self,
        handle: KVHandle,
        first_block: int,
        target: Blocks,
        target_rows: Sequence[int],
        *,
        source_rows: Sequence[int] = (),
        epoch: int = 0,
    ) -> None:
        request = worker_pb2.PullRequest(
            handle=handle_to_proto(handle),
            first_block=first_block,
            num_blocks=len(target_rows),
            epoch=epoch,
        )
        call: grpc.aio.UnaryStreamCall[worker_pb2.PullRequest, worker_pb2.PullChunk] = self._stub.Pull(
            request, metadata=self._metadata
        )
        received = 0
        try:
            async for chunk in call:
                data = self._verified(chunk, first_block + received, len(target_rows) - received)
                target[list(target_rows[received : received + len(data)])] = data
                received += len(data)
        finally:
            call.cancel()
        if received != len(target_rows):
            raise DamagedKVError(f"the peer sent {received} of {len(target_rows)} blocks")

    async def close(self) -> None:
        """Nothing: its calls end with their channel."""

    def _verified(self, chunk: worker_pb2.PullChunk | None, expected_block: int, missing: int) -> Blocks:
        """Return a chunk's blocks, uint8 [n, block_bytes], 0 < n <= missing. Raises DamagedKVError."""
        if chunk is None:
            raise DamagedKVError("a chunk can't be read")
        count = len(chunk.checksums)
        if not 0 < count <= missing:
            raise DamagedKVError(f"a chunk has {count} blocks where 1 to {missing} are missing")
        if chunk.first_block != expected_block:
            raise DamagedKVError(f"block {chunk.first_block} came where {expected_block} was due")
        if len(chunk.data) != count * self._block_bytes:
            raise DamagedKVError(f"{count} blocks came with {len(chunk.data)} bytes")
        blocks = np.frombuffer(chunk.data, np.uint8).reshape(count, self._block_bytes)
        for index, checksum in enumerate(chunk.checksums):
            if zlib.crc32(blocks[index]) != checksum:
                raise DamagedKVError(f"block {expected_block + index} failed its checksum")
        return blocks
