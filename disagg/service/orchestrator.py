"""A request's whole story in one loop: place, prefill, hand off, decode; on a lost worker, place again.

    place ──► prefill on P ──first token──► hand off ──► decode on D ──► finished
      ▲           │ P lost                                  │ D lost
      └───────────┴────── the tokens so far are a prompt ◄──┘

Tokens that reached the client are never taken back: a resumed request is its prompt plus its tokens so far,
and sampling noise is keyed by (seed, position), so what follows is what would have followed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from disagg.errors import (
    DeadlineExceededError,
    DisaggError,
    InvalidRequestError,
    NoCapacityError,
    OverloadedError,
    WorkerLostError,
)
from disagg.hashing import block_hashes, chain_root, short_hash
from disagg.routing.types import Placement, PlacementRequest
from disagg.service import wire
from disagg.service.generation import GenerationRequest
from disagg.service.metrics import FrontendMetrics
from disagg.service.router_client import RouterClient
from disagg.service.worker_pool import RequestStream, WorkerPool
from disagg.types import FinishReason, KVHandle, Request, StepOutput
from disagg.v1 import worker_pb2

T = TypeVar("T")
logger = logging.getLogger(__name__)

# After a worker's death the view may name it for one more moment; a retry at once would find it again.
RETRY_DELAY_S = 0.05


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a front end must know of the model. fingerprint: the first link of every block hash."""

    fingerprint: str
    block_size: int
    max_model_len: int


@dataclass(slots=True)
class _Timeline:
    """Lifetime events of one request on the front end's clock, and what the workers reported."""

    arrived: float
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    prefill_s: float = 0.0
    transfer_s: float = 0.0


@dataclass(slots=True)
class _Story:
    """One request's state across placements. tokens: prompt and output so far."""

    request: GenerationRequest
    deadline: float
    timeline: _Timeline
    tokens: list[int]
    attempts: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


