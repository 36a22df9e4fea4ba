"""Router messages as protobuf, and back. Whatever came over the wire is validated here, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TypeVar

from disagg import errors
from disagg.errors import DisaggError, InvalidRequestError, OverloadedError
from disagg.routing.types import (
    BlockEvents,
    Placement,
    PlacementKind,
    PlacementRequest,
    StepSample,
    TransferSample,
)
from disagg.types import Role, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus
from disagg.v1 import router_pb2

MAX_ID_CHARS = 256
# 2**20 blocks of 16 tokens are 16 million tokens: more than one worker's cache, and 8 MiB on the wire.
MAX_BLOCK_EVENTS = 2**20
MAX_EXCLUDED = 1024
MAX_REQUEST_EVENTS = 2**16
MAX_SAMPLES = 256
# No step or pull takes so long, in seconds; nor has a request so much time left that it matters.
_MOST_SECONDS = 1e6

_INFO_COUNTS = (
    *("pid", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "kv_blocks_total"),
)
_LOAD_COUNTS = (
    *("num_running", "num_waiting", "num_held", "waiting_tokens", "kv_blocks_used", "kv_blocks_cached"),
)
_INT32_MAX = 2**31 - 1
E = TypeVar("E", bound=StrEnum)


def checked_id(name: str, value: str, *, optional: bool = False) -> str:
    """Return `value`. Raises InvalidRequestError where it is empty (unless optional) or oversized."""
    if len(value) > MAX_ID_CHARS or not (value or optional):
        raise InvalidRequestError(f"{name} must have 1 to {MAX_ID_CHARS} characters", param=name)
    return value


def _count(name: str, value: int, low: int = 0) -> int:
    if value < low:
        raise InvalidRequestError(f"{name} must be at least {low}, got {value}", param=name)
    return value


def _at_most(name: str, length: int, limit: int) -> None:
    if length > limit:
        raise InvalidRequestError(f"{name} has {length} items; at most {limit} are taken", param=name)


def _member(name: str, kind: type[E], value: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequestError(f"{name} is unknown: {value[:MAX_ID_CHARS]!r}", param=name) from None


# -- workers -------------------------------------------------------------------------------------------


def info_to_proto(info: WorkerInfo) -> router_pb2.WorkerInfo:
    message = router_pb2.WorkerInfo(
        worker_id=info.worker_id,
        incarnation=info.incarnation,
        role=info.role.value,
        address=info.address,
        host=info.host,
        model_fingerprint=info.model_fingerprint,
        max_prefill_tokens=info.max_prefill_tokens,
    )
    for name in _INFO_COUNTS:
        setattr(message, name, getattr(info, name))
    return message


def info_from_proto(message: router_pb2.WorkerInfo) -> WorkerInfo:
    """Raises InvalidRequestError naming the field that can't be true."""
    counts = {name: _count(f"info.{name}", getattr(message, name), low=1) for name in _INFO_COUNTS}
    host, _, port = message.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
        raise InvalidRequestError("info.address must be host:port", param="info.address")
    return WorkerInfo(
        worker_id=checked_id("info.worker_id", message.worker_id),
        incarnation=checked_id("info.incarnation", message.incarnation),
        role=_member("info.role", Role, message.role),
        address=checked_id("info.address", message.address),
        host=checked_id("info.host", message.host, optional=True),
        model_fingerprint=checked_id("info.model_fingerprint", message.model_fingerprint, optional=True),
        max_prefill_tokens=_count("info.max_prefill_tokens", message.max_prefill_tokens),
        **counts,
    )


def load_to_proto(load: WorkerLoad) -> router_pb2.WorkerLoad:
    message = router_pb2.WorkerLoad()
    for name in _LOAD_COUNTS:
        setattr(message, name, min(getattr(load, name), _INT32_MAX))
    return message


def load_from_proto(message: router_pb2.WorkerLoad) -> WorkerLoad:
    """Raises InvalidRequestError where a count is negative."""
    return WorkerLoad(**{name: _count(f"load.{name}", getattr(message, name)) for name in _LOAD_COUNTS})


