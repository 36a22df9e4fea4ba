"""TritonDecoder: computes steps on a GPU with our kernels and torch's matrix products.

A step whose chunks are all single tokens replays a CUDA graph, captured for a ladder of batch sizes; other
steps launch kernel by kernel, which their matrix products hide. Everything a step needs goes to the device
in one copy, and nothing here waits for the device.

    StepInput ──one copy──► _DeviceBatch ──graph or eager──► logits on the device
                                  ▲
    token ids below zero: ──── drawn, the tokens of the step before, which the host need not know yet
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from disagg.errors import ConfigError
from disagg.model.decode_graphs import (
    Capture,
    CudaCapture,
    DecodeGraphs,
    DecodeInputs,
    padded_tables,
)
from disagg.model.host_memory import upload
from disagg.model.kernels.common import num_processors
from disagg.model.kernels.decode_attention import decode_attention, workspace_elements
from disagg.model.kernels.kv_store import store_kv
from disagg.model.kernels.rms_norm import add_rms_norm
from disagg.model.kernels.rope import apply_rope_
from disagg.model.kernels.swiglu import swiglu
from disagg.model.kernels.tiling import check_head_dim, padded
from disagg.model.kv_cache import KVCache
from disagg.model.prefill_backends import (
    FlashInferPrefill,
    PrefillBackend,
    PrefillChunks,
    TritonPrefill,
)
from disagg.model.step import StepInput
from disagg.model.transformer import DecoderLayer, Transformer


@dataclass(frozen=True, slots=True)
class _DeviceBatch:
    """A step on the device. T tokens; the first num_decodes of B chunks are single tokens.

    token_ids, positions, slots: [T]. tables: [num_decodes and more, n]. context_lens: [num_decodes and more],
    a chunk's own tokens included. What attention needs of the others, the prefill backend has.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    context_lens: Tensor
    num_decodes: int
    max_context: int


class TritonDecoder:
    """A decoder on `model`'s device with the weights of `model`.

    block_size: of the cache. max_model_len: longest sequence; max_num_seqs: sequences of a step at most.
    flashinfer: it computes the attention of prompts' chunks.
    drawn: int64 [max_num_seqs] on the device; a token id of -1 - row in a step means drawn[row], of rank 0's
    where the model is cut among several.
    Raises ConfigError where the kernels can't take the model's head dimension or the block size, and
    KernelsUnavailableError where FlashInfer is asked for and can't be used.
    """

    own_threads = False

    def __init__(
        self,
        model: Transformer,
        *,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        flashinfer: bool = False,
    ) -> None:
        spec = model.spec
        check_head_dim(spec.head_dim)
        if block_size != padded(block_size):
            raise ConfigError(
                f"block_size must be a power of two for the Triton kernels, got {block_size}",
                param="block_size",
            )
        self.spec = spec
        self._model = model
        self._device = model.embed_tokens.device
        self._scale = 1.0 / math.sqrt(spec.head_dim)
        self._prefill: PrefillBackend = TritonPrefill(self._scale)
        if flashinfer:
            self._prefill = FlashInferPrefill(
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                block_size=block_size,
                scale=self._scale,
                dtype=model.embed_tokens.dtype,
                device=self._device,
            )
        self._max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=self._device)
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

    def capture(self, cache: KVCache, max_model_len: int, capture: Capture | None = None) -> None:
        """Capture graphs of decode steps over `cache`, the one that `forward` is called with from then on.

        max_model_len: at most the one that the decoder was made for. capture: makes a graph of a computation;
        where None, CUDA's.
        """
        self._max_model_len = max_model_len
        weight = self._model.embed_tokens
        self._graphs = DecodeGraphs(
            lambda inputs: self._decode(inputs, cache),
            CudaCapture() if capture is None else capture,
            largest=self.max_num_seqs,
            width=-(-max_model_len // cache.block_size),
            block_size=cache.block_size,
            hidden=torch.zeros(
                self.max_num_seqs, self.spec.hidden_size, dtype=weight.dtype, device=self._device
            ),
        )

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Return float32 logits [S, vocab_size] of step.sample_rows; writes all tokens' KV."""
        if self._graphs is not None and self._graphs.hold(step):
            return self._model.logits(self._graphs.replay(step))
        batch, rows = self._upload(step, cache.block_size)
        return self._model.logits(self._hidden(batch, cache).index_select(0, rows))

    def _upload(self, step: StepInput, block_size: int) -> tuple[_DeviceBatch, Tensor]:
        """Bring a step to the device in one copy; return it and its sample_rows."""
        lengths = np.diff(step.query_start)
        num_decodes = int(np.argmin(np.append(lengths == 1, False)))
        last = step.query_start[1:] - 1
        context_lens = step.positions[last] + 1
        tables = padded_tables(step, int(np.diff(step.table_start).max()))
        slots = step.block_ids(block_size) * block_size + step.positions % block_size
        starts = step.query_start[num_decodes:] - num_decodes
        pieces = upload(
            [step.token_ids, step.positions, slots, context_lens, starts, step.sample_rows, tables],
            self._device,
        )
        device_tables = pieces[6].view(tables.shape)
        if num_decodes < step.num_chunks:
            self._prefill.prepare(
                PrefillChunks(
                    lengths=lengths[num_decodes:].astype(np.int64),
                    contexts=context_lens[num_decodes:],
                    block_tables=tables[num_decodes:],
                    tables=device_tables[num_decodes:],
                    query_starts=pieces[4],
                    context_lens=pieces[3][num_decodes:],
                )
            )
        batch = _DeviceBatch(
            token_ids=pieces[0],
            positions=pieces[1],
            slots=pieces[2],
            context_lens=pieces[3],
            tables=device_tables,
            num_decodes=num_decodes,
            max_context=int(context_lens.max()),
        )
        return batch, pieces[5]

    def _decode(self, inputs: DecodeInputs, cache: KVCache) -> Tensor:
        batch = _DeviceBatch(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slots=inputs.slots,
            tables=inputs.tables,
            context_lens=inputs.context_lens,
            num_decodes=len(inputs.token_ids),
            # The same graph serves every context.
            max_context=self._max_model_len,
        )
        return self._hidden(batch, cache)

    def _token_ids(self, given: Tensor) -> Tensor:
        """Put the tokens that the step before drew in the places that ask for them."""
        drawn = self.drawn.index_select(0, (-1 - given).clamp_(min=0))
        return torch.where(given < 0, drawn, given)

    def _hidden(self, batch: _DeviceBatch, cache: KVCache) -> Tensor:
        """Return the normed last hidden states [T, hidden_size]; writes all tokens' KV."""
        layers, eps = self._model.layers, self.spec.rms_norm_eps
        if self._model.group is not None:
            # Rank 0 draws; what it drew last is here only now.
            self._model.group.broadcast(self.drawn)
        residual = self._model.embed(self._token_ids(batch.token_ids))
        x = add_rms_norm(residual, None, layers[0].input_norm.weight, eps)
        following = [layer.input_norm for layer in layers[1:]] + [self._model.norm]
        for layer, norm in zip(layers, following, strict=True):
            mixed = layer.o_proj(self._attention(layer, x, batch, cache))
            x = add_rms_norm(mixed, residual, layer.mlp_norm.weight, eps)
            x = add_rms_norm(layer.down_proj(swiglu(layer.gate_up_proj(x))), residual, norm.weight, eps)
        return x

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
        if first < len(out):
            self._prefill.attend(q[first:], kv, window=layer.window, out=out[first:])
        return out.view(x.shape[0], heads * dim)
