"""FrontEnd: who asks the Router, and what it does while that is away.

As the live front end (disagg.service.router_client): without a router it places by a Router of its own on
the last view that it had. A restarted router knows only the workers that found it already; until those known
before have joined it, or had time to, the front end goes on alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from disagg.routing.router import Router
from disagg.routing.types import Placement, PlacementKind, PlacementRequest, WorkerReport


class FrontEnd:
    """make_router: called at the start and for each router after it, the front end's own included.

    router: the global one, None while it is away. placements: by (policy, kind), over all routers.
    """

    def __init__(self, make_router: Callable[[], Router], *, dead_after_s: float) -> None:
        self._make_router = make_router
        self._dead_after_s = dead_after_s
        self.router: Router | None = make_router()
        self._alone: Router | None = None
        self._settles_at: float | None = None
        self.placements: Counter[tuple[str, str]] = Counter()

    # -- requests ------------------------------------------------------------------------------------

    def ask(self, request: PlacementRequest, now: float) -> Placement:
        """Return where a request runs. Raises as Router.place."""
        if self._alone is not None and self._settled(now):
            self._alone = None
        if self._alone is not None:
            placement = dataclasses.replace(self._alone.place(request, now), kind=PlacementKind.STALE_VIEW)
        else:
            assert self.router is not None
            placement = self.router.place(request, now)
        self.placements[placement.policy, placement.kind.value] += 1
        return placement

    def prefilled(self, request_id: str, now: float) -> None:
        if self.router is not None:
            self.router.prefilled(request_id, now)
        if self._alone is not None:
            self._alone.prefilled(request_id, now)

    def finished(self, request_id: str, now: float, num_tokens: int) -> None:
        """num_tokens: of the answer, 0 where it did not end by itself."""
        if self.router is not None:
            self.router.finished(request_id, now, num_tokens)
        if self._alone is not None:
            self._alone.finished(request_id, now, num_tokens)

    # -- workers -------------------------------------------------------------------------------------

    def worker_report(self, report: WorkerReport, now: float) -> bool:
        """Pass a report to the router; True: the worker must send all of its blocks."""
        if self.router is None:
            return False
        if self._alone is not None:
            # The view that comes back from a router has loads and no blocks.
            self._alone.worker_report(dataclasses.replace(report, blocks=None), now)
        return self.router.worker_report(report, now)

    def worker_left(self, worker_id: str, incarnation: str) -> None:
        if self.router is not None:
            self.router.worker_left(worker_id, incarnation)

    # -- the router's own faults ---------------------------------------------------------------------

    def lose_router(self, now: float) -> None:
        """The router's process is gone; does nothing where it is away already."""
        if self.router is None:
            return
        if self._alone is None:
            self._alone = self._make_router()
            for state in self.router.view.workers.values():
                self._alone.worker_report(WorkerReport(state.info, state.status, state.load), now)
        self.router = self._settles_at = None

    def restart_router(self, now: float) -> None:
        """A new router begins, without workers and without charges."""
        if self.router is None:
            self.router = self._make_router()
            self._settles_at = now + self._dead_after_s

    def _settled(self, now: float) -> bool:
        if self.router is None or self._alone is None or self._settles_at is None:
            return False
        return now >= self._settles_at or self._alone.view.workers.keys() <= self.router.view.workers.keys()

    # -- state ---------------------------------------------------------------------------------------

    @property
    def num_charges(self) -> int:
        """Requests that some router counts on a worker."""
        return sum(router.view.num_charges for router in (self.router, self._alone) if router is not None)
