"""A whole cluster in one process and one event loop, without Ray: the same router, workers and gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg.cluster.worker_process import WorkerProcess, WorkerSpec
from disagg.config import ClusterConfig, parse_config
from disagg.frontend.gateway import Gateway
from disagg.service.generation import GenerationRequest
from disagg.service.router_server import RouterServer
from disagg.tls import load_tls
from disagg.types import FinishReason, Role, SamplingParams

SECRET = "test-secret"


@dataclass
class Cluster:
    """Handles to every part. `address` is what a worker or gateway asks for when it looks for the router."""

    config: ClusterConfig
    router: RouterServer
    address: str = ""
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    gateway: Gateway | None = None

    async def router_address(self) -> str:
        return self.address

    async def add_worker(self, worker_id: str, role: Role) -> WorkerProcess:
        spec = WorkerSpec(worker_id, role, self.config, SECRET, threads=1)
        process = WorkerProcess(spec, self.router_address)
        await process.start()
        self.workers[worker_id] = process
        return process

    def blocks_used(self) -> dict[str, int]:
        return {key: process.worker.load.kv_blocks_used for key, process in self.workers.items()}

    async def wait_idle(self, timeout_s: float = 15.0) -> None:
        """Wait until no worker holds a block; leases end by themselves."""
        async with asyncio.timeout(timeout_s):
            while any(self.blocks_used().values()):
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running_cluster(
    settings: Mapping[str, Any] | None = None, *, prefill: int = 1, decode: int = 1, mixed: int = 0
) -> AsyncIterator[Cluster]:
    base: dict[str, Any] = {
        "engine": {"num_kv_blocks": 400, "max_num_batched_tokens": 64, "block_size": 16},
        "frontend": {"port": 0, "grpc_port": 0},
        # Every request is handed over, however short: that is what is tested here.
        "router": {"heartbeat_s": 0.1, "local_prefill": False},
        "transfer": {"lease_s": 2.0},
    }
    for section, values in (settings or {}).items():
        base[section] = {**base.get(section, {}), **values}
    config = parse_config(base)
    cluster = Cluster(
        config, RouterServer(config.router, SECRET, tls=load_tls(config.tls), admission=config.admission)
    )
    cluster.address = await cluster.router.start("127.0.0.1")
    try:
        counts = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
        for role, count in counts.items():
            for index in range(count):
                await cluster.add_worker(f"{role.value}-{index}", role)
        cluster.gateway = Gateway(config, SECRET, cluster.router_address)
        await cluster.gateway.start()
        yield cluster
    finally:
        if cluster.gateway is not None:
            await cluster.gateway.stop()
        for worker in list(cluster.workers.values()):
            await worker.stop()
        await cluster.router.stop()


@contextlib.asynccontextmanager
async def second_gateway(cluster: Cluster) -> AsyncIterator[Gateway]:
    gateway = Gateway(cluster.config, SECRET, cluster.router_address)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


@dataclass
class Answer:
    token_ids: list[int]
    finish_reason: FinishReason
    num_cached_tokens: int


_counter = iter(range(10**9))


async def ask(cluster: Cluster, prompt: Sequence[int], *, max_tokens: int = 24, **params: Any) -> Answer:
    """Run one request to its end and check that it has exactly one terminal output."""
    assert cluster.gateway is not None
    settings = {"temperature": 0.0, "seed": 1, "ignore_eos": True, **params}
    salt = settings.pop("cache_salt", "")
    request = GenerationRequest(
        request_id=f"test-{next(_counter)}",
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max_tokens, **settings),
        timeout_s=60.0,
        cache_salt=salt,
    )
    tokens: list[int] = []
    cached = 0
    reasons: list[FinishReason] = []
    async for output in cluster.gateway.generator.generate(request):
        tokens.extend(output.token_ids)
        cached = max(cached, output.num_cached_tokens)
        if output.finish_reason is not None:
            reasons.append(output.finish_reason)
    assert len(reasons) == 1
    return Answer(tokens, reasons[0], cached)
