"""Brake: a front end's memory of fresh refusals, so that a flood is stopped before there is any work in it.

Where a request was refused, one like it of the same tenant and tier that asks for no less would be refused
too, for as long as the router said. Refusing costs the most where everything else needs the machine: so this
needs no token of the prompt, and no word with the router. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from disagg.errors import OverloadedError

# Refusals remembered: those of an earlier moment have run out.
_MAX_REFUSALS = 32
# With a much tighter objective a request would overtake what kept the other waiting.
_TIGHTER = 0.5
# Much longer prompts reach their decode worker much later, when it may be less busy.
_LONGER = 2


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for. size: of its prompt, in tokens or in characters: those are not compared."""

    size: int
    in_tokens: bool
    priority: int = 0
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    tenant: str = ""
    tier: str = "default"


@dataclass(frozen=True, slots=True)
class _Refused:
    demand: Demand
    until: float
    retry_at: float
    message: str


class Brake:
    """What one front end was told lately."""

    def __init__(self) -> None:
        self._refused: deque[_Refused] = deque(maxlen=_MAX_REFUSALS)

    def refused(self, demand: Demand, error: OverloadedError, now: float) -> None:
        """Note a refusal, which holds for error.hold_s seconds."""
        if error.hold_s > 0:
            refused = _Refused(demand, now + error.hold_s, now + error.retry_after, error.message)
            self._refused.appendleft(refused)

    def check(self, demand: Demand, now: float) -> None:
        """Raise OverloadedError where another that asked for no more was refused a moment ago."""
        while self._refused and self._refused[-1].until <= now:
            self._refused.pop()
        for item in self._refused:
            if item.until > now and _covers(item.demand, demand):
                raise OverloadedError(item.message, retry_after=item.retry_at - now)


def _covers(refused: Demand, asked: Demand) -> bool:
    return (
        refused.size <= asked.size <= refused.size * _LONGER
        and asked.in_tokens is refused.in_tokens
        and asked.priority >= refused.priority
        and refused.ttft_s * _TIGHTER <= asked.ttft_s <= refused.ttft_s
        and asked.tpot_s <= refused.tpot_s
        and asked.tenant == refused.tenant
        and asked.tier == refused.tier
    )
