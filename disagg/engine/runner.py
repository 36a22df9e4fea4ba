"""What an engine asks of whoever computes: a model on a device, or a cost model on virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from disagg.engine.sequence import Sequence
from disagg.types import Request, SampledToken

# Stands for a token that a submitted batch draws and that the host does not know yet.
PLACEHOLDER = -1


class ScheduledSequence(NamedTuple):
    """`num_tokens` tokens of `seq` are to be computed, from seq.num_computed_tokens on."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next one is drawn."""
        return self.seq.num_computed_tokens + self.num_tokens == len(self.seq.token_ids)


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


class PendingStep(Protocol):
    """A batch that was submitted and may still be computed."""

    def result(self) -> list[SampledToken | None]:
        """Wait for the device and return what Runner.execute would; call it once."""
        ...


@runtime_checkable
class AsyncRunner(Runner, Protocol):
    """A Runner that computes in the background, batches in the order in which they were submitted."""

    def submit(self, batch: Batch) -> PendingStep:
        """Start a batch and return while it is computed.

        A sequence's last token may be a PLACEHOLDER: what the batch submitted just before draws for it.
        Must not read or change a Sequence after it returned, besides its runner_state.
        """
        ...
