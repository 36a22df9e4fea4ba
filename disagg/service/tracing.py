"""OpenTelemetry traces over OTLP: one trace a request, made from its timeline when it has ended.

    chat disagg-tiny                      the front end, from arrival to end
      ├─ route                            the router's answer
      ├─ queue, prefill                   on the prefill worker
      ├─ kv_transfer                      to the decode worker
      └─ decode                           there; after a loss, the same again

All spans come from the front end: workers tell durations, so no two hosts' clocks meet, and tracing costs a
worker nothing. A prompt's or an answer's text is never part of a trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from disagg.config import TracingConfig
from disagg.errors import ConfigError
from disagg.service.generation import GenerationRequest
from disagg.service.timeline import Attempt, Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

EXPORT_TIMEOUT_S = 5
_FAILED = ("error", "deadline", "shed")
Attributes = dict[str, str | int | float | bool | list[str]]


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """One span to be: times on the timeline's clock."""

    name: str
    start: float
    end: float
    attributes: Attributes = field(default_factory=dict)
    error: str = ""


def plan_request(request: GenerationRequest, model: str) -> SpanPlan:
    """Return the span around a request that has ended, with the GenAI attributes."""
    timeline, params = request.timeline, request.params
    attributes: Attributes = {
        "gen_ai.operation.name": timeline.operation,
        "gen_ai.provider.name": "disagg",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.output_tokens": timeline.num_output_tokens,
        "gen_ai.response.finish_reasons": [timeline.outcome],
        "disagg.attempts": len(timeline.attempts),
    }
    if params.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = params.max_tokens
    if timeline.first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = timeline.first_token - timeline.arrived
    if timeline.attempts:
        attributes["gen_ai.usage.cache_read.input_tokens"] = timeline.attempts[0].num_cached_tokens
    error = timeline.outcome if timeline.outcome in _FAILED else ""
    if error:
        attributes["error.type"] = error
    name = f"{timeline.operation} {model}"
    return SpanPlan(name, timeline.arrived, _end(timeline), attributes, error)


def plan_parts(timeline: Timeline) -> Iterator[SpanPlan]:
    """Yield the spans inside a request's, attempt by attempt, in order."""
    for number, attempt in enumerate(timeline.attempts, 1):
        ended = _end(timeline) if attempt.ended is None else attempt.ended
        yield SpanPlan(
            "route",
            attempt.asked,
            attempt.placed,
            {
                "disagg.attempt": number,
                "disagg.role": "router",
                "disagg.router.policy": attempt.policy,
                "disagg.router.kind": attempt.kind,
            },
        )
        yield from _computing(attempt, number, ended)


def _computing(attempt: Attempt, number: int, ended: float) -> Iterator[SpanPlan]:
    prefilling: Attributes = {
        "disagg.attempt": number,
        "disagg.role": "prefill",
        "disagg.worker.id": attempt.prefill_worker,
    }
    lost = {"error.type": "worker_lost"} if attempt.lost else {}
    if attempt.first_output is None:
        yield SpanPlan("queue", attempt.placed, ended, prefilling | lost, attempt.lost)
        return
    begun = max(attempt.placed, attempt.first_output - attempt.prefill_s)
    cached: Attributes = {"disagg.cached_tokens": attempt.num_cached_tokens}
    yield SpanPlan("queue", attempt.placed, begun, prefilling)
    yield SpanPlan("prefill", begun, attempt.first_output, prefilling | cached)
    decoding: Attributes = {
        "disagg.attempt": number,
        "disagg.role": "decode",
        "disagg.worker.id": attempt.decode_worker,
    }
    started = attempt.first_output
    if attempt.handed_off is not None:
        started = ended if attempt.kv_ready is None else attempt.kv_ready
        gone = lost if attempt.kv_ready is None else {}
        moved = _moved(attempt)
        error = attempt.lost if gone else ""
        yield SpanPlan("kv_transfer", attempt.handed_off, started, decoding | moved | gone, error)
    if started < ended:
        yield SpanPlan("decode", started, ended, decoding | lost, attempt.lost)


