"""The HTTP API through the `openai` client, over a real connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from frontend_fakes import ANSWER, HANG, FakeBackend, serve_http
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from disagg.errors import DeadlineExceededError, NoCapacityError, OverloadedError, WorkerLostError

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serve_http(backend) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_chat(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    backend.generator.cached_tokens = 3
    answer = await client.chat.completions.create(model="tiny", messages=CHAT)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].logprobs is None
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    request = backend.generator.requests[0]
    usage = answer.usage
    assert usage.prompt_tokens == len(request.prompt_token_ids)
    assert usage.completion_tokens == len(backend.tokenizer.encode(ANSWER)) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3
    expected = backend.tokenizer.encode_chat(CHAT)
    assert request.prompt_token_ids == expected
    assert request.params.max_tokens == backend.max_model_len - len(expected)
    assert request.params.seed is not None and request.params.n == 1


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_completion_and_its_stream(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    whole = await client.completions.create(model="tiny", prompt="hello", max_tokens=9, echo=True)
    Completion.model_validate(whole.model_dump(), strict=True)
    stream = await client.completions.create(
        model="tiny", prompt="hello", max_tokens=9, echo=True, stream=True
    )
    chunks = [chunk async for chunk in stream]
    text = whole.choices[0].text
    assert text == "hello" + backend.tokenizer.decode(backend.tokenizer.encode(ANSWER)[:9])
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 9


async def test_sixteen_tokens_is_the_default_of_completions(
    client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    whole = await client.completions.create(model="tiny", prompt="hello")
    assert whole.usage is not None and whole.usage.completion_tokens == 16
    backend.max_model_len = 20
    await client.completions.create(model="tiny", prompt="hello hello you are wide 12")
    assert backend.generator.requests[-1].params.max_tokens < 16


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    options = {"model": "tiny", "messages": CHAT, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**options)
    content = whole.choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).startswith(ANSWER.encode())
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)
    chunks = [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == content


async def test_completion_logprobs(client: openai.AsyncOpenAI) -> None:
    options = {"model": "tiny", "prompt": "hello", "logprobs": 1, "max_tokens": 4}
    whole = await client.completions.create(**options)
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4
    assert "".join(logprobs.tokens) == whole.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(4)]
    chunks = [chunk async for chunk in await client.completions.create(**options, stream=True)]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [offset for part in parts for offset in part.text_offset] == logprobs.text_offset


async def test_n_choices_count_the_prompt_once(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    backend.generator.script = lambda request: [[request.params.seed % 7 + 60], [2]]
    answer = await client.chat.completions.create(model="tiny", messages=CHAT, n=3, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [backend.tokenizer.decode([token]) for token in (65, 66, 60)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == len(backend.generator.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == 6
    assert len({request.request_id for request in backend.generator.requests}) == 3
    stream = await client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        n=3,
        seed=5,
        stream=True,
    )
    streamed = ["", "", ""]
    roles = finishes = 0
    async for chunk in stream:
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        roles += choice.delta.role is not None
        finishes += choice.finish_reason is not None
    assert streamed == texts and roles == finishes == 3


async def test_several_prompts(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    ids = backend.tokenizer.encode("wide world")
    answer = await client.completions.create(model="tiny", prompt=[ids, [65]], n=2, max_tokens=1)
    prompts = [list(request.prompt_token_ids) for request in backend.generator.requests]
    assert sorted(prompts) == sorted([ids, ids, [65], [65]])
    assert len(answer.choices) == 4
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids) + 1
    await client.completions.create(model="tiny", prompt=ids, max_tokens=1)
    assert backend.generator.requests[-1].prompt_token_ids == ids


async def test_stop_string_ends_the_request(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    for stop in ("rld", ["zzz", "rld"]):
        answer = await client.chat.completions.create(model="tiny", messages=CHAT, stop=stop)
        assert answer.choices[0].message.content == "Hello wö"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].stop_reason == "rld"
    await backend.generator.until(lambda: len(backend.generator.closed) == 2)
    stream = await client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        stop="rld",
        stream=True,
    )
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello wö"


async def test_fields_reach_the_generator(client: openai.AsyncOpenAI, backend: FakeBackend) -> None:
    await client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        logit_bias={"65": -100},
        max_completion_tokens=12,
        service_tier="priority",
        user="someone",
        extra_headers={
            "x-slo-ttft-ms": "250",
            "x-slo-tpot-ms": "50.5",
            "x-request-timeout-ms": "1500",
            "x-request-id": "my-id.1",
        },
        extra_body={
            **{"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2},
            **{"stop_token_ids": [66], "priority": -3, "cache_salt": "tenant", "unknown_field": 1},
        },
    )
    request = backend.generator.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, -7, 12)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.25)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.01, 1.1)
    assert params.ignore_eos and params.min_tokens == 2 and params.stop_token_ids == (66,)
    assert params.logit_bias == {65: -100}
    assert (request.priority, request.cache_salt, request.service_tier) == (-3, "tenant", "priority")
    assert (request.slo_ttft_s, request.slo_tpot_s, request.timeout_s) == (0.25, 0.0505, 1.5)
    assert request.request_id.startswith("my-id.1-")


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["tiny"]
    Model.model_validate(models[0].model_dump(), strict=True)
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


async def test_blocking_client(backend: FakeBackend) -> None:
    def ask(url: str) -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="tiny", messages=CHAT)
            stream = client.chat.completions.create(model="tiny", messages=CHAT, stream=True)
            return whole.choices[0].message.content, "".join(
                chunk.choices[0].delta.content or "" for chunk in stream
            )

    async with serve_http(backend) as url:
        assert await asyncio.to_thread(ask, url) == (ANSWER, ANSWER)


# -- bytes on the wire -----------------------------------------------------------------------------


async def test_shape_of_the_stream_byte_by_byte(backend: FakeBackend) -> None:
    ids = backend.tokenizer.encode('"é🙂')
    backend.generator.script = lambda _request: [ids[:2], ids[2:], [2]]
    async with serve_http(backend) as url, httpx.AsyncClient() as client:
        answer = await client.post(
            f"{url}/v1/chat/completions",
            json={"messages": CHAT, "stream": True, "stream_options": {"include_usage": True}},
            headers={"x-request-id": "abc"},
        )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-request-id"] == "abc" and answer.headers["cache-control"] == "no-cache"
    created = json.loads(answer.text.split("\n")[0][6:])["created"]
    head = (
        'data: {"id":"chatcmpl-abc","object":"chat.completion.chunk",'
        f'"created":{created},"model":"tiny","choices":['
    )
    prompt, output = len(backend.tokenizer.encode_chat(CHAT)), len(ids) + 1
    usage = (
        f'{{"prompt_tokens":{prompt},"completion_tokens":{output},"total_tokens":{prompt + output},'
        '"prompt_tokens_details":{"cached_tokens":0}}'
    )
    first = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
    # The second step ends inside é, so its half shows with the third token.
    texts = [backend.tokenizer.decode(ids[:2]).rstrip("�"), ""]
    texts[1] = '"é🙂'[len(texts[0]) :]
    deltas = [
        f'"delta":{{"content":{json.dumps(text, ensure_ascii=False)}}},"logprobs":null,"finish_reason":null'
        for text in texts
    ]
    last = '"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null'
    events = [f'{head}{{"index":0,{inner}}}],"usage":null}}' for inner in (first, *deltas, last)]
    expected = "\n\n".join([*events, f'{head}],"usage":{usage}}}', "data: [DONE]", ""])
    assert answer.text == expected


async def test_one_write_for_each_step(backend: FakeBackend) -> None:
    from disagg.frontend.http import create_app

    backend.generator.script = backend.generator.say("Hello", size=1)
    bodies = await drive(create_app(backend), {"messages": CHAT, "stream": True})
    steps = len(backend.tokenizer.encode("Hello")) + 1
    assert len(bodies) == steps
    assert bodies[0].count(b"data: ") == 2 and bodies[-1].endswith(b"data: [DONE]\n\n")


async def drive(app, body: dict[str, object]) -> list[bytes]:
    """Run one request through the bare ASGI interface and return the body writes."""
    sent: list[bytes] = []
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, object]:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""},
        **{"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"},
        **{"root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)},
    }
    await app(scope, receive, send)
    return sent


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_errors_before_the_first_token_have_their_status(
    client: openai.AsyncOpenAI, backend: FakeBackend, stream: bool, n: int
) -> None:
    cases = [
        (OverloadedError("shed", retry_after=2.4), 429, "rate_limit_error"),
        (NoCapacityError("no worker"), 503, "service_unavailable_error"),
        (DeadlineExceededError("late"), 504, "timeout_error"),
        (WorkerLostError("gone", worker_id="w"), 500, "worker_lost"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ]
    for error, status, kind in cases:
        backend.generator.script = lambda _request, error=error: [error]
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="tiny", messages=CHAT, stream=stream, n=n)
        assert caught.value.status_code == status
        assert caught.value.body["type"] == kind
        assert "secret" not in caught.value.message
        if status == 429:
            assert caught.value.response.headers["retry-after"] == "3"
    await backend.generator.until(lambda: not backend.generator.running)


@pytest.mark.parametrize("n", [1, 2])
async def test_error_after_the_first_byte_ends_the_stream_with_an_event(backend: FakeBackend, n: int) -> None:
    backend.generator.script = lambda _request: [[65], [66], NoCapacityError("all workers died")]
    async with serve_http(backend) as url, httpx.AsyncClient() as client:
        answer = await client.post(
            f"{url}/v1/chat/completions", json={"messages": CHAT, "stream": True, "n": n}
        )
    assert answer.status_code == 200
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert json.loads(events[-1].removeprefix("data: ")) == {
        "error": {
            **{"message": "all workers died", "type": "service_unavailable_error"},
            **{"param": None, "code": "no_capacity"},
        }
    }
    assert "[DONE]" not in answer.text and '"content":' in events[-2]


async def test_openai_client_sees_the_error_inside_a_stream(
    client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    backend.generator.script = lambda _request: [[65], NoCapacityError("all workers died")]
    stream = await client.chat.completions.create(model="tiny", messages=CHAT, stream=True)
    with pytest.raises(openai.APIError, match="all workers died"):
        async for _ in stream:
            pass


async def test_generation_without_an_end_is_an_error(
    client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    backend.generator.script = lambda _request: []
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="tiny", messages=CHAT)


async def test_generator_that_misses_the_deadline_is_cut_off(
    client: openai.AsyncOpenAI, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.frontend.generation_response._DEADLINE_GRACE_S", 0.05)
    backend.generator.script = lambda _request: [HANG]
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(
            model="tiny", messages=CHAT, extra_headers={"x-request-timeout-ms": "50"}
        )
    assert caught.value.status_code == 504
    assert len(backend.generator.closed) == 1


# -- clients that leave ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [[HANG], [[65], [66], HANG]], ids=["before", "after"])
async def test_disconnect_closes_every_generation(
    backend: FakeBackend, n: int, stream: bool, steps: list[object]
) -> None:
    generator = backend.generator
    generator.script = lambda _request: steps
    async with serve_http(backend) as url, httpx.AsyncClient() as client:
        task = asyncio.create_task(
            client.post(f"{url}/v1/chat/completions", json={"messages": CHAT, "stream": stream, "n": n})
        )
        await generator.until(lambda: len(generator.running) == n)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await generator.until(lambda: len(generator.closed) == n)
    assert not generator.running and not generator.finished


async def test_cancelling_the_server_task_closes_the_generation(backend: FakeBackend) -> None:
    """Ray Serve cancels the task of a request whose client left."""
    from disagg.frontend.http import create_app

    generator = backend.generator
    generator.script = lambda _request: [[65], HANG]
    task = asyncio.create_task(drive(create_app(backend), {"messages": CHAT, "stream": True}))
    await generator.until(lambda: len(generator.running) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(generator.closed) == 1
