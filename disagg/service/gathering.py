"""The router's questions to front ends, which answer over the streams that they keep open anyway.

So a front end needs no port of its own for the others, and one that can't be reached can't be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Iterator


class Answers:
    """What one question to several front ends brought so far. numbers: that of each front end's question."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self.numbers = numbers
        self._bodies: dict[str, bytes] = {}
        self._complete = asyncio.Event()
        self._check()

    def add(self, frontend_id: str, body: bytes) -> None:
        self._bodies[frontend_id] = body
        self._check()

    def _check(self) -> None:
        if len(self._bodies) == len(self.numbers):
            self._complete.set()

    async def wait(self, timeout_s: float) -> dict[str, bytes]:
        """Return the answers by front end: all of them, or after the timeout those that came."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._complete.wait()
        return dict(self._bodies)


class Gathering:
    """Matches answers with the questions that are open. Use it on one event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[tuple[str, int], Answers] = {}

    @contextlib.contextmanager
    def begin(self, frontend_ids: Iterable[str]) -> Iterator[Answers]:
        """Open a question to each; late answers after the block are dropped."""
        answers = Answers({key: next(self._numbers) for key in frontend_ids})
        self._open.update({item: answers for item in answers.numbers.items()})
        try:
            yield answers
        finally:
            for item in answers.numbers.items():
                del self._open[item]

    def answer(self, frontend_id: str, number: int, body: bytes) -> None:
        """Take a front end's answer; one to a question that it was not asked is ignored."""
        answers = self._open.get((frontend_id, number))
        if answers is not None:
            answers.add(frontend_id, body)
