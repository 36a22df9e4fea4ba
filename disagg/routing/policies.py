"""Policies: which prefill and which decode worker, as pure functions of view, index and random generator.

All share the choice of candidates: READY workers that are long and large enough, without those that the
request just lost unless nobody else is left. Each policy then only says what a worker costs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from disagg.errors import InvalidRequestError, NoCapacityError
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import Placement, PlacementKind, PlacementRequest
from disagg.routing.view import ClusterView, Floats, Pools, Slots, max_tokens

# Costs are in tokens of prefill, the unit in which queues are reported. Until latency is predicted:
# computing a token takes this request's time, and as much again from whoever comes next,
COMPUTE_COST = 2.0
# moving a token's KV costs about a tenth of computing it,
TRANSFER_COST = 0.2
# a further sequence in a decode batch lengthens everybody's steps by about this much work,
SEQUENCE_COST = 16.0
# an almost full KV cache costs like this many tokens,
KV_COST = 256.0
# what does not fit into it preempts others, which costs whole prefills,
OVERFLOW_COST = 8192.0
# and a sequence over max_num_seqs waits until another one ends.
EXCESS_COST = 512.0
_FULL = 0.95
_TIE = 1e-9


class Policy(Protocol):
    """Chooses where a request runs.

    choose raises NoCapacityError where no worker takes requests, and InvalidRequestError (param "prompt")
    where the request fits on none that lives. The same arguments and generator state give the same answer.
    """

    name: str

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A placement in slots. depths: leading blocks that the prefill and the decode worker have cached."""

    prefill: int
    decode: int
    degraded: bool = False
    depths: tuple[int, int] = (0, 0)

    def placement(self, request: PlacementRequest, view: ClusterView, policy: str) -> Placement:
        """Return the choice by names."""
        kind = PlacementKind.LOCAL if self.prefill == self.decode else PlacementKind.DISAGGREGATED
        cached = self.depths[0] * int(view.block_size[self.prefill])
        return Placement(
            prefill_worker=view.worker_id(self.prefill),
            decode_worker=view.worker_id(self.decode),
            # The last token is always computed, since its logits are what is wanted.
            cached_tokens=min(cached, request.num_tokens - 1),
            policy=policy,
            kind=PlacementKind.DEGRADED if self.degraded else kind,
        )


def candidates(request: PlacementRequest, view: ClusterView) -> Pools:
    """Return who could take the request. Raises as Policy.choose does."""
    pools = view.pools()
    if request.num_tokens <= pools.max_tokens and not request.excluded:
        return pools
    ready = pools.ready[view.max_tokens[pools.ready] >= request.num_tokens]
    if not len(ready):
        raise _nobody(request, view)
    lost = [slot for slot in map(view.slot, request.excluded) if slot is not None]
    others = ready[~np.isin(ready, lost)] if lost else ready
    return view.pools_of(others if len(others) else ready)


def _nobody(request: PlacementRequest, view: ClusterView) -> InvalidRequestError | NoCapacityError:
    longest = max((max_tokens(state.info) for state in view.workers.values()), default=None)
    if longest is not None and longest < request.num_tokens:
        return InvalidRequestError(
            f"the prompt has {request.num_tokens} tokens; the longest that fits on a worker has {longest}",
            param="prompt",
            code="context_length_exceeded",
        )
    return NoCapacityError("no worker that could serve the request is ready")


def pick(costs: Floats, slots: Slots, rng: random.Random) -> int:
    """Return the cheapest of `slots` (costs: over all slots); equal ones have equal chances."""
    if len(slots) == 1:
        return int(slots[0])
    # Methods that stay in C: with few workers, calling numpy costs more than what it computes.
    own = costs.take(slots)
    cheapest = (own <= own[own.argmin()] + _TIE).nonzero()[0]
    return int(slots[cheapest[rng.randrange(len(cheapest))] if len(cheapest) > 1 else cheapest[0]])


