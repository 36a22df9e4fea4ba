"""The policy `slo`: prefill and decode worker chosen together by predicted TTFT and TPOT.

1. price every worker in a few array operations; keep the FEW best of each pool
2. weigh their pairs, and prefill on the decode worker itself, each with cache, link and streams in one sum
3. take a pair by class: comfortable (packed tightly), meets the objectives, misses them most mildly
"""

from __future__ import annotations

import random

import numpy as np

from disagg.routing.choice import Choice, candidates
from disagg.routing.costs import DUE_PART, ahead_of, turn_of
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import PlacementRequest
from disagg.routing.view import ClusterView, Floats, Pools, Slots

# Workers of each pool whose pairs are weighed.
FEW = 2
# Up to this share of both objectives a pair is comfortable: there the fullest is taken, so that others keep
# their room for requests that need it; beyond, the quickest.
COMFORTABLE = 0.5
# How many seconds of work elsewhere a second of somebody's queue is worth to whoever packs.
PACKING = 0.25
_MEETS, _MISSES = 1, 2
# Below any time that is not comfortable.
_COMFORT = 1e6

Weight = tuple[int, float]


class Slo:
    """Joint placement by objectives.

    local_prefill: whether decode workers may prefill short prompts. A request without objectives takes the
    pair that serves it soonest.
    """

    name = "slo"

    def __init__(self, *, local_prefill: bool = True) -> None:
        self._local_prefill = local_prefill

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        """See Policy.choose."""
        pools = candidates(request, view)
        found = index.depths(request.block_hashes, view.num_slots) if request.block_hashes else None
        offer = _Offer(request, view, found)
        if pools.degraded:
            slot = offer.best_alone(pools, rng)
            return Choice(slot, slot, True, (offer.depth(slot), offer.depth(slot)))
        prefill, decode = offer.best_pair(pools, rng, self._local_prefill)
        return Choice(prefill, decode, False, (offer.depth(prefill), offer.depth(decode)))


