"""Session messages as protobuf, and back. Whatever came over the wire is validated here, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from disagg import errors
from disagg.errors import DisaggError, InvalidRequestError, OverloadedError
from disagg.types import (
    FinishReason,
    KVHandle,
    Request,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)
from disagg.v1 import common_pb2, worker_pb2

MAX_ID_CHARS = 256
KEY_BYTES = 16

_TO_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_FROM_FINISH = {value: key for key, value in _TO_FINISH.items()}

_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "seed",
    "max_tokens",
    "min_tokens",
)


def params_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """Return the message; `n` does not travel, since a front end unrolls it."""
    message = common_pb2.SamplingParams(
        stop=params.stop, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos
    )
    for name in _SCALARS:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    message.logit_bias.update(params.logit_bias)
    return message


def params_from_proto(message: common_pb2.SamplingParams, *, n: int = 1) -> SamplingParams:
    """Return the parameters, unset fields at their defaults. Raises InvalidRequestError naming the field."""
    # Generated stubs type HasField by literal names; a loop over names is checked by the tests instead.
    present: Callable[[Any], bool] = message.HasField
    given = {name: getattr(message, name) for name in _SCALARS if present(name)}
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        n=n,
    )


def handle_to_proto(handle: KVHandle) -> worker_pb2.KVHandle:
    return worker_pb2.KVHandle(
        worker_id=handle.worker_id,
        incarnation=handle.incarnation,
        request_id=handle.request_id,
        key=handle.key,
        num_tokens=handle.num_tokens,
    )


def handle_from_proto(message: worker_pb2.KVHandle) -> KVHandle:
    """Raises InvalidRequestError where the handle can't be one that a worker gave out."""
    if len(message.key) != KEY_BYTES or message.num_tokens < 1:
        raise InvalidRequestError("malformed KV handle", param="handle")
    return KVHandle(
        worker_id=_checked_id("handle.worker_id", message.worker_id),
        incarnation=_checked_id("handle.incarnation", message.incarnation),
        request_id=_checked_id("handle.request_id", message.request_id),
        key=message.key,
        num_tokens=message.num_tokens,
    )


def _checked_id(name: str, value: str) -> str:
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise InvalidRequestError(f"{name} must have 1 to {MAX_ID_CHARS} characters", param=name)
    return value


def submit_to_proto(
    request: Request,
    *,
    timeout_s: float = 0.0,
    hold_key: bytes = b"",
    handle: KVHandle | None = None,
    awaits_token: bool = False,
    gives_up: bool = False,
) -> worker_pb2.Submit:
    message = worker_pb2.Submit(
        request_id=request.request_id,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        params=params_to_proto(request.params),
        priority=request.priority,
        timeout_s=timeout_s,
        cache_salt=request.cache_salt,
        hold_key=hold_key,
        slo_ttft_s=request.slo_ttft_s or 0.0,
        awaits_token=awaits_token,
        gives_up=gives_up,
    )
    if handle is not None:
        message.handle.CopyFrom(handle_to_proto(handle))
    return message


def request_from_proto(message: worker_pb2.Submit, *, now: float) -> Request:
    """Return the request with its deadline on this process's clock. Raises InvalidRequestError."""
    if not 0 < message.num_prompt_tokens <= len(message.token_ids):
        raise InvalidRequestError("num_prompt_tokens must be in [1, len(token_ids)]", param="prompt")
    if message.hold_key and len(message.hold_key) != KEY_BYTES:
        raise InvalidRequestError(f"hold_key must have {KEY_BYTES} bytes", param="hold_key")
    return Request(
        request_id=_checked_id("request_id", message.request_id),
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        params=params_from_proto(message.params),
        priority=message.priority,
        deadline=now + message.timeout_s if message.timeout_s > 0 else None,
        cache_salt=message.cache_salt,
        slo_ttft_s=message.slo_ttft_s if message.slo_ttft_s > 0 else None,
    )


def output_to_proto(output: StepOutput) -> worker_pb2.SequenceOutput:
    message = worker_pb2.SequenceOutput(
        request_id=output.request_id,
        token_ids=output.token_ids,
        held=output.held,
        num_cached_tokens=output.num_cached_tokens,
    )
    if output.logprobs:
        message.logprobs.extend(logprobs_to_proto(item) for item in output.logprobs)
    if output.finish_reason is not None:
        message.finish_reason = _TO_FINISH[output.finish_reason]
    if output.matched_stop is not None:
        message.matched_stop = output.matched_stop
    if output.queued_s is not None:
        message.queued_s = output.queued_s
    if output.prefill_s is not None:
        message.prefill_s = output.prefill_s
    if output.error is not None:
        message.error = output.error
    return message


def output_from_proto(message: worker_pb2.SequenceOutput) -> StepOutput:
    return StepOutput(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprobs_from_proto(item) for item in message.logprobs),
        finish_reason=_FROM_FINISH.get(message.finish_reason),
        matched_stop=message.matched_stop if message.HasField("matched_stop") else None,
        held=message.held,
        num_cached_tokens=message.num_cached_tokens,
        queued_s=message.queued_s if message.HasField("queued_s") else None,
        prefill_s=message.prefill_s if message.HasField("prefill_s") else None,
        error=message.error or None,
    )


def logprobs_to_proto(item: TokenLogprobs) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        token_id=item.token_id,
        logprob=item.logprob,
        rank=item.rank,
        top=[common_pb2.TopLogprob(token_id=token, logprob=value) for token, value in item.top],
    )


def logprobs_from_proto(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple((item.token_id, item.logprob) for item in message.top),
    )


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason.ValueType:
    return _TO_FINISH[reason] if reason is not None else common_pb2.FINISH_REASON_UNSPECIFIED


def error_to_proto(request_id: str, error: DisaggError) -> worker_pb2.SequenceOutput:
    """Return the terminal output of a request that a worker refused."""
    return worker_pb2.SequenceOutput(
        request_id=request_id,
        finish_reason=common_pb2.FINISH_REASON_ERROR,
        error=error.message,
        error_type=type(error).__name__,
        error_param=error.param or "",
    )


_ERRORS: dict[str, type[DisaggError]] = {
    cls.__name__: cls
    for cls in (
        errors.InvalidRequestError,
        errors.NoCapacityError,
        errors.DeadlineExceededError,
        errors.KVLostError,
    )
}


def error_from_proto(message: worker_pb2.SequenceOutput) -> DisaggError:
    """Return the typed error that a worker sent; an unknown type becomes a plain DisaggError (500)."""
    if message.error_type == OverloadedError.__name__:
        return OverloadedError(message.error, retry_after=1.0)
    cls = _ERRORS.get(message.error_type, DisaggError)
    return cls(message.error, param=message.error_param or None)
