"""In-flight charges: what the router itself sent to a worker, reconciled with what the worker reports.

Reports are a heartbeat old, so a router that trusts them alone sends a whole burst to one worker that "has
load 0" (vllm-project/router#198). Adding charges to reports would count most requests twice. So an Account
splits a worker's load into three parts that don't overlap:

    foreign    reported, but not explained by any charge: requests placed by others, or before a restart
    absorbed   charges older than the last report; for prefill, scaled by the progress that it showed
    fresh      charges younger than the last report: they count in full

All sums are whole numbers, so that when the last charge ends its part is exactly 0. `_accounts.c` does the
same in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf

from disagg.routing.core import NUM_TURNS, AccountFields, Charge
from disagg.routing.costs import WorkerCosts, turn_of
from disagg.routing.types import PlacementRequest, Prediction
from disagg.types import WorkerLoad

__all__ = ["ASIDE_S", "NOWHERE", "Account", "Charge", "close_charge", "move_charge", "observe", "open_charge"]

NOWHERE = -1
# Over so many seconds, exponentially, a decode worker's streams are asked how much time prompts took of them.
ASIDE_S = 5.0


class Account(AccountFields):
    """Load of one worker: its last report and the charges on it."""

    __slots__ = ()
    costs: WorkerCosts

    def __init__(self) -> None:
        self.requests: set[str] = set()
        # Seconds that prompts lately took of who decodes here, as of then; and the TPOT objectives of these.
        self.aside_s = self.aside_at = 0.0
        self.objectives: dict[float, int] = {}
        self.max_seqs = self.block_size = self.kv_total = 1
        self.costs = WorkerCosts()
        # Tokens to prefill of charges whose turn is not later than each turn.
        self.shorter = [0] * NUM_TURNS
        # Tokens to prefill: of charges up to number `absorbed_upto`, and of younger ones. progress: share of
        # the absorbed tokens that was not yet computed at the last report.
        self.absorbed = self.fresh = self.foreign_tokens = 0
        self.absorbed_upto = -1
        self.progress = 1.0
        # Of these sequences: those that are prefilled elsewhere yet, and the sum of the seconds that takes.
        self.coming = 0
        self.coming_s = 0.0
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

    def batch_to_come(self, life_s: float) -> tuple[float, float]:
        """Return the sequences and blocks that somebody who comes to decode here will find.

        life_s: how long one decodes. Those that wait for prefill for longer than that find who runs now gone,
        and come no faster than they are prefilled: behind a long queue of prompts no large batch builds up.
        """
        coming = self.coming
        if not coming or life_s <= 0:
            return self.sequences, self.kv_blocks
        wait_s = max(1e-6, self.coming_s / coming)
        stay, come = max(0.0, 1 - wait_s / life_s), min(1.0, life_s / wait_s)
        blocks = self.blocks - self.blocks_here
        here, blocks_here = self.sequences - coming, self.kv_blocks - blocks
        return max(here, here * stay + coming * come), max(blocks_here, blocks_here * stay + blocks * come)

    @property
    def tightest_s(self) -> float:
        """The tightest TPOT objective of who decodes here; inf where nobody has one."""
        return min(self.objectives, default=inf)

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
        self.costs.links = load.num_held

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
        if charge.tpot_s is not None:
            self.objectives[charge.tpot_s] = self.objectives.get(charge.tpot_s, 0) + 1
        self._add_blocks(charge.decode_blocks, here=charge.local)
        if not charge.local:
            self.coming += 1
            self.coming_s += charge.prefill_s

    def arrive_decode(self, charge: Charge) -> None:
        """Prefill is done: the sequence is on its decode worker, or about to be."""
        self.present += 1
        if not charge.local:
            self.blocks_here += charge.decode_blocks
            self._came(charge)

    def _came(self, charge: Charge) -> None:
        self.coming -= 1
        # Exactly nothing when nobody is left, whatever the sum has lost in rounding.
        self.coming_s = self.coming_s - charge.prefill_s if self.coming else 0.0

    def end_decode(self, charge: Charge) -> None:
        self.requests.discard(charge.request_id)
        self.seqs -= 1
        if charge.tpot_s is not None:
            left = self.objectives[charge.tpot_s] - 1
            if left:
                self.objectives[charge.tpot_s] = left
            else:
                del self.objectives[charge.tpot_s]
        if charge.prefilled:
            self.present -= 1
        elif not charge.local:
            self._came(charge)
        self._add_blocks(-charge.decode_blocks, here=charge.prefilled or charge.local)

    def note_aside(self, seconds: float, now: float) -> None:
        """A prompt that takes so long was placed beside those that decode here."""
        self.aside_s = self.aside_s * exp(min(0.0, self.aside_at - now) / ASIDE_S) + seconds
        self.aside_at = now

    def aside_share(self, now: float) -> float:
        """Return the share of the time that prompts lately took of who decodes here."""
        return self.aside_s * exp(min(0.0, self.aside_at - now) / ASIDE_S) / ASIDE_S if self.aside_s else 0.0

    def _queue(self, turn: int, tokens: int) -> None:
        # The compiled core's fields give a list of their own each time.
        shorter = self.shorter
        for later in range(turn, NUM_TURNS):
            shorter[later] += tokens
        self.shorter = shorter

    def _add_blocks(self, count: int, *, here: bool) -> None:
        self.blocks += count
        if here:
            self.blocks_here += count

    def own(self) -> tuple[int, ...]:
        """Return every sum that charges make; all 0 when no charge is left, and none ever negative."""
        return (
            *(self.absorbed, self.fresh, self.seqs, self.present, self.blocks, self.blocks_here),
            *(self.coming, len(self.requests), len(self.objectives), *self.shorter),
        )


def open_charge(
    accounts: Sequence[Account],
    request: PlacementRequest,
    prefill: int,
    decode: int,
    prefill_depth: int,
    decode_depth: int,
    number: int,
    now: float,
    expected_tokens: float,
    prediction: Prediction | None,
    /,
) -> Charge:
    """Count a request on the workers in two slots, and return what is counted.

    prefill_depth, decode_depth: leading blocks that each has cached. number: of the placement.
    expected_tokens: of an answer.
    """
    on_prefill, on_decode = accounts[prefill], accounts[decode]
    num_tokens = request.num_tokens
    answer = int(min(request.max_new_tokens, expected_tokens))
    charge = Charge()
    charge.request_id, charge.frontend_id = request.request_id, request.frontend_id
    charge.hashes, charge.tpot_s = request.block_hashes, request.slo_tpot_s
    charge.number, charge.placed_at = number, now
    charge.prefill_slot, charge.decode_slot = prefill, decode
    charge.tokens = tokens = max(1, num_tokens - prefill_depth * on_prefill.block_size)
    charge.prefill_blocks = -(-num_tokens // on_prefill.block_size) - prefill_depth
    charge.decode_blocks = max(0, -(-(num_tokens + answer) // on_decode.block_size) - decode_depth)
    charge.turn = turn_of(tokens, request.priority)
    charge.prediction, charge.prefilled = prediction, False
    charge.prefill_s = 0.0 if prediction is None else prediction.ttft
    on_prefill.add_prefill(charge)
    on_decode.add_decode(charge)
    if prefill == decode:
        _, token_s, attended_s = on_prefill.costs.prefill
        attended = tokens * (num_tokens - tokens / 2)
        on_prefill.note_aside(tokens * token_s + attended * attended_s, now)
    return charge


def move_charge(accounts: Sequence[Account], charge: Charge, /) -> None:
    """Prefill is done: move a request's load from its prefill to its decode worker."""
    if charge.prefill_slot != NOWHERE:
        accounts[charge.prefill_slot].end_prefill(charge)
    charge.prefilled = True
    if charge.decode_slot != NOWHERE:
        accounts[charge.decode_slot].arrive_decode(charge)


def close_charge(accounts: Sequence[Account], charge: Charge, /) -> None:
    """Take back whatever is still counted of a request."""
    if charge.prefill_slot != NOWHERE and not charge.prefilled:
        accounts[charge.prefill_slot].end_prefill(charge)
    if charge.decode_slot != NOWHERE:
        accounts[charge.decode_slot].end_decode(charge)


def observe(account: Account, load: WorkerLoad, upto: int, /) -> None:
    """Take over a worker's report that came after placement number `upto`."""
    account.observe(load, upto)
