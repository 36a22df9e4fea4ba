"""What can go wrong with a request, and what stops a benchmark before it starts."""

from __future__ import annotations

from enum import StrEnum


class BenchError(Exception):
    """The benchmark cannot run: `field` names the flag or the endpoint, `problem` says why."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class WarmUpError(BenchError):
    """A warm-up request failed, so no load was sent."""

    def __init__(self, failure: StreamFailure) -> None:
        super().__init__("warm-up", f"a request failed with {failure}")


class FailureKind(StrEnum):
    """Why a request does not count as served."""

    CONNECT = "connect"
    """No connection could be made."""
    HTTP_STATUS = "http_status"
    """An answer other than 200."""
    CONTENT_TYPE = "content_type"
    """200, but not an event stream."""
    PROTOCOL = "protocol"
    """Not HTTP/1.1 as it is written."""
    MALFORMED = "malformed"
    """An event that is not a well-formed completion chunk, or that comes where none may."""
    ERROR_EVENT = "error_event"
    """An error inside a stream that began with 200."""
    DISCONNECTED = "disconnected"
    """The connection closed before the response was complete."""
    NO_DONE = "no_done"
    """The response ended properly, but without `[DONE]`."""
    NO_TOKENS = "no_tokens"
    FINISH_REASON = "finish_reason"
    """None, two, or one that says the request was aborted."""
    USAGE = "usage"
    """The stream states no token count, so that the number asked for cannot be checked."""
    TOKEN_COUNT = "token_count"
    """Another number of tokens than was asked for."""
    TIMEOUT = "timeout"


class StreamFailure(Exception):
    """One request's failure. `label` is what reports count by, `detail` is for people."""

    def __init__(self, kind: FailureKind, detail: str, status: int | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail
        self.status = status

    @property
    def label(self) -> str:
        return f"http_{self.status}" if self.status is not None else self.kind.value
