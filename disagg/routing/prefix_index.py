"""PrefixIndex: which workers hold which KV blocks, as far as they told, and as far as is safe to expect.

    short block hash ──► bit mask over worker slots          (one dict: a match costs its own length)
    worker slot      ──► its hashes, its last event number   (so that a leaving worker costs its own blocks)

Hashes are chained, so a worker that holds block i of a sequence and all before it holds that prefix. The
index may be wrong in both directions; that costs time and never correctness, since a worker looks up its
own cache by full hashes.

Optimistic entries: blocks of a request that was just placed are *assumed* to appear on its workers, so that
a burst with one shared prefix stays together instead of being prefilled everywhere. They are counted, since
several requests may assume the same block, and whoever made an assumption retracts it (see routing.charges
for when). What a worker itself reported is kept apart and outlives the assumption.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from disagg.routing.types import BlockEvents

# Bits of a mask are read one by one up to here; beyond, unpacking the whole mask is faster.
_FEW_BITS = 8
# Share of the entries that is given up at once when the index is full, so that being full costs little.
_EVICTED_SHARE = 64


class _Holder:
    """One worker's entries. expected: number of its next events; None until a snapshot came."""

    __slots__ = ("assumed", "expected", "stored")

    def __init__(self) -> None:
        self.stored: set[int] = set()
        self.assumed: dict[int, int] = {}
        self.expected: int | None = None


