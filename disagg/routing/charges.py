"""In-flight charges: what the router itself sent to a worker, reconciled with what the worker reports.

Reports are a heartbeat old, so a router that trusts them alone sends a whole burst to one worker that "has
load 0" (vllm-project/router#198). Adding charges to reports would count most requests twice. So an Account
splits a worker's load into three parts that don't overlap:

    foreign    reported, but not explained by any charge: requests placed by others, or before a restart
    absorbed   charges older than the last report; for prefill, scaled by the progress that it showed
    fresh      charges younger than the last report: they count in full

All sums are whole numbers, so that when the last charge ends its part is exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg.routing.costs import NUM_TURNS, WorkerCosts
from disagg.routing.types import Prediction
from disagg.types import WorkerLoad

NOWHERE = -1


@dataclass(slots=True)
class Charge:
    """One placed request. A slot is NOWHERE once its worker is gone (or prefill is done).

    number: counts placements up. tokens: to prefill net of cached ones. prefill_blocks, decode_blocks: KV
    blocks that it is expected to take on either side. hashes: its short block hashes. turn: its class in the
    order in which a worker takes prompts, see disagg.routing.costs. prediction: made when it was placed.
    tenant, work_s: whose share it counts against, and by how much.
    """

    request_id: str
    frontend_id: str
    number: int
    placed_at: float
    prefill_slot: int
    decode_slot: int
    tokens: int
    prefill_blocks: int
    decode_blocks: int
    hashes: tuple[int, ...] = ()
    turn: int = 0
    prefilled: bool = False
    prefilled_at: float | None = None
    prediction: Prediction | None = None
    tenant: str = ""
    work_s: float = 0.0

    @property
    def local(self) -> bool:
        return self.prefill_slot == self.decode_slot


class Account:
    """Load of one worker: its last report and the charges on it."""

    __slots__ = (
        "absorbed",
        "absorbed_upto",
        "block_size",
        "blocks",
        "blocks_here",
        "costs",
        "foreign_blocks",
        "foreign_seqs",
        "foreign_tokens",
        "fresh",
        "kv_total",
        "max_seqs",
        "present",
        "progress",
        "requests",
        "seqs",
        "shorter",
    )

    def __init__(self) -> None:
        self.requests: set[str] = set()
        self.max_seqs = self.block_size = self.kv_total = 1
        self.costs = WorkerCosts()
        # Tokens to prefill of charges whose turn is not later than each turn.
        self.shorter = [0] * NUM_TURNS
        # Tokens to prefill: of charges up to number `absorbed_upto`, and of younger ones. progress: share of
        # the absorbed tokens that was not yet computed at the last report.
        self.absorbed = self.fresh = self.foreign_tokens = 0
        self.absorbed_upto = -1
        self.progress = 1.0
        # Sequences that decode here, or will. present: charges whose request should be on the worker by now.
        self.seqs = self.present = self.foreign_seqs = 0
        # blocks_here: the part of `blocks` that the worker's own count may contain already.
        self.blocks = self.blocks_here = self.foreign_blocks = 0

    # -- estimates -----------------------------------------------------------------------------------

    @property
    def queued_tokens(self) -> float:
        return self.foreign_tokens + self.absorbed * self.progress + self.fresh

    @property
    def sequences(self) -> int:
        return self.foreign_seqs + self.seqs

    @property
    def kv_blocks(self) -> int:
        return self.foreign_blocks + self.blocks

    # -- reports -------------------------------------------------------------------------------------

    def observe(self, load: WorkerLoad, upto: int) -> None:
        """Take over a report that came after placement number `upto`."""
        requests = load.num_running + load.num_waiting
        owed = self.absorbed + self.fresh
        self.foreign_tokens = max(0, load.waiting_tokens - owed)
        self.foreign_seqs = max(0, requests - self.present)
        self.foreign_blocks = max(0, load.kv_blocks_used - self.blocks_here)
        # While a placed request may still be on its way, few waiting tokens don't mean much progress.
        arrived = requests >= self.present
        self.progress = min(1.0, load.waiting_tokens / owed) if owed and arrived else 1.0
        self.absorbed, self.fresh, self.absorbed_upto = owed, 0, upto

    # -- charges -------------------------------------------------------------------------------------

    def add_prefill(self, charge: Charge) -> None:
        self.requests.add(charge.request_id)
        self.fresh += charge.tokens
        self._queue(charge.turn, charge.tokens)
        self.present += 1
        if not charge.local:
            self._add_blocks(charge.prefill_blocks, here=True)

    def end_prefill(self, charge: Charge) -> None:
        if charge.number <= self.absorbed_upto:
            self.absorbed -= charge.tokens
        else:
            self.fresh -= charge.tokens
        self._queue(charge.turn, -charge.tokens)
        self.present -= 1
        if not charge.local:
            self._add_blocks(-charge.prefill_blocks, here=True)
            self.requests.discard(charge.request_id)

    def add_decode(self, charge: Charge) -> None:
        self.requests.add(charge.request_id)
        self.seqs += 1
        self._add_blocks(charge.decode_blocks, here=charge.local)

    def arrive_decode(self, charge: Charge) -> None:
        """Prefill is done: the sequence is on its decode worker, or about to be."""
        self.present += 1
        if not charge.local:
            self.blocks_here += charge.decode_blocks

    def end_decode(self, charge: Charge) -> None:
        self.requests.discard(charge.request_id)
        self.seqs -= 1
        if charge.prefilled:
            self.present -= 1
        self._add_blocks(-charge.decode_blocks, here=charge.prefilled or charge.local)

    def _queue(self, turn: int, tokens: int) -> None:
        shorter = self.shorter
        for later in range(turn, NUM_TURNS):
            shorter[later] += tokens

    def _add_blocks(self, count: int, *, here: bool) -> None:
        self.blocks += count
        if here:
            self.blocks_here += count

    def own(self) -> tuple[int, ...]:
        """Return every sum that charges make; all 0 when no charge is left, and none ever negative."""
        return (
            *(self.absorbed, self.fresh, self.seqs, self.present, self.blocks, self.blocks_here),
            *(len(self.requests), *self.shorter),
        )
