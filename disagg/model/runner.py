"""ModelRunner: computes an engine's batches with a checkpoint's weights over a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from disagg.config import EngineConfig, Quantization
from disagg.engine.runner import Batch
from disagg.errors import ConfigError, InvalidRequestError
from disagg.model.block_mover import BlockMover
from disagg.model.config import DTYPES, ModelSpec, read_spec
from disagg.model.decode_graphs import Capture
from disagg.model.decoders import BackgroundDecoder, Decoder
from disagg.model.device import check_rank_devices
from disagg.model.device_loading import Fitted
from disagg.model.kv_cache import Buffer, KVCache, layout, model_len, num_blocks_for
from disagg.model.loading import load
from disagg.model.parallel import RankGroup
from disagg.model.rank_link import RankSetup
from disagg.model.rank_moves import RankMover
from disagg.model.ranks import STEP_TIMEOUT_S, RankProcesses, lead
from disagg.model.sampler import Sampler
from disagg.model.shard import Shard, check_size
from disagg.model.step import step_input
from disagg.model.weights import fingerprint
from disagg.types import KVLayout, Request, SampledToken

Mover = BlockMover | RankMover


class ModelRunner:
    """Implements disagg.engine.runner.Runner.

    num_blocks, max_model_len: what the engine may use. eos_token_ids: ids that end a sequence unless told
    otherwise. fingerprint: the checkpoint's identity, under which its KV blocks are hashed. ranks: the other
    ranks' processes where `model` leads several, which end with `close`.
    """

    def __init__(
        self, model: Decoder, kv_cache: KVCache, max_model_len: int, ranks: RankProcesses | None = None
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.spec: ModelSpec = model.spec
        self.kv_cache = kv_cache
        self.layout: KVLayout = kv_cache.layout
        self.num_blocks: int = kv_cache.num_blocks
        self.max_model_len = max_model_len
        self.eos_token_ids: tuple[int, ...] = model.spec.eos_token_ids
        self.fingerprint: str = kv_cache.layout.model
        self._device = kv_cache.blocks.device
        self._sampler = Sampler(model.spec.vocab_size, self.eos_token_ids, device=self._device)

    def check_request(self, request: Request) -> None:
        """Raise InvalidRequestError naming the field whose token ids this model does not have.

        Also where a request that draws at random comes without a seed: a retry would draw other noise.
        """
        vocab_size, params = self.spec.vocab_size, request.params
        for name, ids in (
            ("prompt", request.token_ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
                raise InvalidRequestError(f"{name} must hold token ids in [0, {vocab_size})", param=name)
        if params.seed is None and not params.greedy:
            raise InvalidRequestError("seed must be set by the front end", param="seed")

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        """Compute the batch, write its KV, and draw a token for each item that samples.

        Raises RankLostError where another rank is gone; nothing can be computed from then on.
        """
        if not batch.items:
            return []
        with torch.inference_mode(), _torch_threads(1 if self.model.own_threads else None):
            logits = self.model.forward(step_input(batch.items), self.kv_cache)
            sampling = [item.seq for item in batch.items if item.samples]
            drawn = iter(self._sampler.sample(logits, sampling) if sampling else ())
        return [next(drawn) if item.samples else None for item in batch.items]

    def block_movers(self, file: tuple[int, int], shape: tuple[int, int]) -> tuple[Mover, Mover]:
        """Return what copies blocks between the device and host memory: one for blocks that leave, one for
        those that arrive, since neither may wait for the other.

        file: descriptor and offset of the memory, for other ranks to map writable meanwhile. shape: its rows
        and bytes of a row. Call it once. Raises RankLostError.
        """
        if self.ranks is not None:
            return self.ranks.movers(self.kv_cache, file, shape)
        return BlockMover(self.kv_cache.blocks), BlockMover(self.kv_cache.blocks)

    def close(self) -> None:
        """End the processes of other ranks; when this returns there are none."""
        if self.ranks is not None:
            self.ranks.close()


@contextmanager
def _torch_threads(wanted: int | None) -> Iterator[None]:
    """Let torch use so many threads inside.

    After an operation that used several, OpenMP's spin for milliseconds and take a core from the model's
    own: a step of 16 sequences took 1.4 times as long.
    """
    before = torch.get_num_threads()
    if wanted is None or wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_dtype(dtype: str, spec: ModelSpec, device: torch.device | str = "cpu") -> str:
    """Return the dtype to compute in. auto: the checkpoint's, or float32 on a CPU that emulates it.

    Measured on a CPU without AVX-512: bfloat16 layers take 2 to 8 times as long as float32 ones.
    Raises ConfigError naming dtype for one that is unknown.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}", param="dtype"
            )
        return dtype
    if torch.device(device).type != "cpu":
        return spec.dtype
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if spec.dtype == "bfloat16" and fast else "float32"


