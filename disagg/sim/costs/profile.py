"""A profile measured on a live worker: the form in which the router predicts latencies.

    {"prefill": {"a": s, "b": s/token, "c": s/(token * context)},
     "decode":  {"a": s, "b": s/sequence, "c": s/cached token}}

    prefill   a + b * tokens + c * sum of tokens * context
    decode    a + b * batch + c * cached tokens

Context of a chunk is what its tokens attend to on average: the tokens before it and half of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg.errors import ConfigError
from disagg.sim.costs.base import Chunk, number, read_json


@dataclass(frozen=True, slots=True)
class ProfileCost:
    """prefill, decode: (a, b, c) in seconds."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]

    def step_s(self, chunks: Sequence[Chunk], num_decodes: int, decode_context: int) -> float:
        """See CostModel. In a mixed step the larger of the two constants covers both."""
        fixed, slope = self.decode_line(num_decodes)
        decode = fixed + slope * decode_context
        if not chunks:
            return decode
        a, b, c = self.prefill
        prefill = a
        for num_tokens, num_computed in chunks:
            prefill += num_tokens * (b + c * (num_computed + num_tokens / 2))
        if not num_decodes:
            return prefill
        return prefill + decode - min(a, self.decode[0])

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        a, b, c = self.decode
        return a + b * num_decodes, c


def load_profile(path: Path) -> ProfileCost:
    """Read a profile. Raises ConfigError naming the key that is missing or can't be a time."""
    data = read_json(path)
    triples = []
    for phase in ("prefill", "decode"):
        a, b, c = (number(data, path, phase, key) for key in "abc")
        if min(a, b, c) < 0 or a + b <= 0:
            raise ConfigError(
                f"cost.file: {path}: {phase}: a, b and c must not be negative, and a + b above 0",
                param="cost.file",
            )
        triples.append((a, b, c))
    return ProfileCost(*triples)
