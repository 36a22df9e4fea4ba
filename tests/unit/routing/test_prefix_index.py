"""PrefixIndex against a naive model, gaps in events, its bound, and many workers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.routing.core import CORE, PYTHON, Core
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import BlockEvents

SLOTS = st.integers(0, 20)


def chain(path: list[int]) -> list[int]:
    """Hashes of a sequence of blocks: each depends on all before it, as real ones do."""
    return [hash((17, *path[: end + 1])) % 2**64 for end in range(len(path))]


# Few different blocks, so that sequences share beginnings and part.
CHAINS = st.lists(st.integers(0, 1), max_size=6).map(chain)
# What workers report may leave holes: blocks of several sequences, in any order.
BLOCKS = st.lists(CHAINS, max_size=3).flatmap(
    lambda chains: st.permutations(sorted({item for one in chains for item in one})).map(lambda a: a[:8])
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["store", "remove", "snapshot", "forget"]), SLOTS, BLOCKS),
        st.tuples(st.sampled_from(["expect", "unexpect"]), SLOTS, CHAINS),
    ),
    max_size=60,
)


class NaiveIndex:
    """The same in sets and lists, of one block at a time."""

    def __init__(self) -> None:
        self.stored: dict[int, set[int]] = {}
        self.expected: dict[int, list[list[int]]] = {}

    def store(self, slot: int, hashes: list[int]) -> None:
        self.stored.setdefault(slot, set()).update(hashes)

    def remove(self, slot: int, hashes: list[int]) -> None:
        self.stored.setdefault(slot, set()).difference_update(hashes)

    def snapshot(self, slot: int, hashes: list[int]) -> None:
        self.stored[slot] = set(hashes)

    def forget(self, slot: int) -> None:
        self.stored.pop(slot, None)

    def match(self, hashes: list[int]) -> dict[int, int]:
        depths: dict[int, int] = {}
        for slot in self.stored.keys() | self.expected.keys():
            held = self.stored.get(slot, set()).union(*self.expected.get(slot, []))
            depth = next((i for i, item in enumerate(hashes) if item not in held), len(hashes))
            if depth:
                depths[slot] = depth
        return depths


@settings(max_examples=300, deadline=None)
@given(
    OPERATIONS,
    st.lists(CHAINS, min_size=1, max_size=5),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([CORE, PYTHON]),
)
def test_index_agrees_with_a_naive_model(
    operations: list[tuple[str, int, list[int]]], queries: list[list[int]], many: int, core: Core
) -> None:
    index, naive = PrefixIndex(core=core), NaiveIndex()
    named: dict[tuple[int, tuple[int, ...]], list[object]] = {}
    with pytest.MonkeyPatch.context() as patch:
        # Both ways of holding and of counting holders.
        patch.setattr("disagg.routing.block_table._MANY", many)
        for name, slot, hashes in operations:
            key = slot, tuple(hashes)
            if name == "expect":
                node = index.expect(hashes, (slot,))
                if node is not None:
                    named.setdefault(key, []).append(node)
                    naive.expected.setdefault(slot, []).append(hashes)
            elif name == "unexpect":
                if named.get(key):
                    index.unexpect(named[key].pop(), slot)
                    naive.expected[slot].remove(hashes)
            else:
                arguments = (slot,) if name == "forget" else (slot, hashes)
                getattr(index, name)(*arguments)
                getattr(naive, name)(*arguments)
        index.check_integrity()
        for query in queries:
            expected = naive.match(query)
            assert index.match(query) == expected
            depths = index.depths(query, 24)
            found = {} if depths is None else {s: int(d) for s, d in enumerate(depths) if d}
            assert found == expected
        for (slot, _), nodes in named.items():
            for node in nodes:
                index.unexpect(node, slot)
        assert len(index) == sum(map(len, naive.stored.values()))


@pytest.mark.parametrize("core", [CORE, PYTHON])
def test_chains_that_contradict_each_other_are_not_expected(core: Core) -> None:
    index = PrefixIndex(core=core)
    kept = index.expect([1, 2, 3], (0,))
    assert kept is not None
    for nonsense in ([2, 1], [3], [5, 1], [9, 9], [1, 3], []):
        assert index.expect(nonsense, (1,)) is None
    assert index.match([2, 3]) == index.match([3]) == {}
    assert index.match([1, 2, 3]) == {0: 3}
    index.unexpect(kept, 0)
    assert len(index) == 0


def test_who_left_is_forgotten_at_once_and_its_blocks_little_by_little() -> None:
    index = PrefixIndex()
    index.store(0, range(5000))
    index.store(1, range(100))
    index.forget(0)
    assert index.match([0, 1]) == {1: 2}
    assert len(index) == 100
    index.store(0, [7000])
    assert index.match([0, 1]) == {1: 2}, "its slot is another worker's by now"
    for number in range(1200):
        index.store(1, [number % 100])
    index.check_integrity()
    assert index.num_blocks == 101


def test_match_is_the_longest_prefix_and_not_any_overlap() -> None:
    index = PrefixIndex()
    index.store(0, [1, 2, 3])
    index.store(1, [1, 3])
    index.store(2, [2, 3])
    assert index.match([1, 2, 3, 4]) == {0: 3, 1: 1}
    assert index.match([]) == {}


def test_more_workers_than_bits_of_a_machine_word() -> None:
    index = PrefixIndex()
    for slot in range(300):
        index.store(slot, range(slot % 7))
    depths = index.depths(range(10), 512)
    assert depths is not None
    assert [int(d) for d in depths[:300]] == [slot % 7 for slot in range(300)]
    assert not depths[300:].any()


def test_a_gap_asks_for_a_snapshot_until_one_comes() -> None:
    index = PrefixIndex()
    assert not index.apply(0, BlockEvents(5, stored=[9]))
    assert index.apply(0, BlockEvents(6, stored=[1, 2], snapshot=True))
    assert index.apply(0, BlockEvents(7, stored=[3]))
    assert not index.apply(0, BlockEvents(9, stored=[5]))
    assert not index.apply(0, BlockEvents(10, stored=[6]))
    assert index.match([1, 2, 3]) == {0: 3}
    assert index.apply(0, BlockEvents(11, stored=[1, 5], snapshot=True))
    assert index.match([1, 2]) == {0: 1}
    assert index.apply(0, BlockEvents(12, removed=[5]))
    assert index.match([5]) == {}


def test_events_that_came_already_change_nothing() -> None:
    index = PrefixIndex()
    index.apply(0, BlockEvents(3, stored=[1], snapshot=True))
    assert index.apply(0, BlockEvents(3, removed=[1]))
    assert index.match([1]) == {0: 1}


def test_memory_is_bounded_and_the_fullest_worker_pays() -> None:
    index = PrefixIndex(max_entries=1000)
    index.store(1, range(50))
    index.store(0, range(100, 100_000))
    assert len(index) <= 1000
    assert index.match(list(range(50))) == {1: 50}
    index.check_integrity()
    assert index.expect(range(2000), (2,)) is None
    index.check_integrity()


def test_bound_must_be_positive() -> None:
    with pytest.raises(ValueError):
        PrefixIndex(max_entries=0)
