"""Client and AsyncClient against the real service with a scripted generator."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from frontend_fakes import ANSWER, HANG, FakeBackend, serve_grpc

from disagg.client import AsyncClient, Client, GenerationResult
from disagg.errors import (
    AuthenticationError,
    DeadlineExceededError,
    DisaggError,
    InvalidRequestError,
    ModelNotFoundError,
    NoCapacityError,
    OverloadedError,
)
from disagg.types import FinishReason

CHAT = [{"role": "user", "content": "hello"}]


class Either:
    """Runs a call on the blocking client (in a thread) or on the asyncio one."""

    def __init__(self, address: str, kind: str, **options: Any) -> None:
        self.blocking = kind == "blocking"
        self.client: Any = (Client if self.blocking else AsyncClient)(address, **options)

    async def call(self, name: str, *args: Any, **options: Any) -> Any:
        method = getattr(self.client, name)
        if self.blocking:
            return await asyncio.to_thread(method, *args, **options)
        return await method(*args, **options)

    async def stream(self, *args: Any, **options: Any) -> list[Any]:
        stream = self.client.stream(*args, **options)
        return await asyncio.to_thread(list, stream) if self.blocking else [chunk async for chunk in stream]

    async def close(self) -> None:
        await self.call("close")


@pytest.fixture(params=["blocking", "asyncio"])
async def either(request: pytest.FixtureRequest, backend: FakeBackend) -> Any:
    async with serve_grpc(backend) as address:
        either = Either(address, request.param)
        yield either
        await either.close()


async def test_generate(either: Either, backend: FakeBackend) -> None:
    ids = backend.tokenizer.encode("hello")
    for arguments in ({"prompt": "hello"}, {"token_ids": ids}, {"messages": CHAT}):
        result = await either.call("generate", **arguments, max_tokens=50, logprobs=1)
        assert isinstance(result, GenerationResult)
        assert result.text == ANSWER and result.finish_reason is FinishReason.STOP
        assert result.token_ids == (*backend.tokenizer.encode(ANSWER), backend.tokenizer.eos_token_id)
        assert [p.token_id for p in result.logprobs] == list(result.token_ids)
        assert result.usage.completion_tokens == len(result.token_ids)
    assert result.usage.prompt_tokens == len(backend.tokenizer.encode_chat(CHAT))


async def test_stream(either: Either) -> None:
    chunks = await either.stream("hello", max_tokens=50, stop="rld", request_id="mine")
    assert "".join(chunk.text for chunk in chunks) == "Hello wö"
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.STOP and chunks[-1].usage is not None
    assert {chunk.request_id for chunk in chunks} == {"mine"}


async def test_options_reach_the_generator(either: Either, backend: FakeBackend) -> None:
    await either.call(
        "generate",
        "hello",
        **{"temperature": 0, "top_k": 3, "seed": 7, "stop": ["a", "b"], "logit_bias": {65: 1.5}},
        **{"ignore_eos": True, "max_tokens": 3, "priority": 4, "cache_salt": "s", "slo_ttft_ms": 100},
        timeout=20,
    )
    asked = backend.generator.requests[0]
    assert (asked.params.temperature, asked.params.top_k, asked.params.seed) == (0, 3, 7)
    assert asked.params.stop == ("a", "b") and asked.params.logit_bias == {65: 1.5}
    assert asked.params.ignore_eos and asked.priority == 4 and asked.cache_salt == "s"
    # gRPC sends a deadline with three digits, rounded up.
    assert asked.slo_ttft_s == 0.1 and 19 < asked.timeout_s < 21


async def test_model_info(either: Either, backend: FakeBackend) -> None:
    info = await either.call("model_info")
    assert (info.model, info.max_model_len, info.version) == ("tiny", 256, "1.2.3")
    assert (info.vocab_size, info.eos_token_ids) == (backend.vocab_size, (2,))


async def test_abort(either: Either, backend: FakeBackend) -> None:
    backend.generator.script = lambda _request: [[65], HANG]
    task = asyncio.create_task(either.call("generate", "hello", request_id="mine"))
    await backend.generator.until(lambda: len(backend.generator.running) == 1)
    assert await either.call("abort", "mine")
    result = await task
    assert result.finish_reason is FinishReason.ABORT
    assert not await either.call("abort", "mine")


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"max_tokens": 0}, InvalidRequestError, "max_tokens"),
        ({"temperature": -1}, InvalidRequestError, "temperature"),
        ({"model": "other"}, ModelNotFoundError, "model"),
        ({"request_id": "a b"}, InvalidRequestError, "request_id"),
        ({"temperature": "hot"}, InvalidRequestError, None),
        ({"no_such_option": 1}, InvalidRequestError, None),
    ],
)
async def test_bad_arguments(
    either: Either, options: Any, kind: type[DisaggError], param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        await either.call("generate", "hello", **options)
    assert caught.value.param == param


async def test_exactly_one_prompt(either: Either) -> None:
    for arguments in ({}, {"prompt": "a", "token_ids": [1]}, {"messages": [{"role": "user"}]}):
        with pytest.raises(InvalidRequestError):
            await either.call("generate", **arguments)


async def test_too_long_a_prompt_has_its_code(either: Either) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await either.call("generate", "x " * 300)
    assert (caught.value.param, caught.value.code) == ("text", "context_length_exceeded")


@pytest.mark.parametrize("before", [[], [[65]]], ids=["first", "later"])
async def test_typed_errors_from_the_cluster(either: Either, backend: FakeBackend, before: list[Any]) -> None:
    for problem in (NoCapacityError("none"), DeadlineExceededError("late"), RuntimeError("secret")):
        backend.generator.script = lambda _request, problem=problem: [*before, problem]
        with pytest.raises(DisaggError) as caught:
            await either.call("generate", "hello")
        assert type(caught.value) is (DisaggError if isinstance(problem, RuntimeError) else type(problem))
        assert "secret" not in caught.value.message
    backend.generator.script = lambda _request: [*before, OverloadedError("shed", retry_after=2.5)]
    with pytest.raises(OverloadedError) as overloaded:
        await either.call("generate", "hello")
    assert overloaded.value.retry_after == 2.5


async def test_timeout(either: Either, backend: FakeBackend) -> None:
    backend.generator.script = lambda _request: [HANG]
    with pytest.raises(DeadlineExceededError):
        await either.call("generate", "hello", timeout=0.1)
    await backend.generator.until(lambda: len(backend.generator.closed) == 1)


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_no_server(kind: str) -> None:
    either = Either("127.0.0.1:1", kind)
    with pytest.raises(NoCapacityError, match=r"127\.0\.0\.1:1"):
        await either.call("generate", "hello")
    await either.close()


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
async def test_api_key(kind: str, backend: FakeBackend) -> None:
    async with serve_grpc(backend, "secret") as address:
        for key, works in ((None, False), ("wrong", False), ("secret", True)):
            either = Either(address, kind, api_key=key)
            if works:
                assert (await either.call("model_info")).model == "tiny"
                assert (await either.call("generate", "hello")).text
            else:
                for name, arguments in (("model_info", ()), ("generate", ("hello",)), ("abort", ("x",))):
                    with pytest.raises(AuthenticationError):
                        await either.call(name, *arguments)
            await either.close()


async def test_leaving_the_async_stream_cancels(backend: FakeBackend) -> None:
    backend.generator.script = lambda _request: [[65], HANG]
    async with serve_grpc(backend) as address, AsyncClient(address) as client:
        stream = client.stream("hello")
        assert (await anext(stream)).token_ids == (65,)
        await stream.aclose()
        await backend.generator.until(lambda: len(backend.generator.closed) == 1)


def test_leaving_the_blocking_stream_cancels(backend: FakeBackend, serve: Any) -> None:
    backend.generator.script = lambda _request: [[65], HANG]
    with serve(backend) as address, Client(address) as client:
        stream = client.stream("hello")
        assert next(stream).token_ids == (65,)
        stream.close()
        closed = threading.Event()
        while not backend.generator.closed:
            assert not closed.wait(0.01)


def test_what_is_public() -> None:
    import disagg.client

    assert sorted(disagg.client.__all__) == disagg.client.__all__
    assert {"Client", "AsyncClient"} <= set(disagg.client.__all__)
