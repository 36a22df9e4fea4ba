"""What it takes to copy splitwise-sim's model: a cluster file, and its join-the-shortest-queue as a policy.

Everything else is live code. Its batching is configuration: the token budget is above the longest prompt
plus all decodes, so the live Scheduler never splits a prompt, and TableCost prices what does not fit 2,048
tokens as splitwise-sim's batches in turn. Its scheduler's book-keeping is the Router's own charges, for
which reports are switched off. Only its placement rule is not among the live policies yet, so it is written
here, under the live Policy protocol, and driven by the live Router.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from disagg.routing.policies import Choice, candidates
from disagg.routing.prefix_index import PrefixIndex
from disagg.routing.types import PlacementRequest
from disagg.routing.view import ClusterView
from disagg.sim.spec import SimSpec, parse_spec

GIB = 1024**3


class JoinShortestQueue:
    """Fewest pending tokens: those of prompts not yet done, and one for each request that decodes.

    Ties go to the first. Decode workers are chosen by the memory that requests have been promised there.
    """

    name = "join_shortest_queue"

    def choose(
        self, request: PlacementRequest, view: ClusterView, index: PrefixIndex, rng: random.Random
    ) -> Choice:
        pools = candidates(request, view)
        pending = view.queued_tokens + view.sequences
        if len(pools.local):
            alone = int(pools.local[pending[pools.local].argmin()])
            return Choice(alone, alone)
        prefill = int(pools.prefill[pending[pools.prefill].argmin()])
        decode = int(pools.decode[view.kv_blocks[pools.decode].argmin()])
        return Choice(prefill, decode)


def machines(role: str, count: int, hardware: str = "h100-80gb") -> dict[str, Any]:
    """A pool of whole machines: 8 GPUs each."""
    return {
        "role": role,
        "replicas": count,
        "hardware": hardware,
        "tensor_parallel_size": 8,
        "memory_share": 1.0,
    }


def splitwise_spec(table: Path, pools: dict[str, Any], *, batch_tokens: int = 2048) -> SimSpec:
    return parse_spec(
        {
            "model": "bloom-176b",
            "cost": {"kind": "table", "file": str(table), "batch_tokens": batch_tokens},
            "pools": pools,
            "links": {"bandwidth_gb_s": 200 * GIB / 1e9, "sharing": "private", "handoff": "push"},
            "engine": {"max_num_seqs": 512, "max_num_batched_tokens": 100_000, "block_size": 64},
            # A period that no run reaches.
            "router": {"heartbeat_s": 1e9},
        }
    )
