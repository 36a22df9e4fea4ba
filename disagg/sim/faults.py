"""Faults on virtual time: who fails when, and for how long. What follows is up to the simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from disagg.errors import ConfigError
from disagg.sim.events import EventLoop


class _Fault(BaseModel):
    """at_s: seconds from the start. for_s: after how long it ends, None for never."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_s: float = Field(ge=0)
    for_s: float | None = Field(None, gt=0)


class WorkerLoss(_Fault):
    """A worker's process dies with all that it holds; with for_s another one joins in its place then.

    detect_s: until its peers notice. A broken connection says so at once, a machine that vanished does not.
    """

    kind: Literal["worker_loss"]
    worker: str
    detect_s: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _noticed_before_replaced(self) -> WorkerLoss:
        if self.for_s is not None and self.detect_s >= self.for_s:
            raise ValueError("detect_s: must be less than for_s")
        return self


class SlowWorker(_Fault):
    """Each step that begins takes `factor` times as long."""

    kind: Literal["slow_worker"]
    worker: str
    factor: float = Field(gt=0)


class SlowLink(_Fault):
    """A worker's link, both directions, has its bandwidth divided by `factor`."""

    kind: Literal["slow_link"]
    worker: str
    factor: float = Field(gt=0)


class Restart(_Fault):
    """The router dies; a new one is there after for_s. Front ends place by their last view meanwhile."""

    kind: Literal["router_restart"]
    for_s: float = Field(gt=0)


Fault = Annotated[WorkerLoss | SlowWorker | SlowLink | Restart, Field(discriminator="kind")]


class Target(Protocol):
    """What faults are done to: the simulation."""

    def lose_worker(self, worker_id: str, detect_s: float) -> None: ...

    def replace_worker(self, worker_id: str) -> None: ...

    def set_slowdown(self, worker_id: str, factor: float) -> None: ...

    def set_link(self, worker_id: str, divisor: float) -> None: ...

    def lose_router(self) -> None: ...

    def restart_router(self) -> None: ...


def schedule_faults(faults: tuple[Fault, ...], target: Target, loop: EventLoop, workers: set[str]) -> None:
    """Set every fault's beginning and end. Raises ConfigError for a worker that does not exist."""
    for number, fault in enumerate(faults):
        if not isinstance(fault, Restart) and fault.worker not in workers:
            raise ConfigError(
                f"faults.{number}.worker: no {fault.worker!r}; workers are called POOL-NUMBER",
                param=f"faults.{number}.worker",
            )
        begin, end = _actions(fault, target)
        loop.at(fault.at_s, _call, begin)
        if fault.for_s is not None:
            loop.at(fault.at_s + fault.for_s, _call, end)


def _actions(fault: Fault, target: Target) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return how a fault begins and how it ends."""
    if isinstance(fault, WorkerLoss):
        worker, detect_s = fault.worker, fault.detect_s
        return lambda: target.lose_worker(worker, detect_s), lambda: target.replace_worker(worker)
    if isinstance(fault, SlowWorker):
        worker, factor = fault.worker, fault.factor
        return lambda: target.set_slowdown(worker, factor), lambda: target.set_slowdown(worker, 1.0)
    if isinstance(fault, SlowLink):
        worker, factor = fault.worker, fault.factor
        return lambda: target.set_link(worker, factor), lambda: target.set_link(worker, 1.0)
    return target.lose_router, target.restart_router


def _call(action: Callable[[], None]) -> None:
    action()
