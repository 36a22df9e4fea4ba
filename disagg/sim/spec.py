"""The cluster file of the simulator: pools, hardware, parallelism, links, costs. Unknown keys are refused.

model: llama3-70b                 # a preset, or a mapping with the shape
cost: {kind: roofline}            # or table, distserve, profile with a file
pools:
  prefill: {role: prefill, replicas: 2, hardware: h100-80gb, tensor_parallel_size: 4}
  decode: {role: decode, replicas: 2, hardware: a100-80gb, tensor_parallel_size: 8}
links: {bandwidth_gb_s: 50, sharing: shared, handoff: serial}
engine: {max_num_seqs: 256, max_num_batched_tokens: 2048}     # as for `disagg serve`
router: {policy: prefix_aware}                                 # as for `disagg serve`
objectives: {ttft_ms: 500, tpot_ms: 50}
admission: {}                                                  # as for `disagg serve`; left out, it is off
faults: [{kind: worker_loss, worker: decode-0, at_s: 60, for_s: 30}]      # see disagg.sim.faults
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from disagg.config import AdmissionConfig, EngineConfig, RouterConfig, load_config
from disagg.errors import ConfigError
from disagg.sim.costs.base import CostModel
from disagg.sim.costs.distserve import load_distserve
from disagg.sim.costs.free import FreeCost
from disagg.sim.costs.profile import load_profile
from disagg.sim.costs.roofline import RooflineCost
from disagg.sim.costs.table import BATCH_TOKENS, load_table
from disagg.sim.faults import Fault
from disagg.sim.hardware import HARDWARE, MODELS, Hardware, ModelShape, kv_token_capacity
from disagg.types import Role


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HardwareSpec(_Frozen):
    """A GPU that has no preset; units as in disagg.sim.hardware.Hardware."""

    flops: float = Field(gt=0)
    bandwidth: float = Field(gt=0)
    memory: float = Field(gt=0)
    interconnect: float = Field(100e9, gt=0)
    price_per_hour: float = Field(0.0, ge=0)
    power_w: float = Field(0.0, ge=0)


class ModelSpec(_Frozen):
    """A model that has no preset; see disagg.sim.hardware.ModelShape. name: how cost files call it."""

    name: str = "custom"
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    gated_mlp: bool = True
    dtype_bytes: float = Field(2.0, gt=0)
    weight_bytes: float = Field(0.0, ge=0)


class CostSpec(_Frozen):
    """Which cost model, and from which file (all but the roofline and free need one).

    name: of the hardware in a table, where it is not the pool's. batch_tokens: of a table, see TableCost.
    The efficiencies, the overhead and decode_context are the roofline's; without decode_context a decode step
    costs the same whatever its sequences attend to, as in splitwise-sim. free: steps take no time, which
    leaves the other phase alone to be looked at.
    """

    kind: Literal["roofline", "table", "distserve", "profile", "free"] = "roofline"
    file: Path | None = None
    name: str | None = None
    batch_tokens: int | None = Field(BATCH_TOKENS, ge=1)
    flops_efficiency: float = Field(0.6, gt=0, le=1)
    bandwidth_efficiency: float = Field(0.8, gt=0, le=1)
    step_overhead_ms: float = Field(3.0, ge=0)
    decode_context: bool = True

    @model_validator(mode="after")
    def _file_where_needed(self) -> CostSpec:
        if self.kind not in ("roofline", "free") and self.file is None:
            raise ValueError(f"file: {self.kind} needs one")
        return self


class PoolSpec(_Frozen):
    """Workers of one kind. tensor_parallel_size, pipeline_parallel_size: GPUs of each, multiplied.

    A pipeline of n stages is simulated as n engines that share it, see disagg.sim.pipeline. num_kv_blocks:
    per worker; None computes it from what the weights leave of memory_share of the memory.
    cost, bandwidth_gb_s and the engine's limits stand over the cluster's. slowed_by_others: how much longer a
    step takes while any other worker computes, 0.2 for a fifth: where all pools share one machine.
    """

    role: Role
    replicas: int = Field(ge=0, le=100_000)
    hardware: str
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    memory_share: float = Field(0.9, gt=0, le=1)
    num_kv_blocks: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    bandwidth_gb_s: float | None = Field(None, gt=0)
    slowed_by_others: float = Field(0.0, ge=0, le=10)
    cost: CostSpec | None = None

    @property
    def gpus_per_worker(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_gpus(self) -> int:
        return self.replicas * self.gpus_per_worker


class LinkSpec(_Frozen):
    """How KV moves between workers. bandwidth_gb_s: 10^9 bytes/s of one worker's link, each direction.

    sharing: private gives every transfer the whole bandwidth, shared divides it among the worker's.
    handoff: serial pulls when prefill has ended and the decode worker has reserved blocks, as live ones do
    that found no room before; push sends when prefill ends (Splitwise); overlapped sends layer by layer while
    prefill runs, the last layer after it, which is nearest to a live one that did find room.
    """

    bandwidth_gb_s: float = Field(50.0, gt=0)
    latency_ms: float = Field(0.0, ge=0)
    sharing: Literal["private", "shared"] = "shared"
    handoff: Literal["serial", "push", "overlapped"] = "serial"


class ObjectiveSpec(_Frozen):
    """Latency objectives of every request, ms; None asks for nothing."""

    ttft_ms: float | None = Field(None, gt=0)
    tpot_ms: float | None = Field(None, gt=0)


class OverheadSpec(_Frozen):
    """Time outside engines, ms: from arrival to the worker's queue, from the first token to decode's."""

    request_ms: float = Field(0.0, ge=0)
    handoff_ms: float = Field(0.0, ge=0)


class SimSpec(_Frozen):
    """All of a cluster file. hardware: GPUs by name, beside the presets."""

    model: str | ModelSpec
    pools: dict[str, PoolSpec] = Field(min_length=1)
    hardware: dict[str, HardwareSpec] = {}
    cost: CostSpec = CostSpec()
    links: LinkSpec = LinkSpec()
    # Larger than the live defaults, which are for CPUs.
    engine: EngineConfig = EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048)
    router: RouterConfig = RouterConfig()
    # None serves whatever comes, however late: what a plan asks is how much a cluster can carry.
    admission: AdmissionConfig | None = None
    objectives: ObjectiveSpec = ObjectiveSpec()
    overheads: OverheadSpec = OverheadSpec()
    faults: tuple[Fault, ...] = ()
    max_model_len: int = Field(1_000_000, ge=2)

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str | ModelSpec) -> str | ModelSpec:
        if isinstance(value, str) and value not in MODELS:
            raise ValueError(f"no preset {value!r}; give its shape, or one of {', '.join(MODELS)}")
        return value

    @model_validator(mode="after")
    def _workers_and_hardware(self) -> SimSpec:
        shared = any(pool.slowed_by_others for pool in self.pools.values())
        for name, pool in self.pools.items():
            if shared and pool.pipeline_parallel_size > 1:
                raise ValueError(
                    f"pools.{name}: pipeline_parallel_size above 1 can't go with slowed_by_others"
                )
        for name, pool in self.pools.items():
            if pool.hardware not in self.hardware and pool.hardware not in HARDWARE:
                known = ", ".join([*self.hardware, *HARDWARE])
                raise ValueError(f"pools.{name}.hardware: no {pool.hardware!r}; known are {known}")
        if not any(pool.replicas for pool in self.pools.values()):
            raise ValueError("pools: no pool has a worker")
        return self

    # -- what the parts amount to --------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else self.model.name

    @property
    def shape(self) -> ModelShape:
        if isinstance(self.model, str):
            return MODELS[self.model]
        return ModelShape(**self.model.model_dump(exclude={"name"}))

    def hardware_of(self, pool: PoolSpec) -> Hardware:
        own = self.hardware.get(pool.hardware)
        return HARDWARE[pool.hardware] if own is None else Hardware(**own.model_dump())

    def engine_of(self, pool: PoolSpec) -> EngineConfig:
        own = {
            "max_num_seqs": pool.max_num_seqs,
            "max_num_batched_tokens": pool.max_num_batched_tokens,
        }
        return self.engine.model_copy(update={key: value for key, value in own.items() if value is not None})

    def cost_of(self, pool: PoolSpec) -> CostModel:
        """Return the pool's cost model, reading its file. Raises ConfigError."""
        spec = pool.cost or self.cost
        degree = pool.tensor_parallel_size
        if spec.kind == "free":
            return FreeCost()
        if spec.kind == "roofline" or spec.file is None:
            return RooflineCost(
                self.shape,
                self.hardware_of(pool),
                degree,
                flops_efficiency=spec.flops_efficiency,
                bandwidth_efficiency=spec.bandwidth_efficiency,
                step_overhead_s=spec.step_overhead_ms / 1000,
                decode_context=spec.decode_context,
            )
        if spec.kind == "table":
            hardware = spec.name or pool.hardware
            return load_table(spec.file, self.model_name, hardware, degree, batch_tokens=spec.batch_tokens)
        if spec.kind == "distserve":
            return load_distserve(spec.file, self.model_name, degree)
        return load_profile(spec.file)

    def blocks_of(self, name: str) -> int:
        """Return the KV blocks of one worker of a pool. Raises ConfigError where the weights leave none."""
        pool = self.pools[name]
        if pool.num_kv_blocks is not None:
            return pool.num_kv_blocks
        tokens = kv_token_capacity(
            self.shape, self.hardware_of(pool), pool.gpus_per_worker, pool.memory_share
        )
        if tokens < self.engine.block_size:
            raise ConfigError(
                f"pools.{name}.tensor_parallel_size: {self.model_name} leaves no memory for KV on "
                f"{pool.gpus_per_worker} x {pool.hardware}",
                param=f"pools.{name}.tensor_parallel_size",
            )
        return tokens // self.engine.block_size

    def bandwidth_of(self, pool: PoolSpec) -> float:
        """Return bytes/s of the link of one worker of a pool."""
        return (pool.bandwidth_gb_s or self.links.bandwidth_gb_s) * 1e9


def parse_spec(data: dict[str, Any]) -> SimSpec:
    """Validate a mapping. Raises ConfigError naming each bad key."""
    try:
        return SimSpec.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"])
            text = item["msg"].removeprefix("Value error, ")
            problems.append(f"{field}: {text}" if field else text)
        raise ConfigError("; ".join(problems), param=problems[0].partition(":")[0]) from None


def load_spec(path: Path) -> SimSpec:
    """Read a YAML cluster file; cost files are relative to it. Raises ConfigError."""
    return parse_spec(load_mapping(path))


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML cluster file as it is, but for cost files, which are looked for beside it."""
    data = load_config(path)
    costs = [data.get("cost"), *(_cost_of(pool) for pool in _values(data.get("pools")))]
    for cost in costs:
        if isinstance(cost, dict) and isinstance(cost.get("file"), str):
            cost["file"] = str(path.parent / cost["file"])
    return data


def _values(data: Any) -> list[Any]:
    return list(data.values()) if isinstance(data, dict) else []


def _cost_of(pool: Any) -> Any:
    return pool.get("cost") if isinstance(pool, dict) else None
