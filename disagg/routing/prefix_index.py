"""PrefixIndex: which workers hold which KV blocks, as far as they told, and as far as is safe to expect.

    short block hash ──► holders        (dicts: a look-up costs the length of what it finds)

Hashes are chained, so a worker that holds block i of a sequence and all before it holds that prefix. The
index may be wrong in both directions; that costs time and never correctness, since a worker looks up its
own cache by full hashes.

Holders are a tuple of *tags*, shared by all blocks that were stored together. A tag is one worker's reports
since its last snapshot. Whoever leaves, or sends another snapshot, gets a new one, and what carries the old
is ignored at once and swept away bit by bit: so no list of each worker's blocks need be kept.

Blocks of a request that was just placed are *expected* on its workers (ChainTree), so that a burst with one
shared prefix stays together instead of being prefilled everywhere. Whoever expects them takes that back
(see routing.assumptions for when); what a worker itself reported outlives it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from disagg.routing.chains import ChainNode, ChainTree
from disagg.routing.types import BlockEvents

Slots = npt.NDArray[np.int64]
Holders = tuple[int, ...] | npt.NDArray[np.int64]

# So many dicts instead of one, so that none ever takes long to grow, and sweeping goes in small steps.
_SHARDS = 8192
_SHARD = _SHARDS - 1
# Holders beyond so many are an array.
_MANY = 16
# Shards and entries that are looked at for dead tags each time that something is stored.
_SWEPT_SHARDS, _SWEPT_ENTRIES = 64, 500
# Looks at the bound until it is found out anew who has more than the average.
_RICH_FOR = 256
# Blocks stored between two looks at the bound.
_PIECE = 4096
# Blocks of a prompt that are looked up first; if they are all known, the next are four times as many.
_LOOKED_UP = 16
_NOBODY = -1
_NO_COUNTS: dict[int, int] = {}


class _Source:
    """One worker's reports. expected: number of its next events; None until a snapshot came."""

    __slots__ = ("alone", "count", "expected", "tag")

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.alone: Holders = (tag,)
        self.count = 0
        self.expected: int | None = None


class Held:
    """Workers that hold leading blocks of a sequence: their slots, and how many `blocks` each."""

    __slots__ = ("_depths", "blocks", "slots")

    def __init__(self, slots: Slots, blocks: Slots) -> None:
        self.slots, self.blocks = slots, blocks
        self._depths: dict[int, int] | None = None

    @classmethod
    def of(cls, depths: dict[int, int]) -> Held:
        held = cls(np.array(list(depths), dtype=np.int64), np.array(list(depths.values()), dtype=np.int64))
        held._depths = depths
        return held

    @property
    def depths(self) -> dict[int, int]:
        if self._depths is None:
            self._depths = dict(zip(self.slots.tolist(), self.blocks.tolist(), strict=True))
        return self._depths

    def depth(self, slot: int) -> int:
        """Return how many blocks one worker holds."""
        if self._depths is not None:
            return self._depths.get(slot, 0)
        at = int(self.slots.searchsorted(slot))
        return int(self.blocks[at]) if at < len(self.slots) and self.slots[at] == slot else 0


