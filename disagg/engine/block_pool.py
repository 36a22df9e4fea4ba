"""BlockPool: who owns which KV block, and which free blocks still hold something worth finding.

A block is in one of three states:

    used    reference count >= 1; in some sequence's block table
    cached  reference count 0, content still indexed by its hash; first to be found, last to be reused
    free    reference count 0, no known content

The last two share one free list, ordered by who is to be handed out next: eviction is LRU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from disagg.hashing import BlockHash

NULL_BLOCK = 0


class _FreeList:
    """Doubly linked list over block ids, in two flat arrays.

    Linked, because a prefix hit takes a block out of the middle, which in a deque costs O(n); flat arrays,
    because a node object for each of a million blocks would weigh more than the list is worth.
    """

    def __init__(self, capacity: int) -> None:
        # One sentinel at index `capacity` closes the ring, so that no operation has a special case.
        self._end = capacity
        self._next = [0] * (capacity + 1)
        self._prev = [0] * (capacity + 1)
        self._next[self._end] = self._prev[self._end] = self._end
        self.size = 0

    def append(self, block_id: int) -> None:
        last = self._prev[self._end]
        self._next[last] = self._prev[self._end] = block_id
        self._prev[block_id], self._next[block_id] = last, self._end
        self.size += 1

    def remove(self, block_id: int) -> None:
        left, right = self._prev[block_id], self._next[block_id]
        self._next[left], self._prev[right] = right, left
        self.size -= 1

    def give(self, block_ids: Sequence[int]) -> None:
        """Put blocks before all others, the last of them first."""
        following, preceding, first = self._next, self._prev, self._next[self._end]
        for block_id in block_ids:
            following[block_id] = first
            preceding[first] = block_id
            first = block_id
        following[self._end], preceding[first] = first, self._end
        self.size += len(block_ids)

    def take(self, num: int) -> list[int]:
        """Take out the first `num` entries, which the list must have."""
        following, taken = self._next, []
        block_id = following[self._end]
        for _ in range(num):
            taken.append(block_id)
            block_id = following[block_id]
        following[self._end], self._prev[block_id] = block_id, self._end
        self.size -= num
        return taken

    def __iter__(self) -> Iterator[int]:
        block_id = self._next[self._end]
        while block_id != self._end:
            yield block_id
            block_id = self._next[block_id]


@dataclass(slots=True)
class BlockEvents:
    """Changes of the prefix cache since they were last taken, for the router's index."""

    stored: list[BlockHash]
    removed: list[BlockHash]