def plan_cache(
    spec: ModelSpec,
    engine_config: EngineConfig,
    *,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    model: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[KVLayout, int]:
    """Return the cache's layout and its number of blocks, before any memory is taken.

    The buffer to allocate for load_runner has num_blocks * layout.block_bytes bytes. model: the
    checkpoint's fingerprint, computed where None. Raises ConfigError.
    """
    identity = fingerprint(spec.folder) if model is None else model
    cache_layout = _cache_layout(spec, engine_config, identity, dtype, quantization, device)
    return cache_layout, num_blocks_for(engine_config, cache_layout.block_bytes)


def _cache_layout(
    spec: ModelSpec,
    engine_config: EngineConfig,
    identity: str,
    dtype: str,
    quantization: Quantization | None,
    device: torch.device | str,
) -> KVLayout:
    return layout(
        spec,
        # Rounded weights give other keys and values: their blocks must not be mixed.
        model=identity if quantization is None else f"{identity}-{quantization}",
        dtype=resolve_dtype(dtype, spec, device),
        block_size=engine_config.block_size,
    )


def load_runner(
    folder: Path,
    engine_config: EngineConfig,
    *,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    num_threads: int | None = None,
    buffer: Buffer | None = None,
    num_blocks: int | None = None,
    max_model_len: int | None = None,
    device: torch.device | str = "cpu",
    tensor_parallel_size: int = 1,
    buffer_file: tuple[int, int] | None = None,
    rank_cores: Sequence[tuple[int, ...]] = (),
    rank_timeout_s: float = STEP_TIMEOUT_S,
) -> ModelRunner:
    """Load a checkpoint and give it a KV cache.

    quantization: bits of the weights, rounded while loading. num_threads: threads of this model, and torch's
    in this process. buffer: zeroed memory of num_blocks * layout.block_bytes bytes, see plan_cache; None
    allocates. num_blocks: overrides the configuration's; pass what plan_cache said, since a fraction of the
    memory may be another number by now. max_model_len: None is the model's, or what the blocks hold if that
    is less.

    tensor_parallel_size: ranks among which the model is cut, each a process with num_threads threads; the
    first is this one. buffer_file: descriptor and offset from which they map `buffer`. rank_cores: those on
    which each rank's threads stay, none for any. rank_timeout_s: longest silence of a rank within a step.
    Call the runner's `close` at the end.

    Raises ConfigError naming the field or tensor that can't be used, RankLostError where a rank dies.
    """
    if num_threads is None and tensor_parallel_size > 1:
        num_threads = max(1, torch.get_num_threads() // tensor_parallel_size)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    spec = read_spec(folder)
    if tensor_parallel_size != 1:
        check_size(spec, tensor_parallel_size)
        check_rank_devices(torch.device(device), tensor_parallel_size)
        _check_whole_kernels(engine_config, quantization)
    place = torch.device(device)
    cache_layout = _cache_layout(spec, engine_config, fingerprint(folder), dtype, quantization, place)
    kv_cache = None
    if buffer is not None or not _fills_device(engine_config, place):
        if num_blocks is None:
            num_blocks = num_blocks_for(engine_config, cache_layout.block_bytes)
        max_model_len = model_len(spec, max_model_len, (num_blocks - 1) * cache_layout.block_size)
        heads = Shard(0, tensor_parallel_size).kv_heads(spec)
        kv_cache = KVCache(cache_layout, num_blocks, buffer=buffer, device=place, heads=heads)
    elif num_blocks is not None:
        engine_config = engine_config.model_copy(update={"num_kv_blocks": num_blocks})

    def load_own(group: RankGroup | None) -> Fitted:
        return load(
            spec,
            engine_config,
            cache_layout,
            group,
            place,
            max_model_len=max_model_len,
            quantization=quantization,
            kv_cache=kv_cache,
        )

    if tensor_parallel_size == 1:
        return runner_over(load_own(None))
    fd, offset = (None, 0) if buffer_file is None else buffer_file
    setup = RankSetup(
        rank=0,
        size=tensor_parallel_size,
        port=0,
        timeout_s=rank_timeout_s,
        folder=str(folder),
        model=cache_layout.model,
        dtype=cache_layout.dtype,
        engine=engine_config,
        num_blocks=None if kv_cache is None else num_blocks,
        max_model_len=max_model_len,
        num_threads=torch.get_num_threads(),
        device=str(place),
        buffer_fd=fd,
        buffer_offset=offset,
    )
    return _runner_of_ranks(RankProcesses(setup, rank_cores), load_own, place)


def _fills_device(engine_config: EngineConfig, device: torch.device) -> bool:
    """Whether the cache is what fits the device; under Triton's interpreter also a given number of blocks."""
    return device.type != "cpu" or (
        engine_config.kernels in ("triton", "flashinfer") and engine_config.num_kv_blocks is not None
    )


def _runner_of_ranks(
    ranks: RankProcesses, load_own: Callable[[RankGroup], Fitted], device: torch.device
) -> ModelRunner:
    """Load this rank's shard, and capture its graphs, while the others do the same."""
    try:
        fitted = load_own(ranks.join(device))
        runner = runner_over(fitted._replace(decoder=lead(fitted.decoder, ranks)), ranks=ranks)
        ranks.begin()
    except BaseException:
        ranks.close()
        raise
    return runner


def runner_over(
    fitted: Fitted, *, capture: Capture | None = None, ranks: RankProcesses | None = None
) -> ModelRunner:
    """Return the runner of a decoder: one that computes in the background where the decoder can.

    capture: see DeviceRunner. ranks: see ModelRunner.
    """
    decoder, kv_cache, max_model_len = fitted
    if not isinstance(decoder, BackgroundDecoder):
        return ModelRunner(decoder, kv_cache, max_model_len, ranks)
    # Only here: it imports triton.
    from disagg.model.device_runner import DeviceRunner

    return DeviceRunner(decoder, kv_cache, max_model_len, capture=capture, ranks=ranks)


def _check_whole_kernels(engine_config: EngineConfig, quantization: Quantization | None) -> None:
    """Raise ConfigError for what needs kernels that compute a step in one call: no place for collectives."""
    if quantization is not None:
        raise ConfigError("quantization needs tensor_parallel_size 1", param="quantization")
    if engine_config.kernels == "native":
        raise ConfigError("kernels: native needs tensor_parallel_size 1", param="kernels")
