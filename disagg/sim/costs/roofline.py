"""Roofline: each part of a step takes as long as the slower of its arithmetic and its memory traffic.

Williams et al., "Roofline" (CACM 2009), applied to a decoder's three parts, which don't overlap:

    matrices    2 FLOP per weight and token; every weight is read once per step
    attention   4 FLOP per head, head dimension and pair of tokens; the KV of the context is read
    all-reduce  two of the hidden state per layer among tensor-parallel ranks (ring)
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg.sim.costs.base import Chunk
from disagg.sim.hardware import Hardware, ModelShape


class RooflineCost:
    """Step times of a model on `tensor_parallel` GPUs.

    flops_efficiency, bandwidth_efficiency: share of the peak that kernels reach. step_overhead_s: launches
    and scheduling once per step; layer_latency_s: of one all-reduce. decode_context: whether decodes pay for
    the context that they read.
    """

    def __init__(
        self,
        model: ModelShape,
        hardware: Hardware,
        tensor_parallel: int = 1,
        *,
        flops_efficiency: float = 0.6,
        bandwidth_efficiency: float = 0.8,
        step_overhead_s: float = 0.003,
        layer_latency_s: float = 8e-6,
        decode_context: bool = True,
    ) -> None:
        flops = hardware.flops * flops_efficiency * tensor_parallel
        bandwidth = hardware.bandwidth * bandwidth_efficiency * tensor_parallel
        self._overhead = step_overhead_s
        # Seconds per token or row, and the least that reading the weights takes.
        self._layer_token_s = 2 * model.layer_params / flops
        self._layer_read_s = model.layer_params * model.dtype_bytes / bandwidth
        self._head_row_s = 2 * model.head_params / flops
        self._head_read_s = model.head_params * model.dtype_bytes / bandwidth
        self._pair_s = 4 * model.num_layers * model.num_heads * model.head_dim / flops
        self._kv_s = model.kv_bytes_per_token / bandwidth
        # Decode attention reads each context token's KV for one query, so both sides grow alike.
        self._context_s = max(self._pair_s, self._kv_s) if decode_context else 0.0
        self._reduce_latency = 0.0
        self._reduce_token_s = 0.0
        if tensor_parallel > 1:
            share = 2 * (tensor_parallel - 1) / tensor_parallel
            reduces = 2 * model.num_layers
            self._reduce_latency = reduces * layer_latency_s
            moved = reduces * share * model.hidden_size * model.dtype_bytes
            self._reduce_token_s = moved / (hardware.interconnect * bandwidth_efficiency)

    def step_s(self, chunks: Sequence[Chunk], num_decodes: int, decode_context: int) -> float:
        tokens = num_decodes + sum(chunk.num_tokens for chunk in chunks)
        # Which chunk draws a token is not known here; one output row per sequence is what there is at most.
        seconds = self._matrices_s(tokens, num_decodes + len(chunks)) + self._context_s * decode_context
        for num_tokens, num_computed in chunks:
            pairs = num_tokens * (num_computed + (num_tokens + 1) / 2)
            seconds += max(pairs * self._pair_s, (num_computed + num_tokens) * self._kv_s)
        return seconds

    def _matrices_s(self, tokens: int, rows: int) -> float:
        layers = max(self._layer_token_s * tokens, self._layer_read_s)
        head = max(self._head_row_s * rows, self._head_read_s)
        return self._overhead + layers + head + self._reduce_latency + self._reduce_token_s * tokens

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        return self._matrices_s(num_decodes, num_decodes), self._context_s
