"""ClusterView: the last state of every worker, and the load that the router itself put on them since.

Every worker has a *slot*, a small number that indexes arrays over all workers, so that a policy costs a few
array operations whether there are 4 workers or 10,000. A slot is used again after its worker left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from disagg.routing import charges
from disagg.routing.calibration import Calibration
from disagg.routing.charges import NOWHERE, Account, Charge
from disagg.routing.core import CORE, NUM_COLUMNS, NUM_TURNS, Core
from disagg.routing.costs import WorkerCosts
from disagg.routing.predictors import Predictor, Predictors
from disagg.routing.types import PlacementRequest, Prediction, WorkerReport
from disagg.types import Role, WorkerInfo, WorkerState, WorkerStatus

if TYPE_CHECKING:
    from disagg.routing._prices import Board

Slots = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROLE_CODE = {Role.PREFILL: 0, Role.DECODE: 1, Role.MIXED: 2}
_INITIAL_SLOTS = 8


class _Column:
    """An array over slots that is brought up to date when somebody reads it."""

    def __init__(self, row: int) -> None:
        self._row = row

    def __get__(self, view: ClusterView, owner: type[ClusterView]) -> Floats:
        return (view.columns() if view._stale else view._rows)[self._row]


# Most requests end long before max_new_tokens; charging all of it would make every worker look full. So long
# is an answer taken to be until some have ended,
EXPECTED_NEW_TOKENS = 256
EXPECTED_PROMPT_TOKENS = 256
# and this is the weight of each that does.
_ANSWER_WEIGHT = 0.02


@dataclass(frozen=True, slots=True)
class Pools:
    """Slots that take new requests. `local` may do both phases without a hand-off.

    ready: all of them. max_tokens: length of a request that surely fits on each of them.
    not_prefill, not_decode: arrays over all slots, 0 for who belongs to the pool and inf for others, so that
    a policy need not gather its members. masks: the same as buffers.
    """

    ready: Slots
    prefill: Slots
    decode: Slots
    local: Slots
    degraded: bool
    max_tokens: float
    not_prefill: Floats
    not_decode: Floats
    masks: tuple[memoryview, memoryview]


def set_prices(costs: WorkerCosts, predictor: Predictor, /) -> None:
    """Take over what a worker's predictor has learned."""
    prefill, decode = predictor.prefill, predictor.decode
    costs.prefill, costs.decode = prefill.coefficients, decode.coefficients
    costs.pull = predictor.pull.coefficients
    costs.prefill_fitted, costs.decode_fitted = in_prefill, in_decode = prefill.fitted, decode.fitted
    costs.fitted = in_prefill and in_decode


def max_tokens(info: WorkerInfo) -> int:
    """Return the longest request that a worker takes: one more token must fit, and its KV in the cache."""
    return min(info.max_model_len - 1, info.kv_blocks_total * info.block_size)


