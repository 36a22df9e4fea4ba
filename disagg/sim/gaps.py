"""Gaps between tokens: a histogram that takes a billion of them in little memory."""

from __future__ import annotations

import math
from collections import defaultdict

# Each bucket is 1 % wider than the one before.
_GROWTH = math.log(1.01)
_SMALLEST_S = 1e-5


class Gaps:
    """Counts gaps in seconds; percentiles are exact to 0.5 %."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, int] = defaultdict(int)
        self.total_s = 0.0
        self.count = 0

    def add(self, gap_s: float, count: int) -> None:
        if count == 0:
            return
        bucket = int(math.log(gap_s / _SMALLEST_S) / _GROWTH) if gap_s > _SMALLEST_S else 0
        self._counts[bucket] += count
        self.total_s += gap_s * count
        self.count += count

    @property
    def mean(self) -> float:
        return self.total_s / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Return the middle of the bucket in which `percent` of the gaps are reached; 0 without gaps."""
        wanted = self.count * percent / 100
        seen = 0
        for bucket, count in sorted(self._counts.items()):
            seen += count
            if seen >= wanted:
                return _SMALLEST_S * math.exp((bucket + 0.5) * _GROWTH)
        return 0.0