def status_from_proto(value: str) -> WorkerStatus:
    """Raises InvalidRequestError for an unknown status, and for "dead": the dead don't report."""
    status = _member("status", WorkerStatus, value)
    if status is WorkerStatus.DEAD:
        raise InvalidRequestError("a worker that reports can't be dead", param="status")
    return status


def events_to_proto(events: BlockEvents) -> router_pb2.BlockEvents:
    return router_pb2.BlockEvents(
        sequence=events.sequence, stored=events.stored, removed=events.removed, snapshot=events.snapshot
    )


def events_from_proto(message: router_pb2.BlockEvents) -> BlockEvents:
    """Raises InvalidRequestError where there are too many."""
    _at_most("blocks.stored", len(message.stored), MAX_BLOCK_EVENTS)
    _at_most("blocks.removed", len(message.removed), MAX_BLOCK_EVENTS)
    return BlockEvents(message.sequence, list(message.stored), list(message.removed), message.snapshot)


def steps_to_proto(steps: Iterable[StepSample]) -> list[router_pb2.StepSample]:
    return [
        router_pb2.StepSample(
            seconds=step.seconds,
            num_tokens=step.num_tokens,
            attended=step.attended,
            num_decodes=step.num_decodes,
            context=step.context,
        )
        for step in steps
    ]


def transfers_to_proto(transfers: Iterable[TransferSample]) -> list[router_pb2.TransferSample]:
    return [
        router_pb2.TransferSample(
            seconds=item.seconds, num_tokens=item.num_tokens, num_others=item.num_others
        )
        for item in transfers
    ]


def steps_from_proto(messages: Sequence[router_pb2.StepSample]) -> list[StepSample]:
    """Raises InvalidRequestError where there are too many, or one is out of bounds."""
    _at_most("steps", len(messages), MAX_SAMPLES)
    return [
        StepSample(
            _seconds("steps.seconds", item.seconds),
            _count("steps.num_tokens", item.num_tokens),
            _count("steps.attended", item.attended),
            _count("steps.num_decodes", item.num_decodes),
            _count("steps.context", item.context),
        )
        for item in messages
    ]


def transfers_from_proto(messages: Sequence[router_pb2.TransferSample]) -> list[TransferSample]:
    """Raises InvalidRequestError where there are too many, or one is out of bounds."""
    _at_most("transfers", len(messages), MAX_SAMPLES)
    return [
        TransferSample(
            _seconds("transfers.seconds", item.seconds),
            _count("transfers.num_tokens", item.num_tokens),
            _count("transfers.num_others", item.num_others),
        )
        for item in messages
    ]


def measured_seconds(event: router_pb2.RequestEvent) -> float | None:
    """Return how long an event says that it took, None where it does not. Raises InvalidRequestError."""
    return _seconds("events.seconds", event.seconds) or None


def _seconds(name: str, value: float) -> float:
    if not 0 <= value <= _MOST_SECONDS:
        raise InvalidRequestError(
            f"{name} must be seconds in [0, {_MOST_SECONDS:g}], got {value}", param=name
        )
    return value


def state_to_proto(state: WorkerState) -> router_pb2.WorkerState:
    return router_pb2.WorkerState(
        info=info_to_proto(state.info), status=state.status.value, load=load_to_proto(state.load)
    )


def state_from_proto(message: router_pb2.WorkerState) -> WorkerState:
    """Raises InvalidRequestError as its parts do."""
    return WorkerState(
        info_from_proto(message.info), status_from_proto(message.status), load_from_proto(message.load)
    )


# -- placements ----------------------------------------------------------------------------------------


