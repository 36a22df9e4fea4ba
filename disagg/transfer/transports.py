"""Transports that are there where they are asked for: both halves of each, for one worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc.aio

from disagg.config import KVTransport
from disagg.errors import KVLostError
from disagg.rpc import secret_metadata
from disagg.transfer.agreement import Device
from disagg.transfer.connections import Opener, Peer, Reached
from disagg.transfer.readers import BlockReader
from disagg.transfer.server import KVTransferService
from disagg.v1 import reads_pb2_grpc, worker_pb2

if TYPE_CHECKING:
    from disagg.transfer.nixl_agent import NixlAgent

logger = logging.getLogger(__name__)

# Copies, and calls of NIXL, of which one may be a copy.
COPY_THREADS = 3


class ExtraTransports:
    """What `wanted` needs besides shm and grpc; nothing for auto, shm and grpc on a CPU.

    service: where peers learn of it. cache: the blocks that they may read, uint8 [n, block_bytes], the
    canary's row among them. own: this worker. host: its own address. timeout_s: the longest that a peer may
    keep silent in the middle of a read. openers: for KVTransferClient.
    """

    def __init__(
        self,
        service: KVTransferService,
        cache: Any,
        *,
        own: Peer,
        secret: str,
        host: str,
        wanted: KVTransport,
        timeout_s: float,
        device: Device = "cpu",
    ) -> None:
        self._service = service
        self._cache = cache
        self._own = own
        self._metadata = secret_metadata(secret)
        self._host = host
        self._device = device
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="kv-scatter")
        self._servers: list[Any] = []
        self.openers: dict[str, Opener] = {}
        self._agent: NixlAgent | None = None
        if wanted == "nccl" or device == "cuda":
            self._add_groups()
        if wanted == "nixl":
            self._add_nixl()
        if device == "cuda":
            self._add_cuda_ipc()

    def _add_groups(self) -> None:
        # Loads torch.distributed, which most workers don't need.
        from disagg.transfer.group_server import GroupServer

        if self._device == "cpu":
            logger.warning("kv_transport nccl: the cache is on a CPU, so Gloo moves its blocks")
        server = GroupServer(
            self._cache,
            self._service.claim,
            host=self._host,
            device=self._device,
            timeout_s=self._timeout_s,
        )
        self._servers.append((server, reads_pb2_grpc.add_KVGroupsServicer_to_server))
        self._service.offer("nccl")
        self.openers["nccl"] = self._open_group

    async def _open_group(self, reached: Reached) -> BlockReader:
        from disagg.transfer.group_reader import GroupReader

        return GroupReader(
            reached,
            self._own,
            self._metadata,
            self._executor,
            host=self._host,
            device=self._device,
            block_bytes=self._cache.shape[1],
            timeout_s=self._timeout_s,
        )

    def _add_nixl(self) -> None:
        from disagg.transfer.nixl_agent import NixlAgent
        from disagg.transfer.nixl_reader import NixlServer, agent_name

        address, num_bytes = _memory_of(self._cache)
        self._agent = NixlAgent(agent_name(self._own), self._host, self._device, self._cache.shape[1])
        self._agent.register(address, num_bytes)
        region = worker_pb2.NixlRegion(metadata=self._agent.metadata(), address=address)
        server = NixlServer(self._agent, self._service.claim, self._executor)
        self._servers.append((server, reads_pb2_grpc.add_NixlReadsServicer_to_server))
        self._service.offer("nixl", lambda response: response.nixl.CopyFrom(region))
        self.openers["nixl"] = self._open_nixl

    async def _open_nixl(self, reached: Reached) -> BlockReader:
        from disagg.transfer.nixl_reader import NixlReader

        assert self._agent is not None
        reader = NixlReader(
            reached,
            self._agent,
            self._metadata,
            self._executor,
            block_bytes=self._cache.shape[1],
            timeout_s=self._timeout_s,
        )
        await reader.meet()
        return reader

    def _add_cuda_ipc(self) -> None:
        from disagg.transfer.cuda_memory import CudaDriver, export_cache
        from disagg.transfer.cuda_reader import CudaIpcReader, exported_to_proto

        try:
            driver = CudaDriver()
            exported = exported_to_proto(export_cache(self._cache, driver))
        except KVLostError as error:
            logger.warning("no cuda_ipc: %s", error.message)
            return
        self._service.offer("cuda_ipc", lambda response: response.cuda.CopyFrom(exported))

        async def opened(reached: Reached) -> BlockReader:
            return CudaIpcReader(reached, self._metadata, self._executor, self._cache.shape[1], driver)

        self.openers["cuda_ipc"] = opened

    def serve(self, server: grpc.aio.Server) -> None:
        """Add what peers call; before the server is started."""
        for servicer, add in self._servers:
            add(servicer, server)

    def retain(self, alive: Collection[Peer]) -> None:
        """End what is held for peers that are not in `alive`."""
        for servicer, _ in self._servers:
            servicer.retain(alive)

    async def close(self) -> None:
        for servicer, _ in self._servers:
            await servicer.close()
        if self._agent is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._agent.close)
        self._executor.shutdown(wait=False, cancel_futures=True)


def _memory_of(cache: Any) -> tuple[int, int]:
    """Return address and length of an array or tensor."""
    if hasattr(cache, "data_ptr"):
        return cache.data_ptr(), cache.numel()
    return cache.ctypes.data, cache.nbytes
