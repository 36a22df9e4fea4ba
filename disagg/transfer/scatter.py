"""What has arrived in a buffer goes to the rows where it belongs, beside what arrives next."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Executor

from disagg.transfer.calls import DamagedKVError
from disagg.transfer.segment import Blocks
from disagg.transfer.staging import Staging


class Scatter:
    """Copies from buffers into the target, one at a time, beside what is received."""

    def __init__(self, target: Blocks, executor: Executor) -> None:
        self._target = target
        self._executor = executor
        self._stop = threading.Event()
        self._running: asyncio.Future[bool] | None = None

    def start(self, buffer: Staging, rows: Sequence[int], checksum: int | None) -> None:
        self._running = asyncio.get_running_loop().run_in_executor(
            self._executor, buffer.scatter, self._target, rows, checksum, self._stop
        )

    async def done(self) -> None:
        """Return when what was started has ended. Raises DamagedKVError where other blocks came."""
        if self._running is not None:
            if not await asyncio.shield(self._running):
                raise DamagedKVError("blocks failed their checksum")
            self._running = None

    async def stop(self) -> None:
        """Return when nothing is written any more, however often this task is cancelled meanwhile."""
        self._stop.set()
        cancelled = False
        while self._running is not None and not self._running.done():
            try:
                await asyncio.wait({self._running})
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
