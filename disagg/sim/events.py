"""Virtual time: a heap of what happens next. Events of one moment happen in the order they were set."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[[Any], None]


class EventLoop:
    """now: seconds since the start of the simulation. stopped: set it to leave `run` after this event."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self.stopped = False
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._set = 0

    def at(self, time: float, action: Action, argument: Any = None) -> None:
        """Call `action(argument)` at `time`, which must not be past."""
        self._set += 1
        heapq.heappush(self._heap, (time, self._set, action, argument))

    def run(self) -> None:
        """Let events happen until none is left, or until one has set `stopped`."""
        heap, pop = self._heap, heapq.heappop
        self.stopped = False
        while heap and not self.stopped:
            self.now, _, action, argument = pop(heap)
            self.num_events += 1
            action(argument)
