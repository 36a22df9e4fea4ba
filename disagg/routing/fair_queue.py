"""FairQueue: the waiting room of admission. Classes, tenants within a class, deadlines within a tenant.

    priority ──► tenants, by start-time fair queueing ──► each one's requests, earliest deadline first

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM '96): each tenant has a tag, which goes up by
work / weight with whatever is taken of it, and the tenant with the smallest tag is next. Whoever comes back
starts at the tag of whoever is served, so idling earns no credit. Pure: no clock, no I/O.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from disagg.routing.types import PlacementRequest


@dataclass(slots=True, order=True)
class Waiting:
    """A request in the queue; ordered by when it must be under way, then by arrival.

    start_by: when it must be with a worker to meet its objective. work_s: seconds of the cluster that it
    takes. asked: whether start_by follows from what the client asked for, rather than from our own guess of
    what it expects. arrived, deadline: on the same clock, deadline None for none. promised_s: time to the
    first token with which it was admitted.
    """

    start_by: float
    number: int
    request: PlacementRequest = field(compare=False)
    work_s: float = field(compare=False)
    arrived: float = field(compare=False)
    deadline: float | None = field(compare=False, default=None)
    promised_s: float | None = field(compare=False, default=None)
    asked: bool = field(compare=False, default=True)


class _Flow:
    """One tenant in one class. tag: where its next request starts. work_s: of all its requests."""

    __slots__ = ("items", "tag", "weight", "work_s")

    def __init__(self, tag: float, weight: float) -> None:
        self.tag, self.weight = tag, weight
        self.items: list[Waiting] = []
        self.work_s = 0.0


class _Class:
    """The tenants of one priority. clock: the tag of whatever was taken last."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.flows: dict[str, _Flow] = {}
        # Tenants without a request whose tag is still ahead of the clock.
        self.left: dict[str, float] = {}

    @property
    def work_s(self) -> float:
        return sum(flow.work_s for flow in self.flows.values())

    def tag(self, tenant: str) -> float:
        """Return where a request of the tenant would start if it were its only one."""
        flow = self.flows.get(tenant)
        return max(self.clock, self.left.get(tenant, 0.0)) if flow is None else flow.tag

    def next(self) -> tuple[str, _Flow]:
        """Return whose turn it is; of equal tags the earliest deadline's."""
        return min(self.flows.items(), key=lambda item: (item[1].tag, item[1].items[0]))

    def charge(self, tenant: str, flow: _Flow, work_s: float) -> None:
        self.clock = max(self.clock, flow.tag)
        flow.tag += work_s / flow.weight

    def leave(self, tenant: str) -> None:
        """Keep the tag of a tenant that has nothing left here, as long as it matters."""
        flow = self.flows.pop(tenant)
        self.left = {name: tag for name, tag in self.left.items() if tag > self.clock}
        if flow.tag > self.clock:
            self.left[tenant] = flow.tag


class FairQueue:
    """At most max_size requests, and of one tenant no more than `patience` times the places that are free.

    So one tenant alone gets patience / (1 + patience) of the queue, and what it leaves is there for others
    when they come (dynamic thresholds; Choudhury and Hahne, 1998). weight_of: a tenant's share.
    """

    def __init__(
        self, max_size: int, weight_of: Callable[[str], float] = lambda tenant: 1.0, *, patience: float = 8.0
    ) -> None:
        self._max_size = max_size
        self._weight_of = weight_of
        self._patience = patience
        self._classes: dict[int, _Class] = {}
        self._places: dict[str, tuple[int, Waiting]] = {}
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._places

    def __iter__(self) -> Iterator[Waiting]:
        return (item for _, item in self._places.values())

    def has_place(self, tenant: str) -> bool:
        """Whether a request of the tenant may join."""
        free = self._max_size - len(self._places)
        return free > 0 and self._counts.get(tenant, 0) < max(1.0, self._patience * free)

    def push(self, item: Waiting) -> None:
        """Add a request. Raises ValueError where it is here already or has no place."""
        request = item.request
        if request.request_id in self._places or not self.has_place(request.tenant):
            raise ValueError(f"{request.request_id} can't join the queue")
        group = self._classes.setdefault(request.priority, _Class())
        flow = group.flows.get(request.tenant)
        if flow is None:
            flow = _Flow(group.tag(request.tenant), self._weight_of(request.tenant))
            group.left.pop(request.tenant, None)
            group.flows[request.tenant] = flow
        insort(flow.items, item)
        flow.work_s += item.work_s
        self._places[request.request_id] = request.priority, item
        self._counts[request.tenant] = self._counts.get(request.tenant, 0) + 1

    def peek(self) -> Waiting:
        """Return whose turn it is. Raises IndexError where nobody waits."""
        if not self._classes:
            raise IndexError("nobody waits")
        return self._classes[min(self._classes)].next()[1].items[0]

    def pop(self) -> Waiting:
        """Take out what `peek` returns, and charge its tenant for it."""
        item = self.peek()
        group = self._classes[item.request.priority]
        group.charge(item.request.tenant, group.flows[item.request.tenant], item.work_s)
        self._take(item)
        return item

    def remove(self, request_id: str) -> Waiting | None:
        """Take a request out wherever it is, at nobody's charge; None where it is not here."""
        place = self._places.get(request_id)
        if place is None:
            return None
        self._take(place[1])
        return place[1]

    def _take(self, item: Waiting) -> None:
        request = item.request
        group = self._classes[request.priority]
        flow = group.flows[request.tenant]
        flow.items.remove(item)
        flow.work_s -= item.work_s
        if not flow.items:
            group.leave(request.tenant)
        if not group.flows:
            del self._classes[request.priority]
        del self._places[request.request_id]
        self._counts[request.tenant] -= 1
        if not self._counts[request.tenant]:
            del self._counts[request.tenant]

    # -- what to expect ------------------------------------------------------------------------------

    def ahead_s(self, item: Waiting) -> float:
        """Return how much work would be done before a request that came now, if nobody came after it."""
        if not self._classes:
            return 0.0
        request = item.request
        ahead = sum(group.work_s for priority, group in self._classes.items() if priority < request.priority)
        group = self._classes.get(request.priority)
        if group is None:
            return ahead
        flow = group.flows.get(request.tenant)
        own, weight = 0.0, self._weight_of(request.tenant) if flow is None else flow.weight
        if flow is not None:
            own = sum(other.work_s for other in flow.items[: bisect_right(flow.items, item)])
        tag = group.tag(request.tenant) + own / weight
        for tenant, other in group.flows.items():
            if tenant != request.tenant:
                ahead += min(other.work_s, max(0.0, tag - other.tag) * other.weight)
        return ahead + own

    def delays(self, item: Waiting, now: float) -> bool:
        """Whether somebody of the same tenant and class, due later, would start later than asked for because
        of it. Who asked for nothing waits as the order of the queue has it.
        """
        group = self._classes.get(item.request.priority)
        flow = None if group is None else group.flows.get(item.request.tenant)
        if flow is None:
            return False
        before = self.ahead_s(item)
        for other in flow.items[bisect_right(flow.items, item) :]:
            if other.asked and now + before <= other.start_by < now + before + item.work_s:
                return True
            before += other.work_s
        return False
