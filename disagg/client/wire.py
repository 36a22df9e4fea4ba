"""What the sync and the async client have in common: requests, responses and errors on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import grpc

from disagg.client.types import (
    GenerationChunk,
    GenerationOptions,
    GenerationResult,
    Messages,
    ModelInfo,
    Usage,
)
from disagg.errors import (
    AuthenticationError,
    DeadlineExceededError,
    DisaggError,
    InvalidRequestError,
    ModelNotFoundError,
    NoCapacityError,
    OverloadedError,
    RequestTooLargeError,
)
from disagg.types import FinishReason, TokenLogprobs
from disagg.v1 import common_pb2, inference_pb2

DEFAULT_ADDRESS = "127.0.0.1:9000"
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A proxy from the environment has no business between a laptop and its own loopback.
    ("grpc.enable_http_proxy", 0),
)
_REQUEST_FIELDS = ("request_id", "model", "priority", "cache_salt", "slo_ttft_ms", "slo_tpot_ms")
_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
    common_pb2.FINISH_REASON_ERROR: FinishReason.ERROR,
}


def auth_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries the key."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def build_request(
    prompt: str | None, token_ids: Sequence[int] | None, messages: Messages | None, options: GenerationOptions
) -> inference_pb2.GenerateRequest:
    """Return the message. Raises InvalidRequestError for what the message can't hold."""
    given = {"prompt": prompt, "token_ids": token_ids, "messages": messages}
    if sum(value is not None for value in given.values()) != 1:
        raise InvalidRequestError("give exactly one of prompt, token_ids and messages", param="prompt")
    values: dict[str, Any] = dict(options)
    values.pop("timeout", None)
    fields = {name: values.pop(name) for name in _REQUEST_FIELDS if name in values}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    try:
        request = inference_pb2.GenerateRequest(**fields, params=common_pb2.SamplingParams(**values))
        if prompt is not None:
            request.text = prompt
        elif token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(token_ids)
        else:
            request.chat.SetInParent()
            for message in messages or ():
                request.chat.messages.add(role=message["role"], content=message["content"])
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidRequestError(f"a field has a wrong type or is unknown: {error}") from None
    return request


def parse_chunk(response: inference_pb2.GenerateResponse) -> GenerationChunk:
    """Return a message of the stream."""
    usage = None
    if response.HasField("usage"):
        counts = response.usage
        usage = Usage(counts.prompt_tokens, counts.completion_tokens, counts.cached_tokens)
    return GenerationChunk(
        response.request_id,
        response.text,
        tuple(response.token_ids),
        tuple(_logprobs(position) for position in response.logprobs),
        _FINISH_REASONS.get(response.finish_reason),
        usage,
    )


def collect(chunks: Iterable[GenerationChunk]) -> GenerationResult:
    """Return the answer that the chunks add up to. Raises DisaggError if they end too early."""
    parts = list(chunks)
    if not parts or parts[-1].finish_reason is None or parts[-1].usage is None:
        raise DisaggError("the stream ended before its last message")
    last = parts[-1]
    assert last.finish_reason is not None and last.usage is not None
    return GenerationResult(
        last.request_id,
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.token_ids),
        tuple(position for part in parts for position in part.logprobs),
        last.finish_reason,
        last.usage,
    )


def parse_model_info(response: inference_pb2.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        response.model,
        response.max_model_len,
        response.vocab_size,
        tuple(response.eos_token_ids),
        response.version,
    )


def raise_typed(error: grpc.RpcError, address: str) -> NoReturn:
    """Raise the error of disagg.errors that the server meant."""
    code, message = error.code(), error.details() or ""
    trailing: Any = error.trailing_metadata() or ()
    metadata = {str(key): str(value) for key, value in trailing}
    param, kind = metadata.get("disagg-error-param"), metadata.get("disagg-error-type")
    raise _typed(code, message, address, kind, param, metadata) from None


def _typed(
    code: grpc.StatusCode,
    message: str,
    address: str,
    kind: str | None,
    param: str | None,
    metadata: dict[str, str],
) -> DisaggError:
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequestError(message, param=param, code=metadata.get("disagg-error-code"))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and kind == OverloadedError.type:
        return OverloadedError(message, retry_after=float(metadata.get("disagg-retry-after", "1")))
    if code is grpc.StatusCode.UNAVAILABLE and kind is None:
        return NoCapacityError(f"can't reach the server at {address}: {message}")
    known: dict[grpc.StatusCode, type[DisaggError]] = {
        grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
        grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: RequestTooLargeError,
        grpc.StatusCode.UNAVAILABLE: NoCapacityError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    }
    return known.get(code, DisaggError)(message or code.name, param=param)


def _logprobs(position: common_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple((each.token_id, each.logprob) for each in position.top)
    return TokenLogprobs(position.token_id, position.logprob, position.rank, top)
