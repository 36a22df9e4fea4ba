"""What the simulator asks of a cost model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from disagg.errors import ConfigError


class Chunk(NamedTuple):
    """Prompt tokens of one sequence that a step computes. num_computed: those whose KV is there already."""

    num_tokens: int
    num_computed: int


class CostModel(Protocol):
    """Seconds of one engine step. Pure: the same step always costs the same.

    A decode-only step must cost a line in its context, `fixed + slope * decode_context`: that is what lets
    the fast path add up many steps at once.
    """

    def step_s(self, chunks: Sequence[Chunk], num_decodes: int, decode_context: int) -> float:
        """Return the seconds of a step.

        num_decodes: sequences that compute the token they drew last. decode_context: tokens that these
        attend to, that one included, summed over them.
        """
        ...

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        """Return (fixed, slope): step_s((), num_decodes, context) == fixed + slope * context."""
        ...


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ConfigError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cost.file: can't read {path}: {error.strerror}", param="cost.file") from None
    except ValueError as error:
        raise ConfigError(f"cost.file: {path} is not JSON: {error}", param="cost.file") from None


def number(data: Any, path: Path, *keys: str) -> float:
    """Return the number under nested keys. Raises ConfigError naming the key that is missing or is none."""
    value: Any = data
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise ConfigError(f"{path}: no key {'.'.join(keys)}", param="cost.file")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{path}: {'.'.join(keys)} must be a number, got {value!r}", param="cost.file")
    return float(value)
