"""What goes into a placement and what comes out, as plain objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

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
    be produced. block_hashes: short (64-bit) hashes of the full blocks of those tokens. priority: lower is
    served first. slo_ttft_s, slo_tpot_s: objectives in seconds, or None. excluded: workers that this request
    just lost. tenant: among whom capacity is shared fairly. service_tier: whose bounds hold for admission.
    timeout_s: seconds until the request's deadline, None for none. resumed: it was admitted before.
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
    tenant: str = ""
    service_tier: str = "default"
    timeout_s: float | None = None
    resumed: bool = False


class Prediction(NamedTuple):
    """What is expected of a placement, in seconds.

    ttft: until the first token; of it wait_s is spent behind others' work, and service_s would be left on an
    idle worker. stall: from the first token to decode's first step (transfer, and the wait for a place).
    tpot: between tokens, the stall spread over them, if nobody else comes; later_tpot: with the share of the
    time that prompts lately took there, and without the streams that will have ended when prefill is done;
    idle_tpot: were the decode worker idle.
    fitted: whether it rests on measured steps of both workers, each of its phase, or on defaults. raw: the
    same before it was corrected by how earlier ones turned out, None where nothing is known of that.
    """

    ttft: float
    wait_s: float
    stall: float
    tpot: float
    later_tpot: float
    idle_tpot: float
    fitted: bool
    raw: Prediction | None = None

    @property
    def service_s(self) -> float:
        return self.ttft - self.wait_s

    @property
    def least_ttft(self) -> float:
        """What an idle worker's own steps take, and nothing else: no objective below can ever be met.

        Not corrected: what came late under a heavy load would make every objective look out of reach.
        """
        return (self.raw or self).service_s

    @property
    def least_tpot(self) -> float:
        """The same between tokens."""
        return (self.raw or self).idle_tpot


class Placement(NamedTuple):
    """Where a request runs. prefill_worker == decode_worker means that there is no hand-off.

    cached_tokens: tokens that the prefill worker is expected to have in its prefix cache. lag_s: how much
    later than its objective the first token is due, since its tenant has had more than its share.
    """

    prefill_worker: str
    decode_worker: str
    cached_tokens: int = 0
    policy: str = ""
    kind: PlacementKind = PlacementKind.DISAGGREGATED
    lag_s: float = 0.0
    prediction: Prediction | None = None


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
class StepSample:
    """How long one step took, and what it computed.

    num_tokens: of prompts. attended: sum over those tokens of the tokens that each attends to.
    num_decodes: sequences that got their next token; context: the tokens that these attend to, summed.
    """

    seconds: float
    num_tokens: int = 0
    attended: int = 0
    num_decodes: int = 0
    context: int = 0


@dataclass(frozen=True, slots=True)
class TransferSample:
    """How long one pull took, from the reservation of its blocks to their being filled.

    num_others: pulls that this worker had under way when it began.
    """

    seconds: float
    num_tokens: int
    num_others: int = 0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker says of itself; blocks is None where its prefix cache has not changed.

    steps, transfers: a few of those since the last report, for the predictors.
    """

    info: WorkerInfo
    status: WorkerStatus
    load: WorkerLoad = field(default_factory=WorkerLoad)
    blocks: BlockEvents | None = None
    steps: Sequence[StepSample] = ()
    transfers: Sequence[TransferSample] = ()
