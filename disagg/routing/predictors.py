"""Predictors: how long a worker's steps and pulls take, learned from what it reports.

    prefill    a + b * tokens + c * (tokens x what each attends to)
    decode     a + b * batch  + c * cached tokens
    pull       a + b * tokens + c * (tokens x other pulls under way)

Workers of one kind share the coefficients, each with a level of its own: by how much it is slower or faster
than its kind. One worker's batches say little of what a sequence costs and what its context does, since both
grow together; with fits of their own equal workers would be priced differently, and loaded unevenly. Pure:
no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg.routing.core import CORE, Core
from disagg.routing.fit import Coefficients, Fit, followed
from disagg.routing.types import StepSample, TransferSample
from disagg.types import WorkerInfo

# What is assumed of a worker of which nothing is known yet: a small model on a CPU. It only has to weigh
# queues against batches sensibly; nothing is refused or prefilled on the decode side by it.
DEFAULT_PREFILL: Coefficients = (2e-3, 1e-3, 0.0)
DEFAULT_DECODE: Coefficients = (1e-2, 1e-3, 1e-6)
DEFAULT_PULL: Coefficients = (5e-3, 1e-5, 0.0)
# Kinds live long and are fed by all their workers.
_KIND_FORGETTING = 0.999
# Above so many workers a kind learns from a part of them at a time: more would tell it nothing new.
_ENOUGH_WORKERS = 256
_USUAL_SPREAD = 0.1

Kind = tuple[str, str, int]


def kind_of(info: WorkerInfo) -> Kind:
    """Return what workers have in common whose steps take about as long."""
    return info.model_fingerprint, info.role.value, info.kv_blocks_total


class KindFits:
    """What workers of one kind take, apart from their levels. make: `Fit`, or its twin in C."""

    __slots__ = ("decode", "prefill", "pull")

    def __init__(self, make: type[Fit] = Fit) -> None:
        forgetting = _KIND_FORGETTING
        self.prefill = make((256.0, 1e5), coefficients=DEFAULT_PREFILL, forgetting=forgetting)
        self.decode = make((8.0, 1e4), coefficients=DEFAULT_DECODE, forgetting=forgetting)
        self.pull = make((1024.0, 1024.0), coefficients=DEFAULT_PULL, forgetting=forgetting)

    def solve(self) -> None:
        self.prefill.solve()
        self.decode.solve()
        self.pull.solve()


class Level:
    """One worker's speed at one thing, relative to its kind's fit."""

    __slots__ = ("_fit", "_spread", "value")

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self.value = 1.0
        self._spread = _USUAL_SPREAD

    @property
    def fitted(self) -> bool:
        """Whether its kind's fit is more than a guess."""
        return self._fit.fitted

    @property
    def coefficients(self) -> Coefficients:
        c0, c1, c2 = self._fit.coefficients
        return c0 * self.value, c1 * self.value, c2 * self.value

    def learn(self, x1: float, x2: float, seconds: float, *, tell_kind: bool) -> None:
        """Take in a sample of x1 and x2, see Fit."""
        level, fit = self.value, self._fit
        if fit.fitted:
            self.value, self._spread = followed(level, self._spread, fit.coefficients, x1, x2, seconds)
        if tell_kind:
            fit.add(x1, x2, seconds / level)


class Predictor:
    """One worker's step and pull times. fitted: whether prefill and decode are more than a guess.

    `_fits.c` does the same in C, with kinds whose fits are there.
    """

    __slots__ = ("_kind", "decode", "prefill", "pull")

    def __init__(self, kind: KindFits, /) -> None:
        self._kind = kind
        self.prefill, self.decode, self.pull = Level(kind.prefill), Level(kind.decode), Level(kind.pull)

    @property
    def fitted(self) -> bool:
        return self._kind.prefill.fitted and self._kind.decode.fitted

    def learn(
        self, steps: Sequence[StepSample], transfers: Sequence[TransferSample], tell_kind: bool, /
    ) -> None:
        """Take samples in. tell_kind: whether its kind learns from them as well."""
        for step in steps:
            self._learn_step(step, tell_kind)
        for item in transfers:
            self.pull.learn(
                item.num_tokens, item.num_tokens * item.num_others, item.seconds, tell_kind=tell_kind
            )
        if tell_kind:
            self._kind.solve()

    def _learn_step(self, step: StepSample, tell_kind: bool) -> None:
        if not step.num_tokens:
            self.decode.learn(step.num_decodes, step.context, step.seconds, tell_kind=tell_kind)
            return
        seconds = step.seconds
        if step.num_decodes:
            # One pass over the weights serves both: decodes add what more of them would.
            _, per_sequence, per_token = self.decode.coefficients
            seconds -= per_sequence * step.num_decodes + per_token * step.context
            if not self._kind.decode.fitted or seconds < 0.2 * step.seconds:
                return
        self.prefill.learn(step.num_tokens, step.attended, seconds, tell_kind=tell_kind)


class Predictors:
    """All workers' predictors by slot, and their kinds'."""

    def __init__(self, core: Core = CORE) -> None:
        self._make_fit, self._make_predictor = core.make_fit or Fit, core.make_predictor or Predictor
        self._kinds: dict[Kind, KindFits] = {}
        self._workers: dict[int, Predictor] = {}
        self._turn = 0.0

    def of(self, slot: int, info: WorkerInfo) -> Predictor:
        """Return a worker's predictor. A change of role keeps it: the machine is the same."""
        known = self._workers.get(slot)
        if known is None:
            kind = self._kinds.setdefault(kind_of(info), KindFits(self._make_fit))
            known = self._workers[slot] = self._make_predictor(kind)
        return known

    def learn(
        self, slot: int, info: WorkerInfo, steps: Sequence[StepSample], transfers: Sequence[TransferSample]
    ) -> Predictor:
        """Take a worker's samples in; return its predictor."""
        predictor = self.of(slot, info)
        self._turn += min(1.0, _ENOUGH_WORKERS / len(self._workers))
        tell_kind = self._turn >= 1 or not predictor.fitted
        if self._turn >= 1:
            self._turn -= 1
        predictor.learn(steps, transfers, tell_kind)
        return predictor

    def forget(self, slot: int) -> None:
        """The slot's worker is gone; what its kind learned from it stays."""
        self._workers.pop(slot, None)
