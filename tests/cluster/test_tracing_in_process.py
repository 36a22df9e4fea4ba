"""Traces as a collector gets them: a loopback OTLP server beside a whole cluster."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import httpx
import pytest

from disagg.config import TracingConfig
from disagg.errors import ConfigError
from disagg.frontend.http import create_app
from disagg.service.tracing import RequestTracer
from tests.cluster.harness import Cluster, running_cluster
from tests.unit.frontend.frontend_fakes import serve_app

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="in the extra [tracing]")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
BODY = {"prompt": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19", "max_tokens": 6, "ignore_eos": True}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that is exported to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []

    def Export(self, request: Any, _context: Any) -> Any:
        for group in request.resource_spans:
            self.resources.append(attributes(group.resource))
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> Any:
        found = [span for span in self.spans if span.name == name]
        assert len(found) == 1, (name, [span.name for span in self.spans])
        return found[0]


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextlib.asynccontextmanager
async def traced(endpoint: str, **tracing: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Cluster]]:
    """Spans have arrived when the block has ended: the gateway sends the rest when it stops."""
    async with running_cluster({"tracing": {"endpoint": endpoint, **tracing}}) as cluster:
        assert cluster.gateway is not None
        async with serve_app(create_app(cluster.gateway)) as url, httpx.AsyncClient(base_url=url) as client:
            yield client, cluster


def attributes(holder: Any) -> dict[str, Any]:
    values = {}
    for item in holder.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        values[item.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return values


async def test_one_trace_from_front_end_to_decode() -> None:
    with collecting() as (collector, endpoint):
        async with traced(endpoint) as (client, _):
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            assert (await client.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
    root = collector.named("text_completion disagg-tiny")
    assert root.parent_span_id.hex() == PARENT
    names = [span.name for span in sorted(collector.spans, key=lambda span: span.start_time_unix_nano)]
    assert names == [root.name, "route", "queue", "prefill", "kv_transfer", "decode"]
    for span in collector.spans:
        assert span.trace_id.hex() == TRACE
        if span is not root:
            assert span.parent_span_id == root.span_id
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    for before, after in (("queue", "prefill"), ("kv_transfer", "decode")):
        gap = collector.named(after).start_time_unix_nano - collector.named(before).end_time_unix_nano
        assert abs(gap) < 1000
    assert attributes(collector.named("prefill"))["disagg.worker.id"] == "prefill-0"
    assert attributes(collector.named("decode"))["disagg.worker.id"] == "decode-0"
    moved = attributes(collector.named("kv_transfer"))
    assert moved["disagg.kv.transport"] == "shm" and moved["disagg.kv.bytes"] > 0
    assert collector.resources[0]["service.name"] == "disagg"


async def test_a_request_is_described_by_genai_attributes_and_without_its_text() -> None:
    with collecting() as (collector, endpoint):
        async with traced(endpoint) as (client, _):
            messages = [{"role": "user", "content": "zanzibar"}]
            body = {"messages": messages, "max_tokens": 6, "ignore_eos": True, "temperature": 0.5}
            usage = (await client.post("/v1/chat/completions", json=body)).json()["usage"]
    root = collector.named("chat disagg-tiny")
    told = attributes(root)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == "disagg-tiny"
    assert told["gen_ai.request.temperature"] == 0.5 and told["gen_ai.request.max_tokens"] == 6
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < told["gen_ai.response.time_to_first_chunk"] < 60
    assert [event.name for event in root.events] == ["first_token"]
    assert not any("zanzibar" in str(span) for span in collector.spans)


async def test_choices_of_one_request_share_a_trace_and_requests_do_not() -> None:
    with collecting() as (collector, endpoint):
        async with traced(endpoint) as (client, _):
            await client.post("/v1/completions", json={**BODY, "n": 2})
            await client.post("/v1/completions", json=BODY)
    roots = [span.trace_id for span in collector.spans if not span.parent_span_id]
    assert len(roots) == 3 and len(set(roots)) == 2


@pytest.mark.parametrize("traceparent", ["nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
async def test_a_malformed_context_is_no_context(traceparent: str) -> None:
    with collecting() as (collector, endpoint):
        async with traced(endpoint) as (client, _):
            answer = await client.post("/v1/completions", json=BODY, headers={"traceparent": traceparent})
            assert answer.status_code == 200
    root = collector.named("text_completion disagg-tiny")
    assert not root.parent_span_id and root.trace_id.hex() not in (TRACE, "0" * 32)


async def test_what_is_not_sampled_is_not_sent() -> None:
    with collecting() as (collector, endpoint):
        async with traced(endpoint, sample_ratio=0.0) as (client, _):
            await client.post("/v1/completions", json=BODY)
            unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            await client.post("/v1/completions", json=BODY, headers=unsampled)
            sampled = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            await client.post("/v1/completions", json=BODY, headers=sampled)
    assert [span.trace_id.hex() for span in collector.spans if span.name.startswith("text")] == [TRACE]


async def test_a_lost_worker_shows_as_a_second_attempt() -> None:
    with collecting() as (collector, endpoint):
        async with traced(endpoint) as (client, cluster):
            body = {**BODY, "max_tokens": 400, "stream": True}
            await cluster.add_worker("decode-1", cluster.workers["decode-0"].info.role)
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.aiter_lines()
                for _ in range(20):
                    await anext(lines)
                assert cluster.gateway is not None
                running = [key for key, used in cluster.blocks_used().items() if used and "decode" in key]
                await cluster.workers.pop(running[0]).stop()
                async for _ in lines:
                    pass
    root = collector.named("text_completion disagg-tiny")
    assert attributes(root)["disagg.attempts"] == 2 and attributes(root)["gen_ai.usage.output_tokens"] == 400
    decodes = [span for span in collector.spans if span.name == "decode"]
    first, second = sorted(decodes, key=lambda span: span.start_time_unix_nano)
    assert attributes(first)["error.type"] == "worker_lost" and first.status.code == 2
    assert "error.type" not in attributes(second)
    assert attributes(first)["disagg.worker.id"] != attributes(second)["disagg.worker.id"]


async def test_a_collector_that_is_away_costs_no_request() -> None:
    async with traced("http://127.0.0.1:1") as (client, _):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


def test_tracing_without_an_endpoint_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"tracing\.endpoint"):
        RequestTracer(TracingConfig(), "m", "1")
