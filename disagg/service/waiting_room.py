"""WaitingRoom: Admission on an event loop. Whoever must wait asks again and again, one call at a time."""

from __future__ import annotations

import asyncio

from disagg.errors import DisaggError, NoCapacityError
from disagg.routing.admission import Admission
from disagg.routing.types import Placement, PlacementRequest

# A call that waits is answered after so long, so that a router that stands still is told from a full one.
CALL_S = 0.4


class WaitingRoom:
    """Everything that changes what Admission decides on goes through here or is followed by `settle`."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._outcomes: dict[str, asyncio.Future[Placement | DisaggError]] = {}

    def enter(self, request: PlacementRequest, now: float) -> Placement | None:
        """Return where a request runs, None if it waits: then call `wait`. Raises as Admission.ask."""
        if not request.resumed and request.request_id in self._outcomes:
            return None
        placement = self._admission.ask(request, now)
        if placement is None:
            self._outcomes[request.request_id] = asyncio.get_running_loop().create_future()
        return placement

    async def wait(self, request_id: str) -> Placement | None:
        """Return where a request that waits runs, None if it is to be asked for again.

        Raises what `enter` does, and DeadlineExceededError where that passes first.
        """
        outcome = self._outcomes[request_id]
        done, _ = await asyncio.wait((outcome,), timeout=CALL_S)
        if not done:
            return None
        self._outcomes.pop(request_id, None)
        if outcome.cancelled():
            raise NoCapacityError("the request has ended while it waited")
        result = outcome.result()
        if isinstance(result, DisaggError):
            raise result
        return result

    def settle(self, now: float) -> None:
        """Let in whoever can be served now."""
        for released in self._admission.release(now):
            outcome = self._outcomes.get(released.request.request_id)
            if outcome is not None and not outcome.done():
                outcome.set_result(released.outcome)

    def prefilled(self, request_id: str, now: float, seconds: float | None) -> None:
        """See Admission.prefilled."""
        self._admission.prefilled(request_id, now, seconds)

    def finished(self, request_id: str, now: float, num_tokens: int, seconds: float | None) -> None:
        """See Admission.finished."""
        self._admission.finished(request_id, now, num_tokens, seconds)
        outcome = self._outcomes.pop(request_id, None)
        if outcome is not None:
            outcome.cancel()

    def frontend_left(self, frontend_id: str) -> None:
        """See Admission.frontend_left."""
        waiting = [
            item.request.request_id
            for item in self._admission.queue
            if item.request.frontend_id == frontend_id
        ]
        self._admission.frontend_left(frontend_id)
        for request_id in waiting:
            outcome = self._outcomes.pop(request_id, None)
            if outcome is not None:
                outcome.cancel()
