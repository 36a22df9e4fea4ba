"""RunningRequests: those of this front end that a client may abort by id, on whichever connection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from disagg.errors import InvalidRequestError


class RunningRequests:
    """How to abort each running request. Use it on one event loop."""

    def __init__(self) -> None:
        self._aborts: dict[str, Callable[[], None]] = {}

    @contextlib.contextmanager
    def entered(self, request_id: str, abort: Callable[[], None]) -> Iterator[None]:
        """Know the request within the block. Raises InvalidRequestError while another has its id."""
        if request_id in self._aborts:
            raise InvalidRequestError(f"request_id {request_id} is already running", param="request_id")
        self._aborts[request_id] = abort
        try:
            yield
        finally:
            del self._aborts[request_id]

    def abort(self, request_id: str) -> bool:
        """Return whether such a request ran."""
        abort = self._aborts.get(request_id)
        if abort is not None:
            abort()
        return abort is not None
