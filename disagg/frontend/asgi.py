"""The ASGI details under the routes: reading bodies within bounds, noticing that a client left, errors."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from disagg.errors import DeadlineExceededError, DisaggError, OverloadedError, RequestTooLargeError

logger = logging.getLogger(__name__)

# Part of a body that is over the bound is read and dropped, since a client that is still sending when the
# connection closes reports a broken pipe instead of the answer.
_DRAIN_FACTOR = 4


class ClientDisconnectedError(Exception):
    """The client closed its connection; there is no one to answer."""


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """Return the body. Raises RequestTooLargeError above `limit` bytes, stated or not."""
    chunks: list[bytes] = []
    size = 0
    stated = request.headers.get("content-length", "")
    too_large = stated.isdigit() and int(stated) > limit
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnectedError
                size += len(message.get("body", b""))
                too_large = too_large or size > limit
                if too_large:
                    chunks.clear()
                else:
                    chunks.append(message.get("body", b""))
                if not message.get("more_body", False) or size > limit * _DRAIN_FACTOR:
                    break
    except TimeoutError:
        raise DeadlineExceededError("the request's body did not arrive in time") from None
    if too_large:
        raise RequestTooLargeError(f"the request body exceeds {limit} bytes")
    return b"".join(chunks)


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it, and wait until it has cleaned up, as soon as the client is gone.

    To be called once the body has been read, so that all `receive` has left to tell is the disconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        gone = not task.done()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
    if gone:
        raise ClientDisconnectedError
    task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_disagg_error(error: Exception, request_id: str) -> DisaggError:
    """Return what a client may see of an error; of an unforeseen one only that it happened."""
    if isinstance(error, DisaggError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceededError("the request's deadline passed before it was finished")
    logger.error("request %s failed", request_id, exc_info=error)
    return DisaggError(f"internal error; the server's log has it under request id {request_id}")


def error_object(error: DisaggError) -> dict[str, Any]:
    """Return OpenAI's error body."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: DisaggError, request_id: str | None = None) -> Response:
    """Return the answer to a request that failed before its first byte."""
    headers = {} if request_id is None else {"x-request-id": request_id}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return json_response(error_object(error), status=error.status, headers=headers)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    body = json.dumps(value, ensure_ascii=False).encode()
    return Response(body, status, headers, media_type="application/json")
