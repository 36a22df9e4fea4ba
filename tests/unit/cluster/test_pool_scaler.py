"""Pools towards their plan, with workers that only note what is asked of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from disagg.cluster.pool_scaler import PoolScaler, bounds_of
from disagg.config import AutoscalerConfig, ClusterConfig, PoolConfig
from disagg.errors import ConfigError
from disagg.routing.autoscaler import Bounds, WorkerSample
from disagg.types import Role


class Remote:
    """A method as Ray gives it."""

    def __init__(self, method: Callable[..., Awaitable[None]]) -> None:
        self.remote = method


class FakeActor:
    def __init__(self) -> None:
        self.story: list[str] = []
        self.may_drain = asyncio.Event()
        self.may_drain.set()
        self.drain, self.enlist = Remote(self._drain), Remote(self._enlist)

    async def _drain(self) -> None:
        self.story.append("drain")
        await self.may_drain.wait()
        self.story.append("drained")

    async def _enlist(self, role: str) -> None:
        self.story.append(f"enlist {role}")


@dataclass
class FakeSlot:
    worker_id: str
    role: Role
    actor: FakeActor = field(default_factory=FakeActor)
    ready_at: float | None = 0.0
    leaving: bool = False
    queued_s: float = 0.0
    sequences: float = 0.0


class FakeSlots:
    """now: the clock, moved by hand."""

    def __init__(self, **pools: int) -> None:
        self.now = 100.0
        self.closed: list[str] = []
        self.slots = [
            FakeSlot(f"{role}-{i}", Role(role)) for role, size in pools.items() for i in range(size)
        ]

    def add_slot(self, role: Role) -> FakeSlot:
        slot = FakeSlot(f"{role.value}-new{len(self.slots)}", role)
        self.slots.append(slot)
        return slot

    async def close_slot(self, slot: FakeSlot) -> None:
        self.closed.append(slot.worker_id)
        self.slots.remove(slot)

    async def samples(self) -> list[WorkerSample]:
        return [
            WorkerSample(
                slot.worker_id, slot.role, 0.0, queued_s=slot.queued_s, prompt_s=0.2,
                sequences=slot.sequences, step_base_s=0.02, step_sequence_s=0.004,
            )
            for slot in self.slots
        ]  # fmt: skip

    def sizes(self) -> dict[Role, int]:
        return {role: sum(slot.role is role for slot in self.slots) for role in (Role.PREFILL, Role.DECODE)}


SETTINGS = AutoscalerConfig(
    enabled=True, max_workers=4, slo_ttft_s=1.0, slo_tpot_s=0.1, look_back_s=10, warm_up_s=5, settle_s=5
)
CONFIG = ClusterConfig(
    prefill=PoolConfig(min_replicas=1, max_replicas=4),
    decode=PoolConfig(min_replicas=1, max_replicas=4),
    autoscaler=SETTINGS,
)


def scaler_of(slots: FakeSlots, config: ClusterConfig = CONFIG) -> PoolScaler:
    return PoolScaler(config, slots, clock=lambda: slots.now)


async def turns(scaler: PoolScaler, slots: FakeSlots, count: int) -> None:
    for _ in range(count):
        slots.now += 1
        await scaler.turn()


async def test_a_pool_that_falls_behind_grows_and_shrinks_again_when_the_load_is_gone() -> None:
    slots = FakeSlots(prefill=1, decode=1)
    scaler = scaler_of(slots)
    slots.slots[0].queued_s = 2.5
    await turns(scaler, slots, 6)
    assert slots.sizes() == {Role.PREFILL: 3, Role.DECODE: 1}
    for slot in slots.slots:
        slot.queued_s = 0.0
    await turns(scaler, slots, 60)
    assert slots.sizes() == {Role.PREFILL: 1, Role.DECODE: 1}
    assert len(slots.closed) == 2


async def test_a_worker_is_drained_before_it_ends() -> None:
    slots = FakeSlots(prefill=1, decode=2)
    leaving = slots.slots[2].actor
    leaving.may_drain.clear()
    change = asyncio.create_task(scaler_of(slots).scale(Role.DECODE, 1))
    await asyncio.sleep(0.01)
    assert slots.closed == [] and leaving.story == ["drain"]
    leaving.may_drain.set()
    await change
    assert slots.closed == ["decode-1"] and leaving.story == ["drain", "drained"]


async def test_where_no_more_workers_are_allowed_the_least_busy_changes_its_role() -> None:
    slots = FakeSlots(prefill=3, decode=1)
    slots.slots[0].queued_s, slots.slots[2].sequences = 0.1, 1
    slots.slots[3].sequences = 40
    await turns(scaler_of(slots), slots, 1)
    moved = slots.slots[1]
    assert moved.role is Role.DECODE and moved.actor.story == ["drain", "drained", "enlist decode"]
    assert slots.closed == [] and not moved.leaving


async def test_samples_of_workers_that_warm_up_order_nothing() -> None:
    slots = FakeSlots(prefill=1, decode=1)
    slots.slots[0].queued_s = 50.0
    slots.slots[0].ready_at = slots.now
    scaler = scaler_of(slots)
    await turns(scaler, slots, 4)
    assert slots.sizes()[Role.PREFILL] == 1
    await turns(scaler, slots, 3)
    assert slots.sizes()[Role.PREFILL] > 1


async def test_a_router_that_is_away_costs_a_turn_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Away(FakeSlots):
        failures = 2

        async def samples(self) -> list[WorkerSample]:
            self.failures -= 1
            if self.failures >= 0:
                raise ValueError("no such actor")
            return await super().samples()

    slots = Away(prefill=1, decode=1)
    quick = CONFIG.model_copy(update={"autoscaler": SETTINGS.model_copy(update={"interval_s": 0.01})})
    running = asyncio.create_task(scaler_of(slots, quick).run())
    slots.slots[0].queued_s = 50.0
    async with asyncio.timeout(5):
        while slots.sizes()[Role.PREFILL] == 1:
            slots.now += 1
            await asyncio.sleep(0.01)
    running.cancel()
    assert "failed" in caplog.text


async def test_a_size_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        await scaler_of(FakeSlots(prefill=1, decode=1)).scale(Role.DECODE, -1)
    assert caught.value.param == "size"


def test_without_bounds_a_pool_stays_as_configured() -> None:
    assert bounds_of(ClusterConfig(decode=PoolConfig(replicas=3)), Role.DECODE) == Bounds(3, 3)
    assert bounds_of(CONFIG, Role.PREFILL) == Bounds(1, 4)
