"""Everything that is refused: by which status, naming which field, and in which shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from frontend_fakes import FakeBackend, serve_http

from disagg.config import FrontendConfig

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"prompt": "hello"}


async def refused(
    http: httpx.AsyncClient, path: str, body: Any, status: int = 400, **headers: str
) -> dict[str, Any]:
    answer = await http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in ("0.5", -0.1, 2.1, True, [], {})],
        *[("top_p", v) for v in (-0.1, 0, 1.1, "x")],
        *[("top_k", v) for v in (-2, 1.5, "1", 2**40)],
        *[("min_p", v) for v in (-0.1, 1.1, "x")],
        *[("presence_penalty", v) for v in (-2.1, 2.1, "x")],
        *[("frequency_penalty", v) for v in (-2.1, 2.1, "x")],
        *[("repetition_penalty", v) for v in (0, -1, "x")],
        *[("max_tokens", v) for v in (0, -1, "8", 1.5, True, 10**400, 2**31)],
        *[("n", v) for v in (0, -1, 129, "2", 10**30)],
        *[("best_of", v) for v in (2, "x")],
        *[("seed", v) for v in ("1", 1.5, 2**63, -(2**63) - 1)],
        *[("stop", v) for v in (5, [5], "", [""], ["x"] * 17, "x" * 1025, {"a": 1})],
        *[("stop_token_ids", v) for v in ([-1], ["1"], 5, [10**6], [1] * 1025)],
        *[("logit_bias", v) for v in ({"a": 1}, {"1": 101}, {"1": "x"}, [1], {"-1": 1}, {"99999": 1})],
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        *[("min_tokens", v) for v in (-1, "x")],
        *[("stream", v) for v in ("true", 1)],
        *[("stream_options", v) for v in ({"include_usage": True}, 5)],
        *[("ignore_eos", v) for v in ("x", 1)],
        *[("priority", v) for v in ("x", 2**40)],
        *[("cache_salt", v) for v in (5, "x" * 513)],
        *[("service_tier", v) for v in ("gold", 5)],
        *[("user", v) for v in (5, "x" * 513)],
        *[("model", v) for v in (5, "x" * 513)],
        *[("response_format", v) for v in ({"type": "json_object"}, {"type": "json_schema"}, "text")],
        *[("tools", v) for v in ([{"type": "function"}], "x")],
        *[("tool_choice", v) for v in ("required", {"type": "function"})],
        *[(name, "x") for name in ("audio", "logits_processors", "chat_template", "suffix", "functions")],
        *[(name, {"a": 1}) for name in ("guided_json", "structured_outputs", "kv_transfer_params")],
        ("modalities", ["text", "audio"]),
        ("prompt_logprobs", 1),
        ("use_beam_search", True),
    ],
)
async def test_bad_field_is_named(
    http: httpx.AsyncClient, backend: FakeBackend, field: str, value: object
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        error = await refused(http, path, {**body, field: value})
        assert error["param"] == field and error["type"] == "invalid_request_error"
    assert not backend.generator.requests


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*CHAT["messages"], {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": ""}] * 4097}, "messages"),
        ({**CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({**CHAT, "max_completion_tokens": 257}, "max_completion_tokens"),
        ({**CHAT, "max_tokens": 257}, "max_tokens"),
        ({**CHAT, "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({**CHAT, "logprobs": 5}, "logprobs"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({**CHAT, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({**CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({**CHAT, "chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs"),
    ],
)
async def test_bad_chat_field_is_named(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    assert (await refused(http, "/v1/chat/completions", body))["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a", [5]]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [10**400]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({**TEXT, "logprobs": 21}, "logprobs"),
        ({**TEXT, "logprobs": True}, "logprobs"),
        ({**TEXT, "echo": True, "logprobs": 1}, "echo"),
        ({**TEXT, "echo": "x"}, "echo"),
    ],
)
async def test_bad_completion_field_is_named(
    http: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    assert (await refused(http, "/v1/completions", body))["param"] == param


async def test_prompt_over_the_models_length(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    for size in (256, 1000, 2_000_000):
        text = "x " * (size // 2)
        error = await refused(http, "/v1/completions", {"prompt": text})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        error = await refused(http, "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]})
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    error = await refused(http, "/v1/completions", {"prompt": [65] * 256})
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    error = await refused(http, "/v1/completions", {"prompt": [65] * 250, "max_tokens": 7})
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    answer = await http.post("/v1/completions", json={"prompt": [65] * 250, "max_tokens": 6})
    assert answer.status_code == 200
    assert len(backend.generator.requests) == 1


@pytest.mark.parametrize("body", ["", "{", "nope", '{"messages": [}', "[" * 5000, b"\xff\xfe", b'"\\ud800"'])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_body_that_is_no_json(http: httpx.AsyncClient, path: str, body: str | bytes) -> None:
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] is None


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"x"'])
async def test_body_that_is_no_object(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] is None


async def test_numbers_that_are_none(http: httpx.AsyncClient) -> None:
    for value in ("NaN", "Infinity", "-Infinity", "1e999"):
        for name in ("temperature", "min_p", "presence_penalty"):
            body = f'{{"prompt": "hello", "{name}": {value}}}'
            answer = await http.post("/v1/completions", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name


async def test_null_is_the_default(http: httpx.AsyncClient) -> None:
    nullable = (
        *("model", "stream", "stream_options", "max_tokens", "n", "seed", "temperature", "top_p", "stop"),
        *("logit_bias", "logprobs", "tools", "response_format", "user", "service_tier", "best_of", "suffix"),
    )
    body = {**TEXT, **dict.fromkeys(nullable)}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "suffix": ""}
    assert (await http.post("/v1/completions", json={**TEXT, **harmless})).status_code == 200


async def test_unknown_model(http: httpx.AsyncClient) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/tokenize", TEXT)):
        error = await refused(http, path, {**body, "model": "gpt-9"}, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_unknown_route_and_wrong_method(http: httpx.AsyncClient) -> None:
    for path in ("/", "/nope", "/v1/models/", "/v1/chat/completions/", "/docs", "/openapi.json"):
        answer = await http.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    for method, path in (("GET", "/v1/completions"), ("POST", "/health"), ("DELETE", "/v1/models")):
        answer = await http.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"]
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-request-timeout-ms"])
@pytest.mark.parametrize("value", ["", "abc", "-1", "0", "nan", "inf", "1e300"])
async def test_bad_objective_header(http: httpx.AsyncClient, header: str, value: str) -> None:
    error = await refused(http, "/v1/chat/completions", CHAT, **{header: value})
    assert error["param"] == header


async def test_deadline_is_bounded_by_the_configuration(backend: FakeBackend) -> None:
    backend.config = FrontendConfig(request_timeout_s=5)
    async with serve_http(backend) as url, httpx.AsyncClient() as client:
        headers = {"x-request-timeout-ms": "999999"}
        await client.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers)
    assert backend.generator.requests[0].timeout_s == 5


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ü", "a\tb"])
async def test_odd_request_id_is_replaced(http: httpx.AsyncClient, given: str) -> None:
    headers = {"x-request-id": given.encode()}
    answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 200
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("stated", [True, False])
async def test_body_too_large(backend: FakeBackend, path: str, stated: bool) -> None:
    backend.config = FrontendConfig(max_body_bytes=2048)
    body = json.dumps({**TEXT, **CHAT, "tokens": [], "user": "x", "padding": "y" * 6000}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    async with serve_http(backend) as url, httpx.AsyncClient() as client:
        answer = await client.post(url + path, content=body if stated else chunks())
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        fits = json.dumps({"prompt": "hello", "tokens": [65], **CHAT}).encode()
        if path == "/tokenize":
            fits = b'{"prompt": "hello"}'
        assert (await client.post(url + path, content=fits.ljust(2048))).status_code == 200


async def test_endless_body_is_cut_off(backend: FakeBackend) -> None:
    backend.config = FrontendConfig(max_body_bytes=1024)
    async with serve_http(backend) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        for _ in range(6):
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
        await writer.drain()
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 10)
        writer.close()
    assert b" 413 " in answer


# -- the other routes ------------------------------------------------------------------------------


async def test_tokenize_and_back(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    text = "hello wörld 🙂<|im_end|>"
    answer = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == backend.tokenizer.encode(text) and answer["max_model_len"] == 256
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}
    for prompt in ([], False):
        body = {**CHAT, "add_generation_prompt": bool(prompt)}
        chat = (await http.post("/tokenize", json=body)).json()
        expected = backend.tokenizer.encode_chat(CHAT["messages"], add_generation_prompt=bool(prompt))
        assert chat["tokens"] == expected
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["count"] == 0
    long = "wide world " * 3000
    assert (await http.post("/tokenize", json={"prompt": long})).json()["count"] > 256


@pytest.mark.parametrize(
    ("path", "body", "pause_s", "enough"),
    [
        # Encoded on a thread: without the interpreter lock the loop would wake a few times at both ends.
        ("/tokenize", {"prompt": "wide world " * 60_000}, 0.005, 15),
        # Decoded on the loop, in 49 pieces.
        ("/detokenize", {"tokens": [70, 71] * 100_000}, 0, 45),
    ],
)
async def test_a_long_text_does_not_hold_up_the_others(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], pause_s: float, enough: int
) -> None:
    """Counts how often another coroutine gets its turn meanwhile."""
    turns = 0
    task = asyncio.create_task(http.post(path, json=body))
    while not task.done():
        turns += 1
        await asyncio.sleep(pause_s)
    assert (await task).status_code == 200
    assert turns > enough


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {**TEXT, **CHAT}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {**CHAT, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
async def test_bad_tokenize_field_is_named(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    assert (await refused(http, path, body))["param"] == param


async def test_probes_and_metrics(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    from disagg.frontend.backend import Readiness

    assert (await http.get("/health")).status_code == 200
    answer = await http.get("/ready")
    assert answer.status_code == 200 and answer.json() == {"ready": True, "reasons": []}
    backend.readiness = Readiness(False, ("no decode worker",))
    answer = await http.get("/ready")
    assert answer.status_code == 503 and answer.json() == {"ready": False, "reasons": ["no decode worker"]}
    metrics = await http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert metrics.content == await backend.metrics()
    assert (await http.get("/version")).json() == {"version": "1.2.3"}
    assert (await http.get("/status")).json() == await backend.status()


# -- smaller promises ------------------------------------------------------------------------------


async def test_message_parts_and_developer_role(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    assert (await http.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello\nworld"}]
    assert backend.generator.requests[0].prompt_token_ids == backend.tokenizer.encode_chat(expected)


async def test_continuing_the_final_message(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "how are"}]
    body = {"messages": messages, "continue_final_message": True}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    prompt = backend.tokenizer.decode(
        backend.generator.requests[0].prompt_token_ids, skip_special_tokens=False
    )
    assert prompt.endswith("assistant\nhow are")


async def test_token_ids_on_request(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {**CHAT, "return_token_ids": True}
    whole = (await http.post("/v1/chat/completions", json=body)).json()
    request = backend.generator.requests[0]
    assert whole["prompt_token_ids"] == request.prompt_token_ids
    streamed: list[int] = []
    answer = await http.post("/v1/chat/completions", json={**body, "stream": True})
    for line in answer.text.split("\n\n")[:-2]:
        streamed += json.loads(line[6:])["choices"][0].get("token_ids", [])
    assert streamed == whole["choices"][0]["token_ids"]
    whole = (await http.post("/v1/completions", json={**TEXT, "return_token_ids": True})).json()
    assert whole["choices"][0]["prompt_token_ids"] == backend.tokenizer.encode("hello")
    assert len(whole["choices"][0]["token_ids"]) == 16


async def test_continuous_usage(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**TEXT, "max_tokens": 5, "stream": True, "stream_options": options}
    answer = await http.post("/v1/completions", json=body)
    counts = [json.loads(event[6:])["usage"]["completion_tokens"] for event in answer.text.split("\n\n")[:-2]]
    assert counts == [1, 2, 3, 4, 5, 5]


async def test_seeds_are_drawn_anew(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    for _ in range(3):
        await http.post("/v1/completions", json={**TEXT, "n": 4})
    seeds = [request.params.seed for request in backend.generator.requests]
    assert None not in seeds and len(set(seeds)) == 12
    await http.post("/v1/completions", json={**TEXT, "n": 2, "seed": 2**63 - 1})
    assert [r.params.seed for r in backend.generator.requests[-2:]] == [2**63 - 1, -(2**63)]


async def test_models_own_defaults(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    from disagg.frontend.backend import SamplingDefaults

    backend.sampling_defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)
    await http.post("/v1/completions", json={**TEXT, "top_k": 3})
    params = backend.generator.requests[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 3)
