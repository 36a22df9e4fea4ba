"""What an engine asks of whoever computes: a model on a device, or a cost model on virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from disagg.engine.sequence import Sequence
from disagg.types import Request, SampledToken


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_tokens` tokens of `seq` are to be computed, from seq.num_computed_tokens on."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next one is drawn."""
        return self.seq.num_computed_tokens + self.num_tokens == self.seq.num_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. Decodes come first, then chunks of prompts; blocks for all of it are allocated."""

    items: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


class Runner(Protocol):
    """Computes a batch: writes KV through each block_table, draws a token where a chunk ends a sequence."""

    def check_request(self, request: Request) -> None:
        """Raise InvalidRequestError naming the field that this model can't take, such as an unknown token."""
        ...

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        """Return one entry per item of the batch, None where `item.samples` is false.

        Must not change any Sequence besides its runner_state.
        """
        ...