def _moved(attempt: Attempt) -> Attributes:
    transfer = attempt.transfer
    if transfer is None:
        return {}
    if transfer.recomputed:
        return {"disagg.kv.recomputed": True, "error.type": transfer.reason}
    return {
        "disagg.kv.transport": transfer.transport,
        "disagg.kv.bytes": transfer.num_bytes,
        "disagg.kv.from": attempt.prefill_worker,
    }


def _end(timeline: Timeline) -> float:
    return timeline.arrived if timeline.finished is None else timeline.finished


class RequestTracer:
    """Sends the traces of ended requests. Raises ConfigError without an endpoint or the extra [tracing].

    processor: where spans go instead of to the endpoint.
    """

    def __init__(
        self, config: TracingConfig, model: str, version: str, processor: SpanProcessor | None = None
    ) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        except ImportError as error:
            raise _missing(error) from None
        self._model = model
        self._ids = _trace_ids()
        resource = Resource.create({"service.name": config.service_name, "service.version": version})
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(config.sample_ratio),
            resource=resource,
            id_generator=self._ids,
            # The gateway shuts it down in time; a hook at exit would hold a dying process up.
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor or _exporting(config))
        self._tracer = self._provider.get_tracer("disagg", version)

    def record(self, request: GenerationRequest) -> None:
        """Queue the trace of a request that has ended; sending is another thread's work."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        timeline = request.timeline
        # A context that is malformed is no context: the propagator reads it strictly.
        parent = TraceContextTextMapPropagator().extract({"traceparent": timeline.traceparent})
        offset = time.time() - time.monotonic()
        with self._ids.using(timeline.trace_id):
            plan = plan_request(request, self._model)
            root = self._start(plan, parent, SpanKind.SERVER, offset)
            inside = set_span_in_context(root, parent)
            for part in plan_parts(timeline):
                kind = SpanKind.CLIENT if part.name == "route" else SpanKind.INTERNAL
                span = self._start(part, inside, kind, offset)
                span.end(_nanoseconds(part.end + offset))
            if timeline.first_token is not None:
                root.add_event("first_token", timestamp=_nanoseconds(timeline.first_token + offset))
            root.end(_nanoseconds(plan.end + offset))

    def _start(self, plan: SpanPlan, context: Any, kind: Any, offset: float) -> Any:
        from opentelemetry.trace import Status, StatusCode

        span = self._tracer.start_span(
            plan.name,
            context,
            kind,
            attributes=plan.attributes,
            start_time=_nanoseconds(plan.start + offset),
        )
        if plan.error:
            span.set_status(Status(StatusCode.ERROR, plan.error))
        return span

    def close(self) -> None:
        """Send what is queued, for at most EXPORT_TIMEOUT_S, and end the thread. Blocks."""
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _exporting(config: TracingConfig) -> SpanProcessor:
    if config.endpoint is None:
        raise ConfigError("tracing.endpoint: where traces go must be given", param="tracing.endpoint")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _missing(error) from None
    exporter = OTLPSpanExporter(
        endpoint=config.endpoint,
        insecure=config.endpoint.startswith("http://"),
        timeout=EXPORT_TIMEOUT_S,
    )
    return BatchSpanProcessor(exporter)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"tracing.endpoint: traces need the extra disagg[tracing]: {error}", param="tracing.endpoint"
    )


def _trace_ids() -> Any:
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

    class TraceIds(RandomIdGenerator):
        """Lets the choices of one request, which end at different times, share a trace."""

        chosen = 0

        @contextmanager
        def using(self, trace_id: int) -> Iterator[None]:
            self.chosen = trace_id
            try:
                yield
            finally:
                self.chosen = 0

        def generate_trace_id(self) -> int:
            return self.chosen or super().generate_trace_id()

    return TraceIds()