class PrefixIndex:
    """Maps short block hashes to worker slots (small integers that ClusterView gives out).

    max_entries bounds (worker, block) pairs, reported and expected. When they are used up, blocks of workers
    that have more than the average are given up, so that one worker can't displace all others.
    """

    def __init__(self, max_entries: int = 4_000_000) -> None:
        if max_entries < 1:
            raise ValueError("max_entries must be at least 1")
        self._max_entries = max_entries
        self._shards: list[dict[int, Holders]] = [{} for _ in range(_SHARDS)]
        self._sources: dict[int, _Source] = {}
        self._chains = ChainTree()
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
        return sum(map(len, self._shards))

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
            self._store(source, some)

    def _store(self, source: _Source, hashes: list[int]) -> None:
        shards, alone, added = self._shards, source.alone, 0
        # Blocks of one sequence have the same holders, more often than not.
        known: Holders | None = None
        extended: Holders = alone
        for item in hashes:
            shard = shards[item & _SHARD]
            holders = shard.get(item)
            if holders is None:
                shard[item] = alone
                added += 1
                continue
            if holders is not known:
                known, extended = holders, _with(holders, source.tag)
            if extended is not holders:
                shard[item] = extended
                added += 1
        source.count += added
        self._num_live += added

    def remove(self, slot: int, hashes: Iterable[int]) -> None:
        """Note that a worker holds these blocks no more; unknown ones are ignored."""
        source = self._sources.get(slot)
        if source is None:
            return
        shards, alone, taken = self._shards, source.alone, 0
        known: Holders | None = None
        reduced: Holders | None = None
        for item in hashes:
            shard = shards[item & _SHARD]
            holders = shard.get(item)
            if holders is None:
                continue
            if holders is alone:
                del shard[item]
                taken += 1
                continue
            if holders is not known:
                known, reduced = holders, _without(holders, source.tag)
            if reduced is not holders:
                taken += 1
                if reduced is None:
                    del shard[item]
                else:
                    shard[item] = reduced
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

    def expect(self, hashes: Sequence[int], slots: Sequence[int]) -> ChainNode | None:
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

    def unexpect(self, chain: ChainNode, slot: int) -> None:
        """Take one expectation back on one of its workers."""
        self._chains.drop(chain, slot)

    # -- look-up -------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[int]) -> dict[int, int]:
        """Return {slot: number of leading blocks held}, without workers that hold not even the first."""
        found = self.held(hashes)
        return {} if found is None else dict(found.depths)

    def held(self, hashes: Sequence[int]) -> Held | None:
        """Return match() in the form that policies use; None where nobody holds anything."""
        intervals = self._intervals(hashes)
        if not intervals:
            return None
        depths = self._few(intervals)
        found = self._many(intervals) if depths is None else Held.of(depths)
        return found if len(found.slots) else None

    def depths(self, hashes: Sequence[int], num_slots: int) -> Slots | None:
        """Return match() as an array over slots, shape [num_slots]; None where nobody holds anything."""
        found = self.held(hashes)
        if found is None:
            return None
        dense = np.zeros(num_slots, dtype=np.int64)
        dense[found.slots] = found.blocks
        return dense

    def _intervals(self, hashes: Sequence[int]) -> list[tuple[int, Holders, dict[int, int]]]:
        """Return [(depth, tags, expected)]: who has the blocks up to each depth, from the one before on."""
        path = self._chains.path(hashes)
        expected = path[-1][0] if path else 0
        shards, runs = self._shards, []
        last: Holders | None = None
        start, width, over = 0, _LOOKED_UP, False
        while start < len(hashes) and not over:
            # In pieces: most of a new prompt is known to nobody, and each look-up waits for memory.
            piece = [shards[item & _SHARD].get(item) for item in hashes[start : start + width]]
            for depth, holders in enumerate(piece, start):
                if holders is not last:
                    if depth:
                        runs.append((depth, () if last is None else last))
                    last = holders
                if holders is None and depth >= expected:
                    over = True
                    break
            start += width
            width *= 4
        if hashes and not over:
            runs.append((len(hashes), () if last is None else last))
        if not path:
            return [(end, holders, _NO_COUNTS) for end, holders in runs]
        return _merged(runs, path)

    def _few(self, intervals: list[tuple[int, Holders, dict[int, int]]]) -> dict[int, int] | None:
        """Return {slot: depth}; None where these are too many to be counted one by one."""
        first, tags, expected = intervals[0]
        if len(tags) + len(expected) > _MANY:
            return None
        slot_of = self._slot_of
        depths = dict.fromkeys(expected, first)
        for tag in tags:
            slot = int(slot_of[tag])
            if slot >= 0:
                depths[slot] = first
        start = first
        for end, tags, expected in intervals[1:]:
            going = False
            if len(tags) <= _MANY:
                present = [int(slot_of[tag]) for tag in tags]
            else:
                present = slot_of[np.asarray(tags)].tolist()
            for slot, depth in depths.items():
                if depth == start and (slot in expected or slot in present):
                    depths[slot] = end
                    going = True
            if not going:
                break
            start = end
        return depths

    def _many(self, intervals: list[tuple[int, Holders, dict[int, int]]]) -> Held:
        # One more than there are slots: those of dead tags, which are -1, all count there.
        dense = np.zeros(self._num_slots + 1, dtype=np.int64)
        start = 0
        for end, tags, expected in intervals:
            holding: Slots = self._slot_of[np.asarray(tags, dtype=np.int64)]
            if expected:
                others = np.fromiter(expected, dtype=np.int64, count=len(expected))
                holding = np.concatenate([holding, others])
            if start:
                holding = holding[dense[holding] == start]
                if not len(holding):
                    break
            dense[holding] = end
            start = end
        dense[-1] = 0
        found = dense.nonzero()[0]
        return Held(found, dense[found])

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
            self._dead[source.tag] = _SHARDS
        else:
            self._free_tags.append(source.tag)

    def _sweep(self) -> None:
        """Take dead tags out of some more shards."""
        seen = shards = 0
        while self._dead and shards < _SWEPT_SHARDS and seen < _SWEPT_ENTRIES:
            shard = self._shards[self._next_shard()]
            seen += len(shard)
            shards += 1
            self._num_dead -= _strip(shard, self._dead.keys())
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
        while len(self) + self._num_dead + count > self._max_entries and tries < 2 * _SHARDS:
            tries += 1
            if self._dead:
                self._sweep()
                continue
            if tries % _SHARDS == 0 or self._rich_for <= 0:
                self._find_rich()
            if not self._rich:
                return
            taken: dict[int, int] = {}
            _strip(self._shards[self._next_shard()], self._rich.keys(), taken)
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
        for number, shard in enumerate(self._shards):
            for item, holders in shard.items():
                tags = [int(tag) for tag in holders]
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


