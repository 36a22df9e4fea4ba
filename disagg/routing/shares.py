"""Shares: how much of the cluster each tenant has had lately, against what would be fair.

Use fades with time, so that a quiet minute is neither a debt nor a credit for ever. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Callable

# Use counts for about so long, and a tenant that asked within this time has a claim to its share.
MEMORY_S = 10.0
# A share is not measured finer than one request.
TOLERANCE = 1.05
MAX_TENANTS = 4096


class Shares:
    """weight_of: a tenant's share against others'. Every call costs the same, however many tenants ask."""

    def __init__(self, weight_of: Callable[[str], float] = lambda tenant: 1.0) -> None:
        self._weight_of = weight_of
        # When each tenant asked last, the earliest first, and what it had, in seconds as of _at.
        self._asked: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._total = self._weights = self._at = 0.0

    def asked(self, tenant: str, now: float) -> None:
        """Note that a tenant wants something, whether it will get it or not."""
        if self._asked.pop(tenant, None) is None:
            self._weights += self._weight_of(tenant)
        self._asked[tenant] = now
        while len(self._asked) > MAX_TENANTS or now - next(iter(self._asked.values())) > MEMORY_S:
            oldest = next(iter(self._asked))
            del self._asked[oldest]
            self._weights -= self._weight_of(oldest)
            self._total -= self._used.pop(oldest, 0.0)

    def served(self, tenant: str, work_s: float, now: float) -> None:
        """Note that a tenant that asked gets so many seconds of the cluster."""
        if tenant not in self._asked:
            return
        # Use grows in today's money instead of fading, until the numbers get large.
        if now - self._at > 20 * MEMORY_S:
            self._rebase(now)
        worth = work_s * math.exp((now - self._at) / MEMORY_S)
        self._used[tenant] = self._used.get(tenant, 0.0) + worth
        self._total += worth

    def _rebase(self, now: float) -> None:
        fading = math.exp((self._at - now) / MEMORY_S)
        self._used = {name: used * fading for name, used in self._used.items()}
        self._total = sum(self._used.values())
        self._at = now

    def lead_s(self, tenant: str, now: float) -> float:
        """Return how many seconds of the cluster a tenant had beyond its share; 0 where nobody else asks."""
        if len(self._asked) < 2:
            return 0.0
        fair = self._total * self._weight_of(tenant) / self._weights
        own = self._used.get(tenant, 0.0)
        if own <= fair * TOLERANCE:
            return 0.0
        return (own - fair) * math.exp((self._at - now) / MEMORY_S)
