"""What a simulation remembers of each request: columns of numbers, since there may be millions."""

from __future__ import annotations

from array import array
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Outcome(IntEnum):
    """A request's one terminal event; PENDING until it comes."""

    PENDING = 0
    DONE = 1
    SHED = 2
    NO_CAPACITY = 3
    INVALID = 4
    ERROR = 5


class Records:
    """Columns over requests. Times are seconds; nan where there was no such event.

    first_token, finished: on virtual time. queued, prefill: parts of the time to the first token as its
    worker reported them. transfer: from the first token until the decode worker may go on.
    """

    def __init__(self, arrivals: list[float], prompts: list[int], outputs: list[int]) -> None:
        count = len(arrivals)
        self.arrival = array("d", arrivals)
        self.prompt_tokens = array("q", prompts)
        self.output_tokens = array("q", outputs)
        nothing = [float("nan")] * count
        self.first_token = array("d", nothing)
        self.finished = array("d", nothing)
        self.queued = array("d", nothing)
        self.prefill = array("d", nothing)
        self.transfer = array("d", bytes(8 * count))
        self.received_tokens = array("q", bytes(8 * count))
        self.cached_tokens = array("q", bytes(8 * count))
        self.resumes = array("i", bytes(4 * count))
        self.outcome = bytearray(count)
        self.num_ended = 0

    def __len__(self) -> int:
        return len(self.arrival)

    def end(self, index: int, outcome: Outcome, now: float) -> None:
        """Note a terminal event. Raises AssertionError on a second one."""
        if self.outcome[index] != Outcome.PENDING:
            raise AssertionError(
                f"request {index} ended twice: {Outcome(self.outcome[index]).name}, then {outcome.name}"
            )
        self.outcome[index] = outcome
        self.finished[index] = now
        self.num_ended += 1

    # -- as arrays -----------------------------------------------------------------------------------

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        outcomes: npt.NDArray[np.uint8] = np.frombuffer(bytes(self.outcome), dtype=np.uint8)
        return np.equal(outcomes, int(Outcome.DONE))

    def ttft(self) -> Floats:
        """Return seconds to the first token, over all requests."""
        return _floats(self.first_token) - _floats(self.arrival)

    def e2e(self) -> Floats:
        return _floats(self.finished) - _floats(self.arrival)

    def tpot(self) -> Floats:
        """Return seconds per token after the first; nan for answers of one token."""
        gaps = np.array(self.output_tokens, dtype=np.float64) - 1
        gaps[gaps == 0] = np.nan
        return (_floats(self.finished) - _floats(self.first_token)) / gaps


def _floats(column: array[float]) -> Floats:
    return np.array(column, dtype=np.float64)
