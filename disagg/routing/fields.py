"""The numbers of WorkerCosts, Account and Charge, as plain attributes.

Where the compiled core is there, disagg.routing.core has the same attributes in C structures, which it reads
without going through Python. What they mean is said where they are used: in costs.py and charges.py.
"""

from __future__ import annotations

from disagg.routing.fit import Coefficients
from disagg.routing.types import Prediction


class CostFields:
    """What disagg.routing.costs.WorkerCosts consists of."""

    __slots__ = (
        "aside",
        "attended_s",
        "bare_step_s",
        "begin_s",
        "beside_streams",
        "budget",
        "chunk",
        "chunk_s",
        "decode",
        "decode_fitted",
        "fitted",
        "idle_chunk_s",
        "idle_step_s",
        "joined_s",
        "links",
        "max_seqs",
        "place_s",
        "prefill",
        "prefill_fitted",
        "pull",
        "queued",
        "sequence_s",
        "sequences",
        "step_s",
        "token_s",
    )

    prefill: Coefficients
    decode: Coefficients
    pull: Coefficients
    fitted: bool
    prefill_fitted: bool
    decode_fitted: bool
    budget: int
    beside_streams: int
    max_seqs: int
    chunk: int
    links: int
    begin_s: float
    chunk_s: float
    token_s: float
    attended_s: float
    idle_chunk_s: float
    step_s: float
    bare_step_s: float
    aside: float
    idle_step_s: float
    joined_s: float
    sequence_s: float
    place_s: float
    queued: float
    sequences: float


class AccountFields:
    """What disagg.routing.charges.Account consists of."""

    __slots__ = (
        "absorbed",
        "absorbed_upto",
        "aside_at",
        "aside_s",
        "block_size",
        "blocks",
        "blocks_here",
        "coming",
        "coming_s",
        "costs",
        "foreign_blocks",
        "foreign_seqs",
        "foreign_tokens",
        "fresh",
        "kv_total",
        "max_seqs",
        "objectives",
        "present",
        "progress",
        "requests",
        "seqs",
        "shorter",
    )

    costs: CostFields
    requests: set[str]
    objectives: dict[float, int]
    shorter: list[int]
    absorbed: int
    fresh: int
    foreign_tokens: int
    absorbed_upto: int
    coming: int
    seqs: int
    present: int
    foreign_seqs: int
    blocks: int
    blocks_here: int
    foreign_blocks: int
    max_seqs: int
    block_size: int
    kv_total: int
    progress: float
    coming_s: float
    aside_s: float
    aside_at: float


class Charge:
    """One placed request. A slot is -1 once its worker is gone (or prefill is done).

    number: counts placements up. tokens: to prefill net of cached ones. prefill_blocks, decode_blocks: KV
    blocks that it is expected to take on either side. hashes: its short block hashes. turn: its class in the
    order in which a worker takes prompts, see disagg.routing.costs. prediction: made when it was placed.
    tpot_s: its objective, None for none. prefill_s: predicted until its first token.
    """

    __slots__ = (
        "decode_blocks",
        "decode_slot",
        "frontend_id",
        "hashes",
        "number",
        "placed_at",
        "prediction",
        "prefill_blocks",
        "prefill_s",
        "prefill_slot",
        "prefilled",
        "request_id",
        "tokens",
        "tpot_s",
        "turn",
    )

    request_id: str
    frontend_id: str
    hashes: tuple[int, ...]
    prediction: Prediction | None
    tpot_s: float | None
    number: int
    prefill_slot: int
    decode_slot: int
    tokens: int
    prefill_blocks: int
    decode_blocks: int
    turn: int
    placed_at: float
    prefill_s: float
    prefilled: bool

    @property
    def local(self) -> bool:
        """Whether one worker does both."""
        return self.prefill_slot == self.decode_slot
