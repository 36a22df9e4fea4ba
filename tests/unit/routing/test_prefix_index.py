"""PrefixIndex against a naive model, gaps in events, its bound, and many workers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import BlockEvents

SLOTS = st.integers(0, 20)
BLOCKS = st.lists(st.integers(0, 12), max_size=8)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "snapshot", "forget", "assume", "retract"]), SLOTS, BLOCKS),
    max_size=60,
)


class NaiveIndex:
    def __init__(self) -> None:
        self.stored: dict[int, set[int]] = {}
        self.assumed: dict[int, list[int]] = {}

    def store(self, slot: int, hashes: list[int]) -> None:
        self.stored.setdefault(slot, set()).update(hashes)

    def remove(self, slot: int, hashes: list[int]) -> None:
        self.stored.setdefault(slot, set()).difference_update(hashes)

    def snapshot(self, slot: int, hashes: list[int]) -> None:
        self.stored[slot] = set(hashes)

    def forget(self, slot: int) -> None:
        self.stored.pop(slot, None)
        self.assumed.pop(slot, None)

    def assume(self, slot: int, hashes: list[int]) -> None:
        self.assumed.setdefault(slot, []).extend(hashes)

    def retract(self, slot: int, hashes: list[int]) -> None:
        for item in hashes:
            if item in self.assumed.get(slot, []):
                self.assumed[slot].remove(item)

    def match(self, hashes: list[int]) -> dict[int, int]:
        depths: dict[int, int] = {}
        for slot in self.stored.keys() | self.assumed.keys():
            held = self.stored.get(slot, set()) | set(self.assumed.get(slot, []))
            depth = next((i for i, item in enumerate(hashes) if item not in held), len(hashes))
            if depth:
                depths[slot] = depth
        return depths


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.lists(BLOCKS, min_size=1, max_size=5))
def test_index_agrees_with_a_naive_model(
    operations: list[tuple[str, int, list[int]]], queries: list[list[int]]
) -> None:
    index, naive = PrefixIndex(), NaiveIndex()
    for name, slot, hashes in operations:
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
    assert not index.assume(2, range(2000))
    index.check_integrity()


def test_bound_must_be_positive() -> None:
    with pytest.raises(ValueError):
        PrefixIndex(max_entries=0)
