"""FairQueue: bounded, by class, fair between tenants, by deadline within one; nobody starves."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fakes import request

from disagg.routing.fair_queue import FairQueue, Waiting

TENANTS = ("a", "b", "c")
_item = st.tuples(
    st.sampled_from(TENANTS), st.integers(-1, 1), st.floats(0, 100), st.floats(0.001, 1), st.booleans()
)


def waiting(
    number: int, tenant: str = "a", priority: int = 0, start_by: float = 0.0, work_s: float = 1.0
) -> Waiting:
    return Waiting(start_by, number, request(f"r{number}", tenant=tenant, priority=priority), work_s, 0.0)


def order(queue: FairQueue) -> list[Waiting]:
    return [queue.pop() for _ in range(len(queue))]


@settings(max_examples=200, deadline=None)
@given(st.lists(_item, max_size=60), st.integers(1, 40))
def test_it_is_bounded_and_loses_nobody(
    rows: list[tuple[str, int, float, float, bool]], max_size: int
) -> None:
    """Whatever comes and leaves, the bound holds, and everybody who joined leaves exactly once."""
    queue, inside, left = FairQueue(max_size), set[str](), Counter[str]()
    for number, (tenant, priority, start_by, work_s, leaves) in enumerate(rows):
        item = waiting(number, tenant, priority, start_by, work_s)
        if queue.has_place(tenant):
            queue.push(item)
            inside.add(item.request.request_id)
        else:
            with pytest.raises(ValueError, match="can't join"):
                queue.push(item)
        if leaves and inside:
            gone = queue.remove(min(inside))
            assert gone is not None
            left[gone.request.request_id] += 1
            inside.discard(gone.request.request_id)
        assert len(queue) == len(inside) <= max_size
    left.update(item.request.request_id for item in order(queue))
    assert set(left.values()) <= {1}
    with pytest.raises(IndexError):
        queue.peek()


@settings(max_examples=200, deadline=None)
@given(st.lists(_item, min_size=1, max_size=60))
def test_classes_first_then_deadlines_within_a_tenant(
    rows: list[tuple[str, int, float, float, bool]],
) -> None:
    queue = FairQueue(1000)
    for number, (tenant, priority, start_by, work_s, _) in enumerate(rows):
        queue.push(waiting(number, tenant, priority, start_by, work_s))
    taken = order(queue)
    assert [item.request.priority for item in taken] == sorted(item.request.priority for item in taken)
    for tenant in TENANTS:
        for priority in (-1, 0, 1):
            own = [i for i in taken if (i.request.tenant, i.request.priority) == (tenant, priority)]
            assert own == sorted(own)


@settings(max_examples=200, deadline=None)
@given(st.lists(_item, max_size=40), _item)
def test_work_ahead_is_what_is_served_before(
    rows: list[tuple[str, int, float, float, bool]], row: tuple[str, int, float, float, bool]
) -> None:
    """The estimate is off by at most one request of each other tenant, the one that is half-way through."""
    queue = FairQueue(1000)
    for number, (tenant, priority, start_by, work_s, _) in enumerate(rows):
        queue.push(waiting(number, tenant, priority, start_by, work_s))
    tenant, priority, start_by, work_s, _ = row
    item = waiting(len(rows), tenant, priority, start_by, work_s)
    expected = queue.ahead_s(item)
    queue.push(item)
    taken = order(queue)
    actual = sum(other.work_s for other in taken[: taken.index(item)])
    assert abs(actual - expected) <= sum(
        max((other.work_s for other in taken if other.request.tenant == name), default=0.0)
        for name in TENANTS
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 3.0, "b": 2.0, "c": 1.0}])
def test_tenants_get_their_shares_whatever_they_send(seed: int, weights: dict[str, float]) -> None:
    """Random arrivals, one tenant of which sends ten times as much in pieces of another size."""
    rng = random.Random(seed)
    queue = FairQueue(200, lambda tenant: weights[tenant])
    served: Counter[str] = Counter()
    for number in range(20_000):
        tenant = rng.choices(TENANTS, (10, 2, 2))[0]
        if queue.has_place(tenant):
            work_s = rng.expovariate(2.0 if tenant == "a" else 0.5)
            queue.push(waiting(number, tenant, start_by=rng.random(), work_s=work_s))
        if number % 4 == 0:
            taken = queue.pop()
            served[taken.request.tenant] += taken.work_s
    shares = {tenant: served[tenant] / sum(served.values()) for tenant in TENANTS}
    for tenant, weight in weights.items():
        assert shares[tenant] == pytest.approx(weight / sum(weights.values()), rel=0.1)


def test_nobody_starves_behind_a_flood() -> None:
    """One request of a tenant waits for about one of each other tenant's, not for their backlog."""
    queue = FairQueue(500)
    for number in range(300):
        queue.push(waiting(number, "a", start_by=0.0))
    queue.push(waiting(999, "b", start_by=100.0))
    assert [item.request.tenant for item in order(queue)].index("b") <= 1


def test_idling_earns_no_credit() -> None:
    queue = FairQueue(500)
    for number in range(200):
        queue.push(waiting(number, "a"))
    for _ in range(100):
        queue.pop()
    for number in range(1000, 1100):
        queue.push(waiting(number, "b"))
    first = [queue.pop().request.tenant for _ in range(20)]
    assert 9 <= first.count("a") <= 11


def test_one_tenant_leaves_places_for_others() -> None:
    queue = FairQueue(90)
    number = 0
    while queue.has_place("a"):
        queue.push(waiting(number, "a"))
        number += 1
    assert 75 <= number < 90
    assert queue.has_place("b")


def test_it_sees_who_would_start_too_late() -> None:
    queue = FairQueue(10)
    queue.push(waiting(0, start_by=0.2, work_s=1.0))
    queue.push(waiting(1, start_by=1.5, work_s=1.0))
    assert not queue.delays(waiting(2, start_by=0.1, work_s=0.1), now=0.0)
    assert queue.delays(waiting(2, start_by=0.1, work_s=0.3), now=0.0)
    assert not queue.delays(waiting(2, start_by=9.0, work_s=0.3), now=0.0), "it would come last"
    assert not queue.delays(waiting(2, "b", start_by=0.1, work_s=0.3), now=0.0), "another's share is its own"


def test_who_asked_for_nothing_keeps_nobody_out() -> None:
    queue = FairQueue(10)
    queue.push(replace(waiting(1, start_by=1.5, work_s=1.0), asked=False))
    assert not queue.delays(waiting(2, start_by=0.1, work_s=3.0), now=0.0)
