"""KV transfers on virtual time, each with bandwidth for itself or sharing its workers' links fairly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from disagg.sim.events import EventLoop

Done = Callable[[], None]


class Network(Protocol):
    """num_bytes: moved so far and under way."""

    num_bytes: float

    def send(self, source: str, target: str, num_bytes: float, done: Done) -> None:
        """Move bytes from one worker to another and call `done` when the last one has arrived."""
        ...

    def set_bandwidth(self, worker: str, bandwidth: float) -> None:
        """Change a worker's link, bytes/s in each direction."""
        ...

    def drop(self, worker: str) -> None:
        """End all transfers from and to a worker that is gone; they are never done."""
        ...


class PrivateLinks:
    """Every transfer has the whole bandwidth, as in splitwise-sim. bandwidth: worker id -> bytes/s.

    A transfer keeps the bandwidth that it began with.
    """

    def __init__(self, loop: EventLoop, bandwidth: dict[str, float], latency_s: float = 0.0) -> None:
        self._loop = loop
        self._bandwidth = dict(bandwidth)
        self._latency_s = latency_s
        self._drops = dict.fromkeys(bandwidth, 0)
        self.num_bytes = 0.0

    def send(self, source: str, target: str, num_bytes: float, done: Done) -> None:
        self.num_bytes += num_bytes
        slower = min(self._bandwidth[source], self._bandwidth[target])
        drops = self._drops[source] + self._drops[target]
        end = self._loop.now + self._latency_s + num_bytes / slower
        self._loop.at(end, self._end, (source, target, drops, done))

    def _end(self, transfer: tuple[str, str, int, Done]) -> None:
        source, target, drops, done = transfer
        if drops == self._drops[source] + self._drops[target]:
            done()

    def set_bandwidth(self, worker: str, bandwidth: float) -> None:
        self._bandwidth[worker] = bandwidth

    def drop(self, worker: str) -> None:
        self._drops[worker] += 1


def _call(done: Done) -> None:
    done()


@dataclass(slots=True, eq=False)
class _Flow:
    """One transfer. rate: bytes/s since `since`. version: changes with it, so that old ends are void."""

    out: _End
    into: _End
    left: float
    done: Done
    since: float
    rate: float = 0.0
    version: int = 0


@dataclass(slots=True, eq=False)
class _End:
    """One direction of one worker's link. flows is a dict for its order: the same seed, the same bytes."""

    bandwidth: float
    flows: dict[_Flow, None]


class SharedLinks:
    """Each worker has one link, full duplex, whose transfers share each direction evenly.

    A transfer goes at the smaller of its two shares. What it leaves on its faster side is not given to
    others: max-min fairness would finish some of them sooner. bandwidth: worker id -> bytes/s.
    """

    def __init__(self, loop: EventLoop, bandwidth: dict[str, float], latency_s: float = 0.0) -> None:
        self._loop = loop
        self._out = {worker: _End(own, {}) for worker, own in bandwidth.items()}
        self._in = {worker: _End(own, {}) for worker, own in bandwidth.items()}
        self._latency_s = latency_s
        self.num_bytes = 0.0

    def send(self, source: str, target: str, num_bytes: float, done: Done) -> None:
        self.num_bytes += num_bytes
        flow = _Flow(self._out[source], self._in[target], num_bytes, done, self._loop.now)
        flow.out.flows[flow] = None
        flow.into.flows[flow] = None
        self._share(flow)

    def set_bandwidth(self, worker: str, bandwidth: float) -> None:
        for end in (self._out[worker], self._in[worker]):
            end.bandwidth = bandwidth
            for flow in end.flows:
                self._set_rate(flow)

    def drop(self, worker: str) -> None:
        for flow in (*self._out[worker].flows, *self._in[worker].flows):
            self._remove(flow)

    def _share(self, changed: _Flow) -> None:
        """Set new rates for all transfers that meet a changed one at either end."""
        for flow in changed.out.flows:
            self._set_rate(flow)
        for flow in changed.into.flows:
            self._set_rate(flow)

    def _set_rate(self, flow: _Flow) -> None:
        out, into = flow.out, flow.into
        rate = min(out.bandwidth / len(out.flows), into.bandwidth / len(into.flows))
        if rate == flow.rate:
            return
        now = self._loop.now
        flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
        flow.since, flow.rate = now, rate
        flow.version += 1
        self._loop.at(now + flow.left / rate, self._end_flow, (flow, flow.version))

    def _end_flow(self, event: tuple[_Flow, int]) -> None:
        flow, version = event
        if version != flow.version:
            return
        self._remove(flow)
        if self._latency_s:
            self._loop.at(self._loop.now + self._latency_s, _call, flow.done)
        else:
            flow.done()

    def _remove(self, flow: _Flow) -> None:
        del flow.out.flows[flow], flow.into.flows[flow]
        flow.version += 1
        self._share(flow)
