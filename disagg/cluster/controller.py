"""The controller: what pools should be against what they are, one keeper per worker, and the router.

A slot ("prefill-0") is a name that stays; the process behind it may die and be replaced, and its role may
change. Its keeper starts an actor, awaits its `run`, which ends only with the actor, and starts the next one.
Ray tells of a death at once, so nothing is polled. All actors are detached and named: when the controller
itself is restarted, it finds and adopts them, with the roles that they have by then, and no stream notices.

Pools grow by new slots. They shrink, and lend a worker to each other, by draining one first: the router
places nothing more there, and what runs there ends in its own time. When: disagg.routing.autoscaler.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from disagg.cluster.actors import RouterActor, WorkerActor
from disagg.cluster.gpus import gpus_per_worker
from disagg.cluster.naming import (
    CONTROLLER_NAME,
    NAMESPACE,
    ROUTER_NAME,
    worker_actor_name,
    worker_of_actor,
)
from disagg.cluster.pool_scaler import PoolScaler
from disagg.config import ClusterConfig
from disagg.errors import ConfigError
from disagg.routing.autoscaler import WorkerSample
from disagg.types import Role

logger = logging.getLogger(__name__)

# A worker that dies sooner than this after its start is restarted with growing pauses.
YOUNG_S = 30.0
MAX_BACKOFF_S = 10.0
# Without any front end for this long, a cluster that belongs to a Serve application takes itself down.
ORPHAN_CHECK_S = 5.0
STOP_TIMEOUT_S = 5.0
# How often the router, which may have been restarted, is told of the pools' sizes.
TELL_EVERY_S = 2.0
# Processes that may die before a worker has been up once.
START_ATTEMPTS = 3


# Ray's own handle type describes the methods of one actor class; a slot's actor is only ever awaited.
Actor = Any


@dataclass(slots=True)
class Slot:
    """A place in a pool that is to be filled until it is given up.

    ready_at: when its present process joined, on this process's clock; None while it starts. leaving: it
    drains, to end or to change its role.
    """

    worker_id: str
    role: Role
    actor: Actor = None
    keeper: asyncio.Task[None] | None = None
    ready_at: float | None = None
    leaving: bool = False


def slots_of(config: ClusterConfig) -> list[Slot]:
    """Return every slot that the configuration asks for."""
    return [
        Slot(f"{role.value}-{index}", role)
        for role in (Role.PREFILL, Role.DECODE, Role.MIXED)
        for index in range(config.pool(role).replicas)
    ]


def threads_of(config: ClusterConfig, role: Role) -> int:
    """Return the torch threads of a rank: its pool's setting, else an even share of this machine's cores."""
    pool = config.pool(role)
    if pool.threads is not None:
        return pool.threads
    ranks = sum(config.pool(slot.role).tensor_parallel_size for slot in slots_of(config))
    return max(1, (os.cpu_count() or 1) // max(1, ranks))


class Controller:
    """Keeps every slot filled. An actor; `start` returns when all workers were up once."""

    def __init__(
        self, config: dict[str, Any], secret: str, host: str, orphan_timeout_s: float | None
    ) -> None:
        self._config = ClusterConfig.model_validate(config)
        self._secret = secret
        self._host = host
        self._orphan_timeout_s = orphan_timeout_s
        self._restarts: dict[str, int] = {}
        self._gpus_in_cluster = 0.0
        self._started = False
        self._slots: dict[str, Slot] = {}
        self._pools = PoolScaler(self._config, self)
        self._watch: asyncio.Task[None] | None = None
        self._scaling: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def secret(self) -> str:
        return self._secret

    async def pid(self) -> int:
        return os.getpid()

    async def restarts(self) -> dict[str, int]:
        """Return how often each worker was replaced."""
        return dict(self._restarts)

    async def start(self) -> None:
        """Bring the router and all slots up; idempotent. Raises ConfigError where a worker can't start."""
        self._gpus_in_cluster = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        router = self._get_or_create_router()
        await router.address.remote()
        new = [] if self._started else self._first_slots()
        for slot in new:
            slot.actor = self._get_or_create_worker(slot)
        # Kept only once they are up: a checkpoint that can't be loaded is to be told, not tried for ever.
        await self._all_ready(new)
        if not self._started:  # another front end's call may have been faster
            self._started = True
            for slot in new:
                self._slots[slot.worker_id] = slot
                slot.keeper = asyncio.create_task(self._keep(slot))
            self._telling = asyncio.create_task(self._tell_router())
            if self._config.autoscaler.enabled:
                self._scaling = asyncio.create_task(self._pools.run())
        if self._watch is None and self._orphan_timeout_s is not None:
            self._watch = asyncio.create_task(self._leave_when_orphaned(self._orphan_timeout_s))

    async def run(self) -> None:
        """Start, and stay. A caller that keeps this call open has Ray repeat it should this process die."""
        await self.start()
        await asyncio.Event().wait()

    def _first_slots(self) -> list[Slot]:
        """Return the configured slots, and those that a predecessor of this process had added."""
        slots = {slot.worker_id: slot for slot in slots_of(self._config)}
        for name in ray.util.list_named_actors(all_namespaces=True):
            worker_id = worker_of_actor(name["name"])
            if name["namespace"] == NAMESPACE and worker_id is not None and worker_id not in slots:
                slots[worker_id] = Slot(worker_id, Role(worker_id.rsplit("-", 1)[0]))
        return list(slots.values())

    async def _all_ready(self, slots: Sequence[Slot]) -> None:
        try:
            await asyncio.gather(*(self._until_ready(slot) for slot in slots))
        except RayTaskError as error:
            # The caller wants to read why a worker can't start, not Ray's traceback around it.
            cause: Exception = error.as_instanceof_cause()  # type: ignore[no-untyped-call]
            raise cause from None

    async def _until_ready(self, slot: Slot) -> None:
        """Await a slot's first worker. One that dies meanwhile is replaced, a few times.

        A restarted controller may find a worker that is dying, and must not fail with it: Ray repeats `run`
        after the death of its process, not after an error.
        """
        for attempt in range(START_ATTEMPTS):
            try:
                await slot.actor.ready.remote()
                slot.role = Role(await slot.actor.role.remote())
                return
            except RayActorError:
                if attempt == START_ATTEMPTS - 1:
                    raise
                logger.warning("worker %s died while it started", slot.worker_id)
                slot.actor = await self._replace(slot)

    def _get_or_create_router(self) -> Actor:
        options = self.actor_options(ROUTER_NAME, max_restarts=-1, resources=self._config.router.resources)
        actor_class: Any = ray.remote(RouterActor)
        return actor_class.options(**options).remote(
            self._config.model_dump(mode="json"), self._secret, self._host
        )

    def _get_or_create_worker(self, slot: Slot) -> Actor:
        pool = self._config.pool(slot.role)
        options = self.actor_options(
            worker_actor_name(slot.worker_id),
            num_cpus=pool.num_cpus,
            num_gpus=gpus_per_worker(self._config, slot.role, self._gpus_in_cluster),
            resources=pool.resources,
            scheduling_strategy="SPREAD",
        )
        actor_class: Any = ray.remote(WorkerActor)
        return actor_class.options(**options).remote(
            slot.worker_id,
            slot.role.value,
            self._config.model_dump(mode="json"),
            self._secret,
            threads_of(self._config, slot.role),
            self._host,
        )

    @staticmethod
    def actor_options(name: str, **more: Any) -> dict[str, Any]:
        """Return Ray's options for an actor that is found by name and outlives its creator."""
        return {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            **more,
        }

    # -- reconciling -------------------------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        """Run a slot's worker again and again."""
        failures = 0
        while True:
            started = time.monotonic()
            await self._run_once(slot)
            young = time.monotonic() - started < YOUNG_S
            failures = failures + 1 if young else 0
            if failures > 1:
                await asyncio.sleep(min(MAX_BACKOFF_S, 0.25 * 2**failures))
            self._restarts[slot.worker_id] = self._restarts.get(slot.worker_id, 0) + 1
            slot.actor = await self._replace(slot)

    async def _run_once(self, slot: Slot) -> None:
        try:
            await slot.actor.ready.remote()
            slot.ready_at = time.monotonic()
            await slot.actor.run.remote()
            logger.warning("worker %s ended", slot.worker_id)
        except RayActorError:
            logger.warning("worker %s died", slot.worker_id)
        except RayError as error:
            logger.error("worker %s failed: %s", slot.worker_id, error)
        finally:
            slot.ready_at = None
        # Its process may still live with a dead engine in it, and would keep the name.
        with contextlib.suppress(RayError):
            ray.kill(slot.actor)

    async def _replace(self, slot: Slot) -> Actor:
        """Create the next actor; the dead one's name is free only once Ray has buried it."""
        dead = slot.actor
        while True:
            actor = self._get_or_create_worker(slot)
            if actor != dead:
                return actor
            await asyncio.sleep(0.05)

    # -- pools -------------------------------------------------------------------------------------

    @property
    def slots(self) -> Sequence[Slot]:
        return list(self._slots.values())

    async def pools(self) -> dict[str, list[str]]:
        """Return the workers of each role's pool, without those that leave it."""
        pools: dict[str, list[str]] = {role.value: [] for role in Role}
        for slot in self._slots.values():
            if not slot.leaving:
                pools[slot.role.value].append(slot.worker_id)
        return pools

    async def scale(self, role: str, size: int) -> None:
        """Add workers to a pool, or drain and end some; return when they are ready, or gone.

        No request fails: one that still runs on a worker that leaves ends there.
        Raises ConfigError where size is out of the pool's bounds.
        """
        await self._pools.scale(Role(role), size)

    async def change_role(self, worker_id: str, role: str) -> None:
        """Move a worker to another pool without restarting it. Raises ConfigError for an unknown id."""
        slot = self._slots.get(worker_id)
        if slot is None or slot.leaving:
            raise ConfigError(f"worker_id: there is no worker {worker_id} to move", param="worker_id")
        await self._pools.move(slot, Role(role))

    def add_slot(self, role: Role) -> Slot:
        """Open a slot, whose process starts in the background."""
        numbers = (f"{role.value}-{index}" for index in itertools.count())
        slot = Slot(next(name for name in numbers if name not in self._slots), role)
        slot.actor = self._get_or_create_worker(slot)
        self._slots[slot.worker_id] = slot
        slot.keeper = asyncio.create_task(self._keep(slot))
        return slot

    async def close_slot(self, slot: Slot) -> None:
        """End a slot's worker, which has been drained, for good."""
        if slot.keeper is not None:
            slot.keeper.cancel()
        await self._stop(slot.actor)
        self._slots.pop(slot.worker_id, None)

    async def _tell_router(self) -> None:
        """Keep the router informed of how many workers each pool is to have; front ends show it."""
        while True:
            sizes = {role: len(workers) for role, workers in (await self.pools()).items()}
            with contextlib.suppress(ValueError, RayError):
                router: Any = ray.get_actor(ROUTER_NAME, namespace=NAMESPACE)
                await router.set_pool_sizes.remote(sizes)
            await asyncio.sleep(TELL_EVERY_S)

    async def samples(self) -> list[WorkerSample]:
        """Return what the router knows of all workers. Raises RayError or ValueError while it is away."""
        router: Any = ray.get_actor(ROUTER_NAME, namespace=NAMESPACE)
        found: list[WorkerSample] = await router.samples.remote()
        return found

    # -- ends --------------------------------------------------------------------------------------

    async def _leave_when_orphaned(self, timeout_s: float) -> None:
        """Shut down when no front end has been attached for `timeout_s`: the application was deleted."""
        last_seen = time.monotonic()
        while time.monotonic() - last_seen < timeout_s:
            await asyncio.sleep(ORPHAN_CHECK_S)
            try:
                router: Any = ray.get_actor(ROUTER_NAME, namespace=NAMESPACE)
                if await router.num_frontends.remote():
                    last_seen = time.monotonic()
            except (ValueError, RayError):
                continue
        logger.warning("no front end for %g s; shutting down", timeout_s)
        await self.shutdown()
        ray.kill(ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE))

    async def shutdown(self) -> None:
        """Stop every worker and the router. What does not stop in time is killed."""
        for task in (self._scaling, self._telling, *(slot.keeper for slot in self._slots.values())):
            if task is not None:
                task.cancel()
        actors = [slot.actor for slot in self._slots.values()]
        stops = [asyncio.ensure_future(self._stop(actor)) for actor in actors]
        await asyncio.gather(*stops)
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(ROUTER_NAME, namespace=NAMESPACE))

    @staticmethod
    async def _stop(actor: Actor) -> None:
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(actor.stop.remote(), STOP_TIMEOUT_S)
        with contextlib.suppress(RayError):
            ray.kill(actor)


def get_or_create_controller(
    config: ClusterConfig, secret: str, *, orphan_timeout_s: float | None = None
) -> Actor:
    """Return the cluster's controller, created if there is none. It survives its creator."""
    options = Controller.actor_options(
        CONTROLLER_NAME, max_restarts=-1, max_task_retries=-1, resources=config.router.resources
    )
    # Clients' keys are the front ends' business; what is not passed on can't leak from here.
    public = config.model_copy(update={"frontend": config.frontend.model_copy(update={"api_key": None})})
    actor_class: Any = ray.remote(Controller)
    return actor_class.options(**options).remote(
        public.model_dump(mode="json"), secret, config.network.host, orphan_timeout_s
    )
