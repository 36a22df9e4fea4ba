"""The Llama architecture of the bundled model, written for fast training on a CPU.

Parameter names are those of ``transformers.LlamaForCausalLM``, so the saved file loads there as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; the names follow ``transformers.LlamaConfig``."""

    vocab_size: int = 1280
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 1e10
    rms_norm_eps: float = 1e-5

    def hf_config(self, eos_token_id: int) -> dict[str, Any]:
        """The content of ``config.json``."""
        sizes = asdict(self)
        theta = sizes.pop("rope_theta")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": eos_token_id,
            "pad_token_id": 0,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": "float32",
        }


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [batch, heads, tokens, head_dim]; ``cos`` and ``sin`` [tokens, head_dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each row of ``x`` [batch, tokens, hidden]."""
        batch, tokens, _ = x.shape
        dim = self.shape.head_dim
        q = self.q_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, -1, dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1)))


class Mlp(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every token of ``x`` [batch, tokens, hidden]."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Transform ``x`` [batch, tokens, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class TinyLlama(nn.Module):
    """The trainable model; ``state_dict`` keys are those of ``LlamaForCausalLM`` with tied embeddings."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)
        exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.outer(
            torch.arange(shape.max_position_embeddings, dtype=torch.float64), shape.rope_theta**-exponent
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        embedding = self.model.embed_tokens.weight
        nn.init.normal_(embedding, std=1 / math.sqrt(embedding.shape[1]))
        for name, weight in self.model.named_parameters():
            if name.endswith("_proj.weight"):
                nn.init.normal_(weight, std=0.5 / math.sqrt(weight.shape[1]))
            # Residual branches start closed, so the first steps see a plain embedding model.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
        wire_heads(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Final hidden states [batch, tokens, hidden] of ``ids`` [batch, tokens]."""
        x = self.model.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return cast(Tensor, self.model.norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of ``hidden`` [..., hidden], by the tied embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight)


#: Dimensions of the embedding that are random at the start; the rest of the residual stream is for notes.
CODE_SIZE = 95
#: Dimensions of a note of one earlier token: a projection of its code.
NOTE_SIZE = 20
#: Rotary frequencies, fastest first: those that tell a distance, and those that hardly turn in a context.
FAST, SLOW = 8, 12
#: How far back, in tokens, the query of each key/value group of the induction heads looks; each also
#: looks at the same tokens of an earlier place, where they are one token older.
MATCHED = ((0, 1, 2), (1, 2, 3, 4))


#: Strength of the queries and keys of the induction heads.
MATCH_GAIN = 4.0


def _orthogonal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))


@torch.no_grad()
def wire_heads(model: TinyLlama) -> None:
    """Start the first two layers as look-back heads and the third as induction heads.

    Looking something up needs two layers that work together: one notes at each token which tokens came
    before it, a later one finds the place whose notes match the present and copies what stands there
    (Olsson et al., "In-context Learning and Induction Heads", 2022). From random weights this circuit
    appears only after a long plateau; wired in advance (all of it stays trainable), the model copies from
    the first steps and a CPU is enough to train the rest.

    The residual stream starts divided: channel 0 is constant, the next ``CODE_SIZE`` hold the token, the
    rest hold notes of ``NOTE_SIZE`` for each of the tokens before it.
    """
    shape = model.shape
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = 1.0
    embedding[:, 1 : 1 + CODE_SIZE] *= math.sqrt(hidden / CODE_SIZE)
    embedding[:, 1 + CODE_SIZE :] = 0.0
    code = _code_reader(hidden, shape.head_dim)
    notes = [code[:NOTE_SIZE]]
    for age in range(2 * heads):
        note = torch.zeros(NOTE_SIZE, hidden)
        note[:, 1 + CODE_SIZE + age * NOTE_SIZE :][:, :NOTE_SIZE] = torch.eye(NOTE_SIZE)
        notes.append(note)
    layers = cast(list[Layer], list(model.model.layers))
    # The constant channel after the norm is sqrt(hidden) / |x|, with |x|^2 = 2 plus 0.25 for each note.
    _wire_look_back(model, layers[0].self_attn, 1, math.sqrt(hidden / 2), code, notes[1 : 1 + heads])
    _wire_look_back(model, layers[1].self_attn, 1 + heads, math.sqrt(hidden / 3), code, notes[1 + heads :])
    _wire_induction(shape, layers[2].self_attn, notes)


def _code_reader(hidden: int, size: int) -> Tensor:
    """Orthogonal rows [size, hidden] that read the dimensions of the token."""
    reader = torch.zeros(size, hidden)
    reader[:, 1 : 1 + CODE_SIZE] = _orthogonal(size, CODE_SIZE)
    return reader


def _wire_look_back(
    model: TinyLlama, attention: Attention, first: int, constant: float, code: Tensor, notes: Sequence[Tensor]
) -> None:
    """Head h attends ``first + h`` tokens back and writes ``notes[h]`` of that token.

    ``constant`` is the value of the constant channel after the norm; ``code`` is [head_dim, hidden].
    """
    shape = model.shape
    half, size = shape.head_dim // 2, shape.head_dim
    fast = torch.arange(FAST)
    # A score is a sum of cosines of (distance - offset), one for each of the fastest frequencies.
    amplitude = math.sqrt(10.0 * math.sqrt(size)) / constant
    cos, sin = model.cos[:, :half], model.sin[:, :half]
    # A note of length 0.5, of a code of length ``constant * sqrt(NOTE_SIZE / CODE_SIZE)``.
    gain = 0.5 / (constant * math.sqrt(NOTE_SIZE / CODE_SIZE))
    for head in range(shape.num_attention_heads):
        rows = head * size + fast
        attention.q_proj.weight[rows, 0] = amplitude * cos[first + head, fast]
        attention.q_proj.weight[rows + half, 0] = -amplitude * sin[first + head, fast]
        attention.o_proj.weight[:, head * size : head * size + NOTE_SIZE] = gain * notes[head].T
    for group in range(shape.num_key_value_heads):
        rows = group * size + fast
        attention.k_proj.weight[rows, 0] = amplitude
        attention.k_proj.weight[rows + half, 0] = 0.0
        attention.v_proj.weight[group * size : (group + 1) * size] = code


def _wire_induction(shape: ModelShape, attention: Attention, notes: Sequence[Tensor]) -> None:
    """Match the last tokens of the present with the tokens before an earlier place, and copy from there.

    ``notes[n]`` [NOTE_SIZE, hidden] reads the token n places back (0: the token itself).
    """
    half, size = shape.head_dim // 2, shape.head_dim
    slow = torch.cat((torch.arange(SLOW, half), torch.arange(SLOW, half) + half))
    per_group = shape.num_attention_heads // shape.num_key_value_heads
    copies = _code_reader(shape.hidden_size, min(size * shape.num_key_value_heads, CODE_SIZE))
    for group, (ages, copy) in enumerate(zip(MATCHED, torch.split(copies, size), strict=True)):
        heads = range(group * per_group, (group + 1) * per_group)
        width = len(slow) // len(ages)
        for part, age in enumerate(ages):
            rows = slow[part * width : (part + 1) * width]
            attention.k_proj.weight[group * size + rows] = MATCH_GAIN * notes[age + 1][:width]
            for head in heads:
                attention.q_proj.weight[head * size + rows] = MATCH_GAIN * notes[age][:width]
        attention.v_proj.weight[group * size : group * size + len(copy)] = copy
        for head in heads:
            attention.o_proj.weight[:, head * size : head * size + len(copy)] = 0.2 * copy.T


def save_checkpoint(model: TinyLlama, directory: Path, eos_token_ids: Sequence[int]) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` (float32)."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.shape.hf_config(eos_token_ids[0])
    generation = {
        "bos_token_id": 0,
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": 0,
        "do_sample": False,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    # Others may load the directory while training goes on: they see the old file or the new one.
    partial.replace(directory / "model.safetensors")