class _Offer:
    """One request in front of all workers."""

    def __init__(self, request: PlacementRequest, view: ClusterView, found: Slots | None) -> None:
        self._request, self._view, self._found = request, view, found
        self._gaps = max(1.0, min(request.max_new_tokens, view.expected_tokens) - 1)
        num_tokens = request.num_tokens
        uncached: Floats | float = float(num_tokens)
        if found is not None:
            uncached = np.maximum(1.0, num_tokens - found * view.block_size)
        self._uncached = uncached
        # A rough turn is enough to compare workers: the exact one comes with the pair.
        self._turn = turn_of(num_tokens, request.priority)

    def depth(self, slot: int) -> int:
        return 0 if self._found is None else int(self._found[slot])

    # -- every worker, roughly -----------------------------------------------------------------------

    def _first_token(self) -> tuple[Floats, Floats]:
        """Return over slots: seconds to the first token, and the tokens ahead of it."""
        view, uncached = self._view, self._uncached
        ahead = np.minimum(view.shorter[self._turn], view.queued_tokens)
        later = view.queued_tokens - ahead
        ahead += np.minimum(later, (ahead + uncached) * DUE_PART)
        first = ahead + uncached
        first *= view.token_s
        first += view.begin_s
        first += view.attended_s * (uncached * (self._request.num_tokens - uncached / 2))
        return first, ahead

    def _decode_time(self) -> Floats:
        """Return over slots: seconds that decode takes, the wait for a place and what must be moved in it."""
        view = self._view
        total: Floats = view.step_s * self._gaps
        total += view.place_s
        if self._found is not None:
            total += self._uncached * view.token_pull_s
        return total

    def best_alone(self, pools: Pools, rng: random.Random) -> int:
        """Return the worker that does all soonest."""
        first, _ = self._first_token()
        first += self._decode_time()
        first += pools.not_prefill
        return _lowest(first, rng, 1)[0]

    def best_pair(self, pools: Pools, rng: random.Random, local_prefill: bool) -> tuple[int, int]:
        """Return the prefill and the decode worker."""
        first, ahead = self._first_token()
        wanted = self._request.slo_ttft_s
        ranked: Floats = first
        if wanted is not None:
            # Comfortable ones first, and among these who has the least to compute and the longest queue.
            waits = ahead * self._view.token_s
            ranked = np.where(first <= COMFORTABLE * wanted, first - (1 + PACKING) * waits - _COMFORT, first)
        prefills = _lowest(ranked + pools.not_prefill, rng, FEW)
        decodes = _lowest(self._ranked_decodes() + pools.not_decode, rng, FEW)
        best, chosen = (_MISSES + 1, 0.0), (-1, -1)
        for decode in decodes:
            for prefill in prefills:
                weight = self._weigh(prefill, decode)
                if weight < best:
                    best, chosen = weight, (prefill, decode)
        for slot in self._alone(pools, decodes, first, local_prefill):
            weight = self._weigh(slot, slot)
            if weight <= best:
                best, chosen = weight, (slot, slot)
        return chosen

    def _ranked_decodes(self) -> Floats:
        total, wanted = self._decode_time(), self._request.slo_tpot_s
        if wanted is None:
            return total
        comfortable = total <= COMFORTABLE * wanted * self._gaps
        packed: Floats = total - (1 + PACKING) * self._gaps * self._view.step_s - _COMFORT
        ranked: Floats = np.where(comfortable, packed, total)
        return ranked

    # -- a few pairs, exactly ------------------------------------------------------------------------

    def _alone(self, pools: Pools, decodes: list[int], first: Floats, local_prefill: bool) -> list[int]:
        """Return workers that may do both: of mixed ones the best, and decode workers for short prompts."""
        alone = []
        if len(pools.local):
            both = (first + self._decode_time()).take(pools.local)
            alone.append(int(pools.local[both.argmin()]))
        if local_prefill:
            for slot in decodes:
                costs = self._view.costs(slot)
                # One step of its own at most, or it would be a prefill worker.
                if costs.fitted and self._tokens(slot) <= costs.budget:
                    alone.append(slot)
        return alone

    def _tokens(self, slot: int) -> int:
        """Return how many tokens a worker would have to compute."""
        if self._found is None:
            return self._request.num_tokens
        cached = int(self._found[slot]) * self._view.size_of_block(slot)
        return max(1, self._request.num_tokens - cached)

    def _weigh(self, prefill: int, decode: int) -> Weight:
        """Return (class, cost): less is better, and of another class better or worse whatever it costs."""
        request, view = self._request, self._view
        on_prefill, on_decode = view.costs(prefill), view.costs(decode)
        tokens = self._tokens(prefill)
        attended = tokens * (request.num_tokens - tokens / 2)
        shorter = view.queued_before(prefill, turn_of(tokens, request.priority))
        ahead = ahead_of(tokens, shorter, on_prefill.queued)
        ttft = on_prefill.first_token_s(ahead, tokens, attended)
        stall = on_decode.place_s
        # What those lose that stream where the prompt is computed, summed over them.
        harm = on_prefill.sequences * (tokens * on_prefill.token_s + attended * on_prefill.attended_s)
        if prefill != decode:
            missing = self._tokens(decode) if self._found is not None else request.num_tokens
            stall += on_decode.pull_s(missing, max(on_prefill.links, on_decode.links))
        decode_s = self._gaps * on_decode.step_s
        total = ttft + stall + decode_s + harm
        miss = self._miss(ttft, (stall + decode_s) / self._gaps)
        if miss is None:
            return 0, total
        if miss > 1:
            return _MISSES, miss
        if miss > COMFORTABLE:
            return _MEETS, total
        waits = on_prefill.begin_s + ahead * on_prefill.token_s
        return 0, total - (1 + PACKING) * (waits + decode_s)

    def _miss(self, ttft: float, tpot: float) -> float | None:
        """Return the larger of both times as a multiple of its objective; None where there is none."""
        wanted_ttft, wanted_tpot = self._request.slo_ttft_s, self._request.slo_tpot_s
        if wanted_ttft is None:
            return None if wanted_tpot is None else tpot / wanted_tpot
        miss = ttft / wanted_ttft
        return miss if wanted_tpot is None else max(miss, tpot / wanted_tpot)


def _lowest(values: Floats, rng: random.Random, count: int) -> list[int]:
    """Return where the lowest finite values stand, and overwrite them; of equal ones any may come first."""
    start = int(rng.random() * len(values))
    found: list[int] = []
    for _ in range(count):
        at = start + int(values[start:].argmin())
        if start:
            before = int(values[:start].argmin())
            if values[before] < values[at]:
                at = before
        if values[at] == np.inf:
            break
        found.append(at)
        values[at] = np.inf
    return found
