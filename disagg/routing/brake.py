"""Brake: a front end's memory of fresh refusals, so that it need not ask the router for each of a flood.

Where a request was refused, one like it of the same tenant and tier that asks for no less would be refused
too, for as long as the router said. Refusing costs the most where everything else needs the machine. Pure: no
clock, no I/O.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from disagg.routing.types import PlacementRequest

# Refusals remembered: those of an earlier moment have run out.
_MAX_REFUSALS = 32
# Objectives are what is left of them when the router is asked, so equal ones differ a little. With a much
# tighter one a request would overtake what kept the other waiting.
_SAME, _TIGHTER = 1.05, 0.5
# Much longer prompts reach their decode worker much later, when it may be less busy.
_LONGER = 2


@dataclass(frozen=True, slots=True)
class _Refused:
    until: float
    num_tokens: int
    priority: int
    ttft_s: float
    tpot_s: float
    tenant: str
    tier: str
    message: str
    retry_at: float


class Brake:
    """What one front end was told lately."""

    def __init__(self) -> None:
        self._refused: deque[_Refused] = deque(maxlen=_MAX_REFUSALS)

    def refused(
        self, request: PlacementRequest, message: str, retry_after: float, hold_s: float, now: float
    ) -> None:
        """Note a refusal that holds for hold_s seconds."""
        if hold_s <= 0:
            return
        self._refused.appendleft(
            _Refused(
                now + hold_s,
                request.num_tokens,
                request.priority,
                _or_never(request.slo_ttft_s),
                _or_never(request.slo_tpot_s),
                request.tenant,
                request.service_tier,
                message,
                now + retry_after,
            )
        )

    def check(self, request: PlacementRequest, now: float) -> tuple[str, float] | None:
        """Return why a request would be refused now, and after how many seconds to come back; else None."""
        if request.resumed:
            return None
        for item in self._refused:
            if item.until > now and self._covers(item, request):
                return item.message, item.retry_at - now
        return None

    @staticmethod
    def _covers(item: _Refused, request: PlacementRequest) -> bool:
        return (
            item.num_tokens <= request.num_tokens <= item.num_tokens * _LONGER
            and request.priority >= item.priority
            and item.ttft_s * _TIGHTER <= _or_never(request.slo_ttft_s) <= item.ttft_s * _SAME
            and _or_never(request.slo_tpot_s) <= item.tpot_s
            and request.tenant == item.tenant
            and request.service_tier == item.tier
        )


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
