"""The paged KV cache: one tensor over a flat buffer, and how many blocks of it there are.

buffer ─► [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
           └ one block over all layers is contiguous: a hand-off is one copy per block
                                      └ heads before tokens: tensor parallelism slices heads
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disagg.config import EngineConfig
from disagg.errors import ConfigError
from disagg.model.config import ModelSpec
from disagg.model.large_tensors import large_zeros
from disagg.model.shard import Span
from disagg.types import KVLayout

Buffer = memoryview | npt.NDArray[np.uint8]


def layout(spec: ModelSpec, *, model: str, dtype: str, block_size: int) -> KVLayout:
    """Return the cache layout of a checkpoint; `model` is its fingerprint, `dtype` that of the cache."""
    return KVLayout(
        model=model,
        dtype=dtype,
        block_size=block_size,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )


def num_blocks_for(engine_config: EngineConfig, block_bytes: int) -> int:
    """Return how many blocks of `block_bytes` the configuration asks for.

    kv_cache_memory as a fraction is of the memory now available to this process (the container's limit, if
    that is lower). Raises ConfigError naming kv_cache_memory where it holds fewer than two blocks.
    """
    if engine_config.num_kv_blocks is not None:
        return engine_config.num_kv_blocks
    memory = engine_config.kv_cache_budget(on_gpu=False)
    budget = int(memory * available_memory()) if isinstance(memory, float) else memory
    if budget < 2 * block_bytes:
        raise ConfigError(
            f"kv_cache_memory of {budget} bytes holds fewer than two blocks of {block_bytes} bytes",
            param="kv_cache_memory",
        )
    return budget // block_bytes


def available_memory() -> int:
    """Return the bytes this process may still take: the machine's, or its cgroup's where that is less."""
    available = _meminfo("MemAvailable")
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        return max(0, min(available, limit - used))
    return available


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo has no {name}; give kv_cache_memory in bytes", param="kv_cache_memory")


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return None


def model_len(spec: ModelSpec, max_model_len: int | None, capacity: int) -> int:
    """Return the longest sequence of a model over `capacity` tokens of KV cache. Raises ConfigError."""
    limit = spec.limit_model_len(max_model_len)
    if max_model_len is not None and limit > capacity:
        raise ConfigError(
            f"max_model_len of {limit} tokens needs more KV cache than there is: it holds {capacity} tokens",
            param="max_model_len",
        )
    return min(limit, capacity)


class KVCache:
    """Keys and values of all blocks.

    blocks: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], 0 along dim 2 is keys. The
    memory must start zeroed, as fresh shared memory is: slots that were never written are read under a mask,
    and 0 times NaN would still be NaN.

    buffer: writable memory of num_blocks * layout.block_bytes bytes that outlives the cache, or None to
    allocate on `device`. heads: of the layout's, those that this rank has, all by default; then `blocks` is
    their part of the buffer, which holds those of all ranks in the same order as without any parallelism, and
    without a buffer no more than theirs is allocated. Raises ConfigError where it is read-only or of another
    size.

    head_rows: int64 [2, num_kv_heads], where in a layer's rows of one block a head's keys and values are, see
    rows().
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        buffer: Buffer | None = None,
        device: torch.device | str = "cpu",
        heads: Span | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        heads = Span.whole(layout.num_kv_heads) if heads is None else heads
        self.heads = heads
        self.num_kv_heads = heads.length
        stored, first = (heads.length, 0) if buffer is None else (heads.total, heads.start)
        shape = (num_blocks, layout.num_layers, 2, stored, layout.block_size, layout.head_dim)
        if buffer is None:
            on_cpu = torch.device(device).type == "cpu"
            whole = (
                large_zeros(shape, self.dtype)
                if on_cpu
                else torch.zeros(shape, dtype=self.dtype, device=device)
            )
        else:
            whole = _over(buffer, num_blocks * layout.block_bytes).view(self.dtype).view(shape)
        self.blocks = whole[:, :, :, first : first + heads.length]
        self.head_rows = np.array([[0], [stored]]) + np.arange(first, first + heads.length)
        self.rows_per_block = layout.num_layers * 2 * stored
        # One row is one head's block of keys or of values. A layer's view starts at its first row, so that
        # row and slot numbers computed once per step serve every layer.
        rows = whole.view(-1, layout.block_size * layout.head_dim)
        step = 2 * stored
        self._rows = [rows[layer * step :] for layer in range(layout.num_layers)]
        self._layers = [self.blocks[:, layer] for layer in range(layout.num_layers)]

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    def rows(self, layer: int) -> Tensor:
        """View [n, block_size * head_dim] whose row `block * rows_per_block + head_rows[c, head]` holds the
        block's keys (c = 0) or values (c = 1) of one head in this layer.
        """
        return self._rows[layer]

    def write(self, layer: int, kv: Tensor, block_ids: Tensor, offsets: Tensor) -> None:
        """Store kv [T, 2, num_kv_heads, head_dim] at slot offsets[t] of block block_ids[t]."""
        self._layers[layer][block_ids, :, :, offsets] = kv


def _over(buffer: Buffer, num_bytes: int) -> Tensor:
    view = buffer if isinstance(buffer, memoryview) else buffer.data
    if view.readonly:
        raise ConfigError("the KV cache's buffer is read-only", param="buffer")
    if view.nbytes != num_bytes:
        raise ConfigError(
            f"the KV cache needs {num_bytes} bytes, its buffer has {view.nbytes}", param="buffer"
        )
    return torch.frombuffer(view, dtype=torch.uint8)