def _with(holders: Holders, tag: int) -> Holders:
    """Return the holders and `tag`; the same object where it is among them."""
    if isinstance(holders, tuple):
        if tag in holders:
            return holders
        at = bisect_left(holders, tag)
        more = (*holders[:at], tag, *holders[at:])
        return more if len(more) <= _MANY else np.array(more, dtype=np.int64)
    at = int(holders.searchsorted(tag))
    if at < len(holders) and holders[at] == tag:
        return holders
    return np.concatenate([holders[:at], np.array([tag]), holders[at:]])


def _without(holders: Holders, tag: int) -> Holders | None:
    """Return the holders but `tag`; the same object where it is not among them, None where none are left."""
    if isinstance(holders, tuple):
        if tag not in holders:
            return holders
        return tuple(other for other in holders if other != tag) or None
    at = int(holders.searchsorted(tag))
    if at >= len(holders) or holders[at] != tag:
        return holders
    fewer = np.concatenate([holders[:at], holders[at + 1 :]])
    return fewer if len(fewer) > _MANY else tuple(fewer.tolist())


def _strip(shard: dict[int, Holders], tags: Iterable[int], taken: dict[int, int] | None = None) -> int:
    """Take tags out of a shard; return how many pairs that were, and count them by tag in `taken`."""
    wanted = set(tags)
    changed: list[tuple[int, Holders | None]] = []
    total = 0
    for item, holders in shard.items():
        if isinstance(holders, tuple) and wanted.isdisjoint(holders):
            continue
        kept: Holders | None = holders
        for tag in wanted.intersection(int(tag) for tag in holders):
            assert kept is not None
            kept = _without(kept, tag)
            total += 1
            if taken is not None:
                taken[tag] = taken.get(tag, 0) + 1
        if kept is not holders:
            changed.append((item, kept))
    for item, kept in changed:
        if kept is None:
            del shard[item]
        else:
            shard[item] = kept
    return total


def _merged(
    runs: list[tuple[int, Holders]], path: list[tuple[int, dict[int, int]]]
) -> list[tuple[int, Holders, dict[int, int]]]:
    """Cut both at each other's depths."""
    merged: list[tuple[int, Holders, dict[int, int]]] = []
    i = j = 0
    while i < len(runs) or j < len(path):
        run = runs[i] if i < len(runs) else None
        step = path[j] if j < len(path) else None
        ends = [item[0] for item in (run, step) if item is not None]
        end = min(ends)
        merged.append((end, run[1] if run else (), step[1] if step else {}))
        if run is not None and run[0] == end:
            i += 1
        if step is not None and step[0] == end:
            j += 1
    return merged
