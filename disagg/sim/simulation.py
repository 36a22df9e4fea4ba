"""Simulation: workers, links, the live Router, and each request's story on virtual time.

The story is the orchestrator's (disagg.service.orchestrator), without its asyncio:

    arrival ──► Router.place ──► add on P ──first token, held──► add on D ──reserved──► transfer
                                    │ P is D: no hand-off                                  │
                                    ▼                                                      ▼
                                 finished ◄──────────────────────── decode ◄── activate, release on P

A lost decode worker, or prefill worker before its first token, sends a request back to Router.place with the
tokens so far; a prefill worker lost later lets decode compute the KV itself. No request is placed, batched,
admitted or preempted by code of this package.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from disagg.config import AdmissionConfig
from disagg.engine.engine import Reservation
from disagg.errors import DisaggError, InvalidRequestError, OverloadedError
from disagg.hashing import block_hashes, chain_root, short_hash
from disagg.routing.admission import Released
from disagg.routing.policies import Policy
from disagg.routing.router import Router
from disagg.routing.types import Placement, PlacementRequest
from disagg.sim.costs.base import CostModel
from disagg.sim.decode_run import OUTPUT_TOKEN
from disagg.sim.events import EventLoop
from disagg.sim.faults import schedule_faults
from disagg.sim.frontend import FrontEnd
from disagg.sim.gaps import Gaps
from disagg.sim.links import Network, PrivateLinks, SharedLinks
from disagg.sim.machine import Machine
from disagg.sim.pipeline import Pipeline
from disagg.sim.records import Outcome, Records
from disagg.sim.spec import PoolSpec, SimSpec
from disagg.sim.worker import SimWorker
from disagg.types import FinishReason, Request, SamplingParams, StepOutput, WorkerInfo
from disagg.workload import TimedRequest, Workload

_FRONTEND = "sim"
_MODEL = "sim"
_PROGRESS_EVERY = 2048
# Policies that look at no prediction: for them, samples and predictions would only cost time.
_UNPREDICTING = {
    *("round_robin", "least_loaded", "power_of_two", "prefix_aware", "splitwise_jsq", "distserve_fcfs"),
}
# As disagg.service.orchestrator has it, which can't be imported without asyncio and gRPC.
RETRY_DELAY_S = 0.05


@dataclass(slots=True, eq=False)
class _Story:
    """One request on its way.

    attempts: numbers its submissions, as the orchestrator does. placements: numbers its placements, so that
    what was set in motion for an earlier one is void. prefill: None once its KV there is lost. cached: tokens
    of a reservation that need no copy; beside: other pulls when it was made. sent_in_vain: KV went to a
    decode worker that is lost. stalled_at: when its last worker was lost.
    """

    index: int
    request: TimedRequest
    request_id: str
    tokens: list[int]
    prefill: SimWorker | None = None
    decode: SimWorker | None = None
    prefill_id: str = ""
    decode_id: str = ""
    attempts: int = 0
    placements: int = 0
    cached: int = 0
    reserved_at: float = 0.0
    beside: int = 0
    held_at: float = 0.0
    stalled_at: float | None = None
    held: bool = False
    pulling: bool = False
    sent_in_vain: bool = False
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
        name = spec.router.policy if policy is None else policy.name
        predicting = self._predicting = name not in _UNPREDICTING or spec.admission is not None
        rng, max_charges = random.Random(seed), max(100_000, len(requests))
        self.frontend = FrontEnd(
            lambda: Router(spec.router, rng, policy=policy, predicting=predicting, max_charges=max_charges),
            dead_after_s=spec.router.dead_after_s,
            admission=spec.admission or AdmissionConfig(enabled=False),
            on_released=self._released,
        )
        # Where no two requests share content nothing is ever found, so nothing needs to be hashed.
        self._hashing = spec.engine.enable_prefix_caching and any(item.block_ids for item in requests)
        self._root = chain_root(_MODEL)
        self._handoff = spec.links.handoff
        self._costs: dict[str, CostModel] = {}
        shared = any(pool.slowed_by_others for pool in spec.pools.values())
        self._machine = Machine(self.loop) if shared else None
        self.workers = self._make_workers(fast)
        self.network = self._make_network()
        self._kv_bytes = spec.shape.kv_bytes_per_token
        self._last_layer = 1 / spec.shape.num_layers
        self._stories: dict[str, _Story] = {}
        # Requests that wait for admission.
        self._waiting: dict[str, _Story] = {}
        self._params: dict[int, SamplingParams] = {}
        self._next = 0
        self._on_progress = on_progress
        # Workers whose loss has been noticed.
        self._gone: set[str] = set()
        # How many pulls each worker has under way.
        self._pulls: dict[str, int] = {}
        schedule_faults(spec.faults, self, self.loop, set(self.workers))

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
                sample_steps=self._predicting,
                pipeline=pipeline,
                machine=self._machine,
                slowed=pool.slowed_by_others,
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
        if self._stories or self._waiting:
            raise AssertionError(f"{len(self._stories) + len(self._waiting)} requests are still followed")
        # A release may wait for the end of a step that nobody else needs.
        self.loop.run()
        for worker in self.workers.values():
            if not worker.alive:
                continue
            worker.engine.check_integrity()
            load = worker.engine.load()
            if load.kv_blocks_used or load.num_running or load.num_waiting or load.num_held:
                raise AssertionError(f"{worker.info.worker_id} is not empty: {load}")
        if self.frontend.num_charges:
            raise AssertionError(f"the router still counts {self.frontend.num_charges} requests")

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
            resumed=bool(story.lost),
        )
        try:
            placement = self.frontend.ask(wanted, self.loop.now)
        except DisaggError as error:
            self._end(story, _outcome_of(error))
            return
        if placement is None:
            self._waiting[story.request_id] = story
        else:
            self._follow(story, placement)

    def _released(self, released: Released) -> None:
        """A request that waited for admission has been placed, or refused."""
        story, outcome = self._waiting.pop(released.request.request_id), released.outcome
        if isinstance(outcome, DisaggError):
            self._end(story, _outcome_of(outcome))
        else:
            self._follow(story, outcome)

    def _follow(self, story: _Story, placement: Placement) -> None:
        story.prefill = self.workers[placement.prefill_worker]
        story.decode = self.workers[placement.decode_worker]
        story.placements += 1
        story.held = story.pulling = story.streaming = story.streamed = story.sent_in_vain = False
        self._after(self.spec.overheads.request_ms, self._submit, story)

    def _after(self, delay_ms: float, action: Callable[[_Story], None], story: _Story) -> None:
        if delay_ms:
            done = self._unless_moved(story, action)
            self.loop.at(self.loop.now + delay_ms / 1000, lambda _: done())
        else:
            action(story)

    @staticmethod
    def _unless_moved(story: _Story, action: Callable[[_Story], None]) -> Callable[[], None]:
        """Return a call of `action` that does nothing once the request was placed again."""
        placements = story.placements

        def act() -> None:
            if story.placements == placements:
                action(story)

        return act

    def _submit(self, story: _Story) -> None:
        worker = story.prefill
        assert worker is not None
        if worker.info.worker_id in self._gone:
            self._resume(story, worker)
            return
        request = self._engine_request(story)
        story.prefill_id = request.request_id
        self._stories[story.prefill_id] = story
        worker.add(request, hold=worker is not story.decode)

    def _engine_request(self, story: _Story) -> Request:
        request = story.request
        story.attempts += 1
        params = self._params.get(request.output_tokens)
        if params is None:
            params = self._params[request.output_tokens] = SamplingParams(
                temperature=0, max_tokens=request.output_tokens, ignore_eos=True, seed=0
            )
        request_id = f"{story.request_id}#{story.attempts}"
        due_s, wanted_ms = None, self.spec.objectives.ttft_ms
        if wanted_ms is not None:
            due_s = max(0.001, wanted_ms / 1000 - (self.loop.now - request.arrival_s))
        return Request(request_id, story.tokens, request.prompt_tokens, params, slo_ttft_s=due_s)

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
            story.held = True
            story.held_at = self.loop.now
            self._after(self.spec.overheads.handoff_ms, self._hand_off, story)

    def _first_token(self, story: _Story, output: StepOutput) -> None:
        records, index = self.records, story.index
        waited = None if story.lost else self.loop.now - story.request.arrival_s
        self.frontend.prefilled(story.request_id, self.loop.now, waited)
        if story.stalled_at is not None:
            self.gaps.add(self.loop.now - story.stalled_at, 1)
            story.stalled_at = None
        if math.isnan(records.first_token[index]):
            records.first_token[index] = self.loop.now
            records.queued[index] = output.queued_s or 0.0
            records.prefill[index] = output.prefill_s or 0.0
            records.cached_tokens[index] = output.num_cached_tokens

    def on_refused(self, worker: SimWorker, request_id: str, error: DisaggError) -> None:
        story = self._stories.pop(request_id)
        if request_id == story.decode_id and story.prefill is not None:
            story.prefill.release(story.prefill_id)
            self._stories.pop(story.prefill_id, None)
        self._end(story, _outcome_of(error))

    def _end(self, story: _Story, outcome: Outcome) -> None:
        records, done = self.records, outcome is Outcome.DONE and not story.lost
        num_tokens = story.request.output_tokens if done else 0
        streamed = self.loop.now - records.first_token[story.index] if done else None
        self.frontend.finished(story.request_id, self.loop.now, num_tokens, streamed)
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
        if not story.decode.alive:
            story.sent_in_vain = True
            return
        num_bytes = len(story.tokens) * self._kv_bytes * (1 - self._last_layer)
        done = self._unless_moved(story, self._streamed)
        self.network.send(worker.info.worker_id, story.decode.info.worker_id, num_bytes, done)

    def _streamed(self, story: _Story) -> None:
        story.streamed = True
        if story.held:
            self._send(story, self._last_layer, self._submit_decode)

    def _hand_off(self, story: _Story) -> None:
        assert story.decode is not None
        lost = story.sent_in_vain or story.decode.info.worker_id in self._gone
        if self._handoff == "serial" or lost:
            self._submit_decode(story)
        elif self._handoff == "push" or not story.streaming:
            self._send(story, 1.0, self._submit_decode)
        elif story.streamed:
            self._send(story, self._last_layer, self._submit_decode)

    def _send(self, story: _Story, share: float, action: Callable[[_Story], None]) -> None:
        """Move this share of the KV of a request's computed tokens from its prefill to its decode worker."""
        assert story.prefill is not None and story.decode is not None
        if not story.prefill.alive or not story.decode.alive:
            return  # nobody has noticed yet; then the request goes on
        num_bytes = (len(story.tokens) - 1) * self._kv_bytes * share
        source, target = story.prefill.info.worker_id, story.decode.info.worker_id
        self.network.send(source, target, num_bytes, self._unless_moved(story, action))

    def _submit_decode(self, story: _Story) -> None:
        worker = story.decode
        assert worker is not None
        if worker.info.worker_id in self._gone or story.sent_in_vain:
            story.stalled_at = story.held_at
            self._resume(story, worker)
            return
        request = self._engine_request(story)
        story.decode_id = request.request_id
        self._stories[story.decode_id] = story
        worker.add(request, remote_kv=len(story.tokens) - 1, since=story.held_at)

    def on_reservation(self, worker: SimWorker, reservation: Reservation) -> None:
        story = self._stories.get(reservation.request_id)
        if story is None:
            return
        if self._handoff != "serial":
            self._received(story)
            return
        story.cached = reservation.num_cached_tokens
        missing = len(story.tokens) - 1 - story.cached
        if missing <= 0:
            self._received(story)
        elif story.prefill is None:
            self._recompute(story)
        else:
            story.pulling, story.reserved_at = True, self.loop.now
            story.beside = self._pulls.get(worker.info.worker_id, 0)
            self._pulls[worker.info.worker_id] = story.beside + 1
            self._send(story, missing / (len(story.tokens) - 1), self._pulled)

    def _pulled(self, story: _Story) -> None:
        assert story.decode is not None
        story.pulling = False
        self._end_pull(story.decode)
        num_tokens = len(story.tokens) - 1 - story.cached
        story.decode.pulled(self.loop.now - story.reserved_at, num_tokens, story.beside)
        self._received(story)
        story.decode.activate(story.decode_id, len(story.tokens) - 1)

    def _end_pull(self, worker: SimWorker) -> None:
        worker_id = worker.info.worker_id
        self._pulls[worker_id] = self._pulls.get(worker_id, 1) - 1

    def _recompute(self, story: _Story) -> None:
        """The KV can't be had any more: the decode worker computes what it has not cached."""
        assert story.decode is not None
        if story.pulling:
            self._end_pull(story.decode)
        self.records.transfer[story.index] = self.loop.now - story.held_at
        story.decode.activate(story.decode_id, story.cached)

    def _received(self, story: _Story) -> None:
        """The decode worker has it all: the prefill worker may let go."""
        self.records.transfer[story.index] = self.loop.now - story.held_at
        self.records.received_tokens[story.index] = len(story.tokens) - 1
        if story.prefill is not None and self._stories.pop(story.prefill_id, None) is not None:
            story.prefill.release(story.prefill_id)

    # -- faults (see faults.Target) ------------------------------------------------------------------

    def lose_worker(self, worker_id: str, detect_s: float) -> None:
        worker = self.workers[worker_id]
        if not worker.alive:
            return
        num_tokens = worker.die()
        self._pulls.pop(worker_id, None)
        self.network.drop(worker_id)
        died_at, incarnation = self.loop.now, worker.info.incarnation
        self._after_s(detect_s, lambda: self._notice_loss(worker, incarnation, num_tokens, died_at))

    def _after_s(self, delay_s: float, action: Callable[[], None]) -> None:
        if delay_s:
            self.loop.at(self.loop.now + delay_s, lambda _: action())
        else:
            action()

    def _notice_loss(
        self, worker: SimWorker, incarnation: str, num_tokens: dict[str, int], died_at: float
    ) -> None:
        """What followed requests on a worker hears that it is gone; `num_tokens`: what they had by then."""
        self._gone.add(worker.info.worker_id)
        self.frontend.worker_left(worker.info.worker_id, incarnation, self.loop.now)
        for request_id, story in list(self._stories.items()):
            on_prefill, on_decode = request_id == story.prefill_id, request_id == story.decode_id
            if worker is story.decode and (on_decode or (on_prefill and worker is story.prefill)):
                self._add_tokens(story, num_tokens.get(request_id, 0))
                if len(story.tokens) > story.request.prompt_tokens:
                    story.stalled_at = died_at
                self._resume(story, worker)
            elif worker is story.prefill and on_prefill:
                self._lose_prefill(story, worker)
            elif worker is story.decode and on_prefill:
                self._lose_target(story, worker)

    @staticmethod
    def _add_tokens(story: _Story, num_tokens: int) -> None:
        story.tokens += [OUTPUT_TOKEN] * (num_tokens - len(story.tokens))

    def _lose_prefill(self, story: _Story, worker: SimWorker) -> None:
        if not story.held or self._handoff != "serial":
            story.stalled_at = story.held_at if story.held else None
            self._resume(story, worker)
            return
        del self._stories[story.prefill_id]
        story.prefill = None
        self.records.resumes[story.index] += 1
        if story.decode_id in self._stories and story.pulling:
            self._recompute(story)

    def _lose_target(self, story: _Story, worker: SimWorker) -> None:
        """The decode worker is gone before it had the request. Unless KV went to it, that shows later."""
        if self._handoff == "serial" or story.decode_id in self._stories:
            return
        story.sent_in_vain = True
        if story.held:
            self._submit_decode(story)

    def _resume(self, story: _Story, lost: SimWorker) -> None:
        """Place a request again, with the tokens so far; as Orchestrator._note_loss."""
        if self._stories.pop(story.prefill_id, None) is not None and story.prefill is not lost:
            assert story.prefill is not None
            story.prefill.release(story.prefill_id)
        self._stories.pop(story.decode_id, None)
        story.prefill = story.decode = None
        story.placements += 1
        story.lost.append(lost.info.worker_id)
        self.records.resumes[story.index] += 1
        if len(story.lost) > self.spec.router.max_resumes:
            self._end(story, Outcome.NO_CAPACITY)
        else:
            self.loop.at(self.loop.now + RETRY_DELAY_S, self._ask_router, story)

    def replace_worker(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        if worker.alive:
            return
        worker.replace()
        self._gone.discard(worker_id)
        self._report((worker, worker.info))

    def set_slowdown(self, worker_id: str, factor: float) -> None:
        self.workers[worker_id].slow_down(factor)

    def set_link(self, worker_id: str, divisor: float) -> None:
        pool = self.spec.pools[self.workers[worker_id].pool]
        self.network.set_bandwidth(worker_id, self.spec.bandwidth_of(pool) / divisor)

    def lose_router(self) -> None:
        for request in self.frontend.lose_router(self.loop.now):
            self._ask_router(self._waiting.pop(request.request_id))

    def restart_router(self) -> None:
        self.frontend.restart_router(self.loop.now)

    # -- reports -------------------------------------------------------------------------------------

    def _start_reports(self) -> None:
        """Let workers report as live ones do: on joining, then every heartbeat, each at its own moment."""
        period, count = self.spec.router.heartbeat_s, len(self.workers)
        for number, worker in enumerate(self.workers.values()):
            self._tell_router(worker)
            self.loop.at(period * (number + 1) / count, self._report, (worker, worker.info))

    def _tell_router(self, worker: SimWorker) -> None:
        if self.frontend.router is None:
            return
        now, with_blocks = self.loop.now, self._hashing
        if self.frontend.worker_report(worker.report(with_blocks=with_blocks), now):
            self.frontend.worker_report(worker.report(with_blocks=with_blocks, snapshot=True), now)

    def _report(self, who: tuple[SimWorker, WorkerInfo]) -> None:
        worker, info = who
        over = self.records.num_ended == len(self.records)
        if over or not worker.alive or worker.info is not info:
            return
        self._tell_router(worker)
        self.loop.at(self.loop.now + self.spec.router.heartbeat_s, self._report, who)


def _outcome_of(error: DisaggError) -> Outcome:
    if isinstance(error, OverloadedError):
        return Outcome.SHED
    return Outcome.INVALID if isinstance(error, InvalidRequestError) else Outcome.NO_CAPACITY
