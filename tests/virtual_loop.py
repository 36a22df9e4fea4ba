"""An event loop on which waiting is moving the clock."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

TURN_S = 1e-8


class _Skipping(selectors.BaseSelector):
    """A selector without files: waiting is moving the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def register(self, *_: Any) -> Any:
        return None

    def unregister(self, *_: Any) -> Any:
        return None

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits for something that will never come"
        # Each turn takes a moment: asyncio's timers may fire early by the clock's resolution, and who waits
        # for a deadline would do so again and again at the same moment.
        self.now += max(TURN_S, timeout)
        return []

    def get_map(self) -> Any:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now

    def run_for(self, seconds: float) -> None:
        self.run_until_complete(asyncio.sleep(seconds))
