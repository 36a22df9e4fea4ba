"""One front end, put together: router client, worker streams, orchestrator, tokenizer, gRPC server.

Knows nothing of Ray, so that a test can run it beside workers in one process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import grpc

from disagg.config import ClusterConfig
from disagg.errors import WorkerLostError
from disagg.frontend.backend import Readiness, load_sampling_defaults
from disagg.frontend.grpc_service import create_grpc_server
from disagg.frontend.running import RunningRequests
from disagg.frontend.shedding import Shedding
from disagg.model.config import read_spec
from disagg.routing.view import ClusterView
from disagg.service.exposition import merge_expositions
from disagg.service.history import LENGTH, PERIOD_S, History, load, merge, summarize
from disagg.service.metrics import FrontendMetrics
from disagg.service.orchestrator import Orchestrator, ServedModel
from disagg.service.router_client import ReportKind, RouterClient
from disagg.service.tokenizer import Tokenizer
from disagg.service.tracing import RequestTracer
from disagg.service.worker_pool import WorkerPool
from disagg.tls import load_tls
from disagg.types import Role, WorkerInfo, WorkerStatus
from disagg.v1 import router_pb2

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
PEER_TIMEOUT_S = 3.0
# Load balancers ask every second or so; each answer exercises a real hand-off, so one answer serves a while.
READY_TTL_S = 1.0


class Gateway:
    """Backend of the HTTP app and of the gRPC service."""

    def __init__(
        self, config: ClusterConfig, secret: str, router_address: Callable[[], Awaitable[str]]
    ) -> None:
        self.config = config.frontend
        self.model_name = config.model.name
        self.version = version("disagg")
        self.tokenizer = Tokenizer(config.model.folder)
        spec = read_spec(config.model.folder)
        self.vocab_size = spec.vocab_size
        self.eos_token_ids = tuple(spec.eos_token_ids)
        self.sampling_defaults = load_sampling_defaults(config.model.folder)
        self._cluster_config = config
        tls = load_tls(config.tls)
        self._id = f"frontend-{uuid.uuid4().hex[:12]}"
        self._metrics = FrontendMetrics()
        self._router = RouterClient(
            self._id,
            router_address,
            secret,
            config.router,
            on_stale_placement=lambda placement: self._metrics.placements.labels(
                placement.policy, placement.kind.value
            ).inc(),
            tls=tls,
            report=self._report,
        )
        self._metrics.describe(
            self.version,
            self._pool_size,
            {"ttft": config.slo.ttft_s, "tpot": config.slo.tpot_s},
            lambda: self._router.connected,
        )
        self._workers = WorkerPool(secret, self._worker_info, tls)
        tracing = config.tracing
        self._tracer = (
            None if tracing.endpoint is None else RequestTracer(tracing, self.model_name, self.version)
        )
        self._history = History(self._metrics)
        self._pools: deque[tuple[int, dict[str, Any]]] = deque(maxlen=LENGTH)
        self._recorder: asyncio.Task[None] | None = None
        self._readiness: tuple[float, Readiness] | None = None
        self._grpc: grpc.aio.Server | None = None
        self.running = RunningRequests()
        self.shedding = Shedding(self._metrics.count_braked)

    async def start(self) -> None:
        """Attach to the router, learn the model from its workers, open the gRPC port.

        Raises NoCapacityError when no worker shows up in time.
        """
        await self._router.start()
        self._router.on_view_change(self._follow_view)
        view = await self._router.wait_ready(START_TIMEOUT_S)
        any_worker = next(iter(view.workers.values())).info
        self.max_model_len = any_worker.max_model_len
        self.generator = Orchestrator(
            self._id,
            ServedModel(any_worker.model_fingerprint, any_worker.block_size, any_worker.max_model_len),
            self._router,
            self._workers,
            self._metrics,
            max_resumes=self._cluster_config.router.max_resumes,
            slo=self._cluster_config.slo,
            on_end=None if self._tracer is None else self._tracer.record,
        )
        self._recorder = asyncio.create_task(self._record())
        front = self.config
        self._grpc = create_grpc_server(self, front.api_key, front.host, front.grpc_port)
        await self._grpc.start()

    async def stop(self) -> None:
        if self._grpc is not None:
            await self._grpc.stop(0.5)
        if self._recorder is not None:
            self._recorder.cancel()
        await self._workers.close()
        await self._router.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    # -- view --------------------------------------------------------------------------------------

    def _worker_info(self, worker_id: str) -> WorkerInfo | None:
        state = self._router.view.workers.get(worker_id)
        return state.info if state is not None else None

    def _follow_view(self, view: ClusterView) -> None:
        self._workers.prune({key: state.info.incarnation for key, state in view.workers.items()})

    # -- Backend -----------------------------------------------------------------------------------

    async def ready(self) -> Readiness:
        """A prefill and a decode worker that hand a block over right now; cached for a second."""
        now = time.monotonic()
        if self._readiness is None or now - self._readiness[0] > READY_TTL_S:
            self._readiness = (now, await self._exercise_handoff())
        return self._readiness[1]

    async def _exercise_handoff(self) -> Readiness:
        by_role: dict[Role, list[str]] = {role: [] for role in Role}
        for worker_id, state in self._router.view.workers.items():
            if state.status is WorkerStatus.READY:
                by_role[state.info.role].append(worker_id)
        if by_role[Role.MIXED]:
            return Readiness(True, ())
        missing = [role.value for role in (Role.PREFILL, Role.DECODE) if not by_role[role]]
        if missing:
            return Readiness(False, tuple(f"no {role} worker is ready" for role in missing))
        pairs = [(prefill, decode) for decode in by_role[Role.DECODE] for prefill in by_role[Role.PREFILL]]
        reasons = await asyncio.gather(*(self._probe(*pair) for pair in pairs[:16]))
        if None in reasons:
            return Readiness(True, ())
        return Readiness(False, tuple(reason for reason in reasons if reason))

    async def _probe(self, prefill: str, decode: str) -> str | None:
        """Return why `decode` can't get KV from `prefill`, or None if it can."""
        try:
            response = await self._workers.connect(decode).probe(prefill, PEER_TIMEOUT_S)
        except (WorkerLostError, grpc.RpcError) as error:
            return f"{decode} can't be reached: {error}"
        return None if response.ok else f"{decode} can't pull from {prefill}: {response.error}"

    async def metrics(self) -> bytes:
        """Return the metrics of every front end, the router and all workers as one exposition."""
        sources = [self._scrape("router", self._router.scrape(PEER_TIMEOUT_S))]
        for worker_id in self._router.view.workers:
            sources.append(self._scrape(worker_id, self._scrape_worker(worker_id)))
        others, answers = await asyncio.gather(
            self._gather(router_pb2.REPORT_KIND_METRICS), asyncio.gather(*sources)
        )
        parts = [(self._id, self._metrics.exposition()), *others.items(), *answers]
        aliases = self._cluster_config.metrics.vllm_aliases
        # On a thread, since a large cluster's lines take milliseconds that streams would wait for.
        return await asyncio.to_thread(
            merge_expositions, parts, vllm_model=self.model_name if aliases else None
        )

    def _report(self, kind: ReportKind, argument: str) -> bytes:
        """Answer another front end, which asks through the router."""
        if kind == router_pb2.REPORT_KIND_ABORT:
            return b"1" if self.running.abort(argument) else b""
        return self._metrics.exposition() if kind == router_pb2.REPORT_KIND_METRICS else self._history.dump()

    async def _gather(self, kind: ReportKind, argument: str = "") -> dict[str, bytes]:
        """Return the other front ends' answers; none while the router is away."""
        try:
            return await self._router.gather(kind, PEER_TIMEOUT_S, argument)
        except (WorkerLostError, grpc.RpcError) as error:
            logger.warning("no answers from other front ends: %s", error)
            return {}

    async def abort(self, request_id: str) -> bool:
        """Abort a request here or at whichever front end runs it."""
        if self.running.abort(request_id):
            return True
        return b"1" in (await self._gather(router_pb2.REPORT_KIND_ABORT, request_id)).values()

    async def _scrape_worker(self, worker_id: str) -> bytes:
        return await self._workers.connect(worker_id).scrape(PEER_TIMEOUT_S)

    async def _scrape(self, name: str, answer: Awaitable[bytes]) -> tuple[str, bytes]:
        try:
            return name, await answer
        except (WorkerLostError, grpc.RpcError) as error:
            # One process that is down must not hide the others, least of all then.
            logger.warning("no metrics from %s: %s", name, error)
            return name, b""

    async def _record(self) -> None:
        """Keep a row of history each period, at the moments at which every front end does."""
        while True:
            period = int(time.time() // PERIOD_S) + 1
            await asyncio.sleep(period * PERIOD_S - time.time())
            self._history.sample(period)
            self._pools.append((period, pool_loads(self._router.view)))

    async def dashboard(self) -> dict[str, Any]:
        """Return what the page /dashboard draws: the cluster now, and the last minutes of all front ends."""
        others = await self._gather(router_pb2.REPORT_KIND_HISTORY)
        rows = merge([self._history.rows(), *(load(body) for body in others.values())])
        pools = dict(self._pools)
        slo = self._cluster_config.slo
        return {
            **await self.status(),
            "now": time.time(),
            "num_frontends": 1 + len(others),
            "objectives": {"ttft": slo.ttft_s, "tpot": slo.tpot_s},
            "period_s": PERIOD_S,
            "pools": pool_loads(self._router.view),
            "wanted": {role.value: self._pool_size(role) for role in Role},
            "history": [{**summarize(row), "pools": pools.get(row["t"], {})} for row in rows],
        }

    def _pool_size(self, role: Role) -> int:
        """Return how many workers a pool is to have: as the controller scaled it, else as configured."""
        return self._router.pool_sizes.get(role, self._cluster_config.pool(role).replicas)

    async def status(self) -> dict[str, Any]:
        """Return what `disagg status --json` prints."""
        workers = [
            {
                "id": worker_id,
                "role": state.info.role.value,
                "state": state.status.value,
                "pid": state.info.pid,
                "host": state.info.host,
                "address": state.info.address,
                "incarnation": state.info.incarnation,
                "kv_blocks_total": state.info.kv_blocks_total,
                "kv_blocks_used": state.load.kv_blocks_used,
                "kv_blocks_cached": state.load.kv_blocks_cached,
                "num_running": state.load.num_running,
                "num_waiting": state.load.num_waiting,
                "num_held": state.load.num_held,
            }
            for worker_id, state in sorted(self._router.view.workers.items())
        ]
        return {
            "model": self.model_name,
            "version": self.version,
            "workers": workers,
            "router": {"pid": self._router.router_pid, "connected": self._router.connected},
            "frontend": {"id": self._id, "pid": os.getpid()},
        }


def pool_loads(view: ClusterView) -> dict[str, Any]:
    """Return each pool's load: ready workers, their requests, KV use of the fullest and on average."""
    pools: dict[str, Any] = {}
    for role in Role:
        states = [state for state in view.workers.values() if state.info.role is role]
        if not states:
            continue
        uses = [state.load.kv_blocks_used / max(1, state.info.kv_blocks_total) for state in states]
        pools[role.value] = {
            "workers": len(states),
            "ready": sum(state.status is WorkerStatus.READY for state in states),
            "running": sum(state.load.num_running for state in states),
            "waiting": sum(state.load.num_waiting for state in states),
            "held": sum(state.load.num_held for state in states),
            "kv_max": max(uses),
            "kv_mean": sum(uses) / len(uses),
        }
    return pools
