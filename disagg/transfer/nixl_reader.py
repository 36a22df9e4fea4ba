"""Reads over NIXL: one-sided, polled with growing pauses while one is under way and never else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from disagg.errors import KVLostError
from disagg.transfer.bulk_server import Claim
from disagg.transfer.calls import answered
from disagg.transfer.connections import MAX_PEER_BLOCKS, Peer, Reached
from disagg.transfer.copying import runs
from disagg.transfer.nixl_agent import NixlAgent, NixlError, Read, Span
from disagg.transfer.readers import Metadata
from disagg.transfer.scatter import Scatter
from disagg.transfer.segment import Blocks
from disagg.transfer.staging import Staging
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle
from disagg.v1 import reads_pb2, reads_pb2_grpc, worker_pb2

Result = TypeVar("Result")

MAX_METADATA_BYTES = 1024 * 1024
SHORTEST_NAP_S, LONGEST_NAP_S = 0.0001, 0.002
# An owner whose hardware serves reads is called for nothing; one without is their bottleneck.
ASSIST_NAP_S = 0.0005


def agent_name(worker: Peer) -> str:
    return "/".join(worker)


class NixlReader:
    """One peer's blocks, read out of its registered cache.

    executor: where calls of the agent and copies run. timeout_s: for which a read may make no progress.
    """

    transport = "nixl"

    def __init__(
        self,
        reached: Reached,
        agent: NixlAgent,
        metadata: Metadata,
        executor: Executor,
        *,
        block_bytes: int,
        timeout_s: float,
    ) -> None:
        self._stub = reached.stub
        self._reads: reads_pb2_grpc.NixlReadsAsyncStub = reads_pb2_grpc.NixlReadsStub(reached.channel)
        self._peer = agent_name(reached.peer)
        self._region = reached.response.nixl
        # The canary's row is one more.
        self._num_rows = reached.response.num_blocks + 1
        if not 1 < self._num_rows <= MAX_PEER_BLOCKS:
            raise KVLostError(f"the peer says that it has {self._num_rows - 1} blocks")
        if not 0 < len(self._region.metadata) <= MAX_METADATA_BYTES:
            raise KVLostError(f"the peer's NIXL metadata has {len(self._region.metadata)} bytes")
        self._agent = agent
        self._metadata = metadata
        self._executor = executor
        self._block_bytes = block_bytes
        self._timeout_s = timeout_s
        self._meeting = asyncio.Lock()
        self._met = False

    async def meet(self) -> None:
        """Exchange what agents must know of each other. Raises KVLostError."""
        async with self._meeting:
            if not self._met:
                await self._run(self._agent.meet, self._region.metadata, self._peer)
                self._met = True

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
        rows = list(source_rows) or await self._locate(handle, first_block)
        if len(rows) != len(target_rows) or not all(0 <= row < self._num_rows for row in rows):
            raise KVLostError("the peer located other blocks than the handle covers")
        await self.meet()
        pull = worker_pb2.PullRequest(handle=handle_to_proto(handle), first_block=first_block, epoch=epoch)
        try:
            async with self._assisted(pull):
                await self._read_parts(rows, target, target_rows)
        except NixlError:
            # A connection that broke is made again by meeting again.
            self._met = False
            await self._run(self._agent.part_with, self._peer)
            raise

    async def close(self) -> None:
        if self._met:
            self._met = False
            await self._run(self._agent.part_with, self._peer)

    async def _locate(self, handle: KVHandle, first_block: int) -> list[int]:
        request = worker_pb2.LocateRequest(handle=handle_to_proto(handle), first_block=first_block)
        response = await answered(self._stub.Locate(request, metadata=self._metadata))
        return list(response.block_ids)

    @contextlib.asynccontextmanager
    async def _assisted(self, pull: worker_pb2.PullRequest) -> AsyncIterator[None]:
        """Have the owner drive its agent meanwhile."""
        call = self._reads.Assist(reads_pb2.AssistRequest(pull=pull), metadata=self._metadata)
        try:
            yield
        finally:
            call.cancel()

    async def _read_parts(self, rows: Sequence[int], target: Blocks, target_rows: Sequence[int]) -> None:
        """Read a part while the one before it is copied to where it belongs, if there are two buffers."""
        scattering = Scatter(target, self._executor)
        buffers = [await self._buffer()]
        try:
            if len(rows) > buffers[0].capacity and (second := await self._take()) is not None:
                buffers.append(second)
            start, turn = 0, 0
            while start < len(rows):
                if len(buffers) == 1:
                    await scattering.done()
                buffer = buffers[turn % len(buffers)]
                end = min(len(rows), start + buffer.capacity)
                try:
                    await self._read_part(rows[start:end], buffer)
                except BaseException:
                    # Whatever may still be written to it, the agent waits for it.
                    buffers.remove(buffer)
                    raise
                await scattering.done()
                scattering.start(buffer, target_rows[start:end], None)
                start, turn = end, turn + 1
            await scattering.done()
        finally:
            await scattering.stop()
            for buffer in buffers:
                self._agent.give_back(buffer)

    async def _buffer(self) -> Staging:
        """Return a buffer as soon as one is free. Raises NixlError where that takes too long."""
        nap = SHORTEST_NAP_S
        try:
            async with asyncio.timeout(self._timeout_s):
                while (buffer := await self._take()) is None:
                    await asyncio.sleep(nap)
                    nap = min(2 * nap, LONGEST_NAP_S)
                return buffer
        except TimeoutError:
            raise NixlError("NIXL: no buffer became free in time") from None

    async def _take(self) -> Staging | None:
        taking = asyncio.get_running_loop().run_in_executor(self._executor, self._agent.take_buffer)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._back)
            raise

    def _back(self, taking: asyncio.Future[Staging | None]) -> None:
        if not taking.cancelled() and taking.exception() is None and (buffer := taking.result()) is not None:
            self._agent.give_back(buffer)

    async def _read_part(self, rows: Sequence[int], buffer: Staging) -> None:
        """Read rows to the front of a buffer. Where this raises, the agent has the buffer."""
        spans = list(self._spans(rows))
        beginning = asyncio.get_running_loop().run_in_executor(
            self._executor, self._agent.begin, self._peer, spans, buffer
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                read = await asyncio.shield(beginning)
                nap = SHORTEST_NAP_S
                while not await self._run(self._agent.check, read):
                    await asyncio.sleep(nap)
                    nap = min(2 * nap, LONGEST_NAP_S)
        except BaseException as error:
            beginning.add_done_callback(lambda begun: self._give_up(begun, buffer))
            if isinstance(error, TimeoutError):
                raise NixlError("NIXL: the peer does not serve its memory") from None
            raise
        await self._run(self._agent.release, read)

    def _give_up(self, begun: asyncio.Future[Read], buffer: Staging) -> None:
        if begun.cancelled() or begun.exception() is not None:
            self._agent.give_back(buffer)
        else:
            self._agent.give_up(begun.result())

    def _spans(self, rows: Sequence[int]) -> Iterator[Span]:
        """Yield where rows are in the peer's memory, neighbours as one."""
        for start, end in runs(rows, range(len(rows)), len(rows)):
            yield (
                self._region.address + rows[start] * self._block_bytes,
                (end - start) * self._block_bytes,
            )

    async def _run(self, function: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


class NixlServer(reads_pb2_grpc.NixlReadsServicer):
    """Drives the owner's agent while peers read. claim: which rows a request may read."""

    def __init__(self, agent: NixlAgent, claim: Claim, executor: Executor) -> None:
        self._agent = agent
        self._claim = claim
        self._executor = executor

    def retain(self, _alive: Collection[Peer]) -> None:
        """Nothing: what is held of a peer is its reader's."""

    async def close(self) -> None:
        """Nothing: calls end with their server."""

    async def Assist(
        self, request: reads_pb2.AssistRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> NoReturn:
        loop = asyncio.get_running_loop()
        try:
            self._claim(request.pull, request.pull.first_block)
            while True:
                await loop.run_in_executor(self._executor, self._agent.progress)
                await asyncio.sleep(ASSIST_NAP_S)
        except KVLostError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, error.message)
