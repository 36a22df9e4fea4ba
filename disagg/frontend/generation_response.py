"""The answer to a request for text, streamed or whole, as an ASGI response that runs the generations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from disagg.errors import DisaggError
from disagg.frontend.asgi import (
    ClientDisconnectedError,
    as_disagg_error,
    error_object,
    error_response,
    run_until_disconnect,
)
from disagg.frontend.openai_format import Choice, Extra, ResponseFormat, ResponseOptions, error_event
from disagg.frontend.text_generation import TextGeneration, stream_all, total_usage
from disagg.service.timeline import describe

# The orchestrator keeps deadlines; this much later the front end answers by itself.
_DEADLINE_GRACE_S = 2.0
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies that buffer would turn a stream into one late answer.
    (b"x-accel-buffering", b"no"),
]


class GenerationResponse(Response):
    """Runs the generations when the server asks for the response, and until the client leaves.

    The status is not sent before the first token exists, so whatever fails earlier has its proper one.
    """

    def __init__(
        self,
        request_id: str,
        response_format: ResponseFormat,
        generations: Sequence[TextGeneration],
        choices_per_prompt: int,
        options: ResponseOptions,
        *,
        streams: bool,
        explains: bool = False,
    ) -> None:
        super().__init__()
        self._request_id = request_id
        self._format = response_format
        self._generations = generations
        self._choices_per_prompt = choices_per_prompt
        self._continuous = options.continuous_usage
        self._streams = streams
        self._explains = explains
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer() -> None:
            try:
                # The limit lies around all of it, since a timeout must not be entered inside a generator.
                async with asyncio.timeout(self._generations[0].request.timeout_s + _DEADLINE_GRACE_S):
                    await (self._stream(send) if self._streams else self._whole(send))
            except Exception as error:
                await self._fail(as_disagg_error(error, self._request_id), scope, receive, send)

        try:
            await run_until_disconnect(receive, answer())
        except ClientDisconnectedError:
            return

    async def _stream(self, send: Send) -> None:
        begun: set[int] = set()
        running = len(self._generations)
        async with aclosing(stream_all(self._generations)) as deltas:
            async for index, delta in deltas:
                usage = self._generations[index].usage if self._continuous else None
                data = self._format.step(index, delta, usage)
                if index not in begun:
                    begun.add(index)
                    data = self._format.first(index) + data
                running -= delta.finish_reason is not None
                if running and (data or not self._started):
                    await self._send(send, data, more=True)
        # Everything is closed by now, so the end of the stream is also the end of the request's cost.
        total = total_usage(self._generations, self._choices_per_prompt)
        data += self._format.last(total, self._explanation())
        await self._send(send, data, more=False)

    async def _whole(self, send: Send) -> None:
        choices = [Choice(index) for index in range(len(self._generations))]
        async with aclosing(stream_all(self._generations)) as deltas:
            async for index, delta in deltas:
                choices[index].add(delta)
        total = total_usage(self._generations, self._choices_per_prompt)
        body = self._format.whole(choices, total, self._explanation())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", self._request_id.encode()),
        ]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _explanation(self) -> Extra | None:
        """Return what became of each choice, for a client that asked: which workers served it, and when."""
        if not self._explains:
            return None
        return {"disagg": {"choices": [describe(each.request.timeline) for each in self._generations]}}

    async def _send(self, send: Send, data: bytes, *, more: bool) -> None:
        if not self._started:
            self._started = True
            headers = [*_SSE_HEADERS, (b"x-request-id", self._request_id.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _fail(self, error: DisaggError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            event = error_event(error_object(error))
            await send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await error_response(error, self._request_id)(scope, receive, send)
