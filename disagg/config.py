"""Nested, frozen configuration. Every command-line flag has its key here; unknown keys are refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from disagg.errors import ConfigError
from disagg.types import Role

BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny"

# Prompts that a decode worker computes itself come in chunks of so many tokens while streams run beside them.
DECODE_POOL_PREFILL_TOKENS = 32

RoutingPolicy = Literal[
    "slo",
    "prefix_aware",
    "least_loaded",
    "power_of_two",
    "round_robin",
    "splitwise_jsq",
    "distserve_fcfs",
]
KVTransport = Literal["auto", "shm", "grpc", "nccl", "nixl"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
Kernels = Literal["auto", "native", "triton", "flashinfer", "torch"]
Device = Literal["auto", "cpu", "cuda"]

# KV cache where none is asked for: bytes on a CPU, a share of what weights leave free on a GPU.
CPU_KV_CACHE_BYTES = 256 * 1024 * 1024
GPU_KV_CACHE_SHARE = 0.9


_Positive = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _custom_resources(value: dict[str, float]) -> dict[str, float]:
    for name, amount in value.items():
        if name.lower() in ("cpu", "gpu", "memory", "object_store_memory"):
            raise ValueError(f"{name} is one of Ray's own resources; custom ones need another name")
        if amount <= 0:
            raise ValueError(f"{name} must be above 0")
    return value


# Ray's custom resources that an actor takes of its node: how a process is kept to nodes that offer them.
Resources = Annotated[dict[str, float], AfterValidator(_custom_resources)]


class ModelConfig(_Frozen):
    """Which checkpoint is served and how.

    path: a folder with safetensors; None is the bundled model. quantization: bits to which weights are
    rounded while they load (CPU only).
    """

    path: str | None = None
    served_model_name: str | None = None
    dtype: DType = "auto"
    max_model_len: int | None = Field(None, ge=1)
    quantization: Quantization | None = None

    @property
    def folder(self) -> Path:
        return BUNDLED_MODEL if self.path is None else Path(self.path)

    @property
    def name(self) -> str:
        """Name under which clients know the model."""
        if self.served_model_name:
            return self.served_model_name
        return "disagg-tiny" if self.path is None else Path(self.path).name


class EngineConfig(_Frozen):
    """Limits of one engine.

    max_num_batched_tokens: token budget of one step, over which prompts are chunked. max_prefill_tokens: that
    of prompts in a step in which streams decode too (they wait for the whole step), None for no other.
    kv_cache_memory: bytes if an int of at least 2, a fraction if a float up to 1: of the machine's free
    memory, or of what a GPU has left beside the weights; None is CPU_KV_CACHE_BYTES, or GPU_KV_CACHE_SHARE.
    num_kv_blocks: overrides it; tests use it to force preemption. device: what computes; auto is a GPU where
    the worker has one and the rest can use it. kernels: with what; auto is native on a CPU, triton on a GPU,
    and torch where those can't.
    """

    block_size: int = Field(16, ge=1, le=1024)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(512, ge=1)
    max_prefill_tokens: int | None = Field(None, ge=1)
    kv_cache_memory: int | float | None = None
    num_kv_blocks: int | None = Field(None, ge=2)
    enable_prefix_caching: bool = True
    max_waiting: int = Field(4096, ge=1)
    device: Device = "auto"
    kernels: Kernels = "auto"

    def kv_cache_budget(self, *, on_gpu: bool) -> int | float:
        """Return kv_cache_memory, or what stands for it where it is not given."""
        if self.kv_cache_memory is not None:
            return self.kv_cache_memory
        return GPU_KV_CACHE_SHARE if on_gpu else CPU_KV_CACHE_BYTES

    @field_validator("kv_cache_memory")
    @classmethod
    def _positive(cls, value: int | float | None) -> int | float | None:
        if value is None:
            return None
        if value <= 0 or (isinstance(value, float) and value > 1 and not value.is_integer()):
            raise ValueError("give bytes (a whole number) or a fraction in (0, 1]")
        return int(value) if value > 1 else float(value)


class PoolConfig(_Frozen):
    """One pool of workers.

    tensor_parallel_size: ranks of each worker, processes on one node among which its model is cut. threads:
    compute threads of each rank; None shares the machine's cores evenly. pin_threads: keep them on cores of
    their own where so many are free. max_num_batched_tokens, max_prefill_tokens: as in engine, over it; a
    decode pool has DECODE_POOL_PREFILL_TOKENS unless told otherwise. min_replicas, max_replicas: bounds of
    the autoscaler, which are replicas where they are None. num_cpus, num_gpus, resources: that Ray reserves
    for each worker, all its ranks together, on one node; for num_gpus 0 see cluster/gpus.py.
    """

    replicas: int = Field(1, ge=0, le=10_000)
    min_replicas: int | None = Field(None, ge=1, le=10_000)
    max_replicas: int | None = Field(None, ge=1, le=10_000)
    tensor_parallel_size: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    pin_threads: bool = True
    max_num_batched_tokens: int | None = Field(None, ge=1)
    max_prefill_tokens: int | None = Field(None, ge=1)
    num_cpus: float = Field(0.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    resources: Resources = Field(default_factory=dict)


class AutoscalerConfig(_Frozen):
    """When pools grow, shrink and lend workers; all times in seconds.

    max_workers: of the prefill and decode pools together. slo_ttft_s, slo_tpot_s: what a pool is sized for.
    react_s: load is averaged over so long before a pool grows. look_back_s: so long a smaller pool must have
    sufficed before one shrinks, and look_ahead_s how far its trend is followed. headroom: share of an
    objective that a pool which shrinks must keep to. warm_up_s: a new worker's samples don't count for so
    long. settle_s: pause after each change.
    """

    enabled: bool = False
    max_workers: int = Field(64, ge=1)
    slo_ttft_s: float = Field(2.0, gt=0)
    slo_tpot_s: float = Field(0.2, gt=0)
    interval_s: float = Field(1.0, gt=0)
    react_s: float = Field(10.0, gt=0)
    look_back_s: float = Field(120.0, gt=0)
    look_ahead_s: float = Field(60.0, ge=0)
    headroom: float = Field(0.7, gt=0, le=1)
    warm_up_s: float = Field(15.0, ge=0)
    settle_s: float = Field(15.0, ge=0)


class TransferConfig(_Frozen):
    """Hand-off. lease_s: how long published KV outlives the last sign of life of whoever is to pull it.

    staging_memory: bytes of host memory through which a GPU's KV blocks pass where they go by shm or grpc,
    half of it for those that leave. KV of a prompt that does not fit is computed again.
    """

    kv_transport: KVTransport = "auto"
    lease_s: float = Field(5.0, gt=0)
    pull_timeout_s: float = Field(10.0, gt=0)
    chunk_bytes: int = Field(2 * 1024 * 1024, ge=4096)
    staging_memory: int = Field(4 * 1024**3, ge=4096)


class TLSConfig(_Frozen):
    """TLS between the cluster's own processes, gRPC and KV streams alike. Files are PEM.

    certificate, key: of this process. ca: the authorities that peers' certificates are checked against.
    mutual: whoever connects must show a certificate too. server_name: name that peers' certificates have;
    None is the host under which each is reached.
    """

    certificate: str
    key: str
    ca: str
    mutual: bool = True
    server_name: str | None = None


class RouterConfig(_Frozen):
    """Placement. heartbeat_s: period of worker reports; a worker silent for dead_after_s is forgotten.

    local_prefill: whether the policy slo may let decode workers prefill short prompts themselves.
    resources: custom resources of Ray that the router and the controller each take of their node.
    """

    policy: RoutingPolicy = "slo"
    local_prefill: bool = True
    heartbeat_s: float = Field(0.5, gt=0)
    dead_after_s: float = Field(3.0, gt=0)
    max_resumes: int = Field(8, ge=0)
    resources: Resources = Field(default_factory=dict)


class FrontendConfig(_Frozen):
    """Where clients connect. request_timeout_s: deadline of a request that names none.

    api_key_file: read for the key by each front end when it starts, which fails if there is none: so a key
    need not stand in a configuration that Ray shows. resources: custom resources of Ray of each front end.
    """

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(9000, ge=0, le=65535)
    api_key: str | None = Field(None, repr=False)
    api_key_file: str | None = None
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    request_timeout_s: float = Field(600.0, gt=0)
    replicas: int = Field(1, ge=1)
    resources: Resources = Field(default_factory=dict)

    @field_validator("api_key")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            # An empty key would look like protection and admit everyone.
            raise ValueError("an API key must not be empty")
        return value

    @model_validator(mode="after")
    def _one_key(self) -> FrontendConfig:
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("give api_key or api_key_file, not both")
        return self

    def with_key_read(self) -> FrontendConfig:
        """Return this with the key from `api_key_file` in it. Raises ConfigError where it holds none."""
        if self.api_key_file is None:
            return self
        try:
            key = Path(self.api_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file: can't read it: {error}", param="api_key_file") from None
        if not key:
            raise ConfigError(f"api_key_file: {self.api_key_file} is empty", param="api_key_file")
        return self.model_copy(update={"api_key": key, "api_key_file": None})


class TierConfig(_Frozen):
    """What a request gets that names this service tier. priority: added to its own; lower is served first."""

    ttft_s: float | None = Field(None, gt=0)
    tpot_s: float | None = Field(None, gt=0)
    priority: int = Field(0, ge=-1000, le=1000)


class SLOConfig(_Frozen):
    """Objectives of requests that name none; without one, a request counts as neither met nor missed.

    ttft_s: time to first token. tpot_s: mean time per output token after it. tiers: by `service_tier`; what a
    tier leaves out is as for all.
    """

    ttft_s: float | None = Field(None, gt=0)
    tpot_s: float | None = Field(None, gt=0)
    tiers: dict[Literal["default", "flex", "scale", "priority", "fast"], TierConfig] = {}

    def of_tier(self, name: str) -> TierConfig:
        """Return a tier's objectives with the common ones where it has none."""
        tier = {str(key): value for key, value in self.tiers.items()}.get(name, TierConfig())
        ttft_s = self.ttft_s if tier.ttft_s is None else tier.ttft_s
        tpot_s = self.tpot_s if tier.tpot_s is None else tier.tpot_s
        return TierConfig(ttft_s=ttft_s, tpot_s=tpot_s, priority=tier.priority)


