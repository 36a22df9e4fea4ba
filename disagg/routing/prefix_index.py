"""PrefixIndex: which workers hold which KV blocks, as far as they told, and as far as is safe to expect.

Hashes are chained, so a worker that holds block i of a sequence and all before it holds that prefix. The
index may be wrong in both directions; that costs time and never correctness, since a worker looks up its
own cache by full hashes.

Blocks carry *tags* (BlockTable). A tag is one worker's reports since its last snapshot. Whoever leaves, or
sends another snapshot, gets a new one, and what carries the old is ignored at once and swept away bit by bit:
so no list of each worker's blocks need be kept.

Blocks of a request that was just placed are *expected* on its workers (ChainTree), so that a burst with one
shared prefix stays together instead of being prefilled everywhere. Whoever expects them takes that back
(see routing.assumptions for when); what a worker itself reported outlives it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from disagg.routing.block_table import SHARDS, Slots
from disagg.routing.core import CORE, Core
from disagg.routing.types import BlockEvents

_SHARD = SHARDS - 1
# Shards and entries that are looked at for dead tags each time that something is stored.
_SWEPT_SHARDS, _SWEPT_ENTRIES = 64, 500
# Looks at the bound until it is found out anew who has more than the average.
_RICH_FOR = 256
# Blocks stored between two looks at the bound.
_PIECE = 4096
_NOBODY = -1


class _Source:
    """One worker's reports. expected: number of its next events; None until a snapshot came."""

    __slots__ = ("count", "expected", "tag")

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.count = 0
        self.expected: int | None = None


class Held:
    """Workers that hold leading blocks of a sequence.

    slots, blocks: ascending, and how many blocks each; as buffers of int64 in `buffers`.
    """

    __slots__ = ("buffers",)

    def __init__(self, slots: Slots | bytes, blocks: Slots | bytes) -> None:
        self.buffers = slots, blocks

    @property
    def slots(self) -> Slots:
        return np.frombuffer(self.buffers[0], dtype=np.int64)

    @property
    def blocks(self) -> Slots:
        return np.frombuffer(self.buffers[1], dtype=np.int64)

    def depth(self, slot: int) -> int:
        """Return how many blocks one worker holds."""
        slots = _whole(self.buffers[0])
        at = bisect_left(slots, slot)
        return _whole(self.buffers[1])[at] if at < len(slots) and slots[at] == slot else 0


def _whole(buffer: Slots | bytes) -> memoryview[int]:
    # Slices and look-ups of these cost a tenth of what they do of small arrays.
    return memoryview(buffer if isinstance(buffer, bytes) else buffer.data).cast("B").cast("q")


