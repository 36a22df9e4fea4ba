"""What a plan is made of: workers of some shape, so many of each, within limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg.errors import ConfigError
from disagg.sim.hardware import Hardware
from disagg.sim.spec import SimSpec, parse_spec
from disagg.types import Role


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """One worker: its kind of GPU, and how many of them by tensor and by pipeline parallelism."""

    hardware: str
    tensor_parallel: int
    pipeline_parallel: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def __str__(self) -> str:
        stages = f" PP{self.pipeline_parallel}" if self.pipeline_parallel > 1 else ""
        return f"{self.hardware} TP{self.tensor_parallel}{stages}"


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool of a plan."""

    role: Role
    shape: WorkerShape
    replicas: int

    @property
    def gpus(self) -> int:
        return self.replicas * self.shape.gpus

    def __str__(self) -> str:
        return f"{self.replicas} × {self.shape}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Pools, and what was found of them.

    estimate: requests/s of one worker in the weaker phase times their number; None for colocated pools. It
    leaves transfers out, and that many workers behind one router do better than each by itself.
    goodput: requests/s of the whole; None until it was simulated. nodes: copies of `pools` that work apart,
    as in a low-affinity cluster; both rates are of all of them.
    """

    pools: tuple[PoolPlan, ...]
    nodes: int = 1
    estimate: float | None = None
    goodput: float | None = None

    @property
    def gpus(self) -> int:
        return self.nodes * sum(pool.gpus for pool in self.pools)

    def replicas(self, role: Role) -> int:
        """Return the workers of one role, over all nodes."""
        return self.nodes * sum(pool.replicas for pool in self.pools if pool.role is role)

    @property
    def colocated(self) -> bool:
        return all(pool.role is Role.MIXED for pool in self.pools)

    def __str__(self) -> str:
        text = " + ".join(f"{pool.role.value} {pool}" for pool in self.pools)
        return text if self.nodes == 1 else f"{self.nodes} × ({text})"


@dataclass(frozen=True)
class Limits:
    """What there is. gpus: of each kind; usd_per_hour, power_w: of the whole plan, None for no limit.

    gpus_per_node: tensor parallelism stays within a node. tensor_parallel, pipeline_parallel: degrees tried.
    """

    gpus: Mapping[str, int]
    gpus_per_node: int = 8
    tensor_parallel: Sequence[int] = (1, 2, 4, 8)
    pipeline_parallel: Sequence[int] = (1,)
    usd_per_hour: float | None = None
    power_w: float | None = None

    def __post_init__(self) -> None:
        if not self.gpus or min(self.gpus.values()) < 1:
            raise ConfigError("gpus: give at least one kind, at least one GPU of each", param="gpus")
        for name, values in (("tp", self.tensor_parallel), ("pp", self.pipeline_parallel)):
            if not values or min(values) < 1:
                raise ConfigError(f"{name}: degrees must be at least 1", param=name)
        if self.gpus_per_node < 1:
            raise ConfigError("gpus_per_node: must be at least 1", param="gpus_per_node")


@dataclass
class Space:
    """Worker shapes that fit, and the specs of clusters made of them.

    base: a cluster file's mapping without pools. Shapes whose weights don't fit, or of which the cost model
    knows nothing, are left out; `left_out` says why. Raises ConfigError where none is left.
    """

    base: Mapping[str, Any]
    limits: Limits
    left_out: dict[WorkerShape, str] = field(default_factory=dict)
    shapes: list[WorkerShape] = field(default_factory=list)
    _hardware: dict[str, Hardware] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for shape in self._conceivable():
            try:
                spec = self.spec((PoolPlan(Role.MIXED, shape, 1),))
                pool = spec.pools[Role.MIXED.value]
                self._hardware[shape.hardware] = spec.hardware_of(pool)
                spec.blocks_of(Role.MIXED.value)
                spec.cost_of(pool)
            except ConfigError as error:
                if not (error.param or "pools").startswith(("pools", "cost")):
                    raise  # Of the rest of the file, so it is no shape's fault.
                self.left_out[shape] = error.message
            else:
                self.shapes.append(shape)
        if not self.shapes:
            reasons = (
                "; ".join(dict.fromkeys(self.left_out.values())) or "more GPUs per worker than there are"
            )
            raise ConfigError(f"gpus: no worker can be made of them: {reasons}", param="gpus")

    def _conceivable(self) -> Iterator[WorkerShape]:
        limits = self.limits
        for hardware, count in limits.gpus.items():
            for tensor in limits.tensor_parallel:
                for stages in limits.pipeline_parallel:
                    shape = WorkerShape(hardware, tensor, stages)
                    if tensor <= limits.gpus_per_node and shape.gpus <= count:
                        yield shape

    def spec(self, pools: Sequence[PoolPlan], **more: dict[str, Any]) -> SimSpec:
        """Return the cluster of these pools; `more`: further keys by role. Raises ConfigError."""
        data = {**self.base, "pools": {}}
        for pool in pools:
            data["pools"][pool.role.value] = {
                "role": pool.role.value,
                "replicas": pool.replicas,
                "hardware": pool.shape.hardware,
                "tensor_parallel_size": pool.shape.tensor_parallel,
                "pipeline_parallel_size": pool.shape.pipeline_parallel,
                **more.get(pool.role.value, {}),
            }
        return parse_spec(data)

    def price(self, plan: Plan) -> tuple[float, float]:
        """Return (USD per hour, watts) of a plan."""
        usd = watts = 0.0
        for pool in plan.pools:
            hardware = self._hardware[pool.shape.hardware]
            usd += pool.gpus * plan.nodes * hardware.price_per_hour
            watts += pool.gpus * plan.nodes * hardware.power_w
        return usd, watts

    def allows(self, plan: Plan) -> bool:
        """Whether a plan is within the limits."""
        used: dict[str, int] = {}
        for pool in plan.pools:
            used[pool.shape.hardware] = used.get(pool.shape.hardware, 0) + pool.gpus * plan.nodes
        if any(count > self.limits.gpus.get(name, 0) for name, count in used.items()):
            return False
        usd, watts = self.price(plan)
        limits = self.limits
        return (limits.usd_per_hour is None or usd <= limits.usd_per_hour) and (
            limits.power_w is None or watts <= limits.power_w
        )
