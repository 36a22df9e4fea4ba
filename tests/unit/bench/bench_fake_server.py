"""An OpenAI-like server on loopback whose streams do exactly what a test says, byte by byte."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

Behaviour = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]

DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"


def head(status: str = "200 OK", content_type: str = "text/event-stream; charset=utf-8") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text: str = " a", finish: str | None = None, usage: int | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    chunk: dict[str, Any] = {"id": "x", "object": "text_completion", "model": "fake", "choices": [choice]}
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": 8, "completion_tokens": usage, "total_tokens": 8 + usage}
    return event(chunk)


def usage(tokens: int, prompt: int = 8, cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": tokens}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"id": "x", "choices": [], "usage": counts})


def plain(status: str, body: bytes) -> bytes:
    lines = ("HTTP/1.1 " + status, "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def events(*parts: bytes) -> Behaviour:
    """A response of these events, each in an HTTP chunk of its own, properly ended."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(head() + b"".join(map(http_chunk, parts)) + LAST_CHUNK)

    return behave


def raw(data: bytes, close: bool = True) -> Behaviour:
    """These bytes, then the connection is closed or left hanging."""

    async def behave(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()
        else:
            await asyncio.sleep(60)

    return behave


async def well_behaved(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """As many tokens as asked for, with usage in each chunk, as vLLM does it."""
    prompt = len(body["prompt"]) if "prompt" in body else 8
    last = body["max_tokens"]
    writer.write(head())
    for number in range(1, last + 1):
        finish = "length" if number == last else None
        if "messages" in body:
            delta = {"index": 0, "delta": {"content": " a"}, "finish_reason": finish}
            writer.write(http_chunk(event({"choices": [delta]})))
        else:
            writer.write(http_chunk(token(finish=finish)))
        await asyncio.sleep(0.001)
    writer.write(http_chunk(usage(last, prompt) + DONE) + LAST_CHUNK)


class FakeServer:
    """Runs in a thread of its own, so that tests may call `asyncio.run`."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = well_behaved
        self.tokenizer = True
        self.max_model_len = 4096
        self.models = ["fake"]
        self.bodies: list[dict[str, Any]] = []
        """Bodies of the completion requests, in order."""
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self._server = starting.result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content) if content else {}
        path = start.split()[1]
        if path == "/v1/models":
            writer.write(plain("200 OK", json.dumps({"data": [{"id": m} for m in self.models]}).encode()))
        elif path == "/tokenize" and self.tokenizer:
            # One token for each distinct character: a byte vocabulary.
            answer = {"tokens": [ord(c) for c in body["prompt"]], "max_model_len": self.max_model_len}
            writer.write(plain("200 OK", json.dumps(answer).encode()))
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(writer, headers, body)
        else:
            writer.write(plain("404 Not Found", b'{"detail": "no such route"}'))
        await writer.drain()

    async def _complete(
        self, writer: asyncio.StreamWriter, headers: dict[str, str], body: dict[str, Any]
    ) -> None:
        self.bodies.append(body)
        self.headers.append(headers)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.behaviour(writer, body)
        finally:
            self.in_flight -= 1
