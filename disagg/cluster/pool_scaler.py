"""Pools towards their plan: grow, drain and end, drain and relabel. The controller gives the means."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from disagg.config import AutoscalerConfig, ClusterConfig
from disagg.errors import ConfigError
from disagg.routing.autoscaler import Bounds, Snapshot, WorkerSample, plan
from disagg.types import Role

logger = logging.getLogger(__name__)

# Most requests end sooner; after it a worker is stopped, and what still runs there resumes elsewhere.
DRAIN_TIMEOUT_S = 900.0
READY_TIMEOUT_S = 300.0
_POLL_S = 0.05


class PoolSlot(Protocol):
    """A worker's place. actor: has drain and enlist, as disagg.cluster.actors.WorkerActor."""

    worker_id: str
    role: Role
    actor: Any
    ready_at: float | None
    leaving: bool


class Slots(Protocol):
    """Whoever starts and ends workers; the controller."""

    @property
    def slots(self) -> Sequence[Any]: ...
    def add_slot(self, role: Role) -> Any: ...
    async def close_slot(self, slot: Any) -> None: ...
    async def samples(self) -> list[WorkerSample]: ...


def bounds_of(config: ClusterConfig, role: Role) -> Bounds:
    """Return how many workers a pool may have."""
    pool = config.pool(role)
    low = pool.replicas if pool.min_replicas is None else pool.min_replicas
    high = max(low, pool.replicas) if pool.max_replicas is None else pool.max_replicas
    return Bounds(low, high)


class PoolScaler:
    """Carries out one change at a time; all of it on one event loop.

    clock: seconds, that of the slots' ready_at.
    """

    def __init__(
        self, config: ClusterConfig, slots: Slots, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._slots = slots
        self._clock = clock
        self._changing = asyncio.Lock()
        settings = config.autoscaler
        length = int(settings.look_back_s / settings.interval_s) + 2
        self._history: deque[Snapshot] = deque(maxlen=length)
        self._last_change = float("-inf")

    @property
    def settings(self) -> AutoscalerConfig:
        return self._config.autoscaler

    # -- reconciling -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look, plan and change, for ever. A look or a change that fails is repeated at the next turn."""
        while True:
            await asyncio.sleep(self.settings.interval_s)
            try:
                await self.turn()
            except Exception:
                # The router or a worker died on the way: both come back, and the next look sees them.
                logger.warning("a turn of the autoscaler failed", exc_info=True)

    async def turn(self) -> None:
        """Take one look at all workers and carry out what follows from it."""
        self._history.append(self._snapshot(await self._slots.samples()))
        pools = {role: bounds_of(self._config, role) for role in (Role.PREFILL, Role.DECODE)}
        decided = plan(self._history, pools, self.settings, self._last_change)
        sizes = {role: len(self.members(role)) for role in pools}
        if decided.flip is None and decided.sizes == sizes:
            return
        logger.warning("pools %s, wanted %s: %s", sizes, decided.sizes, decided.reason)
        if decided.flip is not None:
            giver, receiver = decided.flip
            await self.move(self._least_busy(giver), receiver)
        else:
            await asyncio.gather(*(self.scale(role, size) for role, size in decided.sizes.items()))
        self._last_change = self._clock()

    def _snapshot(self, samples: Sequence[WorkerSample]) -> Snapshot:
        now = self._clock()
        slots = {slot.worker_id: slot for slot in self._slots.slots}
        workers, starting = [], []
        for sample in samples:
            slot = slots.pop(sample.worker_id, None)
            if slot is not None:
                age = 0.0 if slot.ready_at is None else now - slot.ready_at
                workers.append(replace(sample, age_s=age, draining=sample.draining or slot.leaving))
        starting = [slot.role for slot in slots.values() if not slot.leaving]
        return Snapshot(now, tuple(workers), tuple(starting))

    # -- changes -----------------------------------------------------------------------------------

    def members(self, role: Role) -> list[Any]:
        """Return the slots of a pool, without those that leave it."""
        return [slot for slot in self._slots.slots if slot.role is role and not slot.leaving]

    async def scale(self, role: Role, size: int) -> None:
        """Bring a pool to `size`; see Controller.scale."""
        if not 0 <= size <= 10_000:
            raise ConfigError(f"size must be in [0, 10000], got {size}", param="size")
        async with self._changing:
            members = self.members(role)
            added = [self._slots.add_slot(role) for _ in range(size - len(members))]
            await self._until_ready(added)
            leaving = sorted(members, key=lambda slot: slot.worker_id)[size:]
            await asyncio.gather(*(self._end(slot) for slot in leaving))

    async def move(self, slot: PoolSlot, role: Role) -> None:
        """Drain a worker, let it serve in another pool, and go on; the process stays the same."""
        async with self._changing:
            if slot.role is role:
                return
            slot.leaving = True
            try:
                await self._drain(slot)
                slot.role = role
                await slot.actor.enlist.remote(role.value)
            finally:
                slot.leaving = False

    def _least_busy(self, role: Role) -> Any:
        last = {worker.worker_id: worker for worker in self._history[-1].workers}

        def load(slot: Any) -> tuple[float, float]:
            sample = last.get(slot.worker_id)
            return (0.0, 0.0) if sample is None else (sample.queued_s, sample.sequences)

        return min(self.members(role), key=load)

    async def _until_ready(self, slots: Sequence[Any]) -> None:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while any(slot.ready_at is None for slot in slots):
                await asyncio.sleep(_POLL_S)

    async def _end(self, slot: Any) -> None:
        slot.leaving = True
        await self._drain(slot)
        await self._slots.close_slot(slot)

    @staticmethod
    async def _drain(slot: Any) -> None:
        drained: Awaitable[None] = slot.actor.drain.remote()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drained, DRAIN_TIMEOUT_S)
