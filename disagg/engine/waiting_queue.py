"""Orders in which sequences wait: by rank (whose turn it is) and by size (what is soonest done)."""

from __future__ import annotations

import heapq
from typing import Any

from disagg.engine.sequence import Sequence


def rank(seq: Sequence) -> tuple[int, float, int]:
    """Return whose turn it is: priority, then when the first token is due, then arrival; smaller is earlier.

    A due date never moves, so whoever waits overtakes all that come later than it is due.
    """
    return seq.request.priority, seq.due, seq.arrival_order


def by_size(seq: Sequence) -> tuple[int, int, float, int]:
    """Return the order of what is soonest done: priority, tokens left to compute, then as `rank`."""
    return seq.request.priority, tokens_to_compute(seq), seq.due, seq.arrival_order


def tokens_to_compute(seq: Sequence) -> int:
    """Return how many known tokens this engine has to compute, if a peer delivers what it said."""
    known = seq.num_computed_tokens
    return len(seq.token_ids) - (known if known > seq.remote_kv else seq.remote_kv)


class WaitingQueue:
    """Sequences in two orders, by rank and by size. One that is pushed again gets its old place.

    num_tokens: tokens to compute of all that wait. size: how many these are.

    Two heaps from whose middle nothing is taken: what left stays as a tombstone until it surfaces or
    tombstones are the majority, so that cancelling a thousand requests does not cost a thousand rebuilds.
    """

    def __init__(self) -> None:
        # Which push of a sequence counts; entries of another one are tombstones.
        self._live: dict[Sequence, int] = {}
        self._by_rank: list[tuple[tuple[int, float, int], int, Sequence]] = []
        self._by_size: list[tuple[tuple[int, int, float, int], int, Sequence]] = []
        self._num_pushes = 0
        self.num_tokens = 0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def push(self, seq: Sequence) -> None:
        self._num_pushes += 1
        self._live[seq] = self._num_pushes
        heapq.heappush(self._by_rank, (rank(seq), self._num_pushes, seq))
        heapq.heappush(self._by_size, (by_size(seq), self._num_pushes, seq))
        self.num_tokens += tokens_to_compute(seq)
        self.size += 1

    def peek(self) -> Sequence:
        """Return the sequence that is due first. Raises IndexError where none waits."""
        while not self._lives(self._by_rank[0]):
            heapq.heappop(self._by_rank)
        return self._by_rank[0][2]

    def peek_shortest(self) -> Sequence:
        """Return the sequence with the least to compute. Raises IndexError where none waits."""
        while not self._lives(self._by_size[0]):
            heapq.heappop(self._by_size)
        return self._by_size[0][2]

    def pop(self) -> Sequence:
        """Take out what `peek` returns."""
        seq = self.peek()
        self.remove(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is in the queue, wherever it is."""
        del self._live[seq]
        self.num_tokens -= tokens_to_compute(seq)
        self.size -= 1
        if not self.size:
            self._by_rank.clear()
            self._by_size.clear()
            return
        # Neither heap may keep what only ever leaves through the other.
        if len(self._by_rank) > 2 * self.size:
            self._by_rank = [entry for entry in self._by_rank if self._lives(entry)]
            heapq.heapify(self._by_rank)
        if len(self._by_size) > 2 * self.size:
            self._by_size = [entry for entry in self._by_size if self._lives(entry)]
            heapq.heapify(self._by_size)

    def _lives(self, entry: tuple[Any, int, Sequence]) -> bool:
        return self._live.get(entry[2]) == entry[1]
