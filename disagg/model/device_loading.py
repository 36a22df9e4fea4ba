"""What a model computes with on a GPU: a decoder, and a KV cache for which a trial run shows the room.

    weights ─► trial of the worst step, over one block ─► blocks that fit into the rest ─► cache ─► graphs

What a step needs besides the cache (activations, logits, workspaces of libraries) is measured instead of
estimated, since it changes with the model, its parallelism and the libraries' versions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from disagg.config import EngineConfig, Quantization
from disagg.errors import ConfigError
from disagg.model.decoders import Decoder, choose_decoder
from disagg.model.kv_cache import KVCache, model_len
from disagg.model.parallel import RankGroup
from disagg.model.step import StepInput
from disagg.model.transformer import Transformer
from disagg.types import KVLayout

log = logging.getLogger(__name__)

# Prefill attention's tiles follow the powers of two up to 128 rows; a GQA group shares a token's rows.
CHUNKS_TO_COMPILE = (2, 4, 8, 16, 32, 64, 128)


class DeviceMemory(Protocol):
    """What is known of a device's memory."""

    def free(self) -> int:
        """Return the bytes that can still be allocated."""
        ...

    def peak(self, action: Callable[[], object]) -> int:
        """Return the most bytes that `action` held at a time beyond those held before."""
        ...


class CudaMemory:
    """Memory of a GPU, as torch's allocator and the driver see it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Return the bytes that can still be allocated."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def peak(self, action: Callable[[], object]) -> int:
        """Return the most bytes that `action` held at a time beyond those held before."""
        # What libraries allocate past torch shows in what is free afterwards.
        before, free = torch.cuda.memory_allocated(self._device), self.free()
        torch.cuda.reset_peak_memory_stats(self._device)
        action()
        torch.cuda.synchronize(self._device)
        held = torch.cuda.max_memory_allocated(self._device) - before
        return held + max(0, free - self.free())


class Fitted(NamedTuple):
    """A decoder, the cache that it computes over, and tokens of the longest sequence."""

    decoder: Decoder
    kv_cache: KVCache
    max_model_len: int


def fit(
    model: Transformer,
    engine_config: EngineConfig,
    cache_layout: KVLayout,
    *,
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
    memory: DeviceMemory | None = None,
) -> Fitted:
    """Give a loaded model a decoder, and a KV cache of the heads that it has on its device.

    All ranks of a model go through this together, and get as many blocks as the one with the least room.
    engine_config.kv_cache_memory: bytes, or a share of what is free once the weights are there, from which
    a step's own needs are taken off; of each rank's device. memory: of the device; where None, CUDA's.
    Raises ConfigError naming the field that can't be used.
    """
    spec, device, heads = model.spec, model.embed_tokens.device, model.kv_heads
    trial = KVCache(cache_layout, 1, device=device, heads=heads)
    with torch.inference_mode():
        limit = spec.limit_model_len(max_model_len)
        decoder = choose_decoder(model, trial, engine_config, max_model_len=limit, quantization=quantization)
        num_blocks = engine_config.num_kv_blocks
        if num_blocks is None:
            memory = CudaMemory(device) if memory is None else memory
            needs = step_needs(decoder, trial, engine_config, memory)
            budget = engine_config.kv_cache_budget(on_gpu=True)
            own_bytes = cache_layout.block_bytes * heads.length // heads.total
            num_blocks = _agreed(
                model.group, lambda: affordable_blocks(budget, own_bytes, memory.free(), needs)
            )
    limit = model_len(spec, max_model_len, (num_blocks - 1) * cache_layout.block_size)
    return Fitted(decoder, KVCache(cache_layout, num_blocks, device=device, heads=heads), limit)


def _agreed(group: RankGroup | None, affordable: Callable[[], int]) -> int:
    """Return the blocks that every rank affords. Raises ConfigError on all ranks if one can afford none."""
    if group is None:
        return affordable()
    try:
        own = affordable()
    except ConfigError:
        # The others wait for its answer.
        group.least(0)
        raise
    blocks = group.least(own)
    if not blocks:
        raise ConfigError("kv_cache_memory: another rank has no room for it", param="kv_cache_memory")
    return blocks


def step_needs(decoder: Decoder, trial: KVCache, engine_config: EngineConfig, memory: DeviceMemory) -> int:
    """Return the bytes that steps take beside the cache: those of the largest, and those that graphs keep."""
    tokens = engine_config.max_num_batched_tokens
    seqs = min(engine_config.max_num_seqs, tokens)
    # Chunks of other lengths have kernels of their own: compiled now, not while a first request waits for it.
    for length in CHUNKS_TO_COMPILE:
        decoder.forward(trial_step(min(length, tokens), 1, trial.block_size), trial)
    largest = trial_step(tokens, seqs, trial.block_size)
    decodes = trial_step(seqs, seqs, trial.block_size)
    needs = [
        memory.peak(lambda step=step: decoder.forward(step, trial).log_softmax(-1))  # type: ignore[misc]
        for step in (largest, decodes)
    ]
    log.info("a step of %d tokens takes %.2f GB beside weights and KV cache", tokens, needs[0] / 1e9)
    return sum(needs)


def trial_step(num_tokens: int, num_seqs: int, block_size: int) -> StepInput:
    """Return a step of `num_tokens` tokens in prompts of equal length, all drawn from and all in block 0."""
    lengths = np.full(num_seqs, num_tokens // num_seqs)
    lengths[: num_tokens % num_seqs] += 1
    starts = np.concatenate([[0], lengths.cumsum()])
    blocks = -(-lengths // block_size)
    return StepInput(
        token_ids=np.zeros(num_tokens, dtype=np.int64),
        positions=np.arange(num_tokens) - np.repeat(starts[:-1], lengths),
        query_start=starts.astype(np.int32),
        block_tables=np.zeros(blocks.sum(), dtype=np.int64),
        table_start=np.concatenate([[0], blocks.cumsum()]),
        sample_rows=starts[1:] - 1,
    )


def affordable_blocks(asked: int | float, block_bytes: int, free: int, needs: int) -> int:
    """Return how many blocks to allocate. asked: bytes, or a share of `free` that steps' `needs` come off.

    Raises ConfigError naming kv_cache_memory where fewer than two blocks fit, or not the bytes asked for.
    """
    left = free - needs
    budget = int(asked * free) - needs if isinstance(asked, float) else asked
    if budget > left:
        raise ConfigError(
            f"kv_cache_memory of {asked} bytes does not fit: {free} are free and steps need {needs}",
            param="kv_cache_memory",
        )
    if budget < 2 * block_bytes:
        raise ConfigError(
            f"kv_cache_memory of {asked} leaves {max(budget, 0)} bytes beside the {needs} that steps need: "
            f"fewer than two blocks of {block_bytes}",
            param="kv_cache_memory",
        )
    return budget // block_bytes
