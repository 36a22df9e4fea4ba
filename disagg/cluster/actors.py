"""Ray actors: thin shells that keep a router or a worker running in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import ray

from disagg.cluster.naming import NAMESPACE, ROUTER_NAME
from disagg.config import ClusterConfig
from disagg.routing.autoscaler import WorkerSample, sample_workers
from disagg.routing.core import CORE
from disagg.tls import load_tls
from disagg.types import Role

logger = logging.getLogger(__name__)


async def router_address(timeout_s: float = 10.0) -> str:
    """Return where the router listens now; it has another port after a restart. Raises ray errors."""
    router: Any = ray.get_actor(ROUTER_NAME, namespace=NAMESPACE)
    address: str = await asyncio.wait_for(router.address.remote(), timeout_s)
    return address


def listen_address(host: str) -> str:
    """Return where a server of this process listens: `host`, or for "auto" this node's address in Ray."""
    if host != "auto":
        return host
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class RouterActor:
    """Runs the router's gRPC server. Ray restarts the actor when its process dies."""

    def __init__(self, config: dict[str, Any], secret: str, host: str) -> None:
        self._config = ClusterConfig.model_validate(config)
        self._secret = secret
        self._host = host
        self._lock = asyncio.Lock()
        self._address: str | None = None

    async def address(self) -> str:
        """Start the server on the first call in this process; return host:port."""
        from disagg.service.router_server import RouterServer

        async with self._lock:
            if self._address is None:
                tls = load_tls(self._config.tls)
                self._server = RouterServer(
                    self._config.router, self._secret, tls=tls, admission=self._config.admission
                )
                self._address = await self._server.start(listen_address(self._host))
                logger.info("the router listens at %s; its core is %s", self._address, CORE.name)
        return self._address

    async def num_frontends(self) -> int:
        """Return how many front ends are attached; 0 before the server runs."""
        return 0 if self._address is None else self._server.num_frontends

    async def set_pool_sizes(self, sizes: dict[str, int]) -> None:
        """Take note of the workers that each role's pool is to have; nothing before the server runs."""
        if self._address is not None:
            self._server.set_pool_sizes({Role(role): size for role, size in sizes.items()})

    async def samples(self) -> list[WorkerSample]:
        """Return what the autoscaler wants to know of every worker; none before the server runs."""
        return [] if self._address is None else sample_workers(self._server.router.view)

    async def pid(self) -> int:
        return os.getpid()


class WorkerActor:
    """Runs one worker. `run` starts it and returns when it ends, so that its caller learns of any death."""

    def __init__(
        self, worker_id: str, role: str, config: dict[str, Any], secret: str, threads: int, host: str
    ) -> None:
        self._arguments = (worker_id, role, config, secret, threads, host)
        self._started: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Start once; wait for the end. Raises ConfigError, or what the engine thread died of."""
        await self._start_once()
        await self._process.wait()

    async def ready(self) -> None:
        """Return when the worker has joined the router."""
        await self._start_once()

    async def _start_once(self) -> None:
        # A controller that was restarted calls `run` of a worker that is up.
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        # Torch is imported here and not at the top: the controller imports this module too.
        from disagg.cluster.worker_process import WorkerProcess, WorkerSpec

        worker_id, role, config, secret, threads, host = self._arguments
        spec = WorkerSpec(
            worker_id,
            Role(role),
            ClusterConfig.model_validate(config),
            secret,
            threads,
            listen_address(host),
        )
        self._process = WorkerProcess(spec, router_address)
        await self._process.start()

    async def role(self) -> str:
        """Return the role that it has now: a restarted controller asks."""
        await self._start_once()
        return self._process.worker.info.role.value

    async def drain(self) -> None:
        """Take no new requests; return when the last one has ended."""
        await self._start_once()
        await self._process.drain()

    async def enlist(self, role: str) -> None:
        """Take requests in `role`'s pool from now on, after a drain or instead of one."""
        await self._start_once()
        self._process.enlist(Role(role))

    async def stop(self) -> None:
        if self._started is not None and self._started.done() and not self._started.exception():
            await self._process.stop()
