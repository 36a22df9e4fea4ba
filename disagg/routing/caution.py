"""Caution: how much longer things take than was predicted, learned from what came of promises.

A promise is kept if the actual time is at most the predicted one times the caution. It follows the quantile
`kept` of actual / predicted by stochastic approximation (Robbins and Monro, 1951), so whatever the prediction
leaves out, that share of promises is kept. Never below 1: where things take less than predicted, predictions
learn that themselves, and whoever fills a worker up to the limit misses it with all who are there. It fades:
with nobody admitted nothing is learned, and a machine that stood still for a moment must not refuse for ever.
Pure: no clock, no I/O.
"""

from __future__ import annotations

import math

_RATE = 0.03
_MEMORY_S = 20.0
_HIGH = math.log(2.0)


class Caution:
    """A factor on predicted times, 1 at first. kept: share of promises that is to be kept."""

    def __init__(self, kept: float) -> None:
        self._kept = kept
        self._log = 0.0
        self._at = 0.0

    def factor(self, now: float) -> float:
        """Return by what predicted times are to be multiplied."""
        return math.exp(self._faded(now))

    def learn(self, predicted_s: float, actual_s: float, now: float) -> None:
        """Note what came of a promise."""
        if predicted_s <= 0:
            return
        known = self._faded(now)
        late = actual_s > predicted_s * math.exp(known)
        self._log = min(_HIGH, max(0.0, known + _RATE * (self._kept if late else self._kept - 1)))
        self._at = now

    def _faded(self, now: float) -> float:
        return self._log * math.exp(min(0.0, self._at - now) / _MEMORY_S)
