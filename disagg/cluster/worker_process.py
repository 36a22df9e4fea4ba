"""Everything inside one worker process, put together. No Ray here: an actor or a test runs it.

model runner ─┐
shared segment├─► Engine ─► Worker ─┐
KV publisher ─┤                     ├─► one gRPC server on one port that the OS picked
KV puller    ─┘     KVTransfer ─────┘
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import torch

from disagg.cluster.cores import CoreClaim
from disagg.config import ClusterConfig
from disagg.engine.engine import Engine
from disagg.engine.overlap import engine_for
from disagg.model.block_mover import pin
from disagg.model.config import read_spec
from disagg.model.device import describe_device, resolve_device
from disagg.model.runner import ModelRunner, load_runner, plan_cache
from disagg.rpc import cluster_server, listen
from disagg.service.metrics import WorkerMetrics
from disagg.service.router_client import WorkerMembership
from disagg.service.step_samples import profile, recorder_of
from disagg.service.worker import Worker
from disagg.tls import load_tls
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.transfer.staged import StagedPublisher, StagedPuller
from disagg.transfer.staging_rows import halves, staging_blocks
from disagg.transfer.transports import ExtraTransports
from disagg.types import Role, WorkerInfo
from disagg.v1 import worker_pb2_grpc

logger = logging.getLogger(__name__)

# In-flight streams get this long to close when a worker is told to stop.
STOP_GRACE_S = 0.5
# A start waits for so long at the most until the cache has its memory: a second takes about a GiB.
POPULATE_WAIT_S = 2.0
_LOWEST_PRIORITY = 19


def _populate(segment: SharedSegment) -> threading.Thread:
    """Begin to take a segment's memory near this thread's cores, giving way to whoever computes."""

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        segment.populate()

    thread = threading.Thread(target=run, name="populate", daemon=True)
    thread.start()
    return thread


def stages(device: torch.device) -> bool:
    """Whether peers can't read the memory of a cache on this device, so that blocks pass the host's."""
    return device.type != "cpu"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is told when it starts. threads: threads that compute, of each rank."""

    worker_id: str
    role: Role
    config: ClusterConfig
    secret: str
    threads: int
    host: str = "127.0.0.1"


