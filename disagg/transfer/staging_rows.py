"""Rows of a segment through which blocks pass on their way between devices."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from disagg.errors import KVLostError


def staging_blocks(staging_memory: int, block_bytes: int, num_blocks: int) -> int:
    """Return the rows of a segment through which blocks of a cache of `num_blocks` pass; at least two."""
    return max(2, min(staging_memory // block_bytes, 2 * num_blocks))


class StagingRows:
    """Rows of a segment, lent out lowest first so that neighbours stay together. Lives on one event loop."""

    def __init__(self, rows: range) -> None:
        self.capacity = len(rows)
        self._free = sorted(rows, reverse=True)
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Return rows if so many are free and nobody waits for some, else None."""
        if self._waiting or count > len(self._free):
            return None
        return self._pop(count)

    async def wait_for(self, count: int) -> list[int]:
        """Return rows once so many are free, in the order of asking. KVLostError if there never are."""
        if count > self.capacity:
            raise KVLostError(f"{count} blocks of KV don't fit into staging memory for {self.capacity}")
        rows = self.take(count)
        if rows is not None:
            return rows
        turn: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(turn.result())
            else:
                self._waiting.remove((count, turn))
                self._serve()
            raise

    def take_spare(self, count: int) -> list[int] | None:
        """Return rows if half of all stay free, for whoever can do without until later; else None."""
        return self.take(count) if len(self._free) - count >= self.capacity // 2 else None

    def give_back(self, rows: Sequence[int]) -> None:
        self._free = sorted([*self._free, *rows], reverse=True)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= len(self._free):
            count, turn = self._waiting.popleft()
            turn.set_result(self._pop(count))

    def _pop(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]


def halves(num_blocks: int) -> tuple[StagingRows, StagingRows]:
    """Return the rows of a segment for published and for pulled blocks."""
    middle = num_blocks // 2
    return StagingRows(range(middle)), StagingRows(range(middle, num_blocks))
