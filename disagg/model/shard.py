"""Which part of a model one tensor-parallel rank holds. Pure arithmetic; the collectives are in parallel.py.

Megatron-style (Shoeybi et al., 2019, arXiv 1909.08053): a rank has some of the query heads with the key heads
that they read, some of the MLP's features, and some of the vocabulary; its output and down projections give
partial sums that are added over the ranks. Where there are more ranks than key heads, several hold the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from disagg.errors import ConfigError
from disagg.model.config import ModelSpec


@dataclass(frozen=True, slots=True)
class Span:
    """`length` neighbours from `start` on, of `total` along one dimension."""

    start: int
    length: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Span:
        return cls(0, total, total)

    @property
    def end(self) -> int:
        return self.start + self.length

    def times(self, width: int) -> Span:
        """Return the span in units of which each one of these holds `width`."""
        return Span(self.start * width, self.length * width, self.total * width)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`. size: must have passed check_size for the model."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank samples, and adds the biases that must be added once."""
        return self.rank == 0

    def heads(self, spec: ModelSpec) -> Span:
        return self._even(spec.num_heads)

    def kv_heads(self, spec: ModelSpec) -> Span:
        """Key heads that this rank's query heads read."""
        count = spec.num_kv_heads
        if self.size <= count:
            return self._even(count)
        return Span(self.rank * count // self.size, 1, count)

    def features(self, spec: ModelSpec) -> Span:
        """Of the MLP."""
        return self._even(spec.intermediate_size)

    def vocabulary(self, spec: ModelSpec) -> Span:
        """Of the embedding and the output layer: equally many for all but the last ranks, which may have
        fewer, see vocabulary_width.
        """
        width = self.vocabulary_width(spec)
        start = min(self.rank * width, spec.vocab_size)
        return Span(start, min(width, spec.vocab_size - start), spec.vocab_size)

    def vocabulary_width(self, spec: ModelSpec) -> int:
        """Rows of the vocabulary that each rank allocates, so that all compute the same shapes."""
        return -(-spec.vocab_size // self.size)

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the shape of what this rank computes. The vocabulary stays whole: samplers ask for it."""
        return replace(
            spec,
            num_heads=self.heads(spec).length,
            num_kv_heads=self.kv_heads(spec).length,
            intermediate_size=self.features(spec).length,
        )

    def _even(self, total: int) -> Span:
        length = total // self.size
        return Span(self.rank * length, length, total)


def check_size(spec: ModelSpec, size: int) -> None:
    """Raise ConfigError naming tensor_parallel_size where the model can't be cut into so many shards."""
    if size < 1:
        raise ConfigError(f"tensor_parallel_size must be positive, got {size}", param="tensor_parallel_size")
    if spec.num_heads % size:
        problem = f"its {spec.num_heads} attention heads"
    elif max(spec.num_kv_heads, size) % min(spec.num_kv_heads, size):
        problem = f"its {spec.num_kv_heads} key heads"
    elif spec.intermediate_size % size:
        problem = f"its {spec.intermediate_size} MLP features"
    else:
        return
    raise ConfigError(
        f"tensor_parallel_size: {spec.folder} can't be cut into {size} shards: {problem} don't divide evenly",
        param="tensor_parallel_size",
    )
