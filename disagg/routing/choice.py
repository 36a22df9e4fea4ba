"""What every policy shares: the interface, the candidates, and how ties are broken."""

from __future__ import annotations

import random
from typing import NamedTuple, Protocol

import numpy as np

from disagg.errors import InvalidRequestError, NoCapacityError
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import Placement, PlacementKind, PlacementRequest, Prediction
from disagg.routing.view import ClusterView, Floats, Pools, Slots, max_tokens

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


class Choice(NamedTuple):
    """A placement in slots. depths: leading blocks that the prefill and the decode worker have cached."""

    prefill: int
    decode: int
    degraded: bool = False
    depths: tuple[int, int] = (0, 0)

    def placement(
        self, request: PlacementRequest, view: ClusterView, policy: str, prediction: Prediction | None = None
    ) -> Placement:
        """Return the choice by names."""
        kind = PlacementKind.LOCAL if self.prefill == self.decode else PlacementKind.DISAGGREGATED
        cached = self.depths[0] * view.size_of_block(self.prefill)
        return Placement(
            prefill_worker=view.worker_id(self.prefill),
            decode_worker=view.worker_id(self.decode),
            # The last token is always computed, since its logits are what is wanted.
            cached_tokens=min(cached, request.num_tokens - 1),
            policy=policy,
            kind=PlacementKind.DEGRADED if self.degraded else kind,
            prediction=prediction,
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
