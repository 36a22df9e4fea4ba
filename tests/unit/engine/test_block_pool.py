from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg.engine.block_pool import NULL_BLOCK, BlockPool
from disagg.hashing import block_hashes, chain_root

ROOT = chain_root("model")
HASHES = block_hashes(range(64), 1, ROOT)


def fill(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Allocate and register one block for each hash."""
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for block_id, block_hash in zip(blocks, hashes, strict=True):
        pool.register(block_id, block_hash)
    return blocks


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(5, 4)
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert NULL_BLOCK not in blocks
    assert pool.allocate(1) is None
    assert (pool.num_free, pool.num_used, pool.usage) == (0, 4, 1.0)


def test_a_pool_of_the_null_block_alone_is_refused():
    with pytest.raises(ValueError, match="null block"):
        BlockPool(1, 4)


def test_an_allocation_that_does_not_fit_changes_nothing():
    pool = BlockPool(4, 4)
    fill(pool, HASHES[:2])
    pool.drain_events()
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.drain_events().removed == []


def test_lookup_returns_the_longest_prefix_and_has_no_side_effect():
    pool = BlockPool(8, 4)
    blocks = fill(pool, [HASHES[0], HASHES[1], HASHES[3]])
    assert pool.lookup(HASHES[:5]) == blocks[:2]
    assert pool.lookup(HASHES[1:3]) == blocks[1:2]
    assert pool.lookup([HASHES[4]]) == []
    pool.check_integrity(Counter(blocks))


def test_freed_blocks_stay_findable_until_their_turn_comes():
    pool = BlockPool(4, 4)
    blocks = fill(pool, HASHES[:3])
    pool.free(blocks)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (3, 0, 3)
    assert pool.lookup(HASHES[:3]) == blocks
    assert pool.allocate(1) == [blocks[2]], "a sequence's tail is evicted before its prefix"
    assert pool.lookup(HASHES[:3]) == blocks[:2]


def test_eviction_is_least_recently_used():
    pool = BlockPool(4, 4)
    blocks = fill(pool, HASHES[:3])
    for block_id in blocks:
        pool.free([block_id])
    pool.acquire([blocks[0]])
    pool.free([blocks[0]])
    assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]


def test_blocks_without_content_are_used_before_any_is_evicted():
    pool = BlockPool(4, 4)
    cached = fill(pool, HASHES[:2])
    plain = pool.allocate(1)
    assert plain is not None
    pool.free(cached)
    pool.free(plain)
    assert pool.allocate(1) == plain
    assert pool.num_cached == 2


def test_references_are_counted():
    pool = BlockPool(4, 4)
    blocks = fill(pool, HASHES[:2])
    pool.acquire(blocks)
    pool.free(blocks)
    assert pool.num_used == 2
    pool.free(blocks)
    assert pool.num_used == 0
    with pytest.raises(ValueError, match="no owner"):
        pool.free([blocks[0]])


def test_what_an_admission_takes_from_the_free_blocks():
    pool = BlockPool(6, 4)
    shared, idle = fill(pool, HASHES[:2])
    pool.free([idle])
    assert pool.num_needed([shared, idle], 2) == 3


def test_of_two_blocks_with_one_content_the_first_stays():
    pool = BlockPool(4, 4)
    first, second = fill(pool, [HASHES[0], HASHES[0]])
    assert pool.lookup(HASHES[:1]) == [first]
    pool.free([second])
    assert pool.lookup(HASHES[:1]) == [first]
    assert pool.allocate(1) != [first]
    pool.check_integrity({first: 1, second: 1})


def test_a_block_without_owner_is_not_registered():
    pool = BlockPool(4, 4)
    with pytest.raises(ValueError, match="no owner"):
        pool.register(1, HASHES[0])


def test_events_are_the_net_change():
    pool = BlockPool(3, 4)
    blocks = fill(pool, HASHES[:2])
    events = pool.drain_events()
    assert (events.stored, events.removed) == (HASHES[:2], [])
    pool.free(blocks)
    taken = pool.allocate(1)  # evicts hash 1
    assert taken is not None
    pool.register(taken[0], HASHES[2])
    pool.free(taken)
    pool.allocate(2)  # evicts hash 2, which nobody heard of, and hash 0
    events = pool.drain_events()
    assert events.stored == []
    assert set(events.removed) == {HASHES[0], HASHES[1]}
    assert pool.drain_events().removed == []


def test_pending_events_do_not_outgrow_the_pool():
    pool = BlockPool(5, 4)
    for number in range(200):
        pool.free(fill(pool, block_hashes([number] * 4, 1, ROOT)))
    events = pool.drain_events()
    assert len(events.stored) == 4
    assert events.removed == []


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(4, 4, enable_prefix_caching=False)
    fill(pool, HASHES[:2])
    assert pool.lookup(HASHES[:2]) == []
    assert pool.drain_events().stored == []


def test_reset_forgets_content_and_leaves_owners():
    pool = BlockPool(5, 4)
    used = fill(pool, HASHES[:2])
    pool.free(fill(pool, HASHES[2:4]))
    pool.drain_events()
    pool.reset_cache()
    assert pool.snapshot() == []
    assert pool.lookup(HASHES[:4]) == []
    assert set(pool.drain_events().removed) == set(HASHES[:4])
    pool.check_integrity(Counter(used))
    pool.register(used[0], HASHES[0])
    assert pool.lookup(HASHES[:1]) == used[:1]


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ({1: 1, 2: 2}, "block 2 counts 1 references, its owners are 2"),
        ({1: 1}, "block 2 counts 1 references, its owners are 0"),
        ({1: 1, 2: 1, 3: 1}, "block 3 counts 0 references"),
        ({1: 1, 2: 1, 0: 1}, "not in circulation"),
        ({1: 1, 2: 1, 9: 1}, "not in circulation"),
    ],
)
def test_integrity_names_what_differs(owners, message):
    pool = BlockPool(4, 4)
    assert pool.allocate(2) == [1, 2]
    pool.check_integrity({1: 1, 2: 1})
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(owners)


def test_integrity_sees_a_broken_free_list_and_a_broken_index():
    pool = BlockPool(4, 4)
    blocks = fill(pool, HASHES[:1])
    pool._free.append(blocks[0])
    with pytest.raises(AssertionError, match="on the free list"):
        pool.check_integrity(Counter(blocks))
    pool = BlockPool(4, 4)
    blocks = fill(pool, HASHES[:1])
    pool._block_of[HASHES[1]] = blocks[0]
    with pytest.raises(AssertionError, match="does not have"):
        pool.check_integrity(Counter(blocks))


class BlockPoolMachine(RuleBasedStateMachine):
    """Against a model that knows, for each holder, its blocks and what it registered them as."""

    NUM_BLOCKS = 9

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS, 4)
        self.holders: list[list[int]] = []
        # What every block was last registered as, while that may be found.
        self.content: dict[int, bytes] = {}
        self.listener: set[bytes] = set()

    @rule(num=st.integers(0, 5))
    def allocate(self, num: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(num)
        assert (blocks is None) == (num > free)
        if blocks is None:
            return
        owned = {block_id for holder in self.holders for block_id in holder}
        assert not owned & set(blocks), "a block in use was handed out"
        assert len(set(blocks)) == num
        for block_id in blocks:
            self.content.pop(block_id, None)
        self.holders.append(blocks)

    @rule(start=st.integers(0, 5), length=st.integers(1, 5))
    def hit(self, start: int, length: int) -> None:
        found = self.pool.lookup(HASHES[start : start + length])
        assert [self.content[block_id] for block_id in found] == HASHES[start : start + len(found)]
        if len(found) < length:
            assert HASHES[start + len(found)] not in self.content.values()
        taken = sum(1 for block_id in found if not any(block_id in holder for holder in self.holders))
        assert self.pool.num_needed(found, 2) == 2 + taken
        self.pool.acquire(found)
        self.holders.append(found)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), number=st.integers(0, 9))
    def register(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from(sorted({b for holder in self.holders for b in holder})))
        self.pool.register(block_id, HASHES[number])
        if block_id not in self.content and HASHES[number] not in self.content.values():
            self.content[block_id] = HASHES[number]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.free(self.holders.pop(index))

    @rule()
    def listen(self) -> None:
        events = self.pool.drain_events()
        assert not set(events.stored) & set(events.removed)
        assert set(events.removed) <= self.listener
        assert not set(events.stored) & self.listener
        self.listener = (self.listener - set(events.removed)) | set(events.stored)
        assert self.listener == set(self.pool.snapshot())

    @rule()
    def reset(self) -> None:
        self.pool.reset_cache()
        self.content.clear()

    @invariant()
    def owners_and_counts_agree(self) -> None:
        owners: Counter[int] = Counter()
        for holder in self.holders:
            owners.update(holder)
        self.pool.check_integrity(owners)
        assert self.pool.num_used == len(owners)
        assert self.pool.num_free + self.pool.num_used == self.NUM_BLOCKS - 1
        assert set(self.pool.snapshot()) == set(self.content.values())

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.free(holder)
        assert self.pool.num_used == 0
        self.pool.check_integrity({})


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
