"""The policy `slo`: prefill and decode worker chosen together by predicted TTFT and TPOT.

Every worker is priced in a few array operations: seconds to the first token, queue and cache included, and
seconds of decoding, the pull over a link as busy as it is included. The two sides meet in nothing else, so
the best pair is the best of each; what remains is whether one worker should do both:

  - apart, unless alone is cheaper, what it takes from those that stream there counted in;
  - a prompt that would miss its objective apart goes to a decode worker whose streams can spare the time:
    their steps, lengthened by all prompts that came to them lately, stay within the tightest of their
    objectives;
  - where that is not to be had either the mildest miss is taken, and nobody else is made to miss for it.
"""

from __future__ import annotations

import random
from enum import Enum

import numpy as np
import numpy.typing as npt

from disagg.routing.charges import ASIDE_S
from disagg.routing.choice import Choice, candidates
from disagg.routing.costs import DUE_PART, WorkerCosts, turn_of
from disagg.routing.prefix_index import Held, PrefixIndex
from disagg.routing.types import PlacementRequest
from disagg.routing.view import ClusterView, Floats, Pools, Slots

# From this share of an objective on a request is pressed: what a prediction leaves out fits no more.
PRESSED = 0.9
# Streams keep this share of their TPOT objective for what nobody foresaw.
SPARE = 0.1


class Slo:
    """Joint placement by objectives.

    local_prefill: whether decode workers may prefill prompts themselves. A request without objectives takes
    the pair that serves it soonest.
    """

    name = "slo"

    def __init__(self, *, local_prefill: bool = True) -> None:
        self._local_prefill = local_prefill

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        """See Policy.choose."""
        pools = candidates(request, view)
        held = index.held(request.block_hashes) if request.block_hashes else None
        offer = _Offer(request, view, held)
        if pools.degraded:
            slot = offer.alone(pools, rng)
            return Choice(slot, slot, True, (offer.depth(slot), offer.depth(slot)))
        prefill, decode = offer.best(pools, rng, self._local_prefill)
        return Choice(prefill, decode, False, (offer.depth(prefill), offer.depth(decode)))


class _Verdict(Enum):
    """What a request's best pair amounts to. PRESSED: it would miss an objective, so others are looked at."""

    APART = 0
    ALONE = 1
    PRESSED = 2


_VERDICTS = tuple(_Verdict)
_NOTHING = (b"", b"")