def request_to_proto(request: PlacementRequest) -> router_pb2.PlaceRequest:
    return router_pb2.PlaceRequest(
        request_id=request.request_id,
        frontend_id=request.frontend_id,
        num_tokens=request.num_tokens,
        max_new_tokens=request.max_new_tokens,
        block_hashes=request.block_hashes,
        priority=request.priority,
        slo_ttft_s=request.slo_ttft_s or 0.0,
        slo_tpot_s=request.slo_tpot_s or 0.0,
        excluded=request.excluded,
        tenant=request.tenant,
        service_tier=request.service_tier,
        timeout_s=request.timeout_s or 0.0,
        resumed=request.resumed,
    )


def request_from_proto(message: router_pb2.PlaceRequest) -> PlacementRequest:
    """Raises InvalidRequestError naming the field that is out of bounds."""
    _at_most("excluded", len(message.excluded), MAX_EXCLUDED)
    # A block has at least one token, so more hashes than tokens describe no prompt.
    num_tokens = _count("num_tokens", message.num_tokens, low=1)
    _at_most("block_hashes", len(message.block_hashes), min(num_tokens, MAX_BLOCK_EVENTS))
    return PlacementRequest(
        request_id=checked_id("request_id", message.request_id),
        frontend_id=checked_id("frontend_id", message.frontend_id),
        num_tokens=num_tokens,
        max_new_tokens=_count("max_new_tokens", message.max_new_tokens),
        block_hashes=tuple(message.block_hashes),
        priority=message.priority,
        slo_ttft_s=_objective("slo_ttft_s", message.slo_ttft_s),
        slo_tpot_s=_objective("slo_tpot_s", message.slo_tpot_s),
        excluded=tuple(checked_id("excluded", item) for item in message.excluded),
        tenant=checked_id("tenant", message.tenant, optional=True),
        service_tier=checked_id("service_tier", message.service_tier, optional=True) or "default",
        timeout_s=_objective("timeout_s", message.timeout_s),
        resumed=message.resumed,
    )


def _objective(name: str, value: float) -> float | None:
    if not math.isfinite(value) or value < 0:
        raise InvalidRequestError(f"{name} must be a number of seconds, got {value}", param=name)
    return value or None


def placement_to_proto(placement: Placement) -> router_pb2.PlaceResponse:
    return router_pb2.PlaceResponse(
        prefill_worker=placement.prefill_worker,
        decode_worker=placement.decode_worker,
        cached_tokens=placement.cached_tokens,
        policy=placement.policy,
        lag_s=placement.lag_s,
    )


def placement_from_proto(message: router_pb2.PlaceResponse) -> Placement:
    """Return the placement, or raise the typed error that the router answered with."""
    if message.error:
        raise _placement_error(message)
    prefill = checked_id("prefill_worker", message.prefill_worker)
    decode = checked_id("decode_worker", message.decode_worker)
    kind = PlacementKind.LOCAL if prefill == decode else PlacementKind.DISAGGREGATED
    lag_s = _seconds("lag_s", message.lag_s)
    return Placement(prefill, decode, message.cached_tokens, message.policy, kind, lag_s)


def placement_error_to_proto(error: DisaggError) -> router_pb2.PlaceResponse:
    """Return an answer that names no workers; error_type is the error's class."""
    message = router_pb2.PlaceResponse(error=error.message or "no reason", error_type=type(error).__name__)
    if isinstance(error, OverloadedError):
        message.retry_after_s, message.hold_s = error.retry_after, error.hold_s
    return message


def _placement_error(message: router_pb2.PlaceResponse) -> DisaggError:
    if message.error_type == OverloadedError.__name__:
        return OverloadedError(
            message.error, retry_after=message.retry_after_s, hold_s=_seconds("hold_s", message.hold_s)
        )
    if message.error_type == InvalidRequestError.__name__:
        # All that a valid request can be refused for is its length.
        return InvalidRequestError(message.error, param="prompt", code="context_length_exceeded")
    if message.error_type == errors.NoCapacityError.__name__:
        return errors.NoCapacityError(message.error)
    if message.error_type == errors.DeadlineExceededError.__name__:
        return errors.DeadlineExceededError(message.error)
    return DisaggError(message.error)