class AdmissionConfig(_Frozen):
    """Who is served when not all can be; see disagg.routing.admission. Times in seconds.

    max_queue: requests that wait at the router for their turn. max_wait_s: a request that would wait longer
    is refused, objective or not (the only bound of one whose objective not even an idle cluster could meet,
    besides the queue's); tier_max_wait_s: the same by service tier. backlog_s: work that a worker is given
    ahead of its turn, two steps' worth at the least. reserve: share of what an objective allows that is kept
    from tenants who have had more than their share while others ask too. tenant_weights: by cache_salt;
    others have 1.
    """

    enabled: bool = True
    max_queue: int = Field(1024, ge=1, le=100_000)
    max_wait_s: float = Field(30.0, gt=0)
    tier_max_wait_s: dict[Literal["default", "flex", "scale", "priority", "fast"], _Positive] = {}
    backlog_s: float = Field(0.25, ge=0)
    reserve: float = Field(0.3, ge=0, lt=1)
    tenant_weights: dict[str, _Positive] = {}


class MetricsConfig(_Frozen):
    """What /metrics shows. vllm_aliases: vLLM's names too, for gateways and dashboards made for them."""

    vllm_aliases: bool = False


class TracingConfig(_Frozen):
    """OpenTelemetry traces over OTLP (gRPC); off while there is no endpoint. Needs the extra [tracing].

    endpoint: of the collector, as http://127.0.0.1:4317; https for TLS. sample_ratio: share of requests
    traced of those that come without a trace context; a context's own decision is followed.
    """

    endpoint: str | None = Field(None, pattern="^https?://")
    sample_ratio: float = Field(1.0, ge=0, le=1)
    service_name: str = Field("disagg", min_length=1)


