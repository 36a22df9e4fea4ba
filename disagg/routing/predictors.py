"""Predictors: how long a worker's steps and pulls take, learned from what it reports.

    prefill    a + b * tokens + c * (tokens x what each attends to)
    decode     a + b * batch  + c * cached tokens
    pull       a + b * tokens + c * (tokens x other pulls under way)

One set for each worker, which starts from what its kind has shown so far. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from disagg.routing.fit import Coefficients, Fit
from disagg.routing.types import StepSample, TransferSample
from disagg.types import WorkerInfo

# What is assumed of a worker of which nothing is known yet: a small model on a CPU. It only has to weigh
# queues against batches sensibly; nothing is refused or prefilled on the decode side by it.
DEFAULT_PREFILL: Coefficients = (2e-3, 1e-3, 0.0)
DEFAULT_DECODE: Coefficients = (1e-2, 1e-3, 1e-6)
DEFAULT_PULL: Coefficients = (2e-3, 1e-4, 0.0)

Kind = tuple[str, str, int]


def kind_of(info: WorkerInfo) -> Kind:
    """Return what workers have in common whose steps take about as long."""
    return info.model_fingerprint, info.role.value, info.kv_blocks_total


@dataclass(slots=True)
class Predictor:
    """One worker's three fits. fitted: whether its prefill and decode times are more than a guess."""

    prefill: Fit
    decode: Fit
    pull: Fit

    @classmethod
    def unknown(cls) -> Predictor:
        # Kinds live long and are fed by all their workers.
        return cls(
            Fit((256.0, 1e5), coefficients=DEFAULT_PREFILL, forgetting=0.999),
            Fit((8.0, 1e4), coefficients=DEFAULT_DECODE, forgetting=0.999),
            Fit((1024.0, 1024.0), coefficients=DEFAULT_PULL, forgetting=0.999),
        )

    @classmethod
    def like(cls, kind: Predictor) -> Predictor:
        """Return a new worker's, which begins where its kind is."""
        return cls(
            Fit((256.0, 1e5), coefficients=kind.prefill.coefficients, prior=kind.prefill),
            Fit((8.0, 1e4), coefficients=kind.decode.coefficients, prior=kind.decode),
            Fit((1024.0, 1024.0), coefficients=kind.pull.coefficients, prior=kind.pull),
        )

    @property
    def fitted(self) -> bool:
        return self.prefill.fitted and self.decode.fitted

    def learn(self, steps: Iterable[StepSample], transfers: Iterable[TransferSample]) -> None:
        """Take samples in; `solve` makes use of them."""
        for step in steps:
            self._learn_step(step)
        for transfer in transfers:
            self.pull.add(transfer.num_tokens, transfer.num_tokens * transfer.num_others, transfer.seconds)

    def solve(self) -> None:
        self.prefill.solve()
        self.decode.solve()
        self.pull.solve()

    def _learn_step(self, step: StepSample) -> None:
        if not step.num_tokens:
            self.decode.add(step.num_decodes, step.context, step.seconds)
            return
        seconds = step.seconds
        if step.num_decodes:
            # One pass over the weights serves both: decodes add what more of them would.
            _, per_sequence, per_token = self.decode.coefficients
            seconds -= per_sequence * step.num_decodes + per_token * step.context
            if not self.decode.fitted or seconds < 0.2 * step.seconds:
                return
        self.prefill.add(step.num_tokens, step.attended, seconds)


class Predictors:
    """All workers' predictors by slot, and their kinds'."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, Predictor] = {}
        self._workers: dict[int, tuple[Kind, Predictor]] = {}

    def of(self, slot: int, info: WorkerInfo) -> Predictor:
        """Return a worker's predictor. A change of role keeps it: the machine is the same."""
        known = self._workers.get(slot)
        if known is None:
            kind = kind_of(info)
            like = self._kinds.setdefault(kind, Predictor.unknown())
            like.solve()
            known = kind, Predictor.like(like)
            self._workers[slot] = known
        return known[1]

    def learn(
        self, slot: int, info: WorkerInfo, steps: Iterable[StepSample], transfers: Iterable[TransferSample]
    ) -> Predictor:
        """Take a worker's samples in; return its predictor."""
        predictor = self.of(slot, info)
        predictor.learn(steps, transfers)
        predictor.solve()
        self._kinds[self._workers[slot][0]].learn(steps, transfers)
        return predictor

    def forget(self, slot: int) -> None:
        """The slot's worker is gone; what its kind learned from it stays."""
        self._workers.pop(slot, None)
