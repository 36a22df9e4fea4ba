"""Fit: a line through step times, fitted as they come, that neither outliers nor dull traffic spoil.

Weighted least squares in information form with exponential forgetting (recursive least squares, Ljung and
Soederstroem 1983), three features, the first of them constant:

  - errors count relative to what is predicted, so that a step of 2 ms weighs as much as one of 2 s;
  - a residual beyond 1.5 times the usual one counts with Huber's weight (1964): a step that was descheduled
    for a second moves nothing;
  - a level, one factor on all of it that its owner keeps (`followed`), goes with a machine that becomes
    slower or faster within some tens of steps; the coefficients beneath it move slowly, so that dull traffic
    does not bend them;
  - coefficients are never negative: a fit that extrapolates must not promise that more work takes less time;
  - directions that recent samples say nothing of stay where they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

Coefficients = tuple[float, float, float]

FORGETTING = 0.998
HUBER = 1.5
# How far the level follows one residual, and how it returns to 1 as the coefficients catch up.
LEVEL_RATE, LEVEL_RETURN = 0.15, 0.998
_MOST_LEVEL = 20.0
# How strongly a solution holds on to the one before it, as a share of what the samples say.
_HOLD = 1e-3
_LEAST_SPREAD, _MOST_SPREAD, _SPREAD_STEP = 0.01, 0.5, 1.05
# Samples until residuals are looked at: before, there is no usual one.
_WARM = 6
_TINY_S = 1e-6
# Samples are weighed by the last solution, which so many more make stale.
_UNSOLVED = 16
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
_SUBSETS = tuple(set_ for size in (3, 2, 1) for set_ in combinations(range(3), size))


class Fit:
    """seconds = c0 + c1 * x1 + c2 * x2. unit: typical x1 and x2, for conditioning alone.

    slopes: least and greatest c1. Where samples alone would have another, c0 is what then fits them best.
    coefficients: of the last solution, given ones before. num_samples: counted up. spread: usual relative
    residual. `_fits.c` does the same in C.
    """

    __slots__ = (
        "_forgetting",
        "_info",
        "_slopes",
        "_unit",
        "_unsolved",
        "_vector",
        "coefficients",
        "num_samples",
        "spread",
    )

    def __init__(
        self,
        unit: tuple[float, float],
        *,
        coefficients: Coefficients = (0.0, 0.0, 0.0),
        forgetting: float = FORGETTING,
        slopes: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        self._unit = unit
        self._slopes = slopes
        self._forgetting = forgetting
        # Upper triangle of the information matrix in scaled features, and its right-hand side.
        self._info = [0.0] * 6
        self._vector = [0.0] * 3
        self._unsolved = 0
        self.coefficients = coefficients
        self.num_samples = 0
        self.spread = 0.1

    @property
    def fitted(self) -> bool:
        """Whether there were enough samples to go by."""
        return self.num_samples >= _WARM

    def predict(self, x1: float, x2: float) -> float:
        """Return seconds, never negative."""
        c0, c1, c2 = self.coefficients
        return c0 + c1 * x1 + c2 * x2

    def add(self, x1: float, x2: float, seconds: float) -> None:
        """Take a sample in, of which `solve` makes use. Samples without a duration are ignored."""
        if not _TINY_S < seconds < 1e6:
            return
        scale, weight = seconds, 1.0
        if self._unsolved >= _UNSOLVED or (self._unsolved and self.num_samples == _WARM):
            self.solve()
        if self.num_samples >= _WARM:
            scale = max(self.predict(x1, x2), _TINY_S)
            residual = (seconds - scale) / scale
            weight = _weight_of(residual, self)
        self.num_samples += 1
        self._unsolved += 1
        # Written out: every request's end and every step of a worker passes here.
        keep, info, vector = self._forgetting, self._info, self._vector
        x1 /= scale * self._unit[0]
        x2 /= scale * self._unit[1]
        target = seconds / scale
        constant = 1 / scale
        weighted = weight * constant, weight * x1, weight * x2
        info[0] = keep * info[0] + weighted[0] * constant
        info[1] = keep * info[1] + weighted[0] * x1
        info[2] = keep * info[2] + weighted[0] * x2
        info[3] = keep * info[3] + weighted[1] * x1
        info[4] = keep * info[4] + weighted[1] * x2
        info[5] = keep * info[5] + weighted[2] * x2
        vector[0] = keep * vector[0] + weighted[0] * target
        vector[1] = keep * vector[1] + weighted[1] * target
        vector[2] = keep * vector[2] + weighted[2] * target

    def solve(self) -> Coefficients:
        """Return the coefficients that fit the samples so far best, and keep them."""
        info, unit = self._info, (1.0, *self._unit)
        if info[0] <= 0 or not self._unsolved:
            return self.coefficients
        self._unsolved = 0
        matrix = [[0.0] * 3 for _ in range(3)]
        for at, (i, j) in enumerate(_PAIRS):
            matrix[i][j] = matrix[j][i] = info[at]
        vector = list(self._vector)
        # The same for all: what recent samples hardly had to do with is not to explain why they changed.
        hold = _HOLD * info[0]
        for i in range(3):
            matrix[i][i] += hold
            vector[i] += hold * self.coefficients[i] * unit[i]
        scaled = _non_negative(matrix, vector)
        constant, slope = scaled[0], scaled[1] / unit[1]
        least, most = self._slopes
        if not least <= slope <= most:
            slope = max(least, min(most, slope))
            rest = vector[0] - matrix[0][1] * slope * unit[1] - matrix[0][2] * scaled[2]
            constant = max(0.0, rest / matrix[0][0])
        self.coefficients = (constant, slope, scaled[2] / unit[2])
        return self.coefficients


def moved_level(level: float, residual: float, spread: float) -> float:
    """Return a level that follows a relative residual, as far as that is usual."""
    most = HUBER * spread
    moved: float = level**LEVEL_RETURN * (1 + LEVEL_RATE * max(-most, min(most, residual)))
    return min(_MOST_LEVEL, max(1 / _MOST_LEVEL, moved))


def moved_spread(spread: float, residual: float) -> float:
    """Return what is usual of residuals, after another one."""
    step = _SPREAD_STEP if abs(residual) > spread else 1 / _SPREAD_STEP
    return min(_MOST_SPREAD, max(_LEAST_SPREAD, spread * step))


def followed(
    level: float, spread: float, coefficients: Coefficients, x1: float, x2: float, seconds: float, /
) -> tuple[float, float]:
    """Return a level and what is usual of its residuals, after a sample of a fit with these coefficients.

    `_fits.c` does the same.
    """
    c0, c1, c2 = coefficients
    expected = (c0 + c1 * x1 + c2 * x2) * level
    if expected <= 0:
        return level, spread
    residual = (seconds - expected) / expected
    return moved_level(level, residual, spread), moved_spread(spread, residual)


def _weight_of(residual: float, fit: Fit) -> float:
    """Return Huber's weight of a sample, and take its residual into the spread."""
    size, most = abs(residual), HUBER * fit.spread
    fit.spread = moved_spread(fit.spread, residual)
    return 1.0 if size <= most else most / size


