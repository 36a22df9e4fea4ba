"""What tells the supported model families apart. Everything else they share, see transformer.py.

Rules as in transformers' modeling files: where a bias is, whether heads are normalised, which layers
attend through a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from disagg.errors import ConfigError

WindowRule = Literal["never", "every_layer", "by_layer"]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture's departures from the plain decoder.

    qkv_bias, o_bias, mlp_bias: True or False where the architecture fixes it, else the config key that says.
    default_num_kv_heads: used where the config names none; None means as many as query heads.
    """

    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: WindowRule = "never"
    default_num_kv_heads: int | None = None


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, window="every_layer", default_num_kv_heads=8),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, window="by_layer"),
    "Qwen3ForCausalLM": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="by_layer"
    ),
}


def family_of(architecture: str) -> Family:
    """Return the family of an architecture's name. Raises ConfigError for one that is not supported."""
    family = FAMILIES.get(architecture)
    if family is None:
        raise ConfigError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(FAMILIES)}",
            param="architectures",
        )
    return family
