"""What goes into a placement and what comes out, as plain objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from disagg.types import WorkerInfo, WorkerLoad, WorkerStatus


class PlacementKind(StrEnum):
    """DEGRADED: one worker does all because the other side's pool has nobody left. STALE_VIEW: decided by a
    front end on its last view, while the router was away."""

    DISAGGREGATED = "disaggregated"
    LOCAL = "local"
    DEGRADED = "degraded"
    STALE_VIEW = "stale_view"


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What the router must know of one request.

    num_tokens: tokens to prefill, prompt and earlier output. max_new_tokens: upper bound of tokens still to
    be produced. block_hashes: short (64-bit) hashes of the full blocks of those tokens. slo_ttft_s,
    slo_tpot_s: objectives in seconds, or None. excluded: workers that this request just lost.
    """

    request_id: str
    frontend_id: str
    num_tokens: int
    max_new_tokens: int
    block_hashes: tuple[int, ...] = ()
    priority: int = 0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs. prefill_worker == decode_worker means that there is no hand-off.

    cached_tokens: tokens that the prefill worker is expected to have in its prefix cache.
    """

    prefill_worker: str
    decode_worker: str
    cached_tokens: int = 0
    policy: str = ""
    kind: PlacementKind = PlacementKind.DISAGGREGATED


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Changes of one worker's prefix cache, as short hashes; `removed` is applied before `stored`.

    sequence: number of these events, counted up by one. snapshot: `stored` is all that the worker has.
    """

    sequence: int
    stored: Sequence[int] = ()
    removed: Sequence[int] = ()
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself; blocks is None where its prefix cache has not changed."""

    info: WorkerInfo
    status: WorkerStatus
    load: WorkerLoad = field(default_factory=WorkerLoad)
    blocks: BlockEvents | None = None