def _non_negative(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> Coefficients:
    """Return x >= 0 with the least x'Mx - 2v'x: the best of what each set of positive x's gives."""
    best, lowest = (0.0, 0.0, 0.0), 0.0
    for chosen in _SUBSETS:
        solution = _solve(matrix, vector, chosen)
        if solution is None or min(solution) < 0:
            continue
        value = 0.0
        for i in chosen:
            value -= vector[i] * solution[i]
        if value < lowest:
            best, lowest = solution, value
        if len(chosen) == 3:
            break
    return best


def _solve(
    matrix: Sequence[Sequence[float]], vector: Sequence[float], chosen: Sequence[int]
) -> Coefficients | None:
    """Solve the rows and columns in `chosen` by elimination; they are positive definite.

    None where they are so far apart in size that rounding leaves nothing of one of them.
    """
    rows = [[*(matrix[i][j] for j in chosen), vector[i]] for i in chosen]
    size = len(chosen)
    for pivot in range(size):
        head = rows[pivot]
        if head[pivot] == 0:
            return None
        for other in range(size):
            if other != pivot:
                factor = rows[other][pivot] / head[pivot]
                rows[other] = [b - factor * a for a, b in zip(head, rows[other], strict=True)]
    solution = [0.0, 0.0, 0.0]
    for at, i in enumerate(chosen):
        if rows[at][at] == 0:
            return None
        solution[i] = rows[at][size] / rows[at][at]
    return solution[0], solution[1], solution[2]
