"""Copying threads and the coroutines that wait for them; tasks for which several wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


async def to_its_end(copying: asyncio.Future[Any], stop: Callable[[], object]) -> None:
    """Await what runs on a thread. If this task is cancelled, stop it and see it end before the cancellation
    goes on: whoever cancelled gives the rows back, and nobody may write into them from then on.

    copying: a future of an executor, not a task: a loop that shuts down cancels tasks, and would not wait for
    the thread. stop: makes the thread end soon.
    """
    try:
        await asyncio.shield(copying)
    except asyncio.CancelledError:
        stop()
        while not copying.done():
            # Cancelled again (a caller after a time-out): the thread still writes.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({copying})
        if not copying.cancelled():
            # Looked at, so that nobody logs it as forgotten: it failed because it was stopped.
            copying.exception()
        raise


def failed(task: asyncio.Task[Any]) -> bool:
    """Whether a task that several wait for has ended without a result, so that another has to be begun."""
    return task.done() and (task.cancelled() or task.exception() is not None)


def looked_at(task: asyncio.Task[Any]) -> None:
    """A done callback for tasks whose waiters may all have given up: no failure is logged as forgotten."""
    if not task.cancelled():
        task.exception()