class NetworkConfig(_Frozen):
    """Where router and workers listen, for each other and for front ends.

    host: an address of every node; "auto" is the one by which Ray knows each node, for clusters of several.
    """

    host: str = Field("127.0.0.1", min_length=1)


class ClusterConfig(_Frozen):
    """All of it, as `--config FILE.yaml` takes it."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    mixed: PoolConfig = PoolConfig(replicas=0)
    autoscaler: AutoscalerConfig = AutoscalerConfig()
    transfer: TransferConfig = TransferConfig()
    tls: TLSConfig | None = None
    router: RouterConfig = RouterConfig()
    frontend: FrontendConfig = FrontendConfig()
    network: NetworkConfig = NetworkConfig()
    slo: SLOConfig = SLOConfig()
    admission: AdmissionConfig = AdmissionConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()

    def pool(self, role: Role) -> PoolConfig:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}[role]

    def engine_for(self, role: Role) -> EngineConfig:
        """Return the engine's limits in one pool: the common ones with the pool's own over them."""
        pool = self.pool(role)
        own = {
            "max_num_batched_tokens": pool.max_num_batched_tokens,
            "max_prefill_tokens": pool.max_prefill_tokens,
        }
        if role is Role.DECODE and self.engine.max_prefill_tokens is None:
            own["max_prefill_tokens"] = own["max_prefill_tokens"] or DECODE_POOL_PREFILL_TOKENS
        return self.engine.model_copy(update={key: value for key, value in own.items() if value is not None})


def parse_config(data: dict[str, Any]) -> ClusterConfig:
    """Validate a mapping as it came from YAML, Serve or flags. Raises ConfigError naming each bad key."""
    try:
        config = ClusterConfig.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
        )
        first = error.errors()[0]["loc"]
        raise ConfigError(problems, param=".".join(str(part) for part in first)) from None
    _refuse_unavailable(config)
    return config


def _refuse_unavailable(config: ClusterConfig) -> None:
    """Raise ConfigError for settings that have a name but nothing behind it yet; none is ignored."""
    transport = config.transfer.kv_transport
    if transport in ("nccl", "nixl") and config.tls is not None:
        raise ConfigError(
            f"kv_transport: {transport} would send KV unencrypted beside tls; use grpc", param="kv_transport"
        )
    if transport == "nixl" and find_spec("nixl") is None:
        raise ConfigError("kv_transport: nixl is not installed; install disagg[nixl]", param="kv_transport")
    if config.model.quantization is not None and any(
        config.pool(role).tensor_parallel_size > 1 for role in Role
    ):
        raise ConfigError(
            "quantization: needs tensor_parallel_size 1: its kernels compute a whole step in one call",
            param="quantization",
        )


def expand_dotted(data: dict[str, Any]) -> dict[str, Any]:
    """Return nested mappings for keys such as "prefill.replicas", which `serve run` and flags give.

    Raises ConfigError where one key is both a value and a mapping.
    """
    nested: dict[str, Any] = {}
    for key, value in data.items():
        *folders, leaf = key.split(".")
        target = nested
        for folder in folders:
            target = target.setdefault(folder, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{key}: {folder} is given as a value too", param=key)
        if isinstance(value, dict):
            value = expand_dotted(value)
            if isinstance(target.get(leaf), dict):
                value = {**target[leaf], **value}
        target[leaf] = value
    return nested


def load_config(path: Path) -> dict[str, Any]:
    """Read a YAML file into a mapping. Raises ConfigError where it can't be read or is no mapping."""
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"can't read {path}: {error}", param="config") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping", param="config")
    return data
