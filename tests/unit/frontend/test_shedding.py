"""A flood is refused at the door: without encoding its prompts, and without asking the generator again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from frontend_fakes import FakeBackend, serve_grpc

from disagg.errors import OverloadedError
from disagg.v1 import inference_pb2, inference_pb2_grpc

TEXT = "hello how are you " * 4
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}]}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": TEXT},
}


@pytest.fixture(autouse=True)
def refusing(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse everybody for a minute. Returns the texts that were encoded."""
    error = OverloadedError("too much work is waiting", retry_after=60.0, hold_s=60.0)
    backend.generator.script = lambda _request: [error]
    encoded: list[str] = []
    encode = backend.tokenizer.encode

    def note(text: str, **more: Any) -> list[int]:
        encoded.append(text)
        return encode(text, **more)

    monkeypatch.setattr(backend.tokenizer, "encode", note)
    return encoded


@pytest.fixture
async def stub(backend: FakeBackend) -> AsyncIterator[Any]:
    async with serve_grpc(backend) as address, grpc.aio.insecure_channel(address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


async def status_of(call: Any) -> grpc.StatusCode:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_rest_of_a_flood_costs_no_encoding(
    http: httpx.AsyncClient, backend: FakeBackend, refusing: list[str], path: str, stream: bool
) -> None:
    answers = [await http.post(path, json={**PATHS[path], "stream": stream}) for _ in range(20)]
    assert len(refusing) == len(backend.generator.requests) == 1
    assert backend.shed == 19
    first, *others = answers
    for answer in others:
        assert answer.status_code == first.status_code == 429
        assert answer.json() == first.json()
        assert 59 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("more", "headers"),
    [
        ({"messages": [{"role": "user", "content": "hello"}]}, {}),
        ({"cache_salt": "another"}, {}),
        ({"service_tier": "flex"}, {}),
        ({"priority": -1}, {}),
        ({}, {"x-slo-ttft-ms": "2000"}),
    ],
)
async def test_others_still_ask(
    http: httpx.AsyncClient, backend: FakeBackend, more: dict[str, Any], headers: dict[str, str]
) -> None:
    await http.post("/v1/chat/completions", json=CHAT, headers={"x-slo-ttft-ms": "1000"})
    await http.post("/v1/chat/completions", json={**CHAT, **more}, headers=headers)
    assert len(backend.generator.requests) == 2


async def test_many_sequences_hold_back_nobody_but_are_held_back(
    http: httpx.AsyncClient, backend: FakeBackend
) -> None:
    for _ in range(2):
        assert (await http.post("/v1/chat/completions", json={**CHAT, "n": 2})).status_code == 429
    assert backend.shed == 0
    await http.post("/v1/chat/completions", json=CHAT)
    asked = len(backend.generator.requests)
    assert (await http.post("/v1/chat/completions", json={**CHAT, "n": 2})).status_code == 429
    assert len(backend.generator.requests) == asked


async def test_bad_requests_are_told_so_in_a_flood_too(http: httpx.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    for bad, headers in (({"temperature": 5}, {}), ({}, {"x-slo-tpot-ms": "soon"})):
        answer = await http.post("/v1/chat/completions", json={**CHAT, **bad}, headers=headers)
        assert answer.status_code == 400


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": TEXT},
        {"token_ids": inference_pb2.TokenIds(ids=[5] * 30)},
        {"chat": inference_pb2.Chat(messages=[{"role": "user", "content": TEXT}])},
    ],
)
async def test_the_same_over_grpc(
    stub: Any, backend: FakeBackend, refusing: list[str], prompt: dict[str, Any]
) -> None:
    for _ in range(5):
        wanted = inference_pb2.GenerateRequest(**prompt)
        assert await status_of(stub.Generate(wanted)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(backend.generator.requests) == 1
    assert backend.shed == 4 and len(refusing) <= 1


async def test_http_and_grpc_share_what_they_were_told(
    http: httpx.AsyncClient, stub: Any, backend: FakeBackend
) -> None:
    await http.post("/v1/completions", json={"prompt": [5] * 30})
    wanted = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * 30))
    assert await status_of(stub.Generate(wanted)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(backend.generator.requests) == 1
