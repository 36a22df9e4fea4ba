"""Policies: which prefill and which decode worker, as pure functions of view, index and random generator.

Here are the simple ones; `slo` has a module of its own. All share the choice of candidates: READY workers
that are long and large enough, without those that the request just lost unless nobody else is left.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from disagg.config import RouterConfig
from disagg.routing.choice import Choice, Policy, candidates, pick
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.slo import Slo
from disagg.routing.types import PlacementRequest
from disagg.routing.view import ClusterView, Floats, Pools, Slots

__all__ = ["POLICIES", "Choice", "Policy", "make_policy"]

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
        held = index.held(request.block_hashes) if request.block_hashes else None
        uncached: Floats | float = float(num_tokens)
        if held is not None:
            uncached = np.full(view.num_slots, float(num_tokens))
            uncached[held.slots] = np.maximum(1.0, num_tokens - held.blocks * size[held.slots])
        prefill, decode = choose_pair(
            prefill_costs(view, uncached),
            decode_costs(view, uncached / size),
            TRANSFER_COST * uncached,
            pools,
            rng,
        )
        depths = (0, 0) if held is None else (held.depth(prefill), held.depth(decode))
        return Choice(prefill, decode, pools.degraded, depths)


class PowerOfTwo:
    """Two workers of each pool at random, and of these the less loaded (Mitzenmacher 2001)."""

    name = "power_of_two"

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        decode = _less_loaded(view.sequences + view.queued_tokens / SEQUENCE_COST, pools.decode, rng)
        if pools.degraded or decode in pools.local:
            return Choice(decode, decode, pools.degraded)
        return Choice(_less_loaded(view.queued_tokens, pools.prefill, rng), decode)


def _less_loaded(load: Floats, slots: Slots, rng: random.Random) -> int:
    first, second = (int(slots[rng.randrange(len(slots))]) for _ in range(2))
    return first if load[first] <= load[second] else second


class SplitwiseJSQ:
    """Splitwise (ISCA '24, section 4.3): join the shortest queue, with a mixed pool for bursts.

    A prompt goes to the prefill worker with the fewest queued tokens, an answer to the decode worker with the
    fewest KV blocks. Where that one has more than LONG tokens queued, or no room for the answer, the best of
    the mixed pool is taken; where that won't do either, a worker of the other role joins it. It is among its
    own again when it has no more work of the other kind. Workers whose role is mixed are always in that pool.
    """

    name = "splitwise_jsq"
    # As splitwise-sim has it (prompt_max_pending_batch_tokens).
    LONG = 8192

    def __init__(self) -> None:
        # Slots of decode workers that have prompts, and of prefill workers that have answers.
        self._with_prompts: set[int] = set()
        self._with_answers: set[int] = set()

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        if pools.degraded or len(pools.local) == len(pools.ready):
            alone = pick(view.queued_tokens + SEQUENCE_COST * view.sequences, pools.ready, rng)
            return Choice(alone, alone, pools.degraded)
        self._release(view)
        lent = [*self._with_prompts, *self._with_answers]
        guests = pools.ready[np.isin(pools.ready, lent)] if lent else pools.ready[:0]
        mixed = np.union1d(pools.local, guests)
        prompts, answers = (np.setdiff1d(own, mixed) for own in (pools.prefill, pools.decode))
        prefill = self._for_prompt(request, view, (prompts, mixed), rng)
        decode = self._for_answer(request, view, (answers, mixed), rng)
        if prefill is None and len(answers):
            prefill = pick(view.queued_tokens, answers, rng)
            self._with_prompts.add(prefill)
        if decode is None and len(prompts):
            decode = pick(view.kv_blocks, prompts, rng)
            self._with_answers.add(decode)
        if prefill is None or decode is None:
            prefill = decode = pick(view.queued_tokens, pools.ready, rng)
        return Choice(prefill, decode)

    def _release(self, view: ClusterView) -> None:
        queued, sequences = view.queued_tokens, view.sequences
        self._with_prompts = {slot for slot in self._with_prompts if queued[slot] > 0}
        self._with_answers = {slot for slot in self._with_answers if sequences[slot] > 0}

    def _for_prompt(
        self, request: PlacementRequest, view: ClusterView, pools: tuple[Slots, ...], rng: random.Random
    ) -> int | None:
        for slots in pools:
            if len(slots):
                queued = view.queued_tokens[slot := pick(view.queued_tokens, slots, rng)]
                if not queued or queued + request.num_tokens <= self.LONG:
                    return slot
        return None

    def _for_answer(
        self, request: PlacementRequest, view: ClusterView, pools: tuple[Slots, ...], rng: random.Random
    ) -> int | None:
        num_tokens = request.num_tokens + min(request.max_new_tokens, view.expected_tokens)
        for slots in pools:
            if len(slots):
                slot = pick(view.kv_blocks, slots, rng)
                if view.kv_blocks[slot] + num_tokens / view.block_size[slot] <= view.kv_total[slot]:
                    return slot
        return None


class DistServeFCFS:
    """DistServe (OSDI '24, section 4.3): the shortest prefill queue, and the least loaded decode worker.

    Never both on one worker while there are two pools; within a worker requests are served as they come.
    """

    name = "distserve_fcfs"

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        if pools.degraded or len(pools.local) == len(pools.ready):
            alone = pick(view.queued_tokens + SEQUENCE_COST * view.sequences, pools.ready, rng)
            return Choice(alone, alone, pools.degraded)
        return Choice(pick(view.queued_tokens, pools.prefill, rng), pick(view.kv_blocks, pools.decode, rng))


POLICIES: dict[str, type[Any]] = {
    policy.name: policy
    for policy in (Slo, RoundRobin, LeastLoaded, PowerOfTwo, PrefixAware, SplitwiseJSQ, DistServeFCFS)
}


def make_policy(config: RouterConfig) -> Policy:
    """Return a new policy as configured."""
    if config.policy == Slo.name:
        return Slo(local_prefill=config.local_prefill)
    policy: Policy = POLICIES[config.policy]()
    return policy