class PrefixIndex:
    """Maps short block hashes to worker slots (small integers that ClusterView gives out).

    max_entries bounds (worker, block) pairs, reported and expected. When they are used up, blocks of workers
    that have more than the average are given up, so that one worker can't displace all others.
    """

    def __init__(self, max_entries: int = 4_000_000, core: Core = CORE) -> None:
        if max_entries < 1:
            raise ValueError("max_entries must be at least 1")
        self._max_entries = max_entries
        self._table = core.make_table()
        self._sources: dict[int, _Source] = {}
        self._chains = core.make_chains()
        # Of each tag: its worker's slot, or _NOBODY. Tags come again only when nothing carries them any more.
        self._slot_of: Slots = np.full(8, _NOBODY, dtype=np.int64)
        self._num_tags = self._num_slots = 0
        self._free_tags: list[int] = []
        # Tags that nobody has any more -> shards that may still carry them.
        self._dead: dict[int, int] = {}
        # Pairs in the shards, those of dead tags and of live ones.
        self._num_dead = self._num_live = 0
        self._hand = 0
        self._rich: dict[int, _Source] = {}
        self._rich_for = 0

    def __len__(self) -> int:
        """Return the number of (worker, block) pairs; a block both reported and expected counts twice."""
        return self._num_live + self._chains.num_expected

    @property
    def num_blocks(self) -> int:
        """Number of different blocks that were reported."""
        return len(self._table)

    # -- what workers report -------------------------------------------------------------------------

    def apply(self, slot: int, events: BlockEvents) -> bool:
        """Take over a worker's events. False means that some are missing: ask it for a snapshot.

        After a gap the worker's entries stay as they are, which is the better guess, until the snapshot.
        """
        source = self._source(slot)
        if events.snapshot:
            self.snapshot(slot, events.stored)
            self._source(slot).expected = events.sequence + 1
            return True
        if source.expected is None or events.sequence > source.expected:
            source.expected = None
            return False
        if events.sequence < source.expected:
            return True  # known already
        self.remove(slot, events.removed)
        self.store(slot, events.stored)
        source.expected = events.sequence + 1
        return True

    def store(self, slot: int, hashes: Iterable[int]) -> None:
        """Note that a worker holds these blocks."""
        self._sweep()
        source, items = self._source(slot), list(hashes)
        piece = min(_PIECE, max(1, self._max_entries // 64))
        for start in range(0, len(items), piece):
            some = items[start : start + piece]
            self._make_room(len(some))
            added = self._table.store(some, source.tag)
            source.count += added
            self._num_live += added

    def remove(self, slot: int, hashes: Iterable[int]) -> None:
        """Note that a worker holds these blocks no more; unknown ones are ignored."""
        source = self._sources.get(slot)
        if source is None:
            return
        taken = self._table.remove(list(hashes), source.tag)
        source.count -= taken
        self._num_live -= taken

    def snapshot(self, slot: int, hashes: Iterable[int]) -> None:
        """Replace everything that a worker reported before. What is expected stays."""
        self._retire(slot)
        self.store(slot, hashes)

    def forget(self, slot: int) -> None:
        """Drop all that a worker reported; its next events need a snapshot first."""
        self._retire(slot)

    # -- what is expected ----------------------------------------------------------------------------

    def expect(self, hashes: Sequence[int], slots: Sequence[int]) -> Any:
        """Expect a chain of blocks on workers until each is taken back by `unexpect`.

        Returns what to name it by; None, and expects nothing, where there is nothing to or no room for it:
        guesses never displace reports.
        """
        if len(self) + len(hashes) * len(slots) > self._max_entries:
            return None
        for slot in slots:
            if slot >= self._num_slots:
                self._num_slots = slot + 1
        return self._chains.add(hashes, slots)

    def unexpect(self, chain: Any, slot: int) -> None:
        """Take one expectation back on one of its workers."""
        self._chains.drop(chain, slot)

    # -- look-up -------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[int]) -> dict[int, int]:
        """Return {slot: number of leading blocks held}, without workers that hold not even the first."""
        found = self.held(hashes)
        return {} if found is None else dict(zip(found.slots.tolist(), found.blocks.tolist(), strict=True))

    def held(self, hashes: Sequence[int]) -> Held | None:
        """Return match() in the form that policies use; None where nobody holds anything."""
        found = self._table.held(hashes, self._chains, self._slot_of, self._num_slots)
        return None if found is None else Held(*found)

    def depths(self, hashes: Sequence[int], num_slots: int) -> Slots | None:
        """Return match() as an array over slots, shape [num_slots]; None where nobody holds anything."""
        found = self.held(hashes)
        if found is None:
            return None
        dense = np.zeros(num_slots, dtype=np.int64)
        dense[found.slots] = found.blocks
        return dense

    # -- inside --------------------------------------------------------------------------------------

    def _source(self, slot: int) -> _Source:
        source = self._sources.get(slot)
        if source is None:
            source = self._sources[slot] = _Source(self._new_tag(slot))
        return source

    def _new_tag(self, slot: int) -> int:
        if self._free_tags:
            tag = self._free_tags.pop()
        else:
            tag = self._num_tags
            self._num_tags += 1
            if tag >= len(self._slot_of):
                more = np.full(len(self._slot_of), _NOBODY, dtype=np.int64)
                self._slot_of = np.concatenate([self._slot_of, more])
        self._slot_of[tag] = slot
        self._num_slots = max(self._num_slots, slot + 1)
        return tag

    def _retire(self, slot: int) -> None:
        """Let nobody have a worker's tag any more."""
        source = self._sources.pop(slot, None)
        if source is None:
            return
        self._slot_of[source.tag] = _NOBODY
        self._rich.pop(source.tag, None)
        self._num_live -= source.count
        self._num_dead += source.count
        if source.count:
            self._dead[source.tag] = SHARDS
        else:
            self._free_tags.append(source.tag)

    def _sweep(self) -> None:
        """Take dead tags out of some more shards."""
        seen = shards = 0
        while self._dead and shards < _SWEPT_SHARDS and seen < _SWEPT_ENTRIES:
            shard = self._next_shard()
            seen += self._table.size_of(shard)
            shards += 1
            self._num_dead -= sum(self._table.strip(shard, list(self._dead)).values())
            for tag, left in list(self._dead.items()):
                if left > 1:
                    self._dead[tag] = left - 1
                else:
                    del self._dead[tag]
                    self._free_tags.append(tag)

    def _next_shard(self) -> int:
        self._hand = (self._hand + 1) & _SHARD
        return self._hand

    def _make_room(self, count: int) -> None:
        """Give up blocks until `count` more fit, or nothing is left to give up."""
        tries = 0
        while len(self) + self._num_dead + count > self._max_entries and tries < 2 * SHARDS:
            tries += 1
            if self._dead:
                self._sweep()
                continue
            if tries % SHARDS == 0 or self._rich_for <= 0:
                self._find_rich()
            if not self._rich:
                return
            taken = self._table.strip(self._next_shard(), list(self._rich))
            for tag, lost in taken.items():
                self._rich[tag].count -= lost
                self._num_live -= lost
        self._rich_for -= 1

    def _find_rich(self) -> None:
        """Find out who has no less than the average: of these blocks are given up."""
        sources = [source for source in self._sources.values() if source.count]
        average = self._num_live / max(1, len(sources))
        self._rich = {source.tag: source for source in sources if source.count >= average}
        self._rich_for = _RICH_FOR

    def check_integrity(self) -> None:
        """Raise AssertionError where counts and entries disagree; for tests and idle moments."""
        counted: dict[int, int] = {}
        for number in range(SHARDS):
            for item, holders in self._table.items(number):
                tags = list(holders)
                if item & _SHARD != number or not tags or tags != sorted(set(tags)):
                    raise AssertionError(f"prefix index: {item} in shard {number} is held by {tags}")
                for tag in tags:
                    counted[tag] = counted.get(tag, 0) + 1
        live = {source.tag: source.count for source in self._sources.values()}
        dead = sum(count for tag, count in counted.items() if tag not in live)
        if any(counted.get(tag, 0) != count for tag, count in live.items()) or dead != self._num_dead:
            raise AssertionError("prefix index: counts and entries disagree")
        if any(tag not in live and tag not in self._dead for tag in counted):
            raise AssertionError("prefix index: an entry of a tag that may come again")
        if sum(live.values()) != self._num_live:
            raise AssertionError("prefix index: the total is wrong")
