"""Who computes the attention of prompts' chunks on a GPU: our Triton kernel, or FlashInfer where asked for.

    once a step:   prepare(chunks)        once a layer:   attend(q, kv) ─► out

Decode attention is ours in any case: it is part of captured graphs, over buffers that never move.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from disagg.model.kernels.prefill_attention import prefill_attention
from disagg.model.native.library import KernelsUnavailableError
from disagg.model.step import Int64

# What FlashInfer's documentation recommends for partial results of split work.
WORKSPACE_BYTES = 128 << 20
FLASHINFER_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class PrefillChunks:
    """The n chunks of a step that are no single tokens at its start.

    lengths, contexts: [n] on the host; tokens of each chunk, and of its sequence up to the chunk's end.
    block_tables: [n, width] on the host, filled up with the null block. On the device, the same tables,
    query_starts [n + 1] (counted from the first chunk's first token) and context_lens [n].
    """

    lengths: Int64
    contexts: Int64
    block_tables: Int64
    tables: Tensor
    query_starts: Tensor
    context_lens: Tensor


class PrefillBackend(Protocol):
    """Causal attention of chunks whose keys and values are in the paged cache already."""

    def prepare(self, chunks: PrefillChunks) -> None:
        """Take in the chunks that the next calls of `attend` are about."""
        ...

    def attend(self, q: Tensor, kv: Tensor, *, window: int | None, out: Tensor) -> None:
        """Write the attention of q [T, Hq, D] over one layer's blocks [num_blocks, 2, Hkv, bs, D] to out."""
        ...


class TritonPrefill:
    """disagg.model.kernels.prefill_attention."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._chunks: PrefillChunks | None = None
        self._longest = 0

    def prepare(self, chunks: PrefillChunks) -> None:
        self._chunks, self._longest = chunks, int(chunks.lengths.max())

    def attend(self, q: Tensor, kv: Tensor, *, window: int | None, out: Tensor) -> None:
        chunks = self._chunks
        assert chunks is not None, "attend before prepare"
        prefill_attention(
            q,
            kv,
            chunks.tables,
            chunks.query_starts,
            chunks.context_lens,
            scale=self._scale,
            max_query_len=self._longest,
            window=window,
            out=out,
        )


class FlashInferPrefill:
    """FlashInfer's BatchPrefillWithPagedKVCacheWrapper, planned on the host once a step.

    Written against flashinfer-python 0.7. One wrapper for each window of the model, since a plan holds one;
    they share a workspace, as they run one after another on one stream.
    Raises KernelsUnavailableError where it is not installed, or can't take the dtype or head dimension.
    """

    def __init__(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, scale: float,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        try:
            library: Any = importlib.import_module("flashinfer")
        except ImportError as error:
            raise KernelsUnavailableError(f"flashinfer can't be imported: {error}") from None
        if dtype not in (torch.float16, torch.bfloat16):
            raise KernelsUnavailableError(f"FlashInfer computes in bfloat16 or float16, not in {dtype}")
        if head_dim not in FLASHINFER_HEAD_DIMS:
            raise KernelsUnavailableError(f"FlashInfer has no head_dim {head_dim}: {FLASHINFER_HEAD_DIMS}")
        self._make = library.BatchPrefillWithPagedKVCacheWrapper
        self._shape = {
            "num_qo_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim_qk": head_dim,
            "page_size": block_size,
            "sm_scale": scale,
            "q_data_type": dtype,
        }
        self._block_size = block_size
        self._device = device
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[int | None, Any] = {}
        self._planned: set[int | None] = set()
        self._pages: dict[str, Tensor] = {}

    def prepare(self, chunks: PrefillChunks) -> None:
        used = -(-chunks.contexts // self._block_size)
        inside = np.arange(chunks.block_tables.shape[1]) < used[:, None]
        self._planned.clear()
        # Lengths stay on the host, where the plan is made; only ids of pages are read by the device.
        self._pages = {
            "qo_indptr": _sums(chunks.lengths),
            "paged_kv_indptr": _sums(used),
            "paged_kv_last_page_len": _int32(chunks.contexts - (used - 1) * self._block_size),
            "paged_kv_indices": _int32(chunks.block_tables[inside], pinned=self._device.type == "cuda").to(
                self._device, non_blocking=True
            ),
        }

    def attend(self, q: Tensor, kv: Tensor, *, window: int | None, out: Tensor) -> None:
        if window not in self._wrappers:
            self._wrappers[window] = self._make(self._workspace, "HND")
        wrapper = self._wrappers[window]
        if window not in self._planned:
            # A window of w tokens holds the query's own; FlashInfer counts those to its left.
            left = -1 if window is None else window - 1
            wrapper.plan(**self._pages, **self._shape, causal=True, window_left=left)
            self._planned.add(window)
        wrapper.run(q, (kv[:, 0], kv[:, 1]), out=out)


def _int32(values: Int64, *, pinned: bool = False) -> Tensor:
    host = torch.empty(len(values), dtype=torch.int32, pin_memory=pinned)
    host.copy_(torch.from_numpy(values))
    return host


def _sums(lengths: Int64) -> Tensor:
    return _int32(np.concatenate([[0], lengths.cumsum()]))
