"""TritonDecoder: computes steps on a GPU with our kernels and torch's matrix products.

A step whose chunks are all single tokens replays a CUDA graph, captured for a ladder of batch sizes; other
steps launch kernel by kernel, which their matrix products hide. Everything a step needs goes to the device
in one copy, and nothing waits for the device before the tokens are read.

    StepInput ──one copy──► _DeviceBatch ──graph or eager──► logits on the device
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.errors import ConfigError
from disagg.model.kernels.common import num_processors
from disagg.model.kernels.decode_attention import decode_attention, workspace_elements
from disagg.model.kernels.kv_store import store_kv
from disagg.model.kernels.prefill_attention import prefill_attention
from disagg.model.kernels.rms_norm import add_rms_norm
from disagg.model.kernels.rope import apply_rope_
from disagg.model.kernels.swiglu import swiglu
from disagg.model.kernels.tiling import check_head_dim, padded
from disagg.model.kv_cache import KVCache
from disagg.model.step import Int64, StepInput
from disagg.model.transformer import DecoderLayer, Transformer

# Batches up to 8 have a graph each power of two; from there each multiple of 8, where padding costs less
# than a tenth of a step.
GRAPH_STEP = 8


@dataclass(frozen=True, slots=True)
class _DeviceBatch:
    """A step on the device. T tokens; the first num_decodes of B chunks are single tokens.

    token_ids, positions, slots: [T]. tables: [B, n]. context_lens: [B], the chunk's own tokens included.
    query_starts: [B - num_decodes + 1], counted from the first token after the decodes.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    num_decodes: int
    max_query_len: int
    max_context: int


