"""Leases on virtual time: every transition, and random histories against a model."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from disagg.errors import KVLostError
from disagg.transfer.leases import LeaseTable
from disagg.types import KVHandle

LEASE_S = 10.0


def opened(table: LeaseTable, request_id: str = "r", now: float = 0.0) -> KVHandle:
    key = secrets.token_bytes(16)
    table.publish(request_id, key, (3, 1, 4), 11, now)
    return KVHandle("w", "i", request_id, key, 11)


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(LEASE_S)


def assert_lost(table: LeaseTable, handle: KVHandle, now: float) -> None:
    """Nothing that a reader can do has an effect any more."""
    with pytest.raises(KVLostError):
        table.lookup(handle, now)
    with pytest.raises(KVLostError):
        table.renew(handle, now)
    assert table.release(handle, 0, now) is False


def test_live_lease_is_found_with_its_blocks(table: LeaseTable) -> None:
    handle = opened(table)
    lease = table.lookup(handle, LEASE_S - 0.001)
    assert lease.block_ids == (3, 1, 4)
    assert lease.num_tokens == 11
    assert table.next_expiry() == LEASE_S


def test_publish_twice_is_refused_and_changes_nothing(table: LeaseTable) -> None:
    handle = opened(table)
    with pytest.raises(ValueError, match="published already"):
        opened(table, now=5.0)
    assert table.lookup(handle, 9.0).block_ids == (3, 1, 4)
    assert len(table) == 1


def test_live_to_released(table: LeaseTable) -> None:
    handle = opened(table)
    assert table.release(handle, 0, 1.0) is True
    assert_lost(table, handle, 1.0)
    assert table.drop("r") is False
    assert table.sweep(100.0) == []


def test_live_to_dropped(table: LeaseTable) -> None:
    handle = opened(table)
    assert table.drop("r") is True
    assert table.drop("r") is False
    assert_lost(table, handle, 1.0)
    assert table.sweep(100.0) == []


def test_live_to_expired_to_swept(table: LeaseTable) -> None:
    handle = opened(table)
    assert table.sweep(LEASE_S - 0.001) == []
    assert_lost(table, handle, LEASE_S)
    # Expired, yet its blocks are not given back before the sweep says so.
    assert len(table) == 1
    assert table.sweep(LEASE_S) == ["r"]
    assert table.sweep(LEASE_S) == []
    assert table.next_expiry() is None


def test_expired_to_dropped(table: LeaseTable) -> None:
    handle = opened(table)
    assert_lost(table, handle, LEASE_S)
    assert table.drop("r") is True
    assert table.sweep(LEASE_S) == []


def test_live_to_live_by_renewal(table: LeaseTable) -> None:
    handle = opened(table)
    for now in (9.0, 18.0, 27.0):
        table.renew(handle, now)
    assert table.sweep(36.9) == []
    assert table.next_expiry() == 37.0
    assert table.sweep(37.0) == ["r"]


def test_an_expired_lease_is_not_renewed_back_to_life(table: LeaseTable) -> None:
    handle = opened(table)
    with pytest.raises(KVLostError):
        table.renew(handle, LEASE_S)
    assert_lost(table, handle, LEASE_S - 1.0 + 1.0)
    assert table.sweep(LEASE_S) == ["r"]


def test_clear_gives_everything_back_once(table: LeaseTable) -> None:
    handles = [opened(table, f"r{index}") for index in range(3)]
    assert table.clear() == ["r0", "r1", "r2"]
    assert table.clear() == []
    for handle in handles:
        assert_lost(table, handle, 0.0)


def test_published_again_is_another_lease(table: LeaseTable) -> None:
    old = opened(table)
    table.drop("r")
    new = opened(table)
    assert_lost(table, old, 1.0)
    assert table.lookup(new, 1.0).request_id == "r"


def test_every_reason_for_a_refusal_reads_the_same(table: LeaseTable) -> None:
    handle = opened(table)
    opened(table, "expired", now=-LEASE_S)
    wrong = [
        replace(handle, request_id="unknown"),
        replace(handle, request_id="expired"),
        replace(handle, key=bytes(16)),
        replace(handle, key=handle.key[:-1]),
        replace(handle, key=b""),
        replace(handle, num_tokens=12),
        replace(handle, num_tokens=10),
    ]
    messages = set()
    for claim in wrong:
        with pytest.raises(KVLostError) as caught:
            table.lookup(claim, 1.0)
        messages.add(caught.value.message)
        assert table.release(claim, 0, 1.0) is False
    assert len(messages) == 1
    assert table.lookup(handle, 1.0)


class Histories(RuleBasedStateMachine):
    """The table against a model: which handles are live until when, and whose blocks were given back."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(LEASE_S)
        self.now = 0.0
        # Of each lease ever opened, by key.
        self.expires: dict[bytes, float] = {}
        self.open: dict[str, KVHandle] = {}
        self.given_back: list[bytes] = []

    def _end(self, request_id: str) -> None:
        self.given_back.append(self.open.pop(request_id).key)

    def _is_live(self, handle: KVHandle) -> bool:
        return self.open.get(handle.request_id) == handle and self.now < self.expires[handle.key]

    @rule(target=handles, name=st.sampled_from("abc"))
    def publish(self, name: str) -> KVHandle:
        key = secrets.token_bytes(16)
        handle = KVHandle("w", "i", name, key, 5)
        if name in self.open:
            with pytest.raises(ValueError, match="published already"):
                self.table.publish(name, key, (1,), 5, self.now)
            return self.open[name]
        self.table.publish(name, key, (1, 2), 5, self.now)
        self.open[name], self.expires[key] = handle, self.now + LEASE_S
        return handle

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 9.999, 10.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(handle=handles)
    def lookup(self, handle: KVHandle) -> None:
        if self._is_live(handle):
            assert self.table.lookup(handle, self.now).key == handle.key
        else:
            with pytest.raises(KVLostError):
                self.table.lookup(handle, self.now)

    @rule(handle=handles)
    def renew(self, handle: KVHandle) -> None:
        if self._is_live(handle):
            self.table.renew(handle, self.now)
            self.expires[handle.key] = self.now + LEASE_S
        else:
            with pytest.raises(KVLostError):
                self.table.renew(handle, self.now)

    @rule(handle=handles)
    def release(self, handle: KVHandle) -> None:
        live = self._is_live(handle)
        assert self.table.release(handle, 0, self.now) is live
        if live:
            self._end(handle.request_id)

    @rule(handle=consumes(handles))
    def forge(self, handle: KVHandle) -> None:
        assert self.table.release(replace(handle, key=secrets.token_bytes(16)), 0, self.now) is False

    @rule(name=st.sampled_from("abc"))
    def drop(self, name: str) -> None:
        was_open = name in self.open
        assert self.table.drop(name) is was_open
        if was_open:
            self._end(name)

    @rule()
    def sweep(self) -> None:
        expired = self.table.sweep(self.now)
        due = {name for name, handle in self.open.items() if self.expires[handle.key] <= self.now}
        assert set(expired) == due
        assert len(expired) == len(due)
        for name in expired:
            self._end(name)

    @invariant()
    def blocks_are_given_back_once(self) -> None:
        assert len(self.given_back) == len(set(self.given_back))
        assert len(self.table) == len(self.open)
        ends = [self.expires[handle.key] for handle in self.open.values()]
        assert self.table.next_expiry() == min(ends, default=None)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
