"""The client against a server that misbehaves in each way it must notice."""

import asyncio
import json
import socket

import bench_fake_server as fake
import pytest
from bench_fake_server import DONE, LAST_CHUNK, FakeServer, event, events, head, http_chunk, raw, token, usage

from disagg.bench.client import Client, Endpoint, RequestResult, StreamRequest
from disagg.bench.failures import BenchError


async def send(
    server: FakeServer, expected: int | None = None, timeout_s: float = 10.0, chat: bool = False
) -> RequestResult:
    client = Client(Endpoint.parse(server.url), timeout_s)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = json.dumps({"prompt": [1, 2], "max_tokens": expected or 3}).encode()
    try:
        return await client.stream(0, StreamRequest(path, body, 2, expected))
    finally:
        client.close()


def failed(result: RequestResult) -> str:
    assert result.failure is not None, "counted as served"
    return result.failure.label


async def test_whole_stream_is_served(server: FakeServer) -> None:
    result = await send(server, expected=5)
    assert result.failure is None
    assert result.output_tokens == 5
    assert len(result.token_times) == 5
    assert result.prompt_tokens == 2
    assert result.finish_reason == "length"
    assert result.sent_s < result.token_times[0] <= result.token_times[-1] <= result.end_s
    assert result.tpot_s == pytest.approx((result.e2e_s - result.ttft_s) / 4)


@pytest.mark.parametrize(
    ("behaviour", "label"),
    [
        pytest.param(raw(fake.plain("500 Internal Server Error", b"boom")), "http_500", id="500"),
        pytest.param(raw(fake.plain("429 Too Many Requests", b"{}")), "http_429", id="429"),
        pytest.param(raw(fake.plain("200 OK", b"{}")), "content_type", id="not a stream"),
        pytest.param(raw(b"SSH-2.0-OpenSSH_9\r\n\r\n\r\n"), "protocol", id="not http"),
        pytest.param(raw(b""), "disconnected", id="closed at once"),
        pytest.param(raw(head() + http_chunk(token())), "disconnected", id="closed in the middle"),
        pytest.param(raw(head() + b"ff\r\ndata: {"), "disconnected", id="closed inside a chunk"),
        pytest.param(
            raw(head() + http_chunk(token(finish="stop") + DONE)), "disconnected", id="no last HTTP chunk"
        ),
        pytest.param(raw(head() + b"zz\r\n"), "protocol", id="bad chunk size"),
        pytest.param(raw(head() + b"3\r\nabcdef\r\n"), "protocol", id="chunk longer than stated"),
        pytest.param(events(token(), token(finish="stop")), "no_done", id="no DONE"),
        pytest.param(events(token(), b'data: {"cho'), "no_done", id="ends inside an event"),
        pytest.param(events(token(), b"data: {nope}\n\n", DONE), "malformed", id="wrong json"),
        pytest.param(events(b"data: [1]\n\n", DONE), "malformed", id="json but no object"),
        pytest.param(events(event({"id": "x"}), DONE), "malformed", id="no choices"),
        pytest.param(events(event({"choices": [{"index": 0}]}), DONE), "malformed", id="no text"),
        pytest.param(events(b"data: \xff\n\n", DONE), "malformed", id="not utf-8"),
        pytest.param(events(token(finish="stop"), DONE, token()), "malformed", id="event after DONE"),
        pytest.param(events(token(finish="stop"), token(), DONE), "malformed", id="text after the end"),
        pytest.param(
            events(token(), event({"error": {"message": "worker died", "code": 500}}), DONE),
            "error_event",
            id="error event",
        ),
        pytest.param(
            events(token(), b'event: error\ndata: {"message": "x"}\n\n', DONE),
            "error_event",
            id="named error",
        ),
        pytest.param(events(DONE), "no_tokens", id="nothing"),
        pytest.param(events(token("", finish="stop"), usage(0), DONE), "no_tokens", id="no tokens"),
        pytest.param(events(token(), DONE), "finish_reason", id="no finish reason"),
        pytest.param(
            events(token(finish="stop"), token("", finish="stop"), DONE), "finish_reason", id="two reasons"
        ),
        pytest.param(events(token(finish="abort"), DONE), "finish_reason", id="aborted"),
    ],
)
async def test_failure_is_noticed(server: FakeServer, behaviour: fake.Behaviour, label: str) -> None:
    server.behaviour = behaviour
    assert failed(await send(server)) == label


@pytest.mark.parametrize(
    ("parts", "label"),
    [
        ((token(), token(finish="stop"), usage(2), DONE), "token_count"),
        ((token(), token(), token(finish="length"), DONE), "usage"),
    ],
)
async def test_asked_length_is_checked(server: FakeServer, parts: tuple[bytes, ...], label: str) -> None:
    server.behaviour = events(*parts)
    assert failed(await send(server, expected=3)) == label
    assert (await send(server, expected=None)).ok


