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
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from disagg.cluster.cores import CoreClaim
from disagg.config import ClusterConfig
from disagg.engine.engine import Engine
from disagg.model.config import read_spec
from disagg.model.runner import ModelRunner, load_runner, plan_cache
from disagg.rpc import cluster_server, listen
from disagg.service.metrics import WorkerMetrics
from disagg.service.router_client import WorkerMembership
from disagg.service.step_samples import StepRecorder, profile
from disagg.service.worker import Worker
from disagg.tls import load_tls
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.transfer.transports import ExtraTransports
from disagg.types import Role, WorkerInfo
from disagg.v1 import worker_pb2_grpc

logger = logging.getLogger(__name__)

# In-flight streams get this long to close when a worker is told to stop.
STOP_GRACE_S = 0.5


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

    async def start(self) -> WorkerInfo:
        """Load the model, open the port, join the router. Raises ConfigError where that can't be."""
        spec = self._spec
        self._tls = load_tls(spec.config.tls)
        segment, runner = await asyncio.to_thread(self._load)
        self._segment, self._runner = segment, runner
        self._server = cluster_server(spec.secret)
        port = listen(self._server, f"{spec.host}:0", self._tls)
        self.info = self._describe(runner, f"{spec.host}:{port}")
        self._recorder = StepRecorder(runner)
        engine = Engine(
            spec.config.engine_for(spec.role),
            self._recorder,
            num_blocks=runner.num_blocks,
            max_model_len=runner.max_model_len,
            hash_model=runner.fingerprint,
            eos_token_ids=runner.eos_token_ids,
        )
        await asyncio.to_thread(self._profile, engine)
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
        # The plan comes first: the cache's memory is the shared segment, and the runner is built over it.
        layout, num_blocks = plan_cache(
            read_spec(model.folder), engine_config, dtype=model.dtype, quantization=model.quantization
        )
        segment = SharedSegment.create(num_blocks, layout.block_bytes, seal=False)
        # The model's threads start here, and stay on the cores on which this one is pinned meanwhile.
        with self._cores.pinned():
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
        return segment, runner

    def _profile(self, engine: Engine) -> None:
        with self._cores.pinned():
            profile(engine, self._spec.config.engine_for(self._spec.role))

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
        self._membership = WorkerMembership(
            self._router_address,
            spec.secret,
            heartbeat_s=spec.config.router.heartbeat_s,
            tls=self._tls,
            take_samples=self._recorder.take,
        )
        self._publisher = KVTransferService(
            runner.layout,
            segment,
            worker_id=spec.worker_id,
            incarnation=self.incarnation,
            secret=spec.secret,
            lease_s=transfer.lease_s,
            chunk_bytes=transfer.chunk_bytes,
            on_released=lambda request_id: worker.on_lease_ended(request_id),
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
        self._puller = KVTransferClient(
            runner.layout,
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
        self._membership.on_change(self._puller.retain)
        self._membership.on_change(self._transports.retain)
        worker = Worker(
            self.info,
            engine,
            self._publisher,
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
        await self._transports.close()
        await self._publisher.close()
        await asyncio.to_thread(self._runner.close)
        self._segment.close()
        self._cores.close()