class PrefixIndex:
    """Maps short block hashes to worker slots (small integers that ClusterView gives out).

    max_entries bounds (worker, block) pairs, reported and assumed. When they are used up, arbitrary blocks
    of the worker with the most are given up, so that one worker can't displace all others.
    """

    def __init__(self, max_entries: int = 4_000_000) -> None:
        if max_entries < 1:
            raise ValueError("max_entries must be at least 1")
        self._max_entries = max_entries
        self._masks: dict[int, int] = {}
        self._holders: dict[int, _Holder] = {}
        self._num_entries = 0

    def __len__(self) -> int:
        """Return the number of (worker, block) pairs; a block both reported and assumed counts twice."""
        return self._num_entries

    @property
    def num_blocks(self) -> int:
        """Number of different blocks held by anyone."""
        return len(self._masks)

    # -- what workers report -------------------------------------------------------------------------

    def apply(self, slot: int, events: BlockEvents) -> bool:
        """Take over a worker's events. False means that some are missing: ask it for a snapshot.

        After a gap the worker's entries stay as they are, which is the better guess, until the snapshot.
        """
        holder = self._holder(slot)
        if events.snapshot:
            self.snapshot(slot, events.stored)
            holder.expected = events.sequence + 1
            return True
        if holder.expected is None or events.sequence > holder.expected:
            holder.expected = None
            return False
        if events.sequence < holder.expected:
            return True  # known already
        self.remove(slot, events.removed)
        self.store(slot, events.stored)
        holder.expected = events.sequence + 1
        return True

    def store(self, slot: int, hashes: Iterable[int]) -> None:
        """Note that a worker holds these blocks."""
        holder, bit = self._holder(slot), 1 << slot
        masks, stored = self._masks, holder.stored
        for item in hashes:
            if item in stored:
                continue
            if self._num_entries >= self._max_entries:
                self._evict()
            stored.add(item)
            self._num_entries += 1
            masks[item] = masks.get(item, 0) | bit

    def remove(self, slot: int, hashes: Iterable[int]) -> None:
        """Note that a worker holds these blocks no more; unknown ones are ignored."""
        holder = self._holders.get(slot)
        if holder is None:
            return
        for item in hashes:
            if item in holder.stored:
                holder.stored.discard(item)
                self._num_entries -= 1
                if item not in holder.assumed:
                    self._clear(item, slot)

    def snapshot(self, slot: int, hashes: Iterable[int]) -> None:
        """Replace everything that a worker reported before. Assumptions stay."""
        current = set(hashes)
        stored = self._holder(slot).stored
        self.remove(slot, [item for item in stored if item not in current])
        self.store(slot, current)

    def forget(self, slot: int) -> None:
        """Drop all entries of a worker, assumed ones included; its next events need a snapshot first."""
        holder = self._holders.pop(slot, None)
        if holder is None:
            return
        for item in holder.stored:
            self._clear(item, slot)
        for item in holder.assumed:
            if item not in holder.stored:
                self._clear(item, slot)
        self._num_entries -= len(holder.stored) + len(holder.assumed)

    # -- what is expected ----------------------------------------------------------------------------

    def assume(self, slot: int, hashes: Sequence[int]) -> bool:
        """Expect these blocks on a worker until `retract` is called with the same ones.

        Returns False, and assumes nothing, where the index has no room: guesses never displace reports.
        """
        if self._num_entries + len(hashes) > self._max_entries:
            return False
        holder, bit = self._holder(slot), 1 << slot
        masks, assumed = self._masks, holder.assumed
        before = len(assumed)
        for item in hashes:
            count = assumed.get(item, 0)
            assumed[item] = count + 1
            if not count:
                masks[item] = masks.get(item, 0) | bit
        self._num_entries += len(assumed) - before
        return True

    def retract(self, slot: int, hashes: Sequence[int]) -> None:
        """End one assumption of each of these blocks; unknown ones are ignored."""
        holder = self._holders.get(slot)
        if holder is None:
            return
        assumed = holder.assumed
        for item in hashes:
            count = assumed.get(item, 0)
            if count > 1:
                assumed[item] = count - 1
            elif count == 1:
                del assumed[item]
                self._num_entries -= 1
                if item not in holder.stored:
                    self._clear(item, slot)

    # -- look-up -------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[int]) -> dict[int, int]:
        """Return {slot: number of leading blocks held}, without workers that hold not even the first."""
        depths: dict[int, int] = {}
        for depth, mask in self._segments(hashes):
            for slot in _bits(mask):
                depths[slot] = depth
        return depths

    def depths(self, hashes: Sequence[int], num_slots: int) -> npt.NDArray[np.int64] | None:
        """Return match() as an array over slots, shape [num_slots]; None where nobody holds anything."""
        segments = self._segments(hashes)
        if not segments:
            return None
        depths = np.zeros(num_slots, dtype=np.int64)
        for depth, mask in segments:
            if mask.bit_count() <= _FEW_BITS:
                for slot in _bits(mask):
                    depths[slot] = depth
            else:
                raw = np.frombuffer(mask.to_bytes((num_slots + 7) // 8, "little"), dtype=np.uint8)
                held = np.unpackbits(raw, count=num_slots, bitorder="little").view(np.bool_)
                depths[held] = depth
        return depths

    def _segments(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (depth, mask of the workers whose longest prefix has that many blocks)."""
        segments: list[tuple[int, int]] = []
        masks = self._masks
        alive, depth = -1, 0
        for item in hashes:
            holding = alive & masks.get(item, 0)
            if holding != alive:
                if depth:
                    segments.append((depth, alive & ~holding))
                alive = holding
                if not alive:
                    return segments
            depth += 1
        if depth:
            segments.append((depth, alive))
        return segments

    # -- inside --------------------------------------------------------------------------------------

    def _holder(self, slot: int) -> _Holder:
        holder = self._holders.get(slot)
        if holder is None:
            holder = self._holders[slot] = _Holder()
        return holder

    def _clear(self, item: int, slot: int) -> None:
        left = self._masks.get(item, 0) & ~(1 << slot)
        if left:
            self._masks[item] = left
        else:
            self._masks.pop(item, None)

    def _evict(self) -> None:
        slot, holder = max(self._holders.items(), key=lambda pair: len(pair[1].stored))
        if not holder.stored:
            # Everything is assumed: then assumptions of the fullest worker go.
            slot, holder = max(self._holders.items(), key=lambda pair: len(pair[1].assumed))
        victims = holder.stored or holder.assumed
        count = max(1, len(victims) // _EVICTED_SHARE)
        chosen = [item for item, _ in zip(victims, range(count), strict=False)]
        if holder.stored:
            self.remove(slot, chosen)
            return
        for item in chosen:
            del holder.assumed[item]
            self._num_entries -= 1
            self._clear(item, slot)

    def check_integrity(self) -> None:
        """Raise AssertionError where masks and holders disagree; for tests and idle moments."""
        expected: dict[int, int] = {}
        total = 0
        for slot, holder in self._holders.items():
            total += len(holder.stored) + len(holder.assumed)
            for item in holder.stored | holder.assumed.keys():
                expected[item] = expected.get(item, 0) | 1 << slot
        if expected != self._masks or total != self._num_entries:
            raise AssertionError("prefix index: masks and holders disagree")


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
