"""ModelSpec: what a checkpoint's config.json says, checked, with every family's defaults filled in.

Reads JSON only; importing transformers would add seconds to the start of every worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from disagg.errors import ConfigError
from disagg.model.families import Family, family_of

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: theta, and how frequencies are scaled. Names are those of transformers.

    original_max_position_embeddings: length before scaling, for llama3 and yarn. The rest is yarn's.
    """

    theta: float = 10_000.0
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape. sliding_window: per layer, the number of last positions it attends to, or None.

    max_model_len: positions for which the rotary embedding is meant. dtype: of the checkpoint.
    eos_token_ids: of config.json and generation_config.json together.
    """

    folder: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_window: tuple[int | None, ...]
    max_model_len: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def limit_model_len(self, max_model_len: int | None) -> int:
        """Return the length to serve: the operator's or the model's. Raises ConfigError beyond the latter."""
        if max_model_len is None:
            return self.max_model_len
        if not 1 <= max_model_len <= self.max_model_len:
            raise ConfigError(
                f"max_model_len must be in [1, {self.max_model_len}] for {self.folder}, got {max_model_len}",
                param="max_model_len",
            )
        return max_model_len


class _Fields:
    """Typed access to a JSON object; every complaint names the field and the file."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self._data = data
        self._source = source

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self._source}: {name} {problem}", param=name)

    def has(self, name: str) -> bool:
        return name in self._data

    def raw(self, name: str) -> Any:
        return self._data.get(name)

    def integer(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._data.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(name, f"must be a whole number of at least {low}, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._data.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(name, f"must be a positive number, got {value!r}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self._data.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ConfigError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", param="model") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}", param="model") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object", param="model")
    return data


def read_spec(folder: Path) -> ModelSpec:
    """Return the shape of the checkpoint in `folder`.

    Raises ConfigError naming the field that is missing, malformed or not supported.
    """
    path = folder / "config.json"
    fields = _Fields(read_json(path), str(path))
    family = _family(fields)
    _refuse_unsupported(fields)
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    max_positions = fields.integer("max_position_embeddings")
    rope = _rope(fields, max_positions)
    return ModelSpec(
        folder=folder,
        architecture=fields.raw("architectures")[0],
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, family, num_heads),
        head_dim=_head_dim(fields, hidden_size, num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        qkv_bias=_bias(fields, family.qkv_bias),
        o_bias=_bias(fields, family.o_bias),
        mlp_bias=_bias(fields, family.mlp_bias),
        qk_norm=family.qk_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=_sliding_window(fields, family, num_layers),
        max_model_len=_model_len(rope, max_positions),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(folder, fields),
        dtype=_dtype(fields),
    )


def _family(fields: _Fields) -> Family:
    names = fields.raw("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must name one architecture, got {names!r}")
    return family_of(names[0])


def _refuse_unsupported(fields: _Fields) -> None:
    for name in ("quantization_config", "compression_config"):
        if fields.raw(name) is not None:
            raise fields.error(name, "is set: quantised checkpoints are not supported")
    activation = fields.raw("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise fields.error("hidden_act", f"must be silu, got {activation!r}")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "other than 1 is not supported")


def _num_kv_heads(fields: _Fields, family: Family, num_heads: int) -> int:
    # A missing key means the family's default, null means one key head per query head.
    default = num_heads if fields.has("num_key_value_heads") else family.default_num_kv_heads or num_heads
    count = fields.integer("num_key_value_heads", default)
    if num_heads % count:
        raise fields.error("num_key_value_heads", f"must divide the {num_heads} query heads, got {count}")
    return count


def _head_dim(fields: _Fields, hidden_size: int, num_heads: int) -> int:
    if fields.raw("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"must be a multiple of num_attention_heads ({num_heads})")
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embeddings, got {head_dim}")
    return head_dim


def _bias(fields: _Fields, rule: bool | str) -> bool:
    return fields.flag(rule, False) if isinstance(rule, str) else rule


def _sliding_window(fields: _Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    # As in transformers: null switches the window off, a missing key means 4096.
    off = fields.has("sliding_window") and fields.raw("sliding_window") is None
    if family.window == "never" or off:
        return (None,) * num_layers
    window = fields.integer("sliding_window", 4096)
    if family.window == "every_layer":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", False):
        return (None,) * num_layers
    layer_types = fields.raw("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.error("layer_types", f"must list the {num_layers} layers' types")
    for name in layer_types:
        if name not in known:
            raise fields.error("layer_types", f"holds the unsupported type {name!r}")
    return tuple(known[name] for name in layer_types)


def _rope(fields: _Fields, max_positions: int) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_scaling` with a `rope_theta` beside it (before)."""
    name = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    data = fields.raw(name)
    if data is None:
        data = {}
    if not isinstance(data, dict) or any(isinstance(value, dict) for value in data.values()):
        raise fields.error(name, "must be one flat object for all layers")
    scaling = _Fields(data, f"{name} of config.json")
    rope_type = data.get("rope_type") or data.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise fields.error(name, f"has the unsupported rope_type {rope_type!r}; known are {ROPE_TYPES}")
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "other than 1 is not supported")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if rope_type == "default":
        return RopeSpec(theta=theta)
    # Some checkpoints keep the pretrained length beside the object; transformers lets that one win.
    original = fields.integer(
        "original_max_position_embeddings",
        scaling.integer("original_max_position_embeddings", max_positions),
    )
    # yarn alone may leave its factor to the ratio of the two lengths.
    factor = scaling.number("factor", max_positions / original if rope_type == "yarn" else None)
    llama3 = rope_type == "llama3"
    return RopeSpec(
        theta=theta,
        type=cast(RopeType, rope_type),
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=scaling.number("low_freq_factor", None if llama3 else 1.0),
        high_freq_factor=scaling.number("high_freq_factor", None if llama3 else 4.0),
        attention_factor=scaling.optional_number("attention_factor"),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )


def _model_len(rope: RopeSpec, max_positions: int) -> int:
    """Positions that can be served. linear and yarn extend the configured length (as in vLLM).

    dynamic changes the frequencies of keys already cached once a sequence outgrows the trained length, so
    the same token's KV would depend on how the prompt was chunked; up to that length it is the default.
    """
    if rope.type == "linear":
        return int(max_positions * rope.factor)
    if rope.type == "yarn":
        return max(max_positions, int(rope.original_max_position_embeddings * rope.factor))
    return max_positions


def _bos(fields: _Fields) -> int | None:
    return None if fields.raw("bos_token_id") is None else fields.integer("bos_token_id", low=0)


def _eos(folder: Path, fields: _Fields) -> tuple[int, ...]:
    values = [fields.raw("eos_token_id")]
    generation = folder / "generation_config.json"
    if generation.exists():
        values.append(read_json(generation).get("eos_token_id"))
    ids: dict[int, None] = {}
    for value in values:
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise fields.error("eos_token_id", f"must be a token id or a list of them, got {value!r}")
            ids[token] = None
    return tuple(ids)


def _dtype(fields: _Fields) -> str:
    """Return the checkpoint's dtype; transformers writes float32 where an old config names none."""
    value = fields.raw("dtype") or fields.raw("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise fields.error("dtype", f"must be one of {', '.join(DTYPES)}, got {value!r}")
    return name
