"""The gRPC service over a real connection, with the stubs alone; the clients have tests of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from frontend_fakes import ANSWER, HANG, FakeBackend, serve_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from disagg.config import FrontendConfig
from disagg.errors import (
    ConfigError,
    DeadlineExceededError,
    NoCapacityError,
    OverloadedError,
)
from disagg.frontend.backend import Readiness
from disagg.frontend.grpc_service import build_grpc_server, create_grpc_server
from disagg.v1 import common_pb2, inference_pb2, inference_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def channel(backend: FakeBackend) -> AsyncIterator[grpc.aio.Channel]:
    async with serve_grpc(backend) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    params = fields.pop("params", {})
    return inference_pb2.GenerateRequest(
        **({"text": "hello"} | fields), params=common_pb2.SamplingParams(**params)
    )


async def test_one_message_for_each_step(stub: Any, backend: FakeBackend) -> None:
    backend.generator.cached_tokens = 2
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hello")])
    messages = [m async for m in stub.Generate(inference_pb2.GenerateRequest(chat=chat))]
    ids = [*backend.tokenizer.encode(ANSWER), backend.tokenizer.eos_token_id]
    assert [list(message.token_ids) for message in messages] == [[token] for token in ids]
    assert "".join(message.text for message in messages) == ANSWER
    finishes = [message.finish_reason for message in messages]
    assert finishes == [0] * (len(ids) - 1) + [common_pb2.FINISH_REASON_STOP]
    assert [message.HasField("usage") for message in messages] == [False] * (len(ids) - 1) + [True]
    usage = messages[-1].usage
    expected = backend.tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected), len(ids))
    assert usage.cached_tokens == 2
    asked = backend.generator.requests[0]
    assert asked.prompt_token_ids == expected
    assert asked.params.max_tokens == backend.max_model_len - len(expected)


async def test_fields_reach_the_generator(stub: Any, backend: FakeBackend) -> None:
    params = {
        **{"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.25, "presence_penalty": 0.5},
        **{"frequency_penalty": -0.5, "repetition_penalty": 1.5, "logit_bias": {65: -100.0}},
        **{"logprobs": 2, "seed": -5, "max_tokens": 7, "min_tokens": 2, "stop": ["zz"]},
        **{"stop_token_ids": [66], "ignore_eos": True},
    }
    message = request(
        text="",
        token_ids=inference_pb2.TokenIds(ids=[70, 71]),
        params=params,
        request_id="mine",
        priority=-2,
        cache_salt="salt",
        slo_ttft_ms=250,
        slo_tpot_ms=50,
    )
    answers = [m async for m in stub.Generate(message, timeout=30)]
    asked = backend.generator.requests[0]
    for name, value in params.items():
        assert getattr(asked.params, name) == (tuple(value) if isinstance(value, list) else value)
    assert asked.prompt_token_ids == [70, 71] and asked.request_id.startswith("mine-")
    assert (asked.priority, asked.cache_salt, asked.slo_ttft_s, asked.slo_tpot_s) == (-2, "salt", 0.25, 0.05)
    # gRPC rounds a deadline up on its way.
    assert 0 < asked.timeout_s < 31
    assert all(m.request_id == "mine" for m in answers)
    assert len(answers[0].logprobs[0].top) == 2 and answers[0].logprobs[0].rank == 1
    assert answers[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH


async def test_stop_string(stub: Any, backend: FakeBackend) -> None:
    messages = [m async for m in stub.Generate(request(params={"stop": ["rld"], "max_tokens": 50}))]
    assert "".join(message.text for message in messages) == "Hello wö"
    assert messages[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert len(backend.generator.closed) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": ""}, "text"),
        ({"token_ids": inference_pb2.TokenIds()}, "token_ids"),
        ({"token_ids": inference_pb2.TokenIds(ids=[-1])}, "token_ids"),
        ({"token_ids": inference_pb2.TokenIds(ids=[10**6])}, "token_ids"),
        ({"token_ids": inference_pb2.TokenIds(ids=[65] * 256)}, "token_ids"),
        ({"chat": inference_pb2.Chat()}, "messages"),
        (
            {"chat": inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="tool", content="x")])},
            "messages[0].role",
        ),
        ({"text": "x " * 300}, "text"),
        ({"request_id": "a b"}, "request_id"),
        ({"cache_salt": "x" * 513}, "cache_salt"),
        ({"slo_ttft_ms": -1}, "slo_ttft_ms"),
        ({"slo_tpot_ms": float("nan")}, "slo_tpot_ms"),
        ({"params": {"max_tokens": 0}}, "max_tokens"),
        ({"params": {"max_tokens": 257}}, "max_tokens"),
        ({"params": {"temperature": -1}}, "temperature"),
        ({"params": {"temperature": float("nan")}}, "temperature"),
        ({"params": {"top_p": 0}}, "top_p"),
        ({"params": {"top_k": -2}}, "top_k"),
        ({"params": {"logprobs": 21}}, "logprobs"),
        ({"params": {"min_tokens": 20}}, "min_tokens"),
        ({"params": {"stop": ["x"] * 17}}, "stop"),
        ({"params": {"stop": [""]}}, "stop"),
        ({"params": {"stop_token_ids": [10**6]}}, "stop_token_ids"),
        ({"params": {"logit_bias": {1: 101}}}, "logit_bias"),
        ({"params": {"logit_bias": {-1: 1}}}, "logit_bias"),
    ],
)
async def test_bad_field_is_named(stub: Any, backend: FakeBackend, fields: Any, param: str) -> None:
    error = await failure(stub.Generate(request(**fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("disagg-error-param", param) in list(error.trailing_metadata())
    assert param in error.details()
    assert not backend.generator.requests


async def test_no_prompt_and_unknown_model(stub: Any) -> None:
    error = await failure(stub.Generate(inference_pb2.GenerateRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = await failure(stub.Generate(request(model="other")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("before", [[], [[65]]], ids=["first", "later"])
@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (OverloadedError("shed", retry_after=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (NoCapacityError("none"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceededError("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_errors_have_their_status(
    stub: Any, backend: FakeBackend, problem: Exception, code: grpc.StatusCode, before: list[Any]
) -> None:
    backend.generator.script = lambda _request: [*before, problem]
    error = await failure(stub.Generate(request()))
    assert error.code() is code and "secret" not in error.details()
    retry = ("disagg-retry-after", "2.5") in list(error.trailing_metadata())
    assert retry == isinstance(problem, OverloadedError)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_message_too_large() -> None:
    backend = FakeBackend(config=FrontendConfig(max_body_bytes=4096))
    async with serve_grpc(backend) as address, grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = await failure(stub.Generate(request(text="x" * 5000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# -- ending early ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[HANG], [[65], HANG]], ids=["before", "after"])
async def test_cancelling_closes_the_generation(stub: Any, backend: FakeBackend, steps: list[Any]) -> None:
    generator = backend.generator
    generator.script = lambda _request: steps
    call = stub.Generate(request(request_id="mine"))
    await generator.until(lambda: len(generator.running) == 1)
    call.cancel()
    await generator.until(lambda: len(generator.closed) == 1)
    assert not generator.running


async def test_client_deadline_closes_the_generation(stub: Any, backend: FakeBackend) -> None:
    backend.generator.script = lambda _request: [HANG]
    error = await failure(stub.Generate(request(), timeout=0.1))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await backend.generator.until(lambda: len(backend.generator.closed) == 1)


async def test_abort_by_id(stub: Any, backend: FakeBackend) -> None:
    generator = backend.generator
    generator.script = lambda _request: [[65], [66], HANG]
    call = stub.Generate(request(request_id="mine"))
    seen = [await call.read(), await call.read()]
    duplicate = await failure(stub.Generate(request(request_id="mine")))
    assert ("disagg-error-param", "request_id") in list(duplicate.trailing_metadata())
    assert not (await stub.Abort(inference_pb2.AbortRequest(request_id="other"))).aborted
    assert (await stub.Abort(inference_pb2.AbortRequest(request_id="mine"))).aborted
    last = []
    while (message := await call.read()) is not grpc.aio.EOF:
        last.append(message)
    assert [message.finish_reason for message in last] == [common_pb2.FINISH_REASON_ABORT]
    assert last[0].usage.completion_tokens == len(seen) == 2
    await generator.until(lambda: len(generator.closed) == 1)
    assert not (await stub.Abort(inference_pb2.AbortRequest(request_id="mine"))).aborted
    generator.script = generator.say(ANSWER)
    assert [m async for m in stub.Generate(request(request_id="mine"))]


# -- health, reflection, model info ----------------------------------------------------------------


async def test_health_follows_readiness(channel: grpc.aio.Channel, backend: FakeBackend) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "disagg.v1.Inference"):
        check = health_pb2.HealthCheckRequest(service=service)
        backend.readiness = Readiness(True)
        assert (await stub.Check(check)).status == SERVING
        watch = stub.Watch(check)
        assert (await watch.read()).status == SERVING
        backend.readiness = Readiness(False, ("no worker",))
        assert (await stub.Check(check)).status == NOT_SERVING
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
    unknown = health_pb2.HealthCheckRequest(service="other")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(unknown)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(unknown)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="disagg.v1.Inference")
    listed, found = [answer async for answer in stub.ServerReflectionInfo(iter([listing, symbol]))]
    assert {service.name for service in listed.list_services_response.service} == {
        *("disagg.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"),
    }
    assert found.file_descriptor_response.file_descriptor_proto


async def test_model_info(stub: Any, backend: FakeBackend) -> None:
    info = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (info.model, info.max_model_len, info.version) == ("tiny", 256, "1.2.3")
    assert info.vocab_size == backend.vocab_size and list(info.eos_token_ids) == [2]


async def test_replicas_share_a_port(backend: FakeBackend) -> None:
    first = build_grpc_server(backend, None)
    port = first.add_insecure_port("127.0.0.1:0")
    second = create_grpc_server(backend, None, "127.0.0.1", port)
    await asyncio.gather(first.start(), second.start())
    await asyncio.gather(first.stop(0), second.stop(0))


async def test_address_that_cannot_be_had(backend: FakeBackend) -> None:
    with pytest.raises(ConfigError) as caught:
        create_grpc_server(backend, None, "203.0.113.7", 1)
    assert caught.value.param == "grpc_port"
