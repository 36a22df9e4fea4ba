"""Calibration: what predictions leave out, learned from how requests turned out.

Steps and pulls are measured inside workers. Between a placement and its first token lie the front end, two
streams and the worker's loop as well, and between two tokens the loop again. So actual = a + b * predicted
is fitted as requests come back; with nothing learned yet, predictions stand as they are.
"""

from __future__ import annotations

from disagg.routing.core import CORE, Core
from disagg.routing.fit import Fit
from disagg.routing.types import Prediction

_FORGETTING = 0.99
# Among requests that were admitted, predictions differ little from each other, and less than what becomes of
# them: a line through those is too flat, and says that whoever was refused would have been served as well.
_SLOPES = (0.5, 4.0)
# So many samples are made use of at once.
_EAGER = 64


class Calibration:
    """Lines through predicted and actual TTFT and TPOT; TPOT apart for who was handed over.

    lines: of TTFT, of TPOT of who was, and of TPOT of who was not; what `apply` goes by. `_prices.c` does the
    same.
    """

    def __init__(self, core: Core = CORE) -> None:
        make = core.make_fit or Fit
        self._ttft, self._apart, self._local = self.lines = _line(make), _line(make), _line(make)

    def apply(self, raw: Prediction, *, local: bool) -> Prediction:
        """Return what a prediction comes to; `raw` is kept in it, since only that teaches anything."""
        ttft_a, ttft_b = _coefficients(self._ttft)
        tpot_a, tpot_b = _coefficients(self._local if local else self._apart)
        if not raw.fitted or (ttft_a, ttft_b, tpot_a, tpot_b) == (0.0, 1.0, 0.0, 1.0):
            return raw
        return Prediction(
            ttft=ttft_a + ttft_b * raw.ttft,
            wait_s=ttft_b * raw.wait_s,
            stall=raw.stall,
            tpot=tpot_a + tpot_b * raw.tpot,
            later_tpot=tpot_a + tpot_b * raw.later_tpot,
            idle_tpot=tpot_a + tpot_b * raw.idle_tpot,
            fitted=True,
            raw=raw,
        )

    def first_token(self, prediction: Prediction, seconds: float) -> None:
        """Learn from a TTFT."""
        _learn(self._ttft, (prediction.raw or prediction).ttft, seconds)

    def ended(self, prediction: Prediction, tpot: float, *, local: bool) -> None:
        """Learn from the seconds between a request's tokens."""
        _learn(self._local if local else self._apart, (prediction.raw or prediction).tpot, tpot)


def _line(make: type[Fit]) -> Fit:
    return make((0.1, 1.0), coefficients=(0.0, 1.0, 0.0), forgetting=_FORGETTING, slopes=_SLOPES)


def _learn(line: Fit, predicted: float, actual: float) -> None:
    line.add(predicted, 0.0, actual)
    # Later it solves itself every few samples.
    if line.num_samples < _EAGER:
        line.solve()


def _coefficients(line: Fit) -> tuple[float, float]:
    if not line.fitted:
        return 0.0, 1.0
    return line.coefficients[:2]
