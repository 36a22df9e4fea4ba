"""Admission: which requests are served when not all can be, and in which order they get to workers.

    ask ──► enough room on a worker ──────────────────────────────► placed
     │  └─► a promise can be kept, but others come first ──► queue ─► placed when there is room
     └────► it would miss, or wait too long ─► OverloadedError with the time after which to ask again

The decision falls when a request arrives, on what is predicted of it: time to the first token behind all that
is ahead of it, and time between tokens on its decode worker *by the time its prefill is done*. The decode
load of the moment lags behind what prefill is about to send, so that rejecting by it makes both pools swing
between idle and full (Mooncake, FAST '25, section 6). Nor is a request taken that would make running streams
break theirs, or one that is due later in the queue.

Never refused: a request that was admitted before (its worker died), any while predictions are mere guesses,
and whatever an idle worker could begin at once. An objective that not even an idle cluster could meet, by the
measured times of its steps, asks for nothing: such a request is served as soon as may be, and refused only
where it would wait longer than max_wait_s or the queue is full. Pure: no clock, no I/O; `now` is seconds on
any one clock.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from disagg.config import AdmissionConfig
from disagg.errors import DeadlineExceededError, DisaggError, OverloadedError
from disagg.routing.caution import Caution
from disagg.routing.choice import Choice
from disagg.routing.estimates import ended_by
from disagg.routing.fair_queue import FairQueue, Waiting
from disagg.routing.router import CHARGE_TTL_S, Router
from disagg.routing.shares import Shares
from disagg.routing.slo import Slo
from disagg.routing.types import Placement, PlacementRequest, Prediction

# When the first token of a request without an objective is due: so long after it came, and longer requests
# later, so that short ones are not kept waiting by them.
DUE_S, DUE_FACTOR = 10.0, 20.0
# Shares of promises that are to be kept. A late first token delays those behind it too. What makes single
# answers slow has mostly nothing to do with how many are served, so refusing more does not help against that:
# there, only what predictions miss on the whole is made up for.
_TTFT_KEPT, _TPOT_KEPT = 0.95, 0.5
# Steps' worth of prompts that a worker is given ahead, however long its steps: one that runs, and the next.
STEPS_AHEAD = 2
# Rounding errors of what is no wait at all.
_NO_WAIT_S = 1e-6
# A stream whose objective is missed by so much is not saved by refusing others.
_LOST = 1.5
# Shortest and longest time after which a refused client is told to come back, in seconds.
MIN_RETRY_S, MAX_RETRY_S = 0.05, 60.0
# For so long at the most a refusal stands for others like it. Not one for a late first token while prompts
# were found in caches: another as long as the refused one may be cached and take no time.
MAX_HOLD_S, HIT_MEMORY_S = 0.1, 10.0


class Reason(StrEnum):
    """Why a request was not served: the objective that it would have missed, or whose streams it would have
    disturbed; too long a wait; no place in the queue; its deadline passed in the queue."""

    TTFT = "ttft"
    TPOT = "tpot"
    STREAMS = "streams"
    WAIT = "wait"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Released:
    """A request that left the queue: with its placement, or with the error that ended it."""

    request: PlacementRequest
    outcome: Placement | DisaggError


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a request could get now."""

    choice: Choice
    prediction: Prediction
    work_s: float


@dataclass(slots=True)
class _Promise:
    """What a placed request was promised, None for nothing. waited_s: for its place."""

    frontend_id: str
    arrived: float
    waited_s: float
    ttft_s: float | None
    decode_slot: int
    tpot_s: float
    slo_tpot_s: float | None


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: Reason
    excess_s: float