class TritonDecoder:
    """A decoder on `model`'s device with the weights of `model`.

    max_model_len: longest sequence; max_num_seqs: sequences of a step at most. Raises ConfigError where the
    kernels can't take the model's head dimension or the cache's block size.
    """

    own_threads = False

    def __init__(self, model: Transformer, cache: KVCache, *, max_model_len: int, max_num_seqs: int) -> None:
        spec = model.spec
        check_head_dim(spec.head_dim)
        if cache.block_size != padded(cache.block_size):
            raise ConfigError(
                f"block_size must be a power of two for the Triton kernels, got {cache.block_size}",
                param="block_size",
            )
        self.spec = spec
        self._model = model
        self._device = model.embed_tokens.device
        self._scale = 1.0 / math.sqrt(spec.head_dim)
        self._max_context = max_model_len
        positions = torch.arange(max_model_len, device=self._device)
        cos, sin = model.rotary.tables(positions)
        self._cos, self._sin = cos.contiguous(), sin.contiguous()
        self._workspace = torch.empty(
            workspace_elements(
                max_num_seqs,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                max_model_len,
                num_processors(self._device),
            ),
            dtype=torch.float32,
            device=self._device,
        )
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda":
            self._graphs = DecodeGraphs(self, cache, max_num_seqs=max_num_seqs, max_model_len=max_model_len)

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Return float32 logits [S, vocab_size] of step.sample_rows; writes all tokens' KV."""
        if self._graphs is not None and self._graphs.take(step):
            return self._graphs.replay(step)
        batch = self.upload(step, cache.block_size)
        rows = torch.from_numpy(step.sample_rows).to(self._device, non_blocking=True)
        return self.logits(self.hidden(batch, cache)[rows])

    def upload(self, step: StepInput, block_size: int) -> _DeviceBatch:
        """Bring a step to the device in one copy."""
        lengths = np.diff(step.query_start)
        num_decodes = int(np.argmin(np.append(lengths == 1, False)))
        last = step.query_start[1:] - 1
        context_lens = step.positions[last] + 1
        tables = padded_tables(step, int(np.diff(step.table_start).max()))
        slots = step.block_ids(block_size) * block_size + step.positions % block_size
        starts = step.query_start[num_decodes:] - num_decodes
        parts = [step.token_ids, step.positions, slots, context_lens, starts, tables.reshape(-1)]
        host = torch.from_numpy(np.concatenate([part.astype(np.int64) for part in parts]))
        if self._device.type == "cuda":
            host = host.pin_memory()
        pieces = torch.split(host.to(self._device, non_blocking=True), [len(part) for part in parts])
        rest = lengths[num_decodes:]
        return _DeviceBatch(
            token_ids=pieces[0],
            positions=pieces[1],
            slots=pieces[2],
            context_lens=pieces[3],
            query_starts=pieces[4],
            tables=pieces[5].view(tables.shape),
            num_decodes=num_decodes,
            max_query_len=int(rest.max()) if len(rest) else 0,
            max_context=int(context_lens.max()),
        )

    def hidden(self, batch: _DeviceBatch, cache: KVCache) -> Tensor:
        """Return the normed last hidden states [T, hidden_size]; writes all tokens' KV."""
        layers, eps = self._model.layers, self.spec.rms_norm_eps
        residual = F.embedding(batch.token_ids, self._model.embed_tokens)
        x = add_rms_norm(residual, None, layers[0].input_norm.weight, eps)
        following = [layer.input_norm for layer in layers[1:]] + [self._model.norm]
        for layer, norm in zip(layers, following, strict=True):
            mixed = layer.o_proj(self._attention(layer, x, batch, cache))
            x = add_rms_norm(mixed, residual, layer.mlp_norm.weight, eps)
            x = add_rms_norm(layer.down_proj(swiglu(layer.gate_up_proj(x))), residual, norm.weight, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [S, vocab_size] of hidden states [S, hidden_size]."""
        return self._model.lm_head(hidden).float()

    def _attention(self, layer: DecoderLayer, x: Tensor, batch: _DeviceBatch, cache: KVCache) -> Tensor:
        heads, kv_heads, dim = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        qkv = layer.qkv_proj(x).view(x.shape[0], heads + 2 * kv_heads, dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        apply_rope_(q, k, self._cos, self._sin, batch.positions)
        kv = cache.blocks[:, layer.index]
        store_kv(k, v, kv, batch.slots)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        first = batch.num_decodes
        if first:
            decode_attention(
                q[:first],
                kv,
                batch.tables[:first],
                batch.context_lens[:first],
                scale=self._scale,
                max_context=batch.max_context,
                window=layer.window,
                out=out[:first],
                workspace=self._workspace,
            )
        if batch.max_query_len:
            prefill_attention(
                q[first:],
                kv,
                batch.tables[first:],
                batch.query_starts,
                batch.context_lens[first:],
                scale=self._scale,
                max_query_len=batch.max_query_len,
                window=layer.window,
                out=out[first:],
            )
        return out.view(x.shape[0], heads * dim)


class DecodeGraphs:
    """CUDA graphs of decode steps for a ladder of batch sizes, over buffers of their own.

    A batch takes the next larger graph; rows that fill it up store nothing and attend to nothing.
    """

    def __init__(
        self, decoder: TritonDecoder, cache: KVCache, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        self._decoder = decoder
        self._block_size = cache.block_size
        self._width = -(-max_model_len // cache.block_size)
        self._largest = max_num_seqs
        device = cache.blocks.device
        self._columns = 4 + self._width
        self._device = torch.zeros(max_num_seqs * self._columns, dtype=torch.int64, device=device)
        self._host = torch.zeros(max_num_seqs * self._columns, dtype=torch.int64).pin_memory()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = None
        # Largest first: the smaller ones then fit into its memory.
        for size in reversed(ladder(max_num_seqs)):
            graph, logits = self._capture(size, cache, max_model_len, pool)
            pool = graph.pool()
            self._graphs[size] = graph, logits

    def take(self, step: StepInput) -> bool:
        """Whether the step is one of decodes that a graph holds."""
        count = step.num_chunks
        return count == len(step.token_ids) == len(step.sample_rows) and count <= self._largest

    def replay(self, step: StepInput) -> Tensor:
        """Return float32 logits [B, vocab_size]; they are overwritten by the next replay."""
        count = step.num_chunks
        size = next(size for size in sorted(self._graphs) if size >= count)
        host = self._host[: size * self._columns].numpy()
        host.fill(0)
        head, tables = host[: 4 * size].reshape(4, size), host[4 * size :].reshape(size, self._width)
        head[:, :count] = decode_columns(step, self._block_size)
        head[2, count:] = -1
        rows = padded_tables(step, int(np.diff(step.table_start).max()))
        tables[:count, : rows.shape[1]] = rows
        # The copy of the step before has ended: its tokens were read.
        self._device[: host.size].copy_(self._host[: host.size], non_blocking=True)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count]

    def _capture(
        self, size: int, cache: KVCache, max_model_len: int, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        flat = self._device[: size * self._columns]
        head, tables = flat[: 4 * size].view(4, size), flat[4 * size :].view(size, self._width)
        head[2].fill_(-1)
        batch = _DeviceBatch(head[0], head[1], head[2], tables, head[3], head[3], size, 0, max_model_len)

        def compute() -> Tensor:
            return self._decoder.logits(self._decoder.hidden(batch, cache))

        # Compiles the kernels and lets libraries take their workspaces, which a capture must not.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = compute()
        return graph, logits


def ladder(largest: int) -> list[int]:
    """Return the batch sizes that have a graph, ascending: 1, 2, 4, 8, then every multiple of GRAPH_STEP."""
    sizes = {size for size in (1, 2, 4) if size < largest} | {largest}
    return sorted(sizes | set(range(GRAPH_STEP, largest, GRAPH_STEP)))


def decode_columns(step: StepInput, block_size: int) -> Int64:
    """Return [4, B]: token id, position, slot and context length of each decode of a step."""
    slots = step.block_ids(block_size) * block_size + step.positions % block_size
    return np.stack([step.token_ids, step.positions, slots, step.positions + 1])


def padded_tables(step: StepInput, width: int) -> Int64:
    """Return the block tables as [B, width], filled up with the null block."""
    tables = np.zeros((step.num_chunks, width), dtype=np.int64)
    tables[np.arange(width) < np.diff(step.table_start)[:, None]] = step.block_tables
    return tables
