"""BlockTable: which tags are on which KV blocks; what a PrefixIndex keeps its workers' reports in.

    short block hash ──► holders        (dicts: a look-up costs the length of what it finds)

Holders are a tuple of tags in ascending order, shared by all blocks that were stored together. A tag stands
for one worker's reports, see disagg.routing.prefix_index. `_blocks.c` does the same in C.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
Holders = tuple[int, ...] | npt.NDArray[np.int64]
# What is expected of a prompt's blocks: up to which depth, of whom.
Path = list[tuple[int, dict[int, int]]]

# So many tables instead of one, so that none ever takes long to grow, and sweeping goes in small steps.
SHARDS = 8192
_SHARD = SHARDS - 1
# Holders beyond so many are an array.
_MANY = 16
# Blocks of a prompt that are looked up first; if they are all known, the next are four times as many.
_LOOKED_UP = 16
_NO_COUNTS: dict[int, int] = {}


class BlockTable(Protocol):
    """Hashes are below 2**64; tags and slots are small."""

    def __len__(self) -> int:
        """Return the number of different blocks."""

    def store(self, hashes: Sequence[int], tag: int, /) -> int:
        """Put a tag on blocks; return on how many it was not."""

    def remove(self, hashes: Sequence[int], tag: int, /) -> int:
        """Take a tag off blocks, known or not; return on how many it was."""

    def strip(self, shard: int, tags: Sequence[int], /) -> dict[int, int]:
        """Take tags off all blocks of one shard; return {tag: on how many it was}, without zeros."""

    def items(self, shard: int, /) -> Sequence[tuple[int, Sequence[int]]]:
        """Return [(block, its tags)] of one shard."""

    def size_of(self, shard: int, /) -> int:
        """Return the number of blocks in one shard."""

    def held(
        self, hashes: Sequence[int], chains: Any, slot_of: Slots, num_slots: int, /
    ) -> tuple[Slots, Slots] | tuple[bytes, bytes] | None:
        """Return who holds leading blocks of a chain, ascending slots and depths as int64; None: nobody.

        chains: who is expected to hold blocks, a ChainTree of the same core. slot_of: slot of each tag, -1
        for nobody's. num_slots: all slots are below.
        """


class PythonBlockTable:
    """A BlockTable in dicts."""

    def __init__(self) -> None:
        self._shards: list[dict[int, Holders]] = [{} for _ in range(SHARDS)]
        self._alone: dict[int, Holders] = {}

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def store(self, hashes: Sequence[int], tag: int, /) -> int:
        """See BlockTable."""
        shards, alone, added = self._shards, self._of(tag), 0
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
                known, extended = holders, _with(holders, tag)
            if extended is not holders:
                shard[item] = extended
                added += 1
        return added

    def _of(self, tag: int) -> Holders:
        alone = self._alone.get(tag)
        if alone is None:
            alone = self._alone[tag] = (tag,)
        return alone

    def remove(self, hashes: Sequence[int], tag: int, /) -> int:
        """See BlockTable."""
        shards, alone, taken = self._shards, self._of(tag), 0
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
                known, reduced = holders, _without(holders, tag)
            if reduced is not holders:
                taken += 1
                if reduced is None:
                    del shard[item]
                else:
                    shard[item] = reduced
        return taken

    def strip(self, shard: int, tags: Sequence[int], /) -> dict[int, int]:
        """See BlockTable."""
        wanted = set(tags)
        changed: list[tuple[int, Holders | None]] = []
        taken: dict[int, int] = {}
        blocks = self._shards[shard]
        for item, holders in blocks.items():
            if isinstance(holders, tuple) and wanted.isdisjoint(holders):
                continue
            kept: Holders | None = holders
            for tag in wanted.intersection(int(tag) for tag in holders):
                assert kept is not None
                kept = _without(kept, tag)
                taken[tag] = taken.get(tag, 0) + 1
            if kept is not holders:
                changed.append((item, kept))
        for item, kept in changed:
            if kept is None:
                del blocks[item]
            else:
                blocks[item] = kept
        return taken

    def items(self, shard: int, /) -> Sequence[tuple[int, Sequence[int]]]:
        """See BlockTable."""
        return [(item, [int(tag) for tag in holders]) for item, holders in self._shards[shard].items()]

    def size_of(self, shard: int, /) -> int:
        """See BlockTable."""
        return len(self._shards[shard])

    def held(
        self, hashes: Sequence[int], chains: Any, slot_of: Slots, num_slots: int, /
    ) -> tuple[Slots, Slots] | None:
        """See BlockTable."""
        intervals = self._intervals(hashes, chains.path(hashes))
        if not intervals:
            return None
        depths = _few(intervals, slot_of)
        if depths is None:
            slots, blocks = _many(intervals, slot_of, num_slots)
        else:
            slots = np.array(sorted(depths), dtype=np.int64)
            blocks = np.array([depths[slot] for slot in slots.tolist()], dtype=np.int64)
        return (slots, blocks) if len(slots) else None

    def _intervals(self, hashes: Sequence[int], path: Path) -> list[tuple[int, Holders, dict[int, int]]]:
        """Return [(depth, tags, expected)]: who has the blocks up to each depth, from the one before on."""
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


def _few(intervals: list[tuple[int, Holders, dict[int, int]]], slot_of: Slots) -> dict[int, int] | None:
    """Return {slot: depth}; None where these are too many to be counted one by one."""
    first, tags, expected = intervals[0]
    if len(tags) + len(expected) > _MANY:
        return None
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


def _many(
    intervals: list[tuple[int, Holders, dict[int, int]]], slot_of: Slots, num_slots: int
) -> tuple[Slots, Slots]:
    # One more than there are slots: those of dead tags, which are -1, all count there.
    dense = np.zeros(num_slots + 1, dtype=np.int64)
    start = 0
    for end, tags, expected in intervals:
        holding: Slots = slot_of[np.asarray(tags, dtype=np.int64)]
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
    return found, dense[found]


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
