from __future__ import annotations

import pytest

from disagg.sim.events import EventLoop
from disagg.sim.links import Network, PrivateLinks, SharedLinks

BANDWIDTH = {"a": 100.0, "b": 100.0, "c": 50.0}


def send(loop: EventLoop, network: Network, at: float, source: str, target: str, size: float) -> list[float]:
    """Return a list that gets the time at which the transfer has arrived."""
    arrived: list[float] = []
    loop.at(at, lambda _: network.send(source, target, size, lambda: arrived.append(loop.now)))
    return arrived


def test_events_happen_by_time_then_in_the_order_they_were_set() -> None:
    loop, seen = EventLoop(), []
    for time, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        loop.at(time, seen.append, name)
    loop.run()
    assert seen == ["a", "b", "c"] and loop.now == 2.0


def test_private_transfers_do_not_meet() -> None:
    loop = EventLoop()
    network = PrivateLinks(loop, BANDWIDTH, latency_s=0.5)
    ends = [send(loop, network, 1, "a", "b", 200), send(loop, network, 1, "a", "b", 200)]
    slow = send(loop, network, 1, "a", "c", 200)
    loop.run()
    assert ends == [[3.5], [3.5]] and slow == [5.5]
    assert network.num_bytes == 600


def test_shared_transfers_divide_a_link_in_time() -> None:
    loop = EventLoop()
    network = SharedLinks(loop, BANDWIDTH, latency_s=0.25)
    first = send(loop, network, 0, "a", "b", 300)  # alone for 1 s, then half the link until it has ended
    second = send(loop, network, 1, "a", "b", 100)
    loop.run()
    # From 1 s on both go at 50: the second takes 2 s, the first has 100 left then and is alone again.
    assert second == [pytest.approx(3.25)]
    assert first == [pytest.approx(4.25)]


def test_shared_transfers_go_at_the_smaller_share() -> None:
    loop = EventLoop()
    network = SharedLinks(loop, BANDWIDTH)
    narrow = send(loop, network, 0, "a", "c", 50)
    wide = send(loop, network, 0, "b", "a", 100)
    loop.run()
    assert narrow == [1.0] and wide == [1.0]  # other directions of a link don't share


def test_receiving_link_is_shared_too() -> None:
    loop = EventLoop()
    network = SharedLinks(loop, BANDWIDTH)
    ends = [send(loop, network, 0, "a", "c", 100), send(loop, network, 0, "b", "c", 100)]
    loop.run()
    assert ends == [[4.0], [4.0]]