class BlockPool:
    """Fixed set of KV blocks with reference counts and a prefix cache.

    num_blocks: including block 0, which is never handed out: runners pad with it. All operations are O(1) per
    block.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError("a pool needs at least one block beside the null block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._free = _FreeList(num_blocks)
        for block_id in range(1, num_blocks):
            self._free.append(block_id)
        # What a listener does not know yet: True is stored, False is removed. See _note.
        self._changes: dict[BlockHash, bool] = {}

    # -- state -------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Blocks that can be handed out."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return self._free.size

    @property
    def num_used(self) -> int:
        return self.capacity - self._free.size

    @property
    def usage(self) -> float:
        """Share of the blocks that have an owner, 0 to 1."""
        return self.num_used / self.capacity

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found, used or not."""
        return len(self._block_of)

    def hash_of(self, block_id: int) -> BlockHash | None:
        """Return the hash under which a block can be found, None if it can't."""
        return self._hash_of[block_id]

    # -- prefix cache ------------------------------------------------------------------------------

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks of the longest cached prefix of a chain; nothing changes."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def register(self, block_id: int, block_hash: BlockHash) -> None:
        """Make a full, computed block findable. Of two blocks with one content the first stays indexed.

        Raises ValueError for a block without an owner: its content may be overwritten at any time.
        """
        if not self._caching or self._hash_of[block_id] is not None or block_hash in self._block_of:
            return
        if self._refs[block_id] <= 0:
            raise ValueError(f"block {block_id} is registered and has no owner")
        self._hash_of[block_id] = block_hash
        self._block_of[block_hash] = block_id
        self._note(block_hash, stored=True)

    def reset_cache(self) -> None:
        """Forget all content, such as after a change of weights. Owners keep their blocks."""
        for block_hash, block_id in self._block_of.items():
            self._hash_of[block_id] = None
            self._note(block_hash, stored=False)
        self._block_of.clear()

    def drain_events(self) -> BlockEvents:
        """Return the net change since the last call; a hash is in one of the two lists at most."""
        changes, self._changes = self._changes, {}
        return BlockEvents(
            stored=[block_hash for block_hash, stored in changes.items() if stored],
            removed=[block_hash for block_hash, stored in changes.items() if not stored],
        )

    def snapshot(self) -> list[BlockHash]:
        """Return every hash that can be found now."""
        return list(self._block_of)

    def _note(self, block_hash: BlockHash, *, stored: bool) -> None:
        # Storing and removing alternate, so a second change undoes the first for a listener that saw
        # neither. What is pending can't outgrow the pool even where nobody ever listens.
        if self._changes.pop(block_hash, None) is None:
            self._changes[block_hash] = stored

    # -- ownership ---------------------------------------------------------------------------------

    def num_needed(self, cached: Sequence[int], num_new: int) -> int:
        """Return how many free blocks `acquire(cached)` and `allocate(num_new)` would take together."""
        return num_new + [self._refs[block_id] for block_id in cached].count(0)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Take one more reference to each of these blocks, which `lookup` has just found."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                self._free.remove(block_id)
            self._refs[block_id] += 1

    def allocate(self, num: int) -> list[int] | None:
        """Return `num` blocks with one reference each, evicting the least recently used; None if too few."""
        if num > self._free.size:
            return None
        blocks = self._free.take(num)
        refs, hash_of = self._refs, self._hash_of
        for block_id in blocks:
            refs[block_id] = 1
            block_hash = hash_of[block_id]
            if block_hash is not None:
                self._forget(block_id, block_hash)
        return blocks

    def free(self, block_ids: Sequence[int]) -> None:
        """Give one reference to each back. Raises ValueError for a block that has none.

        In reverse, so that of one sequence the tail is evicted before the prefix that others may share.
        """
        refs, hash_of = self._refs, self._hash_of
        # A block without content is better used at once than a cached one evicted for it.
        empty: list[int] = []
        for block_id in reversed(block_ids):
            left = refs[block_id] - 1
            if left < 0:
                self._free.give(empty)
                raise ValueError(f"block {block_id} is freed and has no owner")
            refs[block_id] = left
            if left == 0:
                if hash_of[block_id] is None:
                    empty.append(block_id)
                else:
                    self._free.append(block_id)
        self._free.give(empty)

    def _forget(self, block_id: int, block_hash: BlockHash) -> None:
        self._hash_of[block_id] = None
        del self._block_of[block_hash]
        self._note(block_hash, stored=False)

    def check_integrity(self, owners: Mapping[int, int]) -> None:
        """Compare with what `owners` {block id: references} says, in O(blocks).

        Raises AssertionError with everything that is wrong.
        """
        problems = [*self._free_list_problems(), *self._index_problems()]
        on_list = set(itertools.islice(self._free, self.num_blocks))
        for block_id in range(1, self.num_blocks):
            refs, wanted = self._refs[block_id], owners.get(block_id, 0)
            if refs != wanted:
                problems.append(f"block {block_id} counts {refs} references, its owners are {wanted}")
            if (refs == 0) != (block_id in on_list):
                where = "on" if block_id in on_list else "not on"
                problems.append(f"block {block_id} has {refs} references and is {where} the free list")
        if unknown := [block_id for block_id in owners if not 0 < block_id < self.num_blocks]:
            problems.append(f"owners have blocks that are not in circulation: {unknown}")
        if problems:
            raise AssertionError("; ".join(problems))

    def _free_list_problems(self) -> Iterator[str]:
        # Bounded, since a broken ring may never come back to its end.
        free = list(itertools.islice(self._free, self.num_blocks + 1))
        if len(free) != len(set(free)) or len(free) != self._free.size:
            yield f"the free list repeats or loses a block: {len(free)} entries, size {self._free.size}"
        if NULL_BLOCK in free:
            yield "the null block is on the free list"

    def _index_problems(self) -> Iterator[str]:
        for block_hash, block_id in self._block_of.items():
            if self._hash_of[block_id] != block_hash:
                yield f"block {block_id} is indexed under a hash that it does not have"
        hashed = sum(1 for block_hash in self._hash_of if block_hash is not None)
        if hashed != len(self._block_of):
            yield f"{hashed} blocks have a hash, {len(self._block_of)} are indexed"
