"""What a client asks of a request's timing, from its headers: there in milliseconds, here in seconds."""

from __future__ import annotations

import math

from starlette.requests import Request

from disagg.errors import InvalidRequestError

_MAX_HEADER_MS = 1e9


def objectives(request: Request) -> tuple[float, float]:
    """Return (TTFT, TPOT), inf where none is given. Raises InvalidRequestError naming the header."""
    return _seconds(request, "x-slo-ttft-ms"), _seconds(request, "x-slo-tpot-ms")


def request_timeout(request: Request, limit_s: float) -> float:
    """Return the time-out, at most `limit_s`. Raises InvalidRequestError naming the header."""
    return min(_seconds(request, "x-request-timeout-ms"), limit_s)


def given(seconds: float) -> float | None:
    """Return None for what was not given."""
    return None if seconds == math.inf else seconds


def _seconds(request: Request, header: str) -> float:
    value = request.headers.get(header)
    if value is None:
        return math.inf
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds <= _MAX_HEADER_MS:
        raise InvalidRequestError(f"{header} must be a number of milliseconds above 0", param=header)
    return milliseconds / 1000
