"""DistServe's analytic form (Zhong et al., OSDI '24; LLMServe/DistServe, simdistserve, Apache-2.0).

Milliseconds, with coefficients fitted per model and tensor-parallel degree:

    prefill   a + b * tokens + c * sum of squared prompt lengths
    decode    a + b * context tokens + c * batch size, one set for small batches and one for large
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg.errors import ConfigError
from disagg.sim.costs.base import Chunk, number, read_json

_MS = 1e-3


@dataclass(frozen=True, slots=True)
class DistServeCost:
    """prefill: (a, b, c) in seconds. small, large: those of decode below, and from, `threshold` requests."""

    prefill: tuple[float, float, float]
    small: tuple[float, float, float]
    large: tuple[float, float, float]
    threshold: int

    def step_s(self, chunks: Sequence[Chunk], num_decodes: int, decode_context: int) -> float:
        """See CostModel.

        A chunk with tokens before it pays the squares that it adds. DistServe never mixes phases in one
        batch; where a pool does, the prefill's constant covers both.
        """
        fixed, slope = self.decode_line(num_decodes)
        if not chunks:
            return fixed + slope * decode_context
        a, b, c = self.prefill
        tokens = sum(chunk.num_tokens for chunk in chunks)
        squares = sum(chunk.num_tokens * (chunk.num_tokens + 2 * chunk.num_computed) for chunk in chunks)
        seconds = a + b * tokens + c * squares
        if num_decodes:
            seconds += fixed - self._decode(num_decodes)[0] + slope * decode_context
        return seconds

    def _decode(self, num_decodes: int) -> tuple[float, float, float]:
        return self.small if num_decodes < self.threshold else self.large

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        a, b, c = self._decode(num_decodes)
        return a + c * num_decodes, b


def load_distserve(path: Path, model: str, tensor_parallel: int) -> DistServeCost:
    """Read the coefficients of one model. Raises ConfigError naming the key, or what the file has instead."""
    data = read_json(path)
    name = _model_key(data, path, model)
    degrees = data[name]
    if not isinstance(degrees, dict) or str(tensor_parallel) not in degrees:
        raise ConfigError(
            f"cost.file: {path} has no tensor_parallel_size {tensor_parallel} for {name}; "
            f"it has {', '.join(degrees)}",
            param="cost.file",
        )
    own = degrees[str(tensor_parallel)]
    return DistServeCost(
        prefill=_triple(own, path, "prefill"),
        small=_triple(own, path, "decoding_smallbs"),
        large=_triple(own, path, "decoding_largebs"),
        threshold=int(number(own, path, "decoding_large_small_bs_threshold")),
    )


def _model_key(data: Any, path: Path, model: str) -> str:
    """Return the file's name of a model: as given, or with an organisation before it."""
    names = list(data) if isinstance(data, dict) else []
    for name in names:
        if name == model or name.rpartition("/")[2] == model:
            return str(name)
    raise ConfigError(
        f"cost.file: {path} has no model {model}; it has {', '.join(names) or 'none'}", param="cost.file"
    )


def _triple(data: Any, path: Path, key: str) -> tuple[float, float, float]:
    values = data.get(key) if isinstance(data, dict) else None
    if not isinstance(values, list) or len(values) != 3:
        raise ConfigError(f"cost.file: {path}: {key} must be a list of three numbers", param="cost.file")
    indexed = {str(index): value for index, value in enumerate(values)}
    a, b, c = (number(indexed, path, str(index)) * _MS for index in range(3))
    return a, b, c
