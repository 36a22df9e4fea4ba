"""The decoder: one class for all families, its shape given by ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg.model.attention import AttentionPlan, attend, plan_step
from disagg.model.config import ModelSpec
from disagg.model.kv_cache import KVCache
from disagg.model.layers import Linear, RMSNorm, RotaryEmbedding, rotate_
from disagg.model.step import StepInput
from disagg.model.weights import load_weights


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """A step as the layers take it: int64 [T] each, and the attention plans by window."""

    token_ids: Tensor
    positions: Tensor
    block_ids: Tensor
    offsets: Tensor
    plans: Mapping[int | None, AttentionPlan]


class _Builder:
    """Allocates parameters and notes under which checkpoint names parts of them are loaded."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self.targets: dict[str, Tensor] = {}

    def parameter(self, *shape: int, name: str | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name is not None:
            self.targets[name] = tensor
        return tensor

    def linear(self, parts: Mapping[str, int], in_features: int, *, bias: bool) -> Linear:
        """Fuse the layers named in `parts` (with their out_features) into one, in that order."""
        total = sum(parts.values())
        weight = self.parameter(total, in_features)
        offsets = self.parameter(total) if bias else None
        start = 0
        for name, size in parts.items():
            self.targets[f"{name}.weight"] = weight[start : start + size]
            if offsets is not None:
                self.targets[f"{name}.bias"] = offsets[start : start + size]
            start += size
        return Linear(weight, offsets)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self.parameter(size, name=f"{name}.weight"), eps)


class DecoderLayer:
    """Pre-norm attention and SwiGLU, each on a residual branch."""

    def __init__(self, spec: ModelSpec, index: int, build: _Builder) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.window = spec.sliding_window[index]
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim = spec.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv_proj = build.linear(
            {f"{attention}.q_proj": query, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv},
            spec.hidden_size,
            bias=spec.qkv_bias,
        )
        self.o_proj = build.linear({f"{attention}.o_proj": spec.hidden_size}, query, bias=spec.o_bias)
        self.gate_up_proj = build.linear(
            {f"{mlp}.gate_proj": spec.intermediate_size, f"{mlp}.up_proj": spec.intermediate_size},
            spec.hidden_size,
            bias=spec.mlp_bias,
        )
        self.down_proj = build.linear(
            {f"{mlp}.down_proj": spec.hidden_size}, spec.intermediate_size, bias=spec.mlp_bias
        )
        eps = spec.rms_norm_eps
        self.input_norm = build.norm(f"{prefix}.input_layernorm", spec.hidden_size, eps)
        self.mlp_norm = build.norm(f"{prefix}.post_attention_layernorm", spec.hidden_size, eps)
        self.q_norm = build.norm(f"{attention}.q_norm", spec.head_dim, eps) if spec.qk_norm else None
        self.k_norm = build.norm(f"{attention}.k_norm", spec.head_dim, eps) if spec.qk_norm else None

    def linears(self) -> tuple[Linear, ...]:
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], step: _StepTensors, cache: KVCache
    ) -> Tensor:
        """Return the residual stream [T, hidden_size] after this layer; writes its KV into the cache."""
        hidden += self._attention(self.input_norm(hidden), rotary, step, cache)
        hidden += self._mlp(self.mlp_norm(hidden))
        return hidden

    def _attention(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], step: _StepTensors, cache: KVCache
    ) -> Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        split = self.num_heads + self.num_kv_heads
        if self.q_norm is not None and self.k_norm is not None:
            qkv[:, : self.num_heads] = self.q_norm(qkv[:, : self.num_heads])
            qkv[:, self.num_heads : split] = self.k_norm(qkv[:, self.num_heads : split])
        rotate_(qkv[:, :split], *rotary)
        kv = qkv[:, self.num_heads :].view(x.shape[0], 2, self.num_kv_heads, self.head_dim)
        cache.write(self.index, kv, step.block_ids, step.offsets)
        return self.o_proj(attend(qkv, step.plans[self.window], cache, self.index))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up))


class Transformer:
    """A decoder-only language model. Parameters are uninitialised until `load`."""

    own_threads = False

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        build = _Builder(dtype, device)
        self.spec = spec
        self.embed_tokens = build.parameter(
            spec.vocab_size, spec.hidden_size, name="model.embed_tokens.weight"
        )
        self.layers = [DecoderLayer(spec, index, build) for index in range(spec.num_layers)]
        self.norm = build.norm("model.norm", spec.hidden_size, spec.rms_norm_eps)
        if spec.tie_word_embeddings:
            self.lm_head = Linear(self.embed_tokens)
        else:
            self.lm_head = build.linear({"lm_head": spec.vocab_size}, spec.hidden_size, bias=False)
        self.rotary = RotaryEmbedding(spec.rope, spec.head_dim, device=device, dtype=dtype)
        self._targets: dict[str, Tensor] = build.targets

    def load(self) -> None:
        """Read the weights of spec.folder. Raises ConfigError, see load_weights."""
        tied = self.spec.tie_word_embeddings
        load_weights(self.spec.folder, self._targets, ignored=frozenset({"lm_head.weight"} if tied else ()))
        # Views in the table would keep the plain weights alive beside packed ones.
        self._targets.clear()

    def pack(self) -> None:
        """Bring the weights into the layout that torch multiplies fastest."""
        for layer in self.layers:
            for linear in layer.linears():
                linear.pack()
        self.lm_head.pack(keep_weight=self.spec.tie_word_embeddings)

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Return float32 logits [S, vocab_size] of step.sample_rows; writes all tokens' KV."""
        tensors = self._tensors(step, cache)
        hidden = F.embedding(tensors.token_ids, self.embed_tokens)
        rotary = self.rotary(tensors.positions)
        for layer in self.layers:
            hidden = layer.forward(hidden, rotary, tensors, cache)
        rows = torch.from_numpy(step.sample_rows).to(hidden.device)
        return self.lm_head(self.norm(hidden[rows])).float()

    def _tensors(self, step: StepInput, cache: KVCache) -> _StepTensors:
        device = self.embed_tokens.device
        return _StepTensors(
            token_ids=torch.from_numpy(step.token_ids).to(device),
            positions=torch.from_numpy(step.positions).to(device),
            block_ids=torch.from_numpy(step.block_ids(cache.block_size)).to(device),
            offsets=torch.from_numpy(step.positions % cache.block_size).to(device),
            plans=plan_step(list(step.chunks()), self.spec.sliding_window, cache),
        )