class _Offer:
    """One request in front of all workers.

    first: seconds to its first token. decode_s: seconds from then to its last one. work: seconds of the
    prompt's own computing. All over slots.
    """

    def __init__(self, request: PlacementRequest, view: ClusterView, held: Held | None) -> None:
        self._request, self._view, self._held = request, view, held
        self.gaps = max(1.0, min(request.max_new_tokens, view.expected_tokens) - 1)
        self._depths: dict[int, int] = {}
        # What the compiled core has found of the pair that is best.
        self._verdict: _Verdict | None = None
        self.first: Floats
        self.work: Floats
        self.decode_s: Floats

    def _price(self) -> None:
        """Work all prices out. `_board.c` does the same."""
        request, view, held = self._request, self._view, self._held
        num_tokens = request.num_tokens
        token_s, queued = view.token_s, view.queued_tokens
        # A rough turn is enough to compare workers: the exact one comes with the prediction.
        ahead = np.minimum(view.shorter(turn_of(num_tokens, request.priority)), queued)
        decode_s = view.step_s * self.gaps
        decode_s += view.place_s
        if held is None:
            work = token_s * num_tokens
            work += view.attended_s * (num_tokens * num_tokens / 2)
            ahead += np.minimum(queued - ahead, (ahead + num_tokens) * DUE_PART)
            decode_s += view.token_pull_s * num_tokens
        else:
            uncached = np.full(view.num_slots, float(num_tokens))
            uncached[held.slots] = np.maximum(1.0, num_tokens - held.blocks * view.block_size[held.slots])
            work = token_s * uncached
            work += view.attended_s * (uncached * (num_tokens - uncached / 2))
            ahead += np.minimum(queued - ahead, (ahead + uncached) * DUE_PART)
            decode_s += view.token_pull_s * uncached
        ahead *= token_s
        ahead += view.begin_s
        ahead += work
        self.first = ahead
        self.work = work
        self.decode_s = decode_s

    def cheapest(self, pools: Pools, rng: random.Random) -> tuple[int, int]:
        """Work all prices out; return the best slot of each pool."""
        first_random, second_random = rng.random(), rng.random()
        view, request = self._view, self._request
        if view.board is None:
            self._price()
            # The work counts twice: it takes this request's time, and as much from whoever comes next.
            prefill = _lowest(self.first + self.work + pools.not_prefill, first_random)
            return prefill, _lowest(self.decode_s + pools.not_decode, second_random)
        self.first, self.work, self.decode_s = view.scratch_rows
        prefill, decode, on_prefill, on_decode, verdict = view.board.best(
            view.stale,
            view.expected_tokens,
            view.now,
            request.num_tokens,
            self.gaps,
            first_random,
            second_random,
            turn_of(request.num_tokens, request.priority),
            request.slo_ttft_s,
            request.slo_tpot_s,
            *pools.masks,
            *(_NOTHING if self._held is None else self._held.buffers),
        )
        self._depths = {prefill: on_prefill, decode: on_decode}
        self._verdict = _VERDICTS[verdict]
        return prefill, decode

    def depth(self, slot: int) -> int:
        if self._held is None:
            return 0
        known = self._depths.get(slot)
        return self._held.depth(slot) if known is None else known

    def alone(self, pools: Pools, rng: random.Random) -> int:
        """Return the worker that serves the request soonest all by itself."""
        self._price()
        return _lowest(self.both() + pools.not_prefill, rng.random())

    def both(self) -> Floats:
        """Return over slots the seconds until one worker has done it all, and what that costs others."""
        return self.first + self.work + self.decode_s

    def best(self, pools: Pools, rng: random.Random, local_prefill: bool) -> tuple[int, int]:
        """Return the prefill and the decode worker."""
        prefill, decode = self.cheapest(pools, rng)
        if len(pools.local):
            both = self.both()
            alone = int(pools.local[both.take(pools.local).argmin()])
            apart = self.first[prefill] + self.work[prefill] + self.decode_s[decode]
            return (alone, alone) if both[alone] <= apart else (prefill, decode)
        if not local_prefill:
            return prefill, decode
        chosen = self._aside(prefill, decode, pools)
        return (prefill, decode) if chosen is None else (chosen, chosen)

    def _aside(self, prefill: int, decode: int, pools: Pools) -> int | None:
        """Return the decode worker that should prefill this prompt itself, if one should."""
        verdict = self._verdict or self._judge(prefill, decode)
        if verdict is not _Verdict.PRESSED:
            return decode if verdict is _Verdict.ALONE else None
        first, late = float(self.first[prefill]), self._pressed_for_tpot(decode)
        wanted = self._request.slo_ttft_s
        slots = pools.decode
        soonest = np.where(self._room(slots), self.first.take(slots), np.inf)
        at = int(soonest.argmin())
        limit = np.inf if wanted is None else wanted
        if soonest[at] > limit or (soonest[at] >= first and not late) or soonest[at] == np.inf:
            return None
        slot = int(slots[at])
        return slot if self._view.costs(slot).fitted else None

    def _judge(self, prefill: int, decode: int) -> _Verdict:
        """Return whether the decode worker does better alone. `_board.c` does the same."""
        wanted = self._request.slo_ttft_s
        late = wanted is not None and float(self.first[prefill]) > PRESSED * wanted
        if late or self._pressed_for_tpot(decode):
            return _Verdict.PRESSED
        return _Verdict.ALONE if self._cheaper(prefill, decode) else _Verdict.APART

    def _pressed_for_tpot(self, decode: int) -> bool:
        """Whether the hand-off alone might be too long for so few tokens."""
        wanted = self._request.slo_tpot_s
        if wanted is None:
            return False
        step_s = float(self._view.step_s[decode])
        return float(self.decode_s[decode]) > PRESSED * wanted * self.gaps and step_s <= PRESSED * wanted

    def _cheaper(self, prefill: int, decode: int) -> bool:
        """Whether the decode worker serves the request sooner alone, its streams' loss counted in."""
        costs = self._view.costs(decode)
        if not costs.fitted or not self._has_room(decode, costs):
            return False
        missing = self._request.num_tokens - self.depth(decode) * self._view.size_of_block(decode)
        alone = float(self.first[decode]) + float(self.work[decode]) * (1 + costs.sequences)
        apart = float(self.first[prefill]) + float(self.work[prefill]) + costs.pull_s(missing, costs.links)
        return alone <= apart

    def _room(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Return over `slots` whether the streams there can spare the time for this prompt."""
        view = self._view
        share = view.aside.take(slots) + self.work.take(slots) / ASIDE_S
        limit = np.minimum(view.tightest_s.take(slots), self._request.slo_tpot_s or np.inf)
        room: npt.NDArray[np.bool_] = view.bare_step_s.take(slots) <= limit * (1 - SPARE) * (1 - share)
        return room

    def _has_room(self, slot: int, costs: WorkerCosts) -> bool:
        """Return the same of one worker."""
        share = costs.aside + float(self.work[slot]) / ASIDE_S
        limit = min(float(self._view.tightest_s[slot]), self._request.slo_tpot_s or np.inf)
        return costs.bare_step_s <= limit * (1 - SPARE) * (1 - share)


def _lowest(values: Floats, chance: float) -> int:
    """Return where the lowest value stands; of equal ones any may be it. chance: random, in [0, 1)."""
    start = int(chance * len(values))
    at = start + int(values[start:].argmin())
    if start:
        before = int(values[:start].argmin())
        if values[before] < values[at]:
            at = before
    return at
