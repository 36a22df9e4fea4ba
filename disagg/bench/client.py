"""Sends one request to an OpenAI-compatible endpoint and says how it went."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

from disagg.bench.failures import BenchError, FailureKind, StreamFailure
from disagg.bench.http import Clock, Connection
from disagg.bench.stream import StreamCheck


class Endpoint(NamedTuple):
    """Where requests go. `base_path` is what stands before `/v1`, without a slash at its end."""

    host: str
    port: int
    tls: bool
    base_path: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """From `http[s]://host[:port][/path]`; a trailing `/v1`, as in OpenAI's base URL, is dropped."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BenchError("--url", f"{url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError("--url", f"{url!r} is not of the form http[s]://host[:port]")
        if parts.username or parts.query or parts.fragment:
            raise BenchError("--url", f"{url!r}: no user, query or fragment; keys go in --api-key")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise BenchError("--api-key", "holds characters that cannot stand in an HTTP header")
        tls = parts.scheme == "https"
        base_path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, base_path, api_key)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base_path}"

    def post(self, path: str, body: bytes) -> bytes:
        """A whole HTTP/1.1 request."""
        lines = [
            f"POST {self.base_path}{path} HTTP/1.1",
            f"Host: {self.authority}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What is sent, and what must come back."""

    path: str
    body: bytes
    prompt_tokens: int
    """As planned; what the server counted is in the result."""
    expected_tokens: int | None
    """Completion tokens that must come, or None where the model may stop earlier."""

    @property
    def chat(self) -> bool:
        return self.path.endswith("/chat/completions")


@dataclass(slots=True)
class RequestResult:
    """One request as the client saw it; all times are seconds on one clock.

    TTFT = `token_times[0]` - `sent_s`; E2E = `end_s` - `sent_s`, the end being `[DONE]`;
    TPOT = (E2E - TTFT) / (`output_tokens` - 1); ITL = the gaps between successive `token_times`.
    `sent_s` is taken before the connection is made, so connecting is part of TTFT.
    """

    index: int
    scheduled_s: float
    """When the workload wanted the request sent."""
    sent_s: float
    end_s: float
    planned_prompt_tokens: int
    prompt_tokens: int | None = None
    """By the server's count."""
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted_by_usage: bool = True
    finish_reason: str | None = None
    token_times: list[float] = field(default_factory=list)
    """When each chunk that carries tokens was read."""
    failure: StreamFailure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def lag_s(self) -> float:
        """How late the client sent the request."""
        return self.sent_s - self.scheduled_s


class Client:
    """Streams requests over connections that are kept alive; one event loop, any number at once."""

    def __init__(self, endpoint: Endpoint, timeout_s: float, clock: Clock = time.perf_counter) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._clock = clock
        self._tls = ssl.create_default_context() if endpoint.tls else None
        self._idle: list[Connection] = []

    async def stream(
        self, index: int, request: StreamRequest, scheduled_s: float | None = None
    ) -> RequestResult:
        """Send `request` and follow its stream to the end. Failures are in the result, not raised."""
        check = StreamCheck(request.chat, request.expected_tokens)
        sent_s = self._clock()
        failure = None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(self._endpoint.post(request.path, request.body), check)
            check.close()
        except TimeoutError:
            failure = StreamFailure(
                FailureKind.TIMEOUT, f"no end within {self._timeout_s:g} s, {check.stage}"
            )
        except StreamFailure as error:
            failure = error
        return RequestResult(
            index=index,
            scheduled_s=sent_s if scheduled_s is None else scheduled_s,
            sent_s=sent_s,
            end_s=check.end_s if failure is None else self._clock(),
            planned_prompt_tokens=request.prompt_tokens,
            prompt_tokens=check.prompt_tokens,
            cached_tokens=check.cached_tokens,
            output_tokens=check.output_tokens,
            counted_by_usage=check.counted_by_usage,
            finish_reason=check.finish_reason,
            token_times=check.token_times,
            failure=failure,
        )

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, request: bytes, check: StreamCheck) -> None:
        kept = self._take_idle()
        if kept is not None:
            try:
                await self._over(kept, request, check)
                return
            except StreamFailure as failure:
                # The server may close an idle connection just as a request leaves: not the request's
                # fault, so it gets a fresh one. After a first byte there is no second try.
                if failure.kind is not FailureKind.DISCONNECTED or kept.bytes_read:
                    raise
        await self._over(await self._connect(), request, check)

    async def _over(self, connection: Connection, request: bytes, check: StreamCheck) -> None:
        try:
            await connection.exchange(request, check)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self._clock), self._endpoint.host, self._endpoint.port, ssl=self._tls
            )
        except OSError as error:
            raise StreamFailure(FailureKind.CONNECT, str(error)) from error
        return connection