class Orchestrator:
    """Runs requests for one front end; implements service.generation.Generator."""

    def __init__(
        self,
        frontend_id: str,
        model: ServedModel,
        router: RouterClient,
        workers: WorkerPool,
        metrics: FrontendMetrics,
        *,
        max_resumes: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frontend_id = frontend_id
        self._model = model
        self._router = router
        self._workers = workers
        self._metrics = metrics
        self._max_resumes = max_resumes
        self._clock = clock

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """See Generator.generate."""
        now = self._clock()
        story = _Story(
            request, now + request.timeout_s, _Timeline(arrived=now), list(request.prompt_token_ids)
        )
        outcome = "abort"
        try:
            async with aclosing(self._run(story)) as outputs:
                async for output in outputs:
                    self._observe_output(story, output)
                    if output.finish_reason is not None:
                        outcome = output.finish_reason.value
                    yield output
        except DisaggError as error:
            outcome = _outcome_of(error)
            raise
        finally:
            self._router.finished(request.request_id)
            self._observe_end(story, outcome)

    # -- the story ---------------------------------------------------------------------------------

    async def _run(self, story: _Story) -> AsyncGenerator[StepOutput, None]:
        while True:
            try:
                placement = await self._place(story)
                async with aclosing(self._attempt(story, placement)) as outputs:
                    async for output in outputs:
                        story.tokens.extend(output.token_ids)
                        yield output
                        if output.finish_reason is not None:
                            return
            except WorkerLostError as error:
                self._note_loss(story, error)
                await asyncio.sleep(RETRY_DELAY_S)

    def _note_loss(self, story: _Story, error: WorkerLostError) -> None:
        """Count a lost worker against the retry budget. Raises NoCapacityError when that is spent."""
        logger.warning("request %s resumes: %s", story.request.request_id, error.message)
        self._metrics.resumes.labels("worker_lost").inc()
        story.lost.append(error.worker_id)
        if len(story.lost) > self._max_resumes:
            raise NoCapacityError(f"gave up after {len(story.lost)} lost workers: {error.message}") from error

    async def _place(self, story: _Story) -> Placement:
        request = story.request
        root = chain_root(self._model.fingerprint, salt=request.cache_salt)
        hashes = block_hashes(story.tokens, self._model.block_size, root)
        room = self._model.max_model_len - len(request.prompt_token_ids)
        limit = room if request.params.max_tokens is None else min(room, request.params.max_tokens)
        wanted = PlacementRequest(
            request_id=request.request_id,
            frontend_id=self._frontend_id,
            num_tokens=len(story.tokens),
            max_new_tokens=max(1, limit - story.num_output_tokens),
            block_hashes=tuple(short_hash(item) for item in hashes),
            priority=request.priority,
            slo_ttft_s=request.slo_ttft_s,
            slo_tpot_s=request.slo_tpot_s,
            excluded=tuple(story.lost),
        )
        return await self._before_deadline(story, self._router.place(wanted))

    async def _attempt(self, story: _Story, placement: Placement) -> AsyncGenerator[StepOutput, None]:
        """Run the request on one placement until it ends or a worker is lost."""
        prefill_id, decode_id = placement.prefill_worker, placement.decode_worker
        key = b"" if prefill_id == decode_id else secrets.token_bytes(wire.KEY_BYTES)
        submit = self._submission(story, hold_key=key)
        with ExitStack() as on_prefill:
            prefill = on_prefill.enter_context(self._workers.open(prefill_id, submit))
            while True:
                output = await self._next_output(story, prefill)
                yield output
                if output.finish_reason is not None:
                    return
                if output.held:
                    break
            # The prefill stream stays open until decode has the KV: closing it would end the lease.
            incarnation = self._workers.connect(prefill_id).info.incarnation
            handle = KVHandle(prefill_id, incarnation, submit.request_id, key, len(story.tokens) - 1)
            async with aclosing(self._decode(story, decode_id, handle, on_prefill)) as outputs:
                async for output in outputs:
                    yield output

    async def _decode(
        self, story: _Story, worker_id: str, handle: KVHandle, on_prefill: ExitStack
    ) -> AsyncGenerator[StepOutput, None]:
        submit = self._submission(story, handle=handle)
        with self._workers.open(worker_id, submit) as decode:
            while True:
                output = await self._next_output(story, decode)
                on_prefill.close()
                if not output.token_ids and output.finish_reason is None:
                    continue  # only the transfer report
                yield output
                if output.finish_reason is not None:
                    return

    def _submission(
        self, story: _Story, *, hold_key: bytes = b"", handle: KVHandle | None = None
    ) -> worker_pb2.Submit:
        """Return the next attempt under an id of its own: a worker may still be busy ending the last one."""
        story.attempts += 1
        now, objective = self._clock(), story.request.slo_ttft_s
        due_s = None if objective is None else max(0.001, objective - (now - story.timeline.arrived))
        request = Request(
            request_id=f"{story.request.request_id}#{story.attempts}",
            token_ids=story.tokens,
            num_prompt_tokens=len(story.request.prompt_token_ids),
            params=story.request.params,
            priority=story.request.priority,
            cache_salt=story.request.cache_salt,
            slo_ttft_s=due_s,
        )
        timeout_s = max(0.001, story.deadline - now)
        return wire.submit_to_proto(request, timeout_s=timeout_s, hold_key=hold_key, handle=handle)

    async def _next_output(self, story: _Story, stream: RequestStream) -> StepOutput:
        """Wait for a worker's next word. Raises its typed error, WorkerLostError or DeadlineExceededError."""
        message = await self._before_deadline(story, stream.next())
        if message.HasField("transfer"):
            self._observe_transfer(story, message.transfer)
        output = wire.output_from_proto(message)
        if output.finish_reason is FinishReason.ERROR:
            if output.error == "deadline_exceeded":
                raise DeadlineExceededError("the request's deadline has passed")
            raise wire.error_from_proto(message)
        return output

    async def _before_deadline(self, story: _Story, awaitable: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(max(0.0, story.deadline - self._clock())):
                return await awaitable
        except TimeoutError:
            raise DeadlineExceededError("the request's deadline has passed") from None

    # -- metrics -----------------------------------------------------------------------------------

    def _observe_output(self, story: _Story, output: StepOutput) -> None:
        if not output.token_ids:
            return
        now, timeline = self._clock(), story.timeline
        if timeline.first_token is None:
            timeline.first_token = now
            timeline.prefill_s = output.prefill_s or 0.0
            self._metrics.ttft.observe(now - timeline.arrived)
            self._metrics.prompt_tokens.inc(len(story.request.prompt_token_ids))
            self._router.prefilled(story.request.request_id)
        elif timeline.last_token is not None:
            self._metrics.itl.observe(now - timeline.last_token)
        timeline.last_token = now
        self._metrics.generation_tokens.inc(len(output.token_ids))

    def _observe_transfer(self, story: _Story, report: worker_pb2.TransferReport) -> None:
        story.timeline.transfer_s += report.seconds
        self._metrics.exposed.observe(report.seconds)
        if report.recomputed:
            self._metrics.resumes.labels("kv_lost").inc()

    def _observe_end(self, story: _Story, outcome: str) -> None:
        metrics, timeline = self._metrics, story.timeline
        metrics.requests.labels(outcome).inc()
        if timeline.first_token is None or outcome not in ("stop", "length"):
            return
        ended = self._clock()
        e2e, ttft = ended - timeline.arrived, timeline.first_token - timeline.arrived
        # Clamped so that the four parts add up to e2e even where a resume repeated one of them.
        prefill = min(timeline.prefill_s, ttft)
        transfer = min(timeline.transfer_s, e2e - ttft)
        metrics.e2e.observe(e2e)
        metrics.queue.observe(ttft - prefill)
        metrics.prefill.observe(prefill)
        metrics.kv_transfer.observe(transfer)
        metrics.decode.observe(e2e - ttft - transfer)
        self._observe_objectives(story, ttft, ended - timeline.first_token)

    def _observe_objectives(self, story: _Story, ttft: float, decode_s: float) -> None:
        request, num_gaps = story.request, story.num_output_tokens - 1
        tpot = decode_s / num_gaps if num_gaps > 0 else None
        if tpot is not None:
            self._metrics.tpot.observe(tpot)
        for name, value, objective in (
            ("ttft", ttft, request.slo_ttft_s),
            ("tpot", tpot, request.slo_tpot_s),
        ):
            if objective is not None and value is not None:
                self._metrics.slo.labels(name, str(value <= objective).lower()).inc()


def _outcome_of(error: DisaggError) -> str:
    if isinstance(error, OverloadedError):
        return "shed"
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    return "invalid" if isinstance(error, InvalidRequestError) else "error"
