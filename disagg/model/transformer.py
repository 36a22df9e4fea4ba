"""The decoder: one class for all families, its shape given by ModelSpec; whole, or one rank's shard of it."""

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
from disagg.model.parallel import RankGroup, RowParallelLinear, embed_part
from disagg.model.shard import Shard, Span
from disagg.model.step import StepInput
from disagg.model.weights import Cut, load_weights


@dataclass(frozen=True, slots=True)
class _StepTensors:
    """A step as the layers take it: int64 [T] each, and the attention plans by window."""

    token_ids: Tensor
    positions: Tensor
    block_ids: Tensor
    offsets: Tensor
    plans: Mapping[int | None, AttentionPlan]


class _Builder:
    """Allocates parameters and notes under which checkpoint names, and which parts of them, they are loaded.

    ignored: names in the checkpoint of which another rank makes use.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, group: RankGroup | None) -> None:
        self._dtype = dtype
        self._device = device
        self._group = group
        self.targets: dict[str, Tensor] = {}
        self.cuts: dict[str, Cut] = {}
        self.ignored: set[str] = set()

    def parameter(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _load(self, name: str, tensor: Tensor, dim: int = 0, span: Span | None = None) -> None:
        self.targets[name] = tensor
        if span is not None and span.length != span.total:
            self.cuts[name] = Cut(dim, span)

    def linear(self, parts: Mapping[str, Span], in_features: int, *, bias: bool) -> Linear:
        """Fuse the spans of out_features of the layers named in `parts` into one layer, in that order."""
        total = sum(span.length for span in parts.values())
        weight = self.parameter(total, in_features)
        offsets = self.parameter(total) if bias else None
        start = 0
        for name, span in parts.items():
            end = start + span.length
            self._load(f"{name}.weight", weight[start:end], 0, span)
            if offsets is not None:
                self._load(f"{name}.bias", offsets[start:end], 0, span)
            start = end
        return Linear(weight, offsets)

    def row_linear(self, name: str, out_features: int, inputs: Span, *, bias: bool) -> Linear:
        """Return a layer that takes `inputs` of its inputs, and gives the sum over all ranks."""
        weight = self.parameter(out_features, inputs.length)
        self._load(f"{name}.weight", weight, 1, inputs)
        adds = bias and (self._group is None or self._group.shard.leads)
        offsets = self.parameter(out_features) if adds else None
        if offsets is not None:
            self._load(f"{name}.bias", offsets)
        elif bias:
            self.ignored.add(f"{name}.bias")
        return (
            Linear(weight, offsets)
            if self._group is None
            else RowParallelLinear(weight, offsets, self._group)
        )

    def vocabulary(self, name: str, own: Span, width: int, size: int) -> Tensor:
        """Return [width, size], of which the first own.length rows are loaded and the rest are zero."""
        weight = self.parameter(width, size)
        weight[own.length :].zero_()
        if own.length:
            self._load(f"{name}.weight", weight[: own.length], 0, own)
        else:
            self.ignored.add(f"{name}.weight")
        return weight

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        weight = self.parameter(size)
        self._load(f"{name}.weight", weight)
        return RMSNorm(weight, eps)


class DecoderLayer:
    """Pre-norm attention and SwiGLU, each on a residual branch. spec: of the whole model."""

    def __init__(self, spec: ModelSpec, shard: Shard, index: int, build: _Builder) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.window = spec.sliding_window[index]
        heads, kv_heads, features = shard.heads(spec), shard.kv_heads(spec), shard.features(spec)
        self.num_heads, self.num_kv_heads = heads.length, kv_heads.length
        self.head_dim = spec.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        query, kv = heads.times(spec.head_dim), kv_heads.times(spec.head_dim)
        self.qkv_proj = build.linear(
            {f"{attention}.q_proj": query, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv},
            spec.hidden_size,
            bias=spec.qkv_bias,
        )
        self.o_proj = build.row_linear(f"{attention}.o_proj", spec.hidden_size, query, bias=spec.o_bias)
        self.gate_up_proj = build.linear(
            {f"{mlp}.gate_proj": features, f"{mlp}.up_proj": features}, spec.hidden_size, bias=spec.mlp_bias
        )
        self.down_proj = build.row_linear(f"{mlp}.down_proj", spec.hidden_size, features, bias=spec.mlp_bias)
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
    """A decoder-only language model. Parameters are uninitialised until `load`.

    group: the ranks among which the model is cut, None for all of it here; the size must have passed
    check_size. All ranks go through `forward` with the same steps. spec: the shape of what is computed here.
    kv_heads: which of the whole model's key heads these are.
    """

    own_threads = False

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: RankGroup | None = None,
    ) -> None:
        shard = Shard() if group is None else group.shard
        build = _Builder(dtype, device, group)
        self.group = group
        self.spec = shard.spec(spec)
        self.kv_heads = shard.kv_heads(spec)
        self._vocabulary = shard.vocabulary(spec)
        rows = self._vocabulary, shard.vocabulary_width(spec), spec.hidden_size
        self.embed_tokens = build.vocabulary("model.embed_tokens", *rows)
        self.layers = [DecoderLayer(spec, shard, index, build) for index in range(spec.num_layers)]
        self.norm = build.norm("model.norm", spec.hidden_size, spec.rms_norm_eps)
        if spec.tie_word_embeddings:
            self.lm_head = Linear(self.embed_tokens)
            build.ignored.add("lm_head.weight")
        else:
            self.lm_head = Linear(build.vocabulary("lm_head", *rows))
        self.rotary = RotaryEmbedding(spec.rope, spec.head_dim, device=device, dtype=dtype)
        self._build: _Builder | None = build

    def load(self) -> None:
        """Read the weights of spec.folder, once. Raises ConfigError, see load_weights."""
        build = self._build
        if build is None:
            raise ValueError("the weights are loaded already")
        load_weights(self.spec.folder, build.targets, cuts=build.cuts, ignored=frozenset(build.ignored))
        # Views in its tables would keep the plain weights alive beside packed ones.
        self._build = None

    def pack(self) -> None:
        """Bring the weights into the layout that torch multiplies fastest."""
        for layer in self.layers:
            for linear in layer.linears():
                linear.pack()
        self.lm_head.pack(keep_weight=self.spec.tie_word_embeddings)

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Return float32 logits [S, vocab_size] of step.sample_rows; writes all tokens' KV."""
        tensors = self._tensors(step, cache)
        hidden = self.embed(tensors.token_ids)
        rotary = self.rotary(tensors.positions)
        for layer in self.layers:
            hidden = layer.forward(hidden, rotary, tensors, cache)
        rows = torch.from_numpy(step.sample_rows).to(hidden.device)
        return self.logits(self.norm(hidden[rows]))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return embeddings [T, hidden_size] of token ids [T]."""
        if self.group is None:
            return F.embedding(token_ids, self.embed_tokens)
        return embed_part(token_ids, self.embed_tokens, self._vocabulary, self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [S, vocab_size] of normed hidden states [S, hidden_size].

        Of several ranks only the first has them, and the others return [0, vocab_size].
        """
        if self.group is None:
            return self.lm_head(hidden).float()
        whole = self.group.gather_columns(self.lm_head(hidden).float()) if len(hidden) else None
        if whole is None:
            return hidden.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
        return whole[:, : self.spec.vocab_size]

    def _tensors(self, step: StepInput, cache: KVCache) -> _StepTensors:
        device = self.embed_tokens.device
        return _StepTensors(
            token_ids=torch.from_numpy(step.token_ids).to(device),
            positions=torch.from_numpy(step.positions).to(device),
            block_ids=torch.from_numpy(step.block_ids(cache.block_size)).to(device),
            offsets=torch.from_numpy(step.positions % cache.block_size).to(device),
            plans=plan_step(list(step.chunks()), self.spec.sliding_window, cache),
        )