class Admission:
    """Stands between whoever asks and the Router; tells the latter what became of requests.

    refused: requests that were not served, by reason.
    """

    def __init__(self, config: AdmissionConfig, router: Router) -> None:
        self.router = router
        self.queue = FairQueue(config.max_queue, self._weight)
        self.refused: Counter[Reason] = Counter()
        self._config = config
        self._shares = Shares(self._weight)
        self._second = Slo(local_prefill=router.config.local_prefill)
        self._promises: dict[str, _Promise] = {}
        # Objectives of the streams on each decode worker, by slot.
        self._streams: dict[int, Counter[float]] = {}
        self._ttft_caution = Caution(_TTFT_KEPT)
        self._tpot_caution = Caution(_TPOT_KEPT)
        self._hit_at = -math.inf
        self._number = 0

    def _weight(self, tenant: str) -> float:
        return self._config.tenant_weights.get(tenant, 1.0)

    # -- requests ------------------------------------------------------------------------------------

    def ask(self, request: PlacementRequest, now: float) -> Placement | None:
        """Return where a request runs; None: it waits, and `release` will tell.

        Raises OverloadedError where it is refused, and what Router.place raises.
        """
        if not self._config.enabled:
            return self.router.place(request, now)
        self.withdraw(request.request_id)
        choice, prediction = self.router.consider(request)
        if max(choice.depths) > 0:
            self._hit_at = now
        offer = _Offer(choice, prediction, self._work_s(request, choice, prediction))
        if request.resumed or not prediction.fitted:
            return self._place(request, offer, now, now, None)
        self._shares.asked(request.tenant, now)
        item = self._waiting(request, offer, now)
        refusal = self._refusal(item, offer, now)
        if refusal is not None:
            offer = self._second_opinion(request, offer)
            refusal = self._refusal(item, offer, now)
        if refusal is not None:
            raise self._refuse(refusal, now)
        item.promised_s = self.queue.ahead_s(item) + offer.prediction.ttft
        if self._is_next(item) and self._has_room(offer):
            return self._place(request, offer, now, now, item.promised_s)
        if not self.queue.has_place(request.tenant):
            waiting_s = sum(other.work_s for other in self.queue) / len(self.queue)
            raise self._refuse(_Refusal(Reason.QUEUE_FULL, waiting_s), now)
        self.queue.push(item)
        return None

    def release(self, now: float) -> list[Released]:
        """Return who leaves the queue now; to be called whenever something has changed, and now and then."""
        released: list[Released] = []
        if not len(self.queue):
            return released
        for item in [item for item in self.queue if item.deadline is not None and item.deadline <= now]:
            self.queue.remove(item.request.request_id)
            self.refused[Reason.DEADLINE] += 1
            error = DeadlineExceededError("the request's deadline passed while it waited")
            released.append(Released(item.request, error))
        while len(self.queue):
            item = self.queue.peek()
            try:
                choice, prediction = self.router.consider(item.request)
            except DisaggError as error:
                self.queue.remove(item.request.request_id)
                released.append(Released(item.request, error))
                continue
            offer = _Offer(choice, prediction, item.work_s)
            if prediction.fitted and not self._has_room(offer):
                break
            self.queue.pop()
            placement = self._place(item.request, offer, item.arrived, now, item.promised_s)
            released.append(Released(item.request, placement))
        return released

    def withdraw(self, request_id: str) -> bool:
        """Forget a request that waits; False where it does not."""
        return len(self.queue) > 0 and self.queue.remove(request_id) is not None

    def prefilled(self, request_id: str, now: float, seconds: float | None = None) -> None:
        """The request's first token is out. Unknown ids are ignored.

        seconds: from when it was asked for until then, as measured by whoever asked. Nothing is learned
        without it: words of what has happened come late, and how late they come says nothing of workers.
        """
        promise = self._promises.get(request_id)
        waited = 0.0 if promise is None else promise.waited_s
        self.router.prefilled(request_id, None if seconds is None else max(0.0, seconds - waited))
        if promise is not None and promise.ttft_s is not None and seconds is not None:
            self._ttft_caution.learn(promise.ttft_s, seconds, now)

    def finished(
        self, request_id: str, now: float, num_tokens: int = 0, seconds: float | None = None
    ) -> None:
        """The request has ended, however; waiting or placed. num_tokens: of a whole answer, else 0.

        seconds: from the first token to the last, as `prefilled` has it.
        """
        self.withdraw(request_id)
        self.router.finished(request_id, num_tokens, seconds)
        promise = self._forget(request_id)
        if promise is None or promise.ttft_s is None or seconds is None or num_tokens < 2:
            return
        self._tpot_caution.learn(promise.tpot_s, seconds / (num_tokens - 1), now)

    def frontend_left(self, frontend_id: str) -> None:
        """A front end is gone, and with it all of its requests."""
        self.router.frontend_left(frontend_id)
        waiting = [item.request for item in self.queue if item.request.frontend_id == frontend_id]
        for request in waiting:
            self.queue.remove(request.request_id)
        for request_id in [key for key, item in self._promises.items() if item.frontend_id == frontend_id]:
            self._forget(request_id)

    def sweep(self, now: float) -> list[str]:
        """Return what Router.sweep does, and forget with it who can't be served any more."""
        while self._promises:
            oldest = next(iter(self._promises))
            if self._promises[oldest].arrived >= now - CHARGE_TTL_S:
                break
            self._forget(oldest)
        return self.router.sweep(now)

    def _forget(self, request_id: str) -> _Promise | None:
        promise = self._promises.pop(request_id, None)
        if promise is not None and promise.slo_tpot_s is not None:
            streams = self._streams[promise.decode_slot]
            streams[promise.slo_tpot_s] -= 1
            if not streams[promise.slo_tpot_s]:
                del streams[promise.slo_tpot_s]
        return promise

    # -- the decision --------------------------------------------------------------------------------

    def _work_s(self, request: PlacementRequest, choice: Choice, prediction: Prediction) -> float:
        """Return how many seconds a request takes of whichever pool it takes more of."""
        view = self.router.view
        pools, costs = view.pools(), view.costs(choice.decode)
        answer = min(request.max_new_tokens, view.expected_tokens)
        decode_s = answer * max(costs.sequence_s, costs.step_s / costs.max_seqs)
        return max(prediction.service_s / max(1, len(pools.prefill)), decode_s / max(1, len(pools.decode)))

    def _waiting(self, request: PlacementRequest, offer: _Offer, now: float) -> Waiting:
        prediction = offer.prediction
        due_s = self._slo_ttft_s(request, prediction)
        asked = due_s < math.inf
        if not asked:
            due_s = DUE_S + DUE_FACTOR * prediction.service_s
        if request.timeout_s is not None and request.timeout_s < due_s:
            due_s, asked = request.timeout_s, True
        deadline = None if request.timeout_s is None else now + request.timeout_s
        self._number += 1
        start_by = now + due_s - prediction.service_s
        return Waiting(start_by, self._number, request, offer.work_s, now, deadline, asked=asked)

    @staticmethod
    def _slo_ttft_s(request: PlacementRequest, prediction: Prediction) -> float:
        """Return the objective, inf where there is none that an idle cluster could meet."""
        wanted = request.slo_ttft_s
        return math.inf if wanted is None or wanted < prediction.least_ttft else wanted

    def _refusal(self, item: Waiting, offer: _Offer, now: float) -> _Refusal | None:
        """Return why the request can't be admitted, None if it can."""
        request, prediction = item.request, offer.prediction
        costs = self.router.view.costs(offer.choice.decode)
        ahead = self.queue.ahead_s(item)
        waits = ahead + prediction.wait_s
        # Those who had more than their share leave room for the others.
        part = 1.0 - (self._config.reserve if self._shares.lead_s(request.tenant, now) > 0 else 0.0)
        if waits + costs.place_s > _NO_WAIT_S:
            ttft = (ahead + prediction.ttft) * self._ttft_caution.factor(now)
            timeout = math.inf if request.timeout_s is None else request.timeout_s
            excess = ttft - part * min(self._slo_ttft_s(request, prediction), timeout)
            if excess > 0:
                return _Refusal(Reason.TTFT, excess)
            tiers = {str(name): limit for name, limit in self._config.tier_max_wait_s.items()}
            excess = waits + costs.place_s - part * tiers.get(request.service_tier, self._config.max_wait_s)
            if excess > 0:
                return _Refusal(Reason.WAIT, excess)
            if self.queue.delays(item, now):
                return _Refusal(Reason.TTFT, item.work_s)
        return self._decode_refusal(request, offer, part, now) if costs.sequences > 0 else None

    def _decode_refusal(
        self, request: PlacementRequest, offer: _Offer, part: float, now: float
    ) -> _Refusal | None:
        """Return why the decode worker can't take the request by the time that its prefill is done."""
        prediction, view = offer.prediction, self.router.view
        costs = view.costs(offer.choice.decode)
        caution = self._tpot_caution.factor(now)
        # How long until one sequence fewer decodes there.
        turnover_s = view.expected_tokens * costs.step_s / costs.sequences
        wanted = request.slo_tpot_s
        if wanted is not None and prediction.least_tpot <= wanted < prediction.later_tpot * caution / part:
            return _Refusal(Reason.TPOT, turnover_s)
        streams = self._streams.get(offer.choice.decode)
        if streams:
            step_s = costs.step_s - ended_by(prediction.ttft, costs, view)
            if step_s <= (tightest := min(streams)) * _LOST and step_s * caution > tightest:
                return _Refusal(Reason.STREAMS, turnover_s)
        return None

    def _second_opinion(self, request: PlacementRequest, offer: _Offer) -> _Offer:
        """Return the best placement by predicted times, whatever the policy would have."""
        pools = self.router.view.pools()
        if isinstance(self.router.policy, Slo) or len(pools.ready) <= 2:
            return offer
        choice, prediction = self.router.consider(request, self._second)
        return _Offer(choice, prediction, self._work_s(request, choice, prediction))

    def _refuse(self, refusal: _Refusal, now: float) -> OverloadedError:
        self.refused[refusal.reason] += 1
        retry = min(MAX_RETRY_S, max(MIN_RETRY_S, refusal.excess_s))
        # Work goes down by a second a second at the most, unless somebody leaves early.
        hold = min(MAX_HOLD_S, refusal.excess_s / 2)
        if refusal.reason is Reason.TTFT and now < self._hit_at + HIT_MEMORY_S:
            hold = 0.0
        return OverloadedError(_MESSAGES[refusal.reason], retry_after=retry, hold_s=hold)

    def _is_next(self, item: Waiting) -> bool:
        """Whether nobody in the queue comes before the request."""
        return not len(self.queue) or self.queue.ahead_s(item) <= 0

    def _has_room(self, offer: _Offer) -> bool:
        """Whether the workers would get to it soon, so that its place in their queues does not matter."""
        view, limit = self.router.view, self._config.backlog_s
        prefill, decode = view.costs(offer.choice.prefill), view.costs(offer.choice.decode)
        # Short prompts share a step only if they are there when it begins; word of its end comes too late.
        ahead_s = max(limit, STEPS_AHEAD * (prefill.chunk_s + prefill.token_s * prefill.chunk))
        begins = offer.prediction.wait_s <= ahead_s or prefill.queued <= 0
        return begins and (decode.place_s <= limit or decode.sequences == 0)

    def _place(
        self, request: PlacementRequest, offer: _Offer, arrived: float, now: float, promised_s: float | None
    ) -> Placement:
        placement = self.router.commit(request, offer.choice, offer.prediction, now)
        lag = self._shares.lead_s(request.tenant, now)
        self._shares.served(request.tenant, offer.work_s, now)
        self._forget(request.request_id)
        wanted, decode = request.slo_tpot_s, offer.choice.decode
        if wanted is not None and wanted < offer.prediction.least_tpot:
            wanted = None
        self._promises[request.request_id] = _Promise(
            request.frontend_id,
            arrived,
            now - arrived,
            promised_s,
            decode,
            offer.prediction.later_tpot,
            wanted,
        )
        if wanted is not None:
            self._streams.setdefault(decode, Counter())[wanted] += 1
        return placement._replace(lag_s=lag) if lag > 0 else placement


_MESSAGES = {
    Reason.TTFT: "the first token would come later than asked for",
    Reason.TPOT: "tokens would follow each other more slowly than asked for",
    Reason.STREAMS: "running streams leave no room for another one",
    Reason.WAIT: "too much work is waiting",
    Reason.QUEUE_FULL: "too many requests are waiting",
    Reason.DEADLINE: "the request's deadline passed while it waited",
}
