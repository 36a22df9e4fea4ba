"""The gRPC API: Inference with health checking and reflection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from disagg.errors import ConfigError, DisaggError, InvalidRequestError, OverloadedError
from disagg.frontend import prompts
from disagg.frontend.asgi import as_disagg_error
from disagg.frontend.auth import RequireApiKeyInterceptor
from disagg.frontend.backend import Backend, SamplingDefaults
from disagg.frontend.prompts import Prompt
from disagg.frontend.schemas import DEFAULT_COMPLETION_TOKENS, MAX_MESSAGES
from disagg.frontend.text_generation import GenerationGroup, TextGeneration, Usage
from disagg.routing.brake import Demand
from disagg.rpc import MAX_MESSAGE_BYTES
from disagg.service.generation import GenerationRequest, unroll
from disagg.service.text import TextDelta
from disagg.service.timeline import Timeline
from disagg.types import FinishReason, SamplingParams
from disagg.v1 import common_pb2, inference_pb2, inference_pb2_grpc

SERVICE_NAME = "disagg.v1.Inference"
ERROR_TYPE = "disagg-error-type"
ERROR_PARAM = "disagg-error-param"
ERROR_CODE = "disagg-error-code"
RETRY_AFTER = "disagg-retry-after"
# What gRPC's own retry policy in a client goes by.
RETRY_PUSHBACK = "grpc-retry-pushback-ms"

_ROLES = frozenset(("system", "developer", "user", "assistant"))
_WATCH_PERIOD_S = 1.0
_MAX_SALT_CHARS = 512
_FINISH_REASONS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}

Context = grpc.aio.ServicerContext[Any, Any]


def create_grpc_server(backend: Backend, api_key: str | None, host: str, port: int) -> grpc.aio.Server:
    """Return a server bound to host:port, not started; several processes may share the port.

    Raises ConfigError naming `grpc_port` where the port can't be had.
    """
    server = build_grpc_server(backend, api_key)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"can't listen on {address}: {error}", param="grpc_port") from None
    if bound == 0:
        raise ConfigError(f"can't listen on {address}", param="grpc_port")
    return server


def build_grpc_server(backend: Backend, api_key: str | None) -> grpc.aio.Server:
    """Return a server without a port. With an API key, every method needs it, reflection included."""
    server = grpc.aio.server(
        interceptors=[] if api_key is None else [RequireApiKeyInterceptor(api_key)],
        options=[
            # Front-end replicas on one host share the port; the kernel spreads connections over them.
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", backend.config.max_body_bytes),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # A client whose host vanished would otherwise hold its request until the deadline.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ],
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(backend), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(backend), server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generate, Abort, GetModelInfo over a Backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def Generate(  # type: ignore[override] # written to the context, so that closing is prompt
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        request_id = request.request_id or prompts.draw_request_id()
        try:
            async with asyncio.timeout(self._timeout(context)):
                await self._generate(request, request_id, context)
        except Exception as error:
            await _abort(context, as_disagg_error(error, request_id))

    async def Abort(self, request: inference_pb2.AbortRequest, _context: Any) -> inference_pb2.AbortResponse:
        return inference_pb2.AbortResponse(aborted=await self._backend.abort(request.request_id))

    async def GetModelInfo(
        self, _request: inference_pb2.GetModelInfoRequest, _context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        backend = self._backend
        return inference_pb2.GetModelInfoResponse(
            model=backend.model_name,
            max_model_len=backend.max_model_len,
            vocab_size=backend.vocab_size,
            eos_token_ids=backend.eos_token_ids,
            version=backend.version,
        )

    async def _generate(
        self, request: inference_pb2.GenerateRequest, request_id: str, context: Context
    ) -> None:
        prompts.check_request_id(request_id, "request_id")
        demand = _demand(request)
        self._backend.shedding.check(demand)
        prepared = await self._prepare(request, request_id, context)
        generation = TextGeneration(self._backend, prepared, demand=demand)
        group = GenerationGroup([generation])
        with self._backend.running.entered(request_id, group.abort):
            async with aclosing(group.stream()) as deltas:
                async for _, delta in deltas:
                    usage = None if delta.finish_reason is None else generation.usage
                    await context.write(_response(request_id, delta, usage))

    async def _prepare(
        self, request: inference_pb2.GenerateRequest, request_id: str, context: Context
    ) -> GenerationRequest:
        backend = self._backend
        timeline = Timeline(traceparent=_traceparent(context))
        prompts.check_model(backend, request.model)
        if len(request.cache_salt) > _MAX_SALT_CHARS:
            raise InvalidRequestError(
                f"cache_salt takes at most {_MAX_SALT_CHARS} characters", param="cache_salt"
            )
        prompt, param, default = await self._encode(request)
        prompts.check_prompt(backend, prompt.token_ids, param)
        given = request.params
        params = parse_params(
            given,
            backend.sampling_defaults,
            prompts.resolve_max_tokens(
                backend,
                # Below 1 is refused by SamplingParams, which names the field.
                given.max_tokens if given.HasField("max_tokens") else None,
                default,
                len(prompt.token_ids),
                "max_tokens",
            ),
        )
        prompts.check_token_ids(backend, params)
        return GenerationRequest(
            request_id=prompts.internal_ids(request_id, 1)[0],
            prompt_token_ids=prompt.token_ids,
            params=unroll(params)[0],
            priority=request.priority,
            timeout_s=self._timeout(context),
            cache_salt=request.cache_salt,
            slo_ttft_s=_objective(request.slo_ttft_ms, "slo_ttft_ms"),
            slo_tpot_s=_objective(request.slo_tpot_ms, "slo_tpot_ms"),
            timeline=timeline,
        )

    async def _encode(self, request: inference_pb2.GenerateRequest) -> tuple[Prompt, str, int | None]:
        """Return the prompt, the name of its field, and how many tokens to produce by default."""
        kind = request.WhichOneof("prompt")
        if kind == "text":
            prompt = await prompts.encode_text(self._backend, request.text, param="text")
            return prompt, "text", DEFAULT_COMPLETION_TOKENS
        if kind == "token_ids":
            return Prompt(list(request.token_ids.ids)), "token_ids", DEFAULT_COMPLETION_TOKENS
        if kind == "chat":
            messages = [_message(i, message) for i, message in enumerate(request.chat.messages)]
            if not 1 <= len(messages) <= MAX_MESSAGES:
                raise InvalidRequestError(f"give 1 to {MAX_MESSAGES} messages", param="messages")
            return await prompts.encode_chat(self._backend, messages), "messages", None
        raise InvalidRequestError("one of text, token_ids and chat is needed", param="prompt")

    def _timeout(self, context: Context) -> float:
        limit = self._backend.config.request_timeout_s
        remaining = context.time_remaining()
        return limit if remaining is None else max(0.001, min(limit, remaining))


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # shipped without types
    """grpc.health.v1, answered from the backend's readiness when asked rather than kept up to date."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service not in ("", SERVICE_NAME):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service[:200]}")
        return health_pb2.HealthCheckResponse(status=await self._status())

    async def Watch(self, request: Any, _context: Context) -> AsyncIterator[Any]:
        last = None
        while True:
            known = request.service in ("", SERVICE_NAME)
            status = await self._status() if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _status(self) -> int:
        readiness = await self._backend.ready()
        response = health_pb2.HealthCheckResponse
        status: int = response.SERVING if readiness.ok else response.NOT_SERVING
        return status