class WorkerProcess:
    """One worker from start to stop, on the running loop."""

    def __init__(self, spec: WorkerSpec, router_address: Callable[[], Awaitable[str]]) -> None:
        self._spec = spec
        self._router_address = router_address
        self.incarnation = uuid.uuid4().hex
        pool = spec.config.pool(spec.role)
        self._num_ranks = pool.tensor_parallel_size
        self._cores = CoreClaim(spec.threads if pool.pin_threads else 0, ranks=self._num_ranks)
        # Whether the cache is on a device, so that blocks pass through the segment on their way.
        self._staging = False
        self._staged: StagedPublisher | None = None

    async def start(self) -> WorkerInfo:
        """Load the model, open the port, join the router. Raises ConfigError where that can't be."""
        spec = self._spec
        self._tls = load_tls(spec.config.tls)
        segment, runner = await asyncio.to_thread(self._load)
        self._segment, self._runner = segment, runner
        self._server = cluster_server(spec.secret)
        port = listen(self._server, f"{spec.host}:0", self._tls)
        self.info = self._describe(runner, f"{spec.host}:{port}")
        self._recorder = recorder_of(runner)
        engine = engine_for(
            spec.config.engine_for(spec.role),
            self._recorder,
            num_blocks=runner.num_blocks,
            max_model_len=runner.max_model_len,
            hash_model=runner.fingerprint,
            eos_token_ids=runner.eos_token_ids,
        )
        await asyncio.to_thread(self._profile, engine, runner)
        self.worker = self._wire(engine, runner, segment)
        await self._server.start()
        await self._publisher.listen(spec.host)
        self.worker.start()
        if runner.ranks is not None:
            runner.ranks.on_lost(self.worker.fail)
        await self._membership.start(self.info)
        return self.info

    def _load(self) -> tuple[SharedSegment, ModelRunner]:
        spec = self._spec
        engine_config = spec.config.engine_for(spec.role)
        model = spec.config.model
        device = resolve_device(
            engine_config.device, quantization=model.quantization, kernels=engine_config.kernels
        )
        logger.info("worker %s computes on %s", spec.worker_id, describe_device(device))
        self._staging = stages(device)
        if self._staging:
            return self._load_on_device(device)
        # The plan comes first: the cache's memory is the shared segment, and the runner is built over it.
        layout, num_blocks = plan_cache(
            read_spec(model.folder), engine_config, dtype=model.dtype, quantization=model.quantization
        )
        segment = SharedSegment.create(num_blocks, layout.block_bytes, seal=False)
        # The model's threads start here, and stay on the cores on which this one is pinned meanwhile.
        with self._cores.pinned():
            populating = _populate(segment)
            runner = load_runner(
                model.folder,
                engine_config,
                dtype=model.dtype,
                quantization=model.quantization,
                num_threads=spec.threads,
                buffer=segment.buffer,
                num_blocks=num_blocks,
                max_model_len=model.max_model_len,
                tensor_parallel_size=self._num_ranks,
                buffer_file=segment.file,
                rank_cores=[self._cores.rank_cores(rank) for rank in range(self._num_ranks)],
            )
        segment.seal()
        # A profile beside it would measure both; but what is large may go on while the first requests come.
        populating.join(POPULATE_WAIT_S)
        return segment, runner

    def _load_on_device(self, device: torch.device) -> tuple[SharedSegment, ModelRunner]:
        """The cache is on the device; the segment is what its blocks pass through on their way."""
        spec = self._spec
        model = spec.config.model
        with self._cores.pinned():
            runner = load_runner(
                model.folder,
                spec.config.engine_for(spec.role),
                dtype=model.dtype,
                num_threads=spec.threads,
                max_model_len=model.max_model_len,
                device=device,
                tensor_parallel_size=self._num_ranks,
                rank_cores=[self._cores.rank_cores(rank) for rank in range(self._num_ranks)],
            )
        block_bytes = runner.layout.block_bytes
        memory = spec.config.transfer.staging_memory
        rows = staging_blocks(memory, block_bytes, runner.num_blocks)
        segment = SharedSegment.create(rows, block_bytes, seal=False)
        self._movers = runner.block_movers(segment.file, segment.blocks.shape)
        segment.seal()
        if runner.ranks is None:
            # Ranks pass their parts through pinned memory of their own.
            pin(segment.rows, device)
        longest = rows // 2 * runner.layout.block_size
        if longest < runner.max_model_len:
            logger.warning(
                "staging_memory of %d bytes hands over %d tokens at most; longer prompts are computed again",
                memory,
                longest,
            )
        return segment, runner

    def _profile(self, engine: Engine, runner: ModelRunner) -> None:
        config = self._spec.config.engine_for(self._spec.role)
        with self._cores.pinned():
            if self._staging:
                # Compiles what has not been yet: seconds that no later step takes.
                profile(engine, config)
                self._recorder.take()
            profile(engine, config)

    def _describe(self, runner: ModelRunner, address: str) -> WorkerInfo:
        spec = self._spec
        engine_config = spec.config.engine_for(spec.role)
        return WorkerInfo(
            worker_id=spec.worker_id,
            incarnation=self.incarnation,
            role=spec.role,
            address=address,
            host=socket.gethostname(),
            pid=os.getpid(),
            max_model_len=runner.max_model_len,
            block_size=engine_config.block_size,
            max_num_seqs=engine_config.max_num_seqs,
            max_num_batched_tokens=engine_config.max_num_batched_tokens,
            # Block 0 is scratch and holds no sequence.
            kv_blocks_total=runner.num_blocks - 1,
            model_fingerprint=runner.fingerprint,
            max_prefill_tokens=engine_config.max_prefill_tokens or 0,
        )

    def _wire(self, engine: Engine, runner: ModelRunner, segment: SharedSegment) -> Worker:
        spec, transfer = self._spec, self._spec.config.transfer
        layout = replace(runner.layout, tp_size=self._num_ranks)
        self._membership = WorkerMembership(
            self._router_address,
            spec.secret,
            heartbeat_s=spec.config.router.heartbeat_s,
            tls=self._tls,
            take_samples=self._recorder.take,
        )
        self._publisher = KVTransferService(
            layout,
            segment,
            worker_id=spec.worker_id,
            incarnation=self.incarnation,
            secret=spec.secret,
            lease_s=transfer.lease_s,
            chunk_bytes=transfer.chunk_bytes,
            on_released=lambda request_id: self._on_lease_ended(request_id),
            tls=self._tls,
        )
        self._transports = ExtraTransports(
            self._publisher,
            segment.rows,
            own=(spec.worker_id, self.incarnation),
            secret=spec.secret,
            host=spec.host,
            wanted=transfer.kv_transport,
            timeout_s=transfer.pull_timeout_s,
        )
        client = KVTransferClient(
            layout,
            segment,
            worker_id=spec.worker_id,
            incarnation=self.incarnation,
            secret=spec.secret,
            transport=transfer.kv_transport,
            lease_s=transfer.lease_s,
            pull_timeout_s=transfer.pull_timeout_s,
            resolve=self._membership.resolve,
            tls=self._tls,
            openers=self._transports.openers,
            on_retry=lambda: worker.note_pulled_again(),
        )
        publisher, self._puller = self._staged_ends(segment, client)
        self._membership.on_change(self._puller.retain)
        self._membership.on_change(self._transports.retain)
        worker = Worker(
            self.info,
            engine,
            publisher,
            self._puller,
            self._membership,
            WorkerMetrics(self.info),
            on_engine_thread=self._cores.pin_thread,
            on_pulled=self._recorder.pulled,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, self._server)
        worker_pb2_grpc.add_KVTransferServicer_to_server(self._publisher, self._server)
        self._transports.serve(self._server)
        return worker

    def _staged_ends(
        self, segment: SharedSegment, client: KVTransferClient
    ) -> tuple[KVTransferService | StagedPublisher, KVTransferClient | StagedPuller]:
        """Return both ends of hand-offs, with copies from and to the device where there is one."""
        if not self._staging:
            return self._publisher, client
        published, pulled = halves(segment.num_blocks)
        outgoing, incoming = self._movers
        self._staged = StagedPublisher(self._publisher, segment, outgoing, published, self.info.block_size)
        timeout_s = self._spec.config.transfer.pull_timeout_s
        return self._staged, StagedPuller(client, segment, incoming, pulled, timeout_s)

    def _on_lease_ended(self, request_id: str) -> None:
        if self._staged is not None:
            self._staged.released(request_id)
        self.worker.on_lease_ended(request_id)

    async def wait(self) -> None:
        """Return when the worker was stopped; raise what its engine thread died of."""
        await asyncio.shield(self.worker.stopped)

    async def drain(self) -> None:
        """See Worker.drain."""
        await self.worker.drain()

    def enlist(self, role: Role) -> None:
        """Serve as a member of `role`'s pool from now on. The engine is the same: it knows no roles."""
        self.worker.enlist(role, self._spec.config.engine_for(role).max_prefill_tokens)

    async def stop(self) -> None:
        """Leave the router first, so that nothing new is placed here, then close and free everything."""
        await self._membership.close()
        await self._server.stop(STOP_GRACE_S)
        await self.worker.stop()
        await self._puller.close()
        if self._staged is not None:
            await self._staged.close()
        await self._transports.close()
        await self._publisher.close()
        await asyncio.to_thread(self._runner.close)
        self._segment.close()
        self._cores.close()
