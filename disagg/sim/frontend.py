"""FrontEnd: who asks the Router, and what it does while that is away.

As the live front end (disagg.service.router_client): without a router it places by a Router of its own on
the last view that it had. A restarted router knows only the workers that found it already; until those known
before have joined it, or had time to, the front end goes on alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from disagg.config import AdmissionConfig
from disagg.errors import DisaggError
from disagg.routing.admission import Admission, Released
from disagg.routing.router import Router
from disagg.routing.types import Placement, PlacementKind, PlacementRequest, WorkerReport


class FrontEnd:
    """make_router: called at the start and for each router after it, the front end's own included.

    router: the global one, None while it is away. admission: what stands before it. placements: by (policy,
    kind), over all routers. on_released: told what became of requests that waited.
    """

    def __init__(
        self,
        make_router: Callable[[], Router],
        *,
        dead_after_s: float,
        admission: AdmissionConfig,
        on_released: Callable[[Released], None],
    ) -> None:
        self._make_router = make_router
        self._dead_after_s = dead_after_s
        self._config = admission
        self._on_released = on_released
        # Admission that is off never lets anybody wait.
        self._queues = admission.enabled
        self.admission: Admission | None = Admission(admission, make_router())
        self._alone: Router | None = None
        self._settles_at: float | None = None
        self.placements: Counter[tuple[str, str]] = Counter()

    @property
    def router(self) -> Router | None:
        return None if self.admission is None else self.admission.router

    # -- requests ------------------------------------------------------------------------------------

    def ask(self, request: PlacementRequest, now: float) -> Placement | None:
        """Return where a request runs, None if it waits. Raises as Admission.ask."""
        if self._alone is not None and self._settled(now):
            self._alone = None
        if self._alone is not None:
            placed = self._alone.place(request, now)
            return self._counted(placed._replace(kind=PlacementKind.STALE_VIEW))
        assert self.admission is not None
        placement = self.admission.ask(request, now)
        return None if placement is None else self._counted(placement)

    def _counted(self, placement: Placement) -> Placement:
        self.placements[placement.policy, placement.kind] += 1
        return placement

    def prefilled(self, request_id: str, now: float, seconds: float | None) -> None:
        """See Admission.prefilled."""
        if self.admission is not None:
            self.admission.prefilled(request_id, now, seconds)
            self._settle(now)
        if self._alone is not None:
            self._alone.prefilled(request_id)

    def finished(self, request_id: str, now: float, num_tokens: int, seconds: float | None) -> None:
        """See Admission.finished."""
        if self.admission is not None:
            self.admission.finished(request_id, now, num_tokens, seconds)
            self._settle(now)
        if self._alone is not None:
            self._alone.finished(request_id)

    def _settle(self, now: float) -> None:
        """Pass on who is let in by what has changed."""
        if not self._queues or self.admission is None or not len(self.admission.queue):
            return
        for released in self.admission.release(now):
            if not isinstance(released.outcome, DisaggError):
                self._counted(released.outcome)
            self._on_released(released)

    # -- workers -------------------------------------------------------------------------------------

    def worker_report(self, report: WorkerReport, now: float) -> bool:
        """Pass a report to the router; True: the worker must send all of its blocks."""
        if self.router is None:
            return False
        if self._alone is not None:
            # The view that comes back from a router has loads and no blocks.
            self._alone.worker_report(dataclasses.replace(report, blocks=None), now)
        wants_all = self.router.worker_report(report, now)
        self._settle(now)
        return wants_all

    def worker_left(self, worker_id: str, incarnation: str, now: float) -> None:
        if self.router is not None:
            self.router.worker_left(worker_id, incarnation)
            self._settle(now)

    # -- the router's own faults ---------------------------------------------------------------------

    def lose_router(self, now: float) -> list[PlacementRequest]:
        """The router's process is gone; does nothing where it is away already.

        Returns who waited there, and has to ask again.
        """
        if self.admission is None or self.router is None:
            return []
        if self._alone is None:
            self._alone = self._make_router()
            for state in self.router.view.workers.values():
                self._alone.worker_report(WorkerReport(state.info, state.status, state.load), now)
        waiting = [item.request for item in self.admission.queue]
        self.admission = self._settles_at = None
        return waiting

    def restart_router(self, now: float) -> None:
        """A new router begins, without workers and without charges."""
        if self.admission is None:
            self.admission = Admission(self._config, self._make_router())
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
