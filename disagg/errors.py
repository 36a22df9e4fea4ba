"""Typed errors, each with the HTTP status and the OpenAI error type under which a client sees it.

Front ends translate in one place: `status`, `type`, `param` and `code` become the HTTP body, and
`grpc_code` the name of the gRPC status.
"""

from __future__ import annotations


class DisaggError(Exception):
    """Base of all errors that this project raises on purpose."""

    status = 500
    type = "internal_error"
    code: str | None = None
    grpc_code = "INTERNAL"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(DisaggError):
    """The operator's configuration or checkpoint can't be used; raised before anything is started."""

    type = "config_error"
    grpc_code = "FAILED_PRECONDITION"


class InvalidRequestError(DisaggError):
    """A field of a request is missing, of a wrong type or out of range; `param` names it."""

    status = 400
    type = "invalid_request_error"
    grpc_code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class AuthenticationError(DisaggError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    grpc_code = "UNAUTHENTICATED"


class ModelNotFoundError(DisaggError):
    """The request names a model that is not served here."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"
    grpc_code = "NOT_FOUND"


class RequestTooLargeError(DisaggError):
    """The body exceeds the configured bound."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    grpc_code = "RESOURCE_EXHAUSTED"


class OverloadedError(DisaggError):
    """The request was shed; `retry_after` is in seconds.

    hold_s: for so long others that ask for no less would be shed too, 0 where that is not known.
    """

    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    grpc_code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after: float, hold_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.hold_s = hold_s


class NoCapacityError(DisaggError):
    """No worker that could serve the request is alive."""

    status = 503
    type = "service_unavailable_error"
    code = "no_capacity"
    grpc_code = "UNAVAILABLE"


class DeadlineExceededError(DisaggError):
    """The request's deadline passed before it was finished."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    grpc_code = "DEADLINE_EXCEEDED"


class WorkerLostError(DisaggError):
    """A worker died or became unreachable while it held a request; the orchestrator places it again."""

    type = "worker_lost"
    grpc_code = "UNAVAILABLE"

    def __init__(self, message: str, *, worker_id: str) -> None:
        super().__init__(message)
        self.worker_id = worker_id


class RunnerLostError(DisaggError):
    """This worker can compute no further step right, and must end."""

    type = "runner_lost"
    grpc_code = "UNAVAILABLE"


class RankLostError(RunnerLostError):
    """A tensor-parallel rank of this worker died or hangs: the others are out of step."""

    type = "rank_lost"


class DeviceLostError(RunnerLostError):
    """The GPU refuses every call from now on, as after a kernel that faulted."""

    type = "device_lost"


class KVLostError(DisaggError):
    """Published KV can't be had any more: lease ended, peer gone, or bytes that failed their checksum."""

    type = "kv_lost"
    grpc_code = "UNAVAILABLE"


class KVWithdrawnError(KVLostError):
    """The peer took blocks back before all were copied, to compute them again: start again when it has."""


class LayoutMismatchError(DisaggError):
    """Two workers' KV caches can't exchange blocks; the message says what differs."""

    type = "kv_layout_mismatch"
    grpc_code = "FAILED_PRECONDITION"