def parse_params(
    given: common_pb2.SamplingParams, defaults: SamplingDefaults, max_tokens: int
) -> SamplingParams:
    """Return the parameters with defaults for what is unset. Raises InvalidRequestError naming a field."""
    values: dict[str, Any] = {name: getattr(defaults, name) for name in SamplingDefaults.__dataclass_fields__}
    for field, value in given.ListFields():
        if field.has_presence:
            values[field.name] = value
    values["max_tokens"] = max_tokens
    return SamplingParams(
        **values,
        logit_bias=dict(given.logit_bias),
        stop=tuple(given.stop),
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
    )


def _demand(request: inference_pb2.GenerateRequest) -> Demand:
    """Return what the request asks for, before anything of it was looked at. Raises InvalidRequestError."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        size = len(request.token_ids.ids)
    elif kind == "text":
        size = len(request.text)
    else:
        size = sum(len(message.content) for message in request.chat.messages)
    ttft_s = _objective(request.slo_ttft_ms, "slo_ttft_ms")
    tpot_s = _objective(request.slo_tpot_ms, "slo_tpot_ms")
    return Demand(
        size,
        kind == "token_ids",
        request.priority,
        math.inf if ttft_s is None else ttft_s,
        math.inf if tpot_s is None else tpot_s,
        request.cache_salt,
    )


def _message(index: int, message: inference_pb2.ChatMessage) -> dict[str, str]:
    if message.role not in _ROLES:
        raise InvalidRequestError(
            f"messages[{index}].role must be one of {', '.join(sorted(_ROLES))}",
            param=f"messages[{index}].role",
        )
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.content}


def _traceparent(context: Context) -> str:
    values = (value for key, value in context.invocation_metadata() or () if key == "traceparent")
    value = next(values, "")
    return value if isinstance(value, str) else ""


def _objective(milliseconds: float, name: str) -> float | None:
    if milliseconds == 0:
        return None
    if not 0 < milliseconds < 1e9:
        raise InvalidRequestError(f"{name} must be above 0", param=name)
    return milliseconds / 1000


def _response(request_id: str, delta: TextDelta, usage: Usage | None) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=request_id, token_ids=delta.token_ids, text=delta.text
    )
    for position in delta.logprobs:
        top = [common_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in position.top]
        response.logprobs.add(
            token_id=position.token_id, logprob=position.logprob, rank=position.rank, top=top
        )
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if usage is not None:
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.cached_tokens = usage.cached_tokens
    return response


async def _abort(context: Context, error: DisaggError) -> NoReturn:
    metadata = [(ERROR_TYPE, error.type)]
    if error.param is not None:
        metadata.append((ERROR_PARAM, error.param))
    if error.code is not None:
        metadata.append((ERROR_CODE, error.code))
    if isinstance(error, OverloadedError):
        metadata.append((RETRY_AFTER, f"{error.retry_after:g}"))
        metadata.append((RETRY_PUSHBACK, str(math.ceil(1000 * error.retry_after))))
    status = grpc.StatusCode[error.grpc_code]
    await context.abort(status, error.message, tuple(metadata))
    raise AssertionError("abort always raises")
