"""The controller: one reconciling loop per worker slot, and the router beside them.

A slot ("prefill-0") is a name that stays; the process behind it may die and be replaced. The loop of a slot
starts an actor, awaits its `run`, which ends only with the actor, and starts the next one. Ray tells of a
death at once, so nothing is polled. All actors are detached and named: when the controller itself is
restarted, it finds and adopts them, and no stream notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from disagg.cluster.actors import RouterActor, WorkerActor
from disagg.cluster.naming import CONTROLLER_NAME, NAMESPACE, ROUTER_NAME, worker_actor_name
from disagg.config import ClusterConfig
from disagg.types import Role

logger = logging.getLogger(__name__)

# A worker that dies sooner than this after its start is restarted with growing pauses.
YOUNG_S = 30.0
MAX_BACKOFF_S = 10.0
# Without any front end for this long, a cluster that belongs to a Serve application takes itself down.
ORPHAN_CHECK_S = 5.0
STOP_TIMEOUT_S = 5.0


# Ray's own handle type describes the methods of one actor class; a slot's actor is only ever awaited.
Actor = Any


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a pool that is to be filled at all times."""

    worker_id: str
    role: Role


def slots_of(config: ClusterConfig) -> list[Slot]:
    """Return every slot that the configuration asks for."""
    return [
        Slot(f"{role.value}-{index}", role)
        for role in (Role.PREFILL, Role.DECODE, Role.MIXED)
        for index in range(config.pool(role).replicas)
    ]


def threads_of(config: ClusterConfig, role: Role) -> int:
    """Return a worker's torch threads: its pool's setting, else an even share of this machine's cores."""
    pool = config.pool(role)
    if pool.threads is not None:
        return pool.threads
    return max(1, (os.cpu_count() or 1) // max(1, len(slots_of(config))))


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
        self._keepers: dict[Slot, asyncio.Task[None]] = {}
        self._actors: dict[Slot, Actor] = {}
        self._watch: asyncio.Task[None] | None = None

    async def secret(self) -> str:
        return self._secret

    async def pid(self) -> int:
        return os.getpid()

    async def restarts(self) -> dict[str, int]:
        """Return how often each worker was replaced."""
        return dict(self._restarts)

    async def start(self) -> None:
        """Bring the router and all slots up; idempotent. Raises ConfigError where a worker can't start."""
        router = self._get_or_create_router()
        await router.address.remote()
        new = [slot for slot in slots_of(self._config) if slot not in self._keepers]
        for slot in new:
            self._actors[slot] = self._get_or_create_worker(slot)
        # Kept only once they are up: a checkpoint that can't be loaded is to be told, not tried for ever.
        await self._all_ready(new)
        for slot in new:
            if slot not in self._keepers:  # another front end's call may have been faster
                self._keepers[slot] = asyncio.create_task(self._keep(slot))
        if self._watch is None and self._orphan_timeout_s is not None:
            self._watch = asyncio.create_task(self._leave_when_orphaned(self._orphan_timeout_s))

    async def run(self) -> None:
        """Start, and stay. A caller that keeps this call open has Ray repeat it should this process die."""
        await self.start()
        await asyncio.Event().wait()

    async def _all_ready(self, slots: Sequence[Slot]) -> None:
        try:
            await asyncio.gather(*(self._actors[slot].ready.remote() for slot in slots))
        except RayTaskError as error:
            # The caller wants to read why a worker can't start, not Ray's traceback around it.
            cause: Exception = error.as_instanceof_cause()  # type: ignore[no-untyped-call]
            raise cause from None

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
            num_gpus=pool.num_gpus,
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
            self._actors[slot] = await self._replace(slot)

    async def _run_once(self, slot: Slot) -> None:
        try:
            await self._actors[slot].run.remote()
            logger.warning("worker %s ended", slot.worker_id)
        except RayActorError:
            logger.warning("worker %s died", slot.worker_id)
        except RayError as error:
            logger.error("worker %s failed: %s", slot.worker_id, error)
        # Its process may still live with a dead engine in it, and would keep the name.
        with contextlib.suppress(RayError):
            ray.kill(self._actors[slot])

    async def _replace(self, slot: Slot) -> Actor:
        """Create the next actor; the dead one's name is free only once Ray has buried it."""
        dead = self._actors[slot]
        while True:
            actor = self._get_or_create_worker(slot)
            if actor != dead:
                return actor
            await asyncio.sleep(0.05)

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
        for keeper in self._keepers.values():
            keeper.cancel()
        actors = list(self._actors.values())
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
