"""The API key, checked in front of every route and every gRPC method: denied unless it matches."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg.errors import AuthenticationError
from disagg.frontend.asgi import error_response
from disagg.rpc import refuse

SignIn = Callable[[Scope], Response | None]
_MESSAGE = "a valid API key is needed: Authorization: Bearer KEY"


class _KeyCheck:
    """Compares in constant time; digests, so that not even the key's length shows."""

    def __init__(self, api_key: str) -> None:
        self._digest = hashlib.sha256(api_key.encode()).digest()

    def accepts(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        matches = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        return matches and scheme.lower() == b"bearer"


class RequireApiKey:
    """ASGI middleware. It stands before routing, so a path that is odd, unknown or new is covered too."""

    def __init__(self, app: ASGIApp, api_key: str, sign_in: SignIn = lambda scope: None) -> None:
        """sign_in: returns the answer, if there is one, with which a browser asks its user for the key."""
        self._app = app
        self._check = _KeyCheck(api_key)
        self._sign_in = sign_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            response = self._sign_in(scope) or error_response(AuthenticationError(_MESSAGE))
            response.status_code = 401
            response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and self._check.accepts(given[0])


class RequireApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """The same for gRPC: metadata `authorization: Bearer KEY`, on health checks and reflection as well."""

    def __init__(self, api_key: str) -> None:
        self._check = _KeyCheck(api_key)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(given) == 1 and self._check.accepts(_as_bytes(given[0])):
            return handler
        # Which methods exist is not told either.
        handler = handler or grpc.stream_stream_rpc_method_handler(_unreachable)
        return refuse(handler, grpc.StatusCode.UNAUTHENTICATED, _MESSAGE)


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _unreachable(_requests: Any, _context: Any) -> Any:
    raise AssertionError("only its kind is looked at")
