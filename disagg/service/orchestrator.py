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
from hashlib import sha256
from typing import TypeVar

from disagg.config import SLOConfig, TierConfig
from disagg.errors import (
    DeadlineExceededError,
    DisaggError,
    InvalidRequestError,
    KVLostError,
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
from disagg.service.timeline import Attempt, Timeline, Transfer
from disagg.service.wire_router import MAX_ID_CHARS
from disagg.service.worker_pool import RequestStream, WorkerPool
from disagg.types import FinishReason, KVHandle, Request, Role, StepOutput, WorkerStatus
from disagg.v1 import worker_pb2

T = TypeVar("T")
logger = logging.getLogger(__name__)

# After a worker's death the view may name it for one more moment; a retry at once would find it again.
RETRY_DELAY_S = 0.05
# How long a request that runs already waits for a worker where none is left: one is replaced in seconds.
CAPACITY_WAIT_S = 15.0
CAPACITY_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a front end must know of the model. fingerprint: the first link of every block hash."""

    fingerprint: str
    block_size: int
    max_model_len: int


@dataclass(slots=True)
class _Story:
    """One request's state across placements. tokens: prompt and output so far."""

    request: GenerationRequest
    deadline: float
    tokens: list[int]
    attempts: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def timeline(self) -> Timeline:
        return self.request.timeline

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


@dataclass(slots=True)
class _HandOff:
    """Published KV on its way to a decode worker. early: the stream of one that was reserved during prefill.
    received: one has it. tried: those that were lost or could not have it.
    """

    handle: KVHandle
    on_prefill: ExitStack
    on_decode: ExitStack
    worker_id: str
    early: RequestStream | None
    received: bool = False
    tried: set[str] = field(default_factory=set)


class Orchestrator:
    """Runs requests for one front end; implements service.generation.Generator.

    slo: objectives of requests that name none. on_end: called with every request that has ended, however.
    clock: that of the requests' timelines.
    """

    def __init__(
        self,
        frontend_id: str,
        model: ServedModel,
        router: RouterClient,
        workers: WorkerPool,
        metrics: FrontendMetrics,
        *,
        max_resumes: int = 8,
        slo: SLOConfig | None = None,
        on_end: Callable[[GenerationRequest], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frontend_id = frontend_id
        self._model = model
        self._router = router
        self._workers = workers
        self._metrics = metrics
        self._max_resumes = max_resumes
        self._slo = slo or SLOConfig()
        self._tiers: dict[str, TierConfig] = {}
        self._on_end = on_end
        self._clock = clock

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """See Generator.generate."""
        story = _Story(request, self._clock() + request.timeout_s, list(request.prompt_token_ids))
        outcome = "abort"
        self._metrics.in_flight.inc()
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
            ended = outcome in ("stop", "length") and not story.lost
            num_tokens = story.num_output_tokens if ended else 0
            self._router.finished(request.request_id, num_tokens, story.timeline.streamed_s)
            if outcome == "abort" and story.timeline.complete:
                outcome = "stop"
            self._end(story, outcome)

    # -- the story ---------------------------------------------------------------------------------

    async def _run(self, story: _Story) -> AsyncGenerator[StepOutput, None]:
        while True:
            try:
                placement = await (self._place_again(story) if story.lost else self._place(story))
                try:
                    async with aclosing(self._attempt(story, placement)) as outputs:
                        async for output in outputs:
                            story.tokens.extend(output.token_ids)
                            yield output
                            if output.finish_reason is not None:
                                return
                finally:
                    story.timeline.current.ended = self._clock()
            except WorkerLostError as error:
                self._note_loss(story, error)
                await asyncio.sleep(RETRY_DELAY_S)

    def _note_loss(self, story: _Story, error: WorkerLostError, attempt: Attempt | None = None) -> None:
        """Count a lost worker against the retry budget. Raises NoCapacityError when that is spent.

        attempt: whose it was, if not the current one's.
        """
        logger.warning("request %s resumes: %s", story.request.request_id, error.message)
        if story.timeline.attempts:
            (attempt or story.timeline.current).lost = error.worker_id
        self._metrics.resumes.labels("worker_lost").inc()
        story.lost.append(error.worker_id)
        if len(story.lost) > self._max_resumes:
            raise NoCapacityError(f"gave up after {len(story.lost)} lost workers: {error.message}") from error

    async def _place(self, story: _Story, *, excluded: tuple[str, ...] | None = None) -> Placement:
        """excluded: workers not to choose, those that the request has lost unless said otherwise."""
        request = story.request
        root = chain_root(self._model.fingerprint, salt=request.cache_salt)
        hashes = block_hashes(story.tokens, self._model.block_size, root)
        room = self._model.max_model_len - len(request.prompt_token_ids)
        limit = room if request.params.max_tokens is None else min(room, request.params.max_tokens)
        asked = self._clock()
        slo_ttft_s, slo_tpot_s = self._objectives(request)
        if slo_ttft_s is not None:
            # What is left of it: reading the request took its time too.
            slo_ttft_s = max(0.001, slo_ttft_s - (asked - story.timeline.arrived))
        wanted = PlacementRequest(
            request_id=request.request_id,
            frontend_id=self._frontend_id,
            num_tokens=len(story.tokens),
            max_new_tokens=max(1, limit - story.num_output_tokens),
            block_hashes=tuple(short_hash(item) for item in hashes),
            priority=self._priority(request),
            slo_ttft_s=slo_ttft_s,
            slo_tpot_s=slo_tpot_s,
            excluded=tuple(story.lost) if excluded is None else excluded,
            tenant=_tenant_of(request.cache_salt),
            service_tier=request.service_tier,
            timeout_s=max(0.001, story.deadline - asked),
            resumed=bool(story.lost) or excluded is not None,
        )
        with self._metrics.placing.track_inprogress():
            placement = await self._before_deadline(story, self._router.place(wanted))
        story.timeline.attempts.append(
            Attempt(
                asked,
                self._clock(),
                placement.prefill_worker,
                placement.decode_worker,
                placement.policy,
                placement.kind.value,
            )
        )
        return placement

    async def _place_again(self, story: _Story) -> Placement:
        """Place a request that has lost a worker, once there is one. Raises as `_place`."""
        gives_up_at = self._clock() + CAPACITY_WAIT_S
        while True:
            try:
                return await self._place(story)
            except NoCapacityError:
                if self._clock() >= gives_up_at:
                    raise
                await self._before_deadline(story, asyncio.sleep(CAPACITY_POLL_S))

    def _objectives(self, request: GenerationRequest) -> tuple[float | None, float | None]:
        """Return the request's TTFT and TPOT objectives in seconds, where it has them."""
        ttft, tpot, tier = request.slo_ttft_s, request.slo_tpot_s, self._tier(request.service_tier)
        return (tier.ttft_s if ttft is None else ttft, tier.tpot_s if tpot is None else tpot)

    def _priority(self, request: GenerationRequest) -> int:
        return request.priority + self._tier(request.service_tier).priority

    def _tier(self, name: str) -> TierConfig:
        known = self._tiers.get(name)
        if known is None:
            known = self._tiers[name] = self._slo.of_tier(name)
        return known

    async def _attempt(self, story: _Story, placement: Placement) -> AsyncGenerator[StepOutput, None]:
        """Run the request on one placement until it ends or a worker is lost."""
        prefill_id, decode_id = placement.prefill_worker, placement.decode_worker
        key = b"" if prefill_id == decode_id else secrets.token_bytes(wire.KEY_BYTES)
        submit = self._submission(story, hold_key=key, lag_s=placement.lag_s)
        with ExitStack() as on_prefill, ExitStack() as on_decode:
            prefill = on_prefill.enter_context(self._workers.open(prefill_id, submit))
            incarnation = self._workers.connect(prefill_id).info.incarnation
            handle = KVHandle(prefill_id, incarnation, submit.request_id, key, len(story.tokens))
            decode = self._reserve(story, decode_id, handle, on_decode) if key else None
            while True:
                output = await self._next_output(story, prefill)
                yield output
                if output.finish_reason is not None:
                    return
                if output.held:
                    break
            # The prefill stream stays open until decode has the KV: closing it would end the lease.
            hand_off = _HandOff(handle, on_prefill, on_decode, decode_id, decode)
            async with aclosing(self._hand_off(story, hand_off)) as outputs:
                async for output in outputs:
                    yield output

    def _reserve(
        self, story: _Story, worker_id: str, handle: KVHandle, on_decode: ExitStack
    ) -> RequestStream | None:
        """Let decode copy what prefill has done while it does the rest; None where that can't be or needn't.

        The token that prefill draws follows with `proceed`.
        """
        limit = story.request.params.max_tokens
        if limit is not None and story.num_output_tokens + 1 >= limit:
            return None  # ends with that token
        gives_up = self._another_decodes({worker_id, handle.worker_id, *story.lost})
        submit = self._submission(story, handle=handle, awaits_token=True, gives_up=gives_up)
        try:
            stream: RequestStream = on_decode.enter_context(self._workers.open(worker_id, submit))
        except WorkerLostError:
            return None  # found again when its turn comes
        return stream

    def _another_decodes(self, but: set[str]) -> bool:
        return any(
            state.info.role is not Role.PREFILL
            and state.status is WorkerStatus.READY
            and state.info.worker_id not in but
            for state in self._router.view.workers.values()
        )

    async def _hand_off(self, story: _Story, hand_off: _HandOff) -> AsyncGenerator[StepOutput, None]:
        """Go on with the prefilled KV: on the decode worker that was chosen or, where it is lost, full or
        can't have the KV, on another one while the lease lives. The last one that is tried computes it again.
        """
        while True:
            try:
                async with aclosing(self._decode(story, hand_off)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except (WorkerLostError, KVLostError, OverloadedError) as error:
                if hand_off.received or not await self._try_again(story, hand_off, error):
                    raise

    async def _try_again(
        self, story: _Story, hand_off: _HandOff, error: WorkerLostError | KVLostError | OverloadedError
    ) -> bool:
        """Choose who decodes instead, while the KV is still published; False where the request is to be
        placed anew.
        """
        hand_off.tried.add(hand_off.worker_id)
        hand_off.on_decode.close()
        hand_off.early = None
        if isinstance(error, WorkerLostError) and error.worker_id == hand_off.handle.worker_id:
            return False
        attempt = story.timeline.current
        if await self._goes_to_another(story, hand_off):
            if isinstance(error, WorkerLostError):
                self._note_loss(story, error, attempt)
            return True
        if isinstance(error, OverloadedError):
            await self._before_deadline(story, asyncio.sleep(error.retry_after))
        # One that lives has room again, or is told to compute what it can't have.
        return not isinstance(error, WorkerLostError)

    async def _goes_to_another(self, story: _Story, hand_off: _HandOff) -> bool:
        """Give the hand-off to a decode worker that was not tried yet; False where there is none."""
        unfit = (*story.lost, *hand_off.tried)
        if not self._another_decodes({hand_off.handle.worker_id, *unfit}):
            return False
        try:
            placement = await self._place(story, excluded=unfit)
        except NoCapacityError:
            return False  # the view was behind the router's
        self._router.prefilled(story.request.request_id)
        hand_off.worker_id = placement.decode_worker
        self._metrics.recoveries.labels("other_worker").inc()
        return True

    async def _decode(self, story: _Story, hand_off: _HandOff) -> AsyncGenerator[StepOutput, None]:
        story.timeline.current.handed_off = self._clock()
        decode = hand_off.early
        if decode is not None:
            decode.proceed(story.tokens[-1])
        else:
            but = {hand_off.worker_id, hand_off.handle.worker_id, *hand_off.tried, *story.lost}
            gives_up = not hand_off.tried and self._another_decodes(but)
            submit = self._submission(story, handle=hand_off.handle, gives_up=gives_up)
            decode = hand_off.on_decode.enter_context(self._workers.open(hand_off.worker_id, submit))
        while True:
            output = await self._next_output(story, decode)
            if not output.token_ids and output.finish_reason is None:
                # Only the transfer report: nobody needs what prefill holds any more.
                hand_off.received = True
                hand_off.on_prefill.close()
                continue
            yield output
            if output.finish_reason is not None:
                return

    def _submission(
        self,
        story: _Story,
        *,
        hold_key: bytes = b"",
        handle: KVHandle | None = None,
        awaits_token: bool = False,
        gives_up: bool = False,
        lag_s: float = 0.0,
    ) -> worker_pb2.Submit:
        """Return the next attempt under an id of its own: a worker may still be busy ending the last one."""
        story.attempts += 1
        now, objective = self._clock(), self._objectives(story.request)[0]
        due_s = None if objective is None else max(0.001, objective + lag_s - (now - story.timeline.arrived))
        request = Request(
            request_id=f"{story.request.request_id}#{story.attempts}",
            token_ids=story.tokens,
            num_prompt_tokens=len(story.request.prompt_token_ids),
            params=story.request.params,
            priority=self._priority(story.request),
            cache_salt=story.request.cache_salt,
            slo_ttft_s=due_s,
        )
        timeout_s = max(0.001, story.deadline - now)
        return wire.submit_to_proto(
            request,
            timeout_s=timeout_s,
            hold_key=hold_key,
            handle=handle,
            awaits_token=awaits_token,
            gives_up=gives_up,
        )

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
        attempt = timeline.current
        if attempt.first_output is None:
            attempt.first_output = now
            attempt.num_cached_tokens = output.num_cached_tokens
            attempt.queued_s, attempt.prefill_s = output.queued_s or 0.0, output.prefill_s or 0.0
        if timeline.first_token is None:
            timeline.first_token = now
            self._metrics.ttft.observe(now - timeline.arrived)
            self._metrics.prompt_tokens.inc(len(story.request.prompt_token_ids))
            waited = now - attempt.asked if len(timeline.attempts) == 1 else 0.0
            self._router.prefilled(story.request.request_id, waited)
        elif timeline.last_token is not None:
            timeline.second_token = timeline.second_token or now
            self._metrics.itl.observe(now - timeline.last_token)
        timeline.last_token = now
        timeline.num_output_tokens += len(output.token_ids)
        self._metrics.generation_tokens.inc(len(output.token_ids))

    def _observe_transfer(self, story: _Story, report: worker_pb2.TransferReport) -> None:
        attempt = story.timeline.current
        attempt.kv_ready = self._clock()
        attempt.transfer = Transfer(
            report.transport, report.bytes, report.exposed_s, report.recomputed, report.reason
        )
        if not report.recomputed:
            self._metrics.exposed.observe(report.exposed_s)
        if report.recomputed:
            self._metrics.resumes.labels("kv_lost").inc()

    def _end(self, story: _Story, outcome: str) -> None:
        timeline = story.timeline
        timeline.finished, timeline.outcome = self._clock(), outcome
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(outcome).inc()
        if outcome in ("stop", "length"):
            self._observe_parts(story)
        if self._on_end is not None:
            self._on_end(story.request)

    def _observe_parts(self, story: _Story) -> None:
        metrics, timeline = self._metrics, story.timeline
        parts = timeline.parts()
        if parts is None:
            return
        metrics.e2e.observe(parts.e2e)
        metrics.frontend.observe(parts.frontend)
        metrics.queue.observe(parts.queue)
        metrics.prefill.observe(parts.prefill)
        metrics.kv_transfer.observe(parts.kv_transfer)
        metrics.decode.observe(parts.decode)
        if parts.first_decode is not None:
            metrics.first_decode.observe(parts.first_decode)
        num_gaps = timeline.num_output_tokens - 1
        tpot = (parts.e2e - parts.ttft) / num_gaps if num_gaps > 0 else None
        if tpot is not None:
            metrics.tpot.observe(tpot)
        objectives = self._objectives(story.request)
        for name, value, objective in zip(("ttft", "tpot"), (parts.ttft, tpot), objectives, strict=True):
            if objective is not None and value is not None:
                metrics.slo.labels(name, str(value <= objective).lower()).inc()


def _tenant_of(cache_salt: str) -> str:
    """Return whom a request counts against: who shares no cache with others shares no queue either."""
    return cache_salt if len(cache_salt) <= MAX_ID_CHARS else sha256(cache_salt.encode()).hexdigest()


def _outcome_of(error: DisaggError) -> str:
    if isinstance(error, OverloadedError):
        return "shed"
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    return "invalid" if isinstance(error, InvalidRequestError) else "error"
