"""A backend without a cluster: a scripted generator, a small tokenizer, and servers on ports of their own."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import uvicorn
from starlette.types import ASGIApp

from disagg.config import FrontendConfig
from disagg.frontend.backend import Readiness, SamplingDefaults
from disagg.frontend.grpc_service import build_grpc_server
from disagg.frontend.http import create_app
from disagg.frontend.running import RunningRequests
from disagg.frontend.shedding import Shedding
from disagg.service.generation import GenerationRequest
from disagg.service.tokenizer import Tokenizer
from disagg.tinymodel.tokenizer import build_tokenizer, save_tokenizer
from disagg.types import FinishReason, StepOutput, TokenLogprobs

ANSWER = "Hello wörld 🙂, how are you?"
HANG = "hang"
Step = Sequence[int] | Exception | str
"""Tokens of one step, an error, or HANG: wait until closed."""


@functools.cache
def make_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(build_tokenizer(["hello how are you wide world"] * 4, 300), folder, 512)
        return Tokenizer(folder)


class FakeGenerator:
    """Plays a script for each request and records what was asked and how it ended."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.requests: list[GenerationRequest] = []
        self.finished: list[str] = []
        self.closed: list[str] = []
        self.running: set[str] = set()
        self.cached_tokens = 0
        self.step_delay_s = 0.0
        self.script: Callable[[GenerationRequest], Sequence[Step]] = self.say(ANSWER)
        self.changed = asyncio.Condition()

    def say(self, text: str, size: int = 1) -> Callable[[GenerationRequest], Sequence[Step]]:
        """Return a script that says `text` in steps of `size` tokens, then EOS."""
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id or 0]
        return lambda _request: [ids[i : i + size] for i in range(0, len(ids), size)]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        await self._tell()
        ended = False
        try:
            async for output in self._play(request):
                ended = output.finish_reason is not None
                yield output
        except Exception:
            ended = True
            raise
        finally:
            (self.finished if ended else self.closed).append(request.request_id)
            self.running.discard(request.request_id)
            # As an orchestrator that has to tell its workers: cleaning up takes a moment.
            await asyncio.shield(asyncio.sleep(0))
            await self._tell()

    async def _play(self, request: GenerationRequest) -> AsyncIterator[StepOutput]:
        left = request.params.max_tokens or 10**9
        steps = self.script(request)
        for number, step in enumerate(steps):
            await asyncio.sleep(self.step_delay_s)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, str):
                await asyncio.Event().wait()
                continue
            tokens = tuple(step[:left])
            left -= len(tokens)
            stopped = number == len(steps) - 1 and len(tokens) == len(step)
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH if left <= 0 else None
            yield StepOutput(
                request.request_id,
                tokens,
                self._logprobs(request, tokens),
                finish_reason=reason,
                matched_stop=tokens[-1] if stopped else None,
                num_cached_tokens=0 if number else self.cached_tokens,
            )
            if reason is not None:
                return

    def _logprobs(self, request: GenerationRequest, tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
        count = request.params.logprobs
        if count is None:
            return ()
        return tuple(
            TokenLogprobs(token, -0.5, 1, tuple((token + i, -0.5 - i) for i in range(count)))
            for token in tokens
        )

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.changed, asyncio.timeout(10):
            await self.changed.wait_for(condition)


@dataclass
class FakeBackend:
    tokenizer: Tokenizer = field(default_factory=make_tokenizer)
    model_name: str = "tiny"
    max_model_len: int = 256
    version: str = "1.2.3"
    config: FrontendConfig = field(default_factory=FrontendConfig)
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    readiness: Readiness = field(default_factory=lambda: Readiness(True))

    def __post_init__(self) -> None:
        self.generator = FakeGenerator(self.tokenizer)
        self.running = RunningRequests()
        self.shed = 0
        self.shedding = Shedding(self._count_shed)
        self.vocab_size = self.tokenizer.vocab_size
        self.eos_token_ids = (self.tokenizer.eos_token_id or 0,)

    def _count_shed(self) -> None:
        self.shed += 1

    async def ready(self) -> Readiness:
        return self.readiness

    async def abort(self, request_id: str) -> bool:
        return self.running.abort(request_id)

    async def metrics(self) -> bytes:
        return b"# HELP disagg_workers Workers.\n# TYPE disagg_workers gauge\ndisagg_workers 2.0\n"

    async def status(self) -> dict[str, Any]:
        return {"workers": [{"id": "w0", "role": "prefill"}], "router": {"pid": 1}}

    async def dashboard(self) -> dict[str, Any]:
        return {**await self.status(), "history": []}


@asynccontextmanager
async def serve_app(app: ASGIApp) -> AsyncIterator[str]:
    """Serve on loopback; yields the URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", ws="none"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def serve_http(backend: FakeBackend) -> AsyncIterator[str]:
    async with serve_app(create_app(backend)) as url:
        yield url


@asynccontextmanager
async def serve_grpc(backend: FakeBackend, api_key: str | None = None) -> AsyncIterator[str]:
    """Serve on loopback; yields the address."""
    server: grpc.aio.Server = build_grpc_server(backend, api_key)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