class ClusterView:
    """What placement decisions are made on. Not for threads: one owner changes it.

    workers: {worker_id: WorkerState} of all workers that live; read only. version: changes with every
    worker that comes, goes, restarts, or changes its status or role.
    Arrays over slots: queued_tokens (to prefill), sequences (decoding, or placed to), excess (sequences over
    what a worker runs at once, were there one more), kv_blocks (in use or expected to be), and limits:
    max_tokens (longest request that fits), kv_total (blocks), block_size.
    Prices in seconds, arrays over slots: those of disagg.routing.costs.WorkerCosts, begin_s and token_s with
    a worker's chunks in them. aside: share of the time that prompts take of who decodes; tightest_s: the
    tightest TPOT objective of these. now: of what came last. expected_tokens: of an answer; expected_prompt:
    to compute of a prompt. What changed is worked out when somebody asks, however often it changed.
    """

    def __init__(self, *, max_charges: int = 100_000, core: Core = CORE) -> None:
        self.core = core
        self._open_charge = core.open_charge or charges.open_charge
        self._move_charge = core.move_charge or charges.move_charge
        self._close_charge = core.close_charge or charges.close_charge
        self._observe = core.observe or charges.observe
        self._set_prices = core.set_prices or set_prices
        self._board: Board | None = None
        self.version = 0
        self.now = 0.0
        # Slots whose prices are out of date.
        self._stale: set[int] = set()
        self.workers: dict[str, WorkerState] = {}
        self._slots: dict[str, int] = {}
        self._ids: list[str | None] = []
        self._free: list[int] = []
        self._last_seen: dict[str, float] = {}
        self._accounts: list[Account] = []
        self._charges: OrderedDict[str, Charge] = OrderedDict()
        self._by_frontend: dict[str, set[str]] = {}
        self._max_charges = max_charges
        self._num_placed = 0
        self.expected_tokens = float(EXPECTED_NEW_TOKENS)
        self.expected_prompt = float(EXPECTED_PROMPT_TOKENS)
        self.predictors = Predictors(core)
        self.calibration = Calibration(core)
        self._pools: Pools | None = None
        self._allocate(_INITIAL_SLOTS)
        self._share()

    queued_tokens, sequences, excess, kv_blocks = (_Column(row) for row in range(4))
    begin_s, token_s, attended_s, step_s, place_s = (_Column(row) for row in range(4, 9))
    token_pull_s, bare_step_s, aside, tightest_s = (_Column(row) for row in range(9, 13))

    @property
    def table(self) -> Floats:
        """All columns, shape [NUM_COLUMNS + NUM_TURNS, num_slots]."""
        self.columns()
        return self._table

    @property
    def scratch(self) -> Floats:
        """Room for a policy's own prices, shape [3, num_slots]; valid until the next placement."""
        return self._scratch

    @property
    def scratch_rows(self) -> list[Floats]:
        """The same by rows."""
        return self._scratch_rows

    def shorter(self, turn: int) -> Floats:
        """Return over slots the queued tokens of prompts whose turn is not later."""
        return self.columns()[NUM_COLUMNS + turn]

    def _allocate(self, size: int) -> None:
        self.kv_total: Floats = np.ones(size)
        self.block_size: Floats = np.ones(size)
        self.max_tokens: Floats = np.zeros(size)
        # One row each, then those of `shorter`.
        self._table: Floats = np.zeros((NUM_COLUMNS + NUM_TURNS, size))
        self._scratch: Floats = np.zeros((3, size))
        self._role: npt.NDArray[np.int8] = np.zeros(size, dtype=np.int8)
        self._ready: npt.NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)

    def _grow(self) -> None:
        old = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        # Large ones by a quarter, never to a multiple of a page: rows so far apart share a cache's set.
        size = len(self._ready)
        self._allocate(2 * size if size < 256 else (size * 5 // 32 + 1 | 1) * 8)
        for name, values in old.items():
            getattr(self, name)[..., : values.shape[-1]] = values
        self._share()

    def _share(self) -> None:
        """Let others know where the arrays are now."""
        self._rows, self._scratch_rows = list(self._table), list(self._scratch)
        if self.core.make_board is not None:
            self._board = self.core.make_board(
                self._accounts, self.num_slots, self._table, self.block_size, self._scratch
            )

    # -- workers -------------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        return len(self._ready)

    def slot(self, worker_id: str) -> int | None:
        return self._slots.get(worker_id)

    def worker_id(self, slot: int) -> str:
        """Raises KeyError where the slot is free."""
        worker_id = self._ids[slot]
        if worker_id is None:
            raise KeyError(slot)
        return worker_id

    def update(self, report: WorkerReport, now: float) -> None:
        """Take over a report. The caller has removed an earlier incarnation of the worker."""
        info = report.info
        previous = self.workers.get(info.worker_id)
        if previous is None:
            self._slots[info.worker_id] = self._new_slot(info.worker_id)
        slot = self._slots[info.worker_id]
        self.now = now
        self._last_seen[info.worker_id] = now
        self.workers[info.worker_id] = WorkerState(info, report.status, report.load)
        account = self._accounts[slot]
        self._observe(account, report.load, self._num_placed)
        # The simulator's reports carry the same info each time, so ask for identity before field by field.
        same = previous is not None and (previous.info is info or previous.info == info)
        if previous is None or previous.status is not report.status or not same:
            self._set_limits(slot, report)
            self._changed()
        if report.steps or report.transfers:
            predictor = self.predictors.learn(slot, info, report.steps, report.transfers)
            self._set_prices(account.costs, predictor)
        self._stale.add(slot)

    def _new_slot(self, worker_id: str) -> int:
        if self._free:
            slot = self._free.pop()
            self._ids[slot], self._accounts[slot] = worker_id, Account()
            return slot
        slot = len(self._ids)
        self._ids.append(worker_id)
        self._accounts.append(Account())
        if slot >= len(self._ready):
            self._grow()
        return slot

    def _set_limits(self, slot: int, report: WorkerReport) -> None:
        info = report.info
        self.kv_total[slot] = info.kv_blocks_total
        self.block_size[slot] = self._accounts[slot].block_size = info.block_size
        self._accounts[slot].kv_total = info.kv_blocks_total
        self.max_tokens[slot] = max_tokens(info)
        self._accounts[slot].max_seqs = info.max_num_seqs
        costs = self._accounts[slot].costs
        costs.budget, costs.max_seqs = info.max_num_batched_tokens, info.max_num_seqs
        costs.beside_streams = info.max_prefill_tokens or info.max_num_batched_tokens
        self._set_prices(costs, self.predictors.of(slot, info))
        self._role[slot] = _ROLE_CODE[info.role]
        self._ready[slot] = report.status is WorkerStatus.READY

    def costs(self, slot: int) -> WorkerCosts:
        """Return the present prices of one worker; read only."""
        return self._priced(slot) if slot in self._stale else self._accounts[slot].costs

    @property
    def board(self) -> Board | None:
        """The arrays as the compiled core has them; None where Python does it all."""
        return self._board

    @property
    def stale(self) -> set[int]:
        """Slots whose prices are out of date; whoever brings them up to date takes them out."""
        return self._stale

    @property
    def accounts(self) -> list[Account]:
        """The load of each worker by slot; read only."""
        return self._accounts

    def size_of_block(self, slot: int) -> int:
        """Return tokens per KV block of one worker."""
        return self._accounts[slot].block_size

    def queued_before(self, slot: int, turn: int) -> int:
        """Return the queued tokens of one worker's charges whose turn is not later than `turn`."""
        return self._accounts[slot].shorter[turn]

    def remove(self, worker_id: str) -> int | None:
        """Forget a worker and the charges on it; return the slot that it had. Unknown ids are ignored."""
        slot = self._slots.pop(worker_id, None)
        if slot is None:
            return None
        for request_id in list(self._accounts[slot].requests):
            self._detach(self._charges[request_id], slot)
        del self.workers[worker_id], self._last_seen[worker_id]
        self._ids[slot] = None
        self._ready[slot] = False
        self._free.append(slot)
        self.predictors.forget(slot)
        self._changed()
        return slot

    def _detach(self, charge: Charge, slot: int) -> None:
        """Cut a charge off a worker that is gone; its part on the other worker stays until it ends."""
        if charge.prefill_slot == slot and not charge.local:
            charge.prefill_slot = NOWHERE
        elif charge.decode_slot == slot:
            if charge.local:
                charge.prefill_slot = NOWHERE
            charge.decode_slot = NOWHERE
        if charge.decode_slot == NOWHERE and (charge.prefill_slot == NOWHERE or charge.prefilled):
            self._drop(charge)

    def silent(self, now: float, dead_after_s: float) -> list[str]:
        """Return the workers whose last report is older than dead_after_s."""
        return [worker for worker, seen in self._last_seen.items() if now - seen > dead_after_s]

    def _changed(self) -> None:
        self.version += 1
        self._pools = None

    # -- pools ---------------------------------------------------------------------------------------

    def pools(self) -> Pools:
        """Return who takes new requests; cached until the version changes."""
        if self._pools is None:
            self._pools = self.pools_of(np.flatnonzero(self._ready))
        return self._pools

    def pools_of(self, ready: Slots) -> Pools:
        """Divide workers by role. Engines know no roles: where one side is missing the other does all."""
        role = self._role[ready]
        shortest = float(self.max_tokens[ready].min()) if len(ready) else 0.0
        prefill, decode = ready[role != _ROLE_CODE[Role.DECODE]], ready[role != _ROLE_CODE[Role.PREFILL]]
        if len(prefill) and len(decode):
            local = ready[role == _ROLE_CODE[Role.MIXED]]
            outside = self._outside(prefill), self._outside(decode)
            masks = outside[0].data, outside[1].data
            return Pools(ready, prefill, decode, local, False, shortest, *outside, masks)
        everywhere = self._outside(ready)
        masks = everywhere.data, everywhere.data
        return Pools(ready, ready, ready, ready, True, shortest, everywhere, everywhere, masks)

    def _outside(self, slots: Slots) -> Floats:
        outside = np.full(self.num_slots, np.inf)
        outside[slots] = 0.0
        return outside

    # -- charges -------------------------------------------------------------------------------------

    @property
    def num_charges(self) -> int:
        return len(self._charges)

    @property
    def frontends(self) -> list[str]:
        """Ids of the front ends that have charges."""
        return list(self._by_frontend)

    def charge(
        self,
        request: PlacementRequest,
        prefill: int,
        decode: int,
        depths: tuple[int, int],
        now: float,
        prediction: Prediction | None = None,
    ) -> tuple[Charge, list[Charge]]:
        """Count a request on the workers in these slots; depths: leading blocks that each has cached.

        Returns the charge, and the charges that had to go: the request's own earlier one, if this is a retry,
        and the oldest where there are too many.
        """
        ended = []
        earlier = self.finished(request.request_id)
        if earlier is not None:
            ended.append(earlier)
        if len(self._charges) >= self._max_charges:
            ended.append(self._end(next(iter(self._charges.values()))))
        self._num_placed += 1
        self.now = now
        charge = self._open_charge(
            self._accounts,
            request,
            prefill,
            decode,
            *depths,
            self._num_placed,
            now,
            self.expected_tokens,
            prediction,
        )
        self.expected_prompt += _ANSWER_WEIGHT * (charge.tokens - self.expected_prompt)
        self._charges[request.request_id] = charge
        own = self._by_frontend.get(request.frontend_id)
        if own is None:
            own = self._by_frontend[request.frontend_id] = set()
        own.add(request.request_id)
        self._stale.add(prefill)
        self._stale.add(decode)
        return charge, ended

    def prefilled(self, request_id: str) -> Charge | None:
        """Move a request's load from its prefill to its decode worker. None: unknown, or known already."""
        charge = self._charges.get(request_id)
        if charge is None or charge.prefilled:
            return None
        self._move_charge(self._accounts, charge)
        if charge.prefill_slot != NOWHERE:
            self._stale.add(charge.prefill_slot)
        if charge.decode_slot != NOWHERE:
            self._stale.add(charge.decode_slot)
        else:
            self._drop(charge)
        return charge

    def finished(self, request_id: str) -> Charge | None:
        """End a request's charge, wherever it stands; None where there is none."""
        charge = self._charges.get(request_id)
        return None if charge is None else self._end(charge)

    def frontend_left(self, frontend_id: str) -> list[Charge]:
        """End the charges of all requests of a front end."""
        return [self._end(self._charges[item]) for item in list(self._by_frontend.get(frontend_id, ()))]

    def expire(self, before: float) -> list[Charge]:
        """End charges placed before this moment: whoever placed them can't be serving them any more."""
        ended = []
        while self._charges:
            oldest = next(iter(self._charges.values()))
            if oldest.placed_at >= before:
                break
            ended.append(self._end(oldest))
        return ended

    def _end(self, charge: Charge) -> Charge:
        self._close_charge(self._accounts, charge)
        if charge.prefill_slot != NOWHERE and not charge.prefilled:
            self._stale.add(charge.prefill_slot)
        if charge.decode_slot != NOWHERE:
            self._stale.add(charge.decode_slot)
        self._drop(charge)
        return charge

    def _drop(self, charge: Charge) -> None:
        del self._charges[charge.request_id]
        own = self._by_frontend[charge.frontend_id]
        own.discard(charge.request_id)
        if not own:
            del self._by_frontend[charge.frontend_id]

    def columns(self) -> list[Floats]:
        """Return all columns, up to date."""
        stale = self._stale
        if stale and self._board is not None:
            self._board.write(stale, self.expected_tokens, self.now)
        elif stale:
            slots = list(stale)
            stale.clear()
            if len(slots) == 1:
                self._table[:, slots[0]] = self._row_of(slots[0])
            else:
                self._table[:, slots] = np.array([self._row_of(slot) for slot in slots]).T
        return self._rows

    def _row_of(self, slot: int) -> list[float]:
        costs, account = self._priced(slot), self._accounts[slot]
        sequences = account.sequences
        excess = sequences + 1 - account.max_seqs
        return [
            account.queued_tokens,
            sequences,
            excess if excess > 0 else 0,
            account.kv_blocks,
            costs.begin_s + costs.chunk_s,
            costs.token_s + costs.chunk_s / costs.chunk,
            costs.attended_s,
            costs.step_s,
            costs.place_s,
            costs.pull[1] + costs.pull[2] * costs.links,
            costs.bare_step_s,
            costs.aside,
            account.tightest_s,
            *account.shorter,
        ]

    def _priced(self, slot: int) -> WorkerCosts:
        account = self._accounts[slot]
        costs = account.costs
        if self.core.price is not None:
            self.core.price(account, self.expected_tokens, self.now)
            return costs
        sequences, blocks = account.batch_to_come(self.expected_tokens * costs.step_s)
        costs.refresh(
            account.queued_tokens,
            sequences,
            blocks * account.block_size,
            blocks / account.kv_total,
            self.expected_tokens,
            account.aside_share(self.now),
        )
        return costs

    def answered(self, num_tokens: int) -> None:
        """Note how long an answer was that has ended."""
        if num_tokens > 0:
            self.expected_tokens += _ANSWER_WEIGHT * (num_tokens - self.expected_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError where charges are negative, or left without a request; for tests."""
        for worker_id, slot in self._slots.items():
            account = self._accounts[slot]
            if min(account.own()) < 0:
                raise AssertionError(f"negative charge on {worker_id}: {account.own()}")
            if not account.requests <= self._charges.keys():
                raise AssertionError(f"{worker_id} is charged for requests that have ended")
            if not account.requests and any(account.own()):
                raise AssertionError(f"{worker_id} is charged without a request: {account.own()}")

    def charges_of(self, worker_id: str) -> Mapping[str, int]:
        """Return the router's own sums on a worker: tokens to prefill, sequences, blocks."""
        account = self._accounts[self._slots[worker_id]]
        return {
            "tokens": account.absorbed + account.fresh,
            "sequences": account.seqs,
            "blocks": account.blocks,
        }