def choose_pair(
    prefill_costs: Floats,
    decode_costs: Floats,
    transfer_costs: Floats | float,
    pools: Pools,
    rng: random.Random,
) -> tuple[int, int]:
    """Return the (prefill, decode) slots with the least prefill + decode + transfer cost; all over slots.

    Transfer depends on the decode worker alone and is nothing within one worker. So the best pair is the
    best of each side, or the best single worker: linear in the number of workers, not in that of pairs.
    """
    receiving = decode_costs + transfer_costs
    if pools.degraded:
        alone = pick(prefill_costs + decode_costs, pools.local, rng)
        return alone, alone
    prefill, decode = pick(prefill_costs, pools.prefill, rng), pick(receiving, pools.decode, rng)
    if not len(pools.local):
        return prefill, decode
    together = prefill_costs + decode_costs
    alone = pick(together, pools.local, rng)
    apart = prefill_costs[prefill] + receiving[decode]
    return (alone, alone) if together[alone] <= apart else (prefill, decode)


def prefill_costs(view: ClusterView, uncached: Floats | float) -> Floats:
    """The wait for what is queued, and the computing of what is not cached.

    With the latter counted once, a burst with one prefix would be prefilled everywhere: waiting for the
    first of them takes as long as computing the prefix again.
    """
    return view.queued_tokens + COMPUTE_COST * uncached


def decode_costs(view: ClusterView, new_blocks: Floats | float) -> Floats:
    """Work that a worker's running sequences and full cache amount to, with this request among them."""
    fill = (view.kv_blocks + new_blocks) / view.kv_total
    costs = SEQUENCE_COST * view.sequences + EXCESS_COST * view.excess + KV_COST * fill
    if fill[fill.argmax()] > _FULL:
        costs += OVERFLOW_COST * np.maximum(fill - _FULL, 0.0)
    return costs


class RoundRobin:
    """Each pool in turn, blind to load. A mixed worker whose turn it is to decode prefills as well."""

    name = "round_robin"

    def __init__(self) -> None:
        self._turn = 0

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        turn, self._turn = self._turn, self._turn + 1
        decode = int(pools.decode[turn % len(pools.decode)])
        if pools.degraded or decode in pools.local:
            return Choice(decode, decode, pools.degraded)
        return Choice(int(pools.prefill[turn % len(pools.prefill)]), decode, pools.degraded)


class LeastLoaded:
    """Fewest queued tokens to prefill; fewest sequences and emptiest cache to decode. Blind to prefixes."""

    name = "least_loaded"

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        prefill, decode = choose_pair(
            prefill_costs(view, request.num_tokens),
            decode_costs(view, request.num_tokens / view.block_size),
            TRANSFER_COST * request.num_tokens,
            pools,
            rng,
        )
        return Choice(prefill, decode, pools.degraded)


class PrefixAware:
    """Least work, where cached tokens need none: neither prefill on P nor transfer to D.

    A shared prefix draws a request to where it is cached until the queue there is longer than elsewhere by
    more than COMPUTE_COST times the prefix, so a popular one spreads over as many workers as it needs.
    """

    name = "prefix_aware"

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        num_tokens, size = request.num_tokens, view.block_size
        depths = index.depths(request.block_hashes, view.num_slots)
        if depths is None:
            blocks = num_tokens / size
            prefill, decode = choose_pair(
                prefill_costs(view, num_tokens),
                decode_costs(view, blocks),
                TRANSFER_COST * num_tokens,
                pools,
                rng,
            )
            return Choice(prefill, decode, pools.degraded)
        uncached = np.maximum(1.0, num_tokens - depths * size)
        prefill, decode = choose_pair(
            prefill_costs(view, uncached),
            decode_costs(view, uncached / size),
            TRANSFER_COST * uncached,
            pools,
            rng,
        )
        return Choice(prefill, decode, pools.degraded, (int(depths[prefill]), int(depths[decode])))


POLICIES: dict[str, type[RoundRobin] | type[LeastLoaded] | type[PrefixAware]] = {
    policy.name: policy for policy in (RoundRobin, LeastLoaded, PrefixAware)
}


def make_policy(name: str) -> Policy:
    """Return a new policy. Raises KeyError for a name that RouterConfig does not know."""
    return POLICIES[name]()
