"""Simulation: workers, links, the live Router, and each request's story on virtual time.

The story is the orchestrator's (disagg.service.orchestrator), without its asyncio:

    arrival ──► Router.place ──► add on P ──first token, held──► add on D ──reserved──► transfer
                                    │ P is D: no hand-off                                  │
                                    ▼                                                      ▼
                                 finished ◄──────────────────────── decode ◄── activate, release on P

No request is placed, batched, admitted or preempted by code of this package.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from disagg.engine.engine import Reservation
from disagg.errors import DisaggError, InvalidRequestError, OverloadedError
from disagg.hashing import block_hashes, chain_root, short_hash
from disagg.routing.policies import Policy
from disagg.routing.router import Router
from disagg.routing.types import PlacementRequest
from disagg.sim.costs.base import CostModel
from disagg.sim.decode_run import OUTPUT_TOKEN
from disagg.sim.events import EventLoop
from disagg.sim.gaps import Gaps
from disagg.sim.links import Network, PrivateLinks, SharedLinks
from disagg.sim.pipeline import Pipeline
from disagg.sim.records import Outcome, Records
from disagg.sim.spec import PoolSpec, SimSpec
from disagg.sim.worker import SimWorker
from disagg.types import FinishReason, Request, SamplingParams, StepOutput, WorkerInfo
from disagg.workload import TimedRequest, Workload

_FRONTEND = "sim"
_MODEL = "sim"
_PROGRESS_EVERY = 2048


@dataclass(slots=True, eq=False)
class _Story:
    """One request on its way. attempt: numbers its submissions, as the orchestrator does."""

    index: int
    request: TimedRequest
    request_id: str
    tokens: list[int]
    prefill: SimWorker | None = None
    decode: SimWorker | None = None
    prefill_id: str = ""
    decode_id: str = ""
    held_at: float = 0.0
    streaming: bool = False
    streamed: bool = False
    lost: list[str] = field(default_factory=list)


class Simulation:
    """One run. The same spec, workload and seed give the same bytes.

    fast: take runs of decode steps as one. policy: in place of the one that the spec names. on_progress:
    called now and then with the number of requests that have ended. Raises ConfigError for a spec whose
    parts don't fit together.
    """

    def __init__(
        self,
        spec: SimSpec,
        workload: Workload,
        *,
        seed: int = 0,
        fast: bool = True,
        policy: Policy | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.spec = spec
        self.workload = workload
        self.loop = EventLoop()
        self.gaps = Gaps()
        requests = workload.requests
        self.records = Records(
            [item.arrival_s for item in requests],
            [item.prompt_tokens for item in requests],
            [item.output_tokens for item in requests],
        )
        self.router = Router(
            spec.router, random.Random(seed), policy=policy, max_charges=max(100_000, len(requests))
        )
        # Where no two requests share content nothing is ever found, so nothing needs to be hashed.
        self._hashing = spec.engine.enable_prefix_caching and any(item.block_ids for item in requests)
        self._root = chain_root(_MODEL)
        self._handoff = spec.links.handoff
        self._costs: dict[str, CostModel] = {}
        self.workers = self._make_workers(fast)
        self.network = self._make_network()
        self._kv_bytes = spec.shape.kv_bytes_per_token
        self._last_layer = 1 / spec.shape.num_layers
        self._stories: dict[str, _Story] = {}
        self._params: dict[int, SamplingParams] = {}
        self._next = 0
        self._on_progress = on_progress

    def _make_workers(self, fast: bool) -> dict[str, SimWorker]:
        workers: dict[str, SimWorker] = {}
        for name, pool in self.spec.pools.items():
            for number in range(pool.replicas):
                for worker in self._make_worker(name, pool, number, fast):
                    workers[worker.info.worker_id] = worker
        return workers

    def _make_worker(self, name: str, pool: PoolSpec, number: int, fast: bool) -> Iterator[SimWorker]:
        """Yield the engines of one worker: one, or as many as it has pipeline stages."""
        spec, stages = self.spec, pool.pipeline_parallel_size
        config = spec.engine_of(pool).model_copy(update={"enable_prefix_caching": self._hashing})
        cost, num_blocks = self._cost_of(name), spec.blocks_of(name)
        pipeline = Pipeline(stages) if stages > 1 else None
        for stage in range(stages):
            worker_id = f"{name}-{number}" if pipeline is None else f"{name}-{number}.{stage}"
            info = WorkerInfo(
                worker_id=worker_id,
                incarnation="1",
                role=pool.role,
                address="",
                host=worker_id,
                pid=0,
                max_model_len=spec.max_model_len,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                kv_blocks_total=num_blocks // stages,
                model_fingerprint=_MODEL,
            )
            yield SimWorker(
                info,
                config,
                cost,
                self.loop,
                self,
                self.gaps,
                pool=name,
                fast=fast,
                arrived=self._handoff != "serial",
                watch_prefills=self._handoff == "overlapped",
                pipeline=pipeline,
            )

    def _cost_of(self, name: str) -> CostModel:
        """Return a pool's cost model, whose file is read once however many workers there are."""
        cost = self._costs.get(name)
        if cost is None:
            cost = self._costs[name] = self.spec.cost_of(self.spec.pools[name])
        return cost

    def _make_network(self) -> Network:
        spec = self.spec
        bandwidth = {
            worker_id: spec.bandwidth_of(spec.pools[worker.pool])
            for worker_id, worker in self.workers.items()
        }
        kind = PrivateLinks if spec.links.sharing == "private" else SharedLinks
        return kind(self.loop, bandwidth, spec.links.latency_ms / 1000)

    # -- the run -------------------------------------------------------------------------------------

    def run(self) -> Records:
        """Run until every request has ended, check the invariants and return what happened."""
        # A million live objects and hardly a cycle among them: collecting costs a fifth for nothing.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._run()
        finally:
            if collecting:
                gc.enable()
        self.check_invariants()
        return self.records

    def _run(self) -> None:
        self._start_reports()
        self._await_arrival()
        if len(self.records):
            self.loop.run()
        if self._on_progress is not None:
            self._on_progress(self.records.num_ended)

    def check_invariants(self) -> None:
        """Raise AssertionError unless every request has ended once and every block is back."""
        records = self.records
        ended = sum(1 for outcome in records.outcome if outcome != Outcome.PENDING)
        if not ended == records.num_ended == len(records):
            raise AssertionError(f"{len(records)} requests came, {ended} have ended")
        if self._stories:
            raise AssertionError(f"{len(self._stories)} requests are still followed")
        # A release may wait for the end of a step that nobody else needs.
        self.loop.run()
        for worker in self.workers.values():
            if not worker.alive:
                continue
            worker.engine.check_integrity()
            load = worker.engine.load()
            if load.kv_blocks_used or load.num_running or load.num_waiting or load.num_held:
                raise AssertionError(f"{worker.info.worker_id} is not empty: {load}")
        if self.router.view.num_charges:
            raise AssertionError(f"the router still counts {self.router.view.num_charges} requests")

    def _await_arrival(self) -> None:
        if self._next < len(self.workload.requests):
            request = self.workload.requests[self._next]
            self.loop.at(request.arrival_s, self._arrive, self._next)
            self._next += 1

    def _arrive(self, index: int) -> None:
        self._await_arrival()
        request = self.workload.requests[index]
        story = _Story(index, request, str(index), self._prompt(index, request))
        self._ask_router(story)

    def _prompt(self, index: int, request: TimedRequest) -> list[int]:
        """Return tokens that are equal exactly where the workload says that content is."""
        own = -2 - index  # never equal to a block's id, nor to OUTPUT_TOKEN
        if not self._hashing or not request.block_ids:
            return [own] * request.prompt_tokens
        tokens: list[int] = []
        for segment in request.segments():
            tokens += [own if segment.block_id is None else segment.block_id] * segment.tokens
        return tokens

    # -- placement -----------------------------------------------------------------------------------

    def _ask_router(self, story: _Story) -> None:
        request, objectives = story.request, self.spec.objectives
        hashes: tuple[int, ...] = ()
        if self._hashing:
            chain = block_hashes(story.tokens, self.spec.engine.block_size, self._root)
            hashes = tuple(map(short_hash, chain))
        num_output = len(story.tokens) - request.prompt_tokens
        wanted = PlacementRequest(
            request_id=story.request_id,
            frontend_id=_FRONTEND,
            num_tokens=len(story.tokens),
            max_new_tokens=request.output_tokens - num_output,
            block_hashes=hashes,
            slo_ttft_s=None if objectives.ttft_ms is None else objectives.ttft_ms / 1000,
            slo_tpot_s=None if objectives.tpot_ms is None else objectives.tpot_ms / 1000,
            excluded=tuple(story.lost),
        )
        try:
            placement = self.router.place(wanted, self.loop.now)
        except DisaggError as error:
            self._end(story, _outcome_of(error))
            return
        story.prefill = self.workers[placement.prefill_worker]
        story.decode = self.workers[placement.decode_worker]
        self._after(self.spec.overheads.request_ms, self._submit, story)

    def _after(self, delay_ms: float, action: Callable[[_Story], None], story: _Story) -> None:
        if delay_ms:
            self.loop.at(self.loop.now + delay_ms / 1000, action, story)
        else:
            action(story)

    def _submit(self, story: _Story) -> None:
        assert story.prefill is not None
        story.prefill_id = f"{story.request_id}#1"
        self._stories[story.prefill_id] = story
        story.prefill.add(
            self._engine_request(story, story.prefill_id), hold=story.prefill is not story.decode
        )

    def _engine_request(self, story: _Story, request_id: str) -> Request:
        request = story.request
        params = self._params.get(request.output_tokens)
        if params is None:
            params = self._params[request.output_tokens] = SamplingParams(
                temperature=0, max_tokens=request.output_tokens, ignore_eos=True, seed=0
            )
        return Request(request_id, story.tokens, request.prompt_tokens, params)

    # -- what workers say (see worker.Listener) ------------------------------------------------------

    def on_output(self, worker: SimWorker, output: StepOutput) -> None:
        story = self._stories.get(output.request_id)
        if story is None:
            return
        if output.queued_s is not None and output.request_id == story.prefill_id:
            self._first_token(story, output)
        if output.finish_reason is not None:
            del self._stories[output.request_id]
            reason = output.finish_reason
            self._end(story, Outcome.DONE if reason is FinishReason.LENGTH else Outcome.ERROR)
        elif output.held:
            story.tokens.append(OUTPUT_TOKEN)
            story.held_at = self.loop.now
            self._after(self.spec.overheads.handoff_ms, self._hand_off, story)

    def _first_token(self, story: _Story, output: StepOutput) -> None:
        records, index = self.records, story.index
        records.first_token[index] = self.loop.now
        records.queued[index] = output.queued_s or 0.0
        records.prefill[index] = output.prefill_s or 0.0
        records.cached_tokens[index] = output.num_cached_tokens
        self.router.prefilled(story.request_id)

    def on_refused(self, worker: SimWorker, request_id: str, error: DisaggError) -> None:
        story = self._stories.pop(request_id)
        if request_id == story.decode_id and story.prefill is not None:
            story.prefill.release(story.prefill_id)
            self._stories.pop(story.prefill_id, None)
        self._end(story, _outcome_of(error))

    def _end(self, story: _Story, outcome: Outcome) -> None:
        self.router.finished(story.request_id)
        records = self.records
        records.end(story.index, outcome, self.loop.now)
        ended = records.num_ended
        self.loop.stopped = ended == len(records)
        if self._on_progress is not None and ended % _PROGRESS_EVERY == 0:
            self._on_progress(ended)

    # -- hand-off ------------------------------------------------------------------------------------

    def on_prefill_begun(self, worker: SimWorker, request_id: str) -> None:
        """Overlapped: all layers but the last travel while they are computed."""
        story = self._stories[request_id]
        if story.streaming or story.decode is None:
            return
        story.streaming = True
        num_bytes = len(story.tokens) * self._kv_bytes * (1 - self._last_layer)
        self.network.send(
            worker.info.worker_id, story.decode.info.worker_id, num_bytes, lambda: self._streamed(story)
        )

    def _streamed(self, story: _Story) -> None:
        story.streamed = True
        if len(story.tokens) > story.request.prompt_tokens:
            self._send(story, self._last_layer, lambda: self._submit_decode(story))

    def _hand_off(self, story: _Story) -> None:
        if self._handoff == "serial":
            self._submit_decode(story)
        elif self._handoff == "push":
            self._send(story, 1.0, lambda: self._submit_decode(story))
        elif story.streamed:
            self._send(story, self._last_layer, lambda: self._submit_decode(story))

    def _send(self, story: _Story, share: float, done: Callable[[], None]) -> None:
        """Move this share of the KV of a request's computed tokens from its prefill to its decode worker."""
        assert story.prefill is not None and story.decode is not None
        num_bytes = (len(story.tokens) - 1) * self._kv_bytes * share
        self.network.send(story.prefill.info.worker_id, story.decode.info.worker_id, num_bytes, done)

    def _submit_decode(self, story: _Story) -> None:
        assert story.decode is not None
        story.decode_id = f"{story.request_id}#2"
        self._stories[story.decode_id] = story
        request = self._engine_request(story, story.decode_id)
        story.decode.add(request, remote_kv=len(story.tokens) - 1)

    def on_reservation(self, worker: SimWorker, reservation: Reservation) -> None:
        story = self._stories.get(reservation.request_id)
        if story is None:
            return
        if self._handoff != "serial":
            self._received(story)
            return
        missing = len(story.tokens) - 1 - reservation.num_cached_tokens
        if missing <= 0:
            self._received(story)
            return
        share = missing / (len(story.tokens) - 1)
        self._send(story, share, lambda: self._pulled(story))

    def _pulled(self, story: _Story) -> None:
        assert story.decode is not None
        self._received(story)
        story.decode.activate(story.decode_id, len(story.tokens) - 1)

    def _received(self, story: _Story) -> None:
        """The decode worker has it all: the prefill worker may let go."""
        self.records.transfer[story.index] = self.loop.now - story.held_at
        self.records.received_tokens[story.index] = len(story.tokens) - 1
        if story.prefill is not None and self._stories.pop(story.prefill_id, None) is not None:
            story.prefill.release(story.prefill_id)

    # -- reports -------------------------------------------------------------------------------------

    def _start_reports(self) -> None:
        """Let workers report as live ones do: on joining, then every heartbeat, each at its own moment."""
        period, count = self.spec.router.heartbeat_s, len(self.workers)
        for number, worker in enumerate(self.workers.values()):
            self.router.worker_report(worker.report(with_blocks=self._hashing), 0.0)
            self.loop.at(period * (number + 1) / count, self._report, worker)

    def _report(self, worker: SimWorker) -> None:
        if not worker.alive or self.records.num_ended == len(self.records):
            return
        now = self.loop.now
        self.router.worker_report(worker.report(with_blocks=self._hashing), now)
        self.loop.at(now + self.spec.router.heartbeat_s, self._report, worker)


def _outcome_of(error: DisaggError) -> Outcome:
    if isinstance(error, OverloadedError):
        return Outcome.SHED
    return Outcome.INVALID if isinstance(error, InvalidRequestError) else Outcome.NO_CAPACITY