@pytest.mark.parametrize(
    ("sent", "detail"),
    [
        (b"", "before any answer"),
        (head(), "before the first token"),
        (head() + http_chunk(token()), "after 1 tokens"),
    ],
)
async def test_hang_is_a_timeout_that_says_where(server: FakeServer, sent: bytes, detail: str) -> None:
    server.behaviour = raw(sent, close=False)
    result = await send(server, timeout_s=0.2)
    assert failed(result) == "timeout"
    assert result.failure is not None and detail in result.failure.detail


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = Client(Endpoint.parse(f"http://127.0.0.1:{unused.getsockname()[1]}"), 5.0)
        assert failed(await client.stream(0, StreamRequest("/v1/completions", b"{}", 1, None))) == "connect"


async def test_message_of_the_error_is_kept(server: FakeServer) -> None:
    body = json.dumps({"error": {"message": "queue full", "type": "overloaded"}}).encode()
    server.behaviour = raw(fake.plain("429 Too Many Requests", body))
    failure = (await send(server)).failure
    assert failure is not None and failure.detail == "HTTP 429: queue full"


async def test_connection_is_kept_and_a_dead_one_replaced(server: FakeServer) -> None:
    client = Client(Endpoint.parse(server.url), 5.0)
    request = StreamRequest("/v1/completions", b'{"prompt": [1], "max_tokens": 2}', 1, 2)
    assert (await client.stream(0, request)).ok
    assert (await client.stream(1, request)).ok
    assert server.connections == 1

    async def once_then_close(writer: asyncio.StreamWriter, body: dict[str, object]) -> None:
        server.behaviour = fake.well_behaved
        writer.close()

    server.behaviour = once_then_close
    assert (await client.stream(2, request)).ok, "an idle connection that closed is not the request's fault"
    assert server.connections == 2
    client.close()


async def test_chat_role_announcement_is_no_token(server: FakeServer) -> None:
    def delta(finish: str | None = None, **fields: str) -> bytes:
        return event({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})

    server.behaviour = events(
        delta(role="assistant", content=""), delta(content="a"), delta(finish="stop"), usage(1), DONE
    )
    result = await send(server, chat=True)
    assert result.ok and len(result.token_times) == 1
    server.behaviour = events(delta(role="assistant", content=""), delta(finish="stop"), DONE)
    assert failed(await send(server, chat=True)) == "no_tokens"


async def test_continuous_usage_says_which_chunks_carry_tokens(server: FakeServer) -> None:
    server.behaviour = events(
        token("", usage=1), token("ab", usage=4), token("", usage=4, finish="length"), usage(4), DONE
    )
    result = await send(server, expected=4)
    assert result.ok and len(result.token_times) == 2 and result.output_tokens == 4


async def test_usage_beside_the_finish_reason_alone_is_the_total(server: FakeServer) -> None:
    server.behaviour = events(token(), token(), token("", finish="length", usage=2), DONE)
    result = await send(server, expected=2)
    assert result.ok and len(result.token_times) == 2


async def test_tokens_without_text_still_have_a_first_time(server: FakeServer) -> None:
    server.behaviour = events(token(""), token("", finish="length"), usage(2, cached=6), DONE)
    result = await send(server, expected=2)
    assert result.ok and len(result.token_times) == 1 and result.cached_tokens == 6


async def test_api_key_is_sent(server: FakeServer) -> None:
    client = Client(Endpoint.parse(server.url + "/v1", "secret"), 5.0)
    await client.stream(0, StreamRequest("/v1/completions", b'{"prompt": [1], "max_tokens": 1}', 1, 1))
    client.close()
    assert server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://h:port", "http://h/?a=b"])
def test_wrong_url_is_named(url: str) -> None:
    with pytest.raises(BenchError, match="--url"):
        Endpoint.parse(url)


def test_key_cannot_add_headers() -> None:
    with pytest.raises(BenchError, match="--api-key"):
        Endpoint.parse("http://h", "a\r\nX-Evil: 1")


async def test_chunk_framing_survives_any_split(server: FakeServer) -> None:
    parts = [token(), token(), token(finish="length"), usage(3), DONE]
    data = head() + b"".join(map(http_chunk, parts)) + LAST_CHUNK

    async def byte_by_byte(writer: asyncio.StreamWriter, body: dict[str, object]) -> None:
        for at in range(0, len(data), 7):
            writer.write(data[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0)

    server.behaviour = byte_by_byte
    result = await send(server, expected=3)
    assert result.ok and len(result.token_times) == 3
