"""Refusing a flood at the door: before its prompts are encoded, and without a word to the router."""

from __future__ import annotations

import time
from collections.abc import Callable

from disagg.errors import OverloadedError
from disagg.routing.brake import Brake, Demand


class Shedding:
    """A front end's brake. on_shed: called with each request that it stops."""

    def __init__(
        self, on_shed: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._brake = Brake()
        self._on_shed = on_shed
        self._clock = clock

    def check(self, demand: Demand) -> None:
        """Raise OverloadedError where another that asked for no more was refused a moment ago."""
        try:
            self._brake.check(demand, self._clock())
        except OverloadedError:
            self._on_shed()
            raise

    def refused(self, demand: Demand, error: OverloadedError) -> None:
        """Note what the router said."""
        self._brake.refused(demand, error, self._clock())
