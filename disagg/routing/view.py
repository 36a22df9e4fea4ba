"""ClusterView: the last state of every worker, and the load that the router itself put on them since.

Every worker has a *slot*, a small number that indexes arrays over all workers, so that a policy costs a few
array operations whether there are 4 workers or 10,000. A slot is used again after its worker left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from disagg.routing.charges import NOWHERE, Account, Charge
from disagg.routing.types import PlacementRequest, WorkerReport
from disagg.types import Role, WorkerInfo, WorkerState, WorkerStatus

Slots = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROLE_CODE = {Role.PREFILL: 0, Role.DECODE: 1, Role.MIXED: 2}
_INITIAL_SLOTS = 8
# Most requests end long before max_new_tokens; charging all of it would make every worker look full.
EXPECTED_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Pools:
    """Slots that take new requests. `local` may do both phases without a hand-off.

    ready: all of them. max_tokens: length of a request that surely fits on each of them.
    """

    ready: Slots
    prefill: Slots
    decode: Slots
    local: Slots
    degraded: bool
    max_tokens: float


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
    """

    def __init__(self, *, max_charges: int = 100_000) -> None:
        self.version = 0
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
        self._pools: Pools | None = None
        self._allocate(_INITIAL_SLOTS)

    def _allocate(self, size: int) -> None:
        self.queued_tokens: Floats = np.zeros(size)
        self.sequences: Floats = np.zeros(size)
        self.excess: Floats = np.zeros(size)
        self.kv_blocks: Floats = np.zeros(size)
        self.kv_total: Floats = np.ones(size)
        self.block_size: Floats = np.ones(size)
        self.max_tokens: Floats = np.zeros(size)
        self._role: npt.NDArray[np.int8] = np.zeros(size, dtype=np.int8)
        self._ready: npt.NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)

    def _grow(self) -> None:
        old = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        self._allocate(2 * len(self._ready))
        for name, values in old.items():
            getattr(self, name)[: len(values)] = values

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
        self._last_seen[info.worker_id] = now
        self.workers[info.worker_id] = WorkerState(info, report.status, report.load)
        account = self._accounts[slot]
        account.max_seqs = info.max_num_seqs
        account.observe(report.load, self._num_placed)
        self._refresh(slot)
        if previous is None or previous.status is not report.status or previous.info != info:
            self._set_limits(slot, report)
            self._changed()

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
        self.block_size[slot] = info.block_size
        self.max_tokens[slot] = max_tokens(info)
        self._role[slot] = _ROLE_CODE[info.role]
        self._ready[slot] = report.status is WorkerStatus.READY

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
            return Pools(ready, prefill, decode, ready[role == _ROLE_CODE[Role.MIXED]], False, shortest)
        return Pools(ready, ready, ready, ready, True, shortest)

    # -- charges -------------------------------------------------------------------------------------

    @property
    def num_charges(self) -> int:
        return len(self._charges)

    @property
    def frontends(self) -> list[str]:
        """Ids of the front ends that have charges."""
        return list(self._by_frontend)

    def charge(
        self, request: PlacementRequest, prefill: int, decode: int, depths: tuple[int, int], now: float
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
        charge = Charge(
            request_id=request.request_id,
            frontend_id=request.frontend_id,
            number=self._num_placed,
            placed_at=now,
            prefill_slot=prefill,
            decode_slot=decode,
            tokens=max(1, request.num_tokens - depths[0] * int(self.block_size[prefill])),
            prefill_blocks=self._blocks(request.num_tokens, prefill, depths[0]),
            decode_blocks=self._blocks(
                request.num_tokens + min(request.max_new_tokens, EXPECTED_NEW_TOKENS), decode, depths[1]
            ),
            hashes=request.block_hashes,
        )
        self._charges[request.request_id] = charge
        self._by_frontend.setdefault(request.frontend_id, set()).add(request.request_id)
        self._accounts[prefill].add_prefill(charge)
        self._accounts[decode].add_decode(charge)
        self._refresh(prefill)
        self._refresh(decode)
        return charge, ended

    def _blocks(self, num_tokens: int, slot: int, depth: int) -> int:
        return max(0, -(-num_tokens // int(self.block_size[slot])) - depth)

    def prefilled(self, request_id: str) -> Charge | None:
        """Move a request's load from its prefill to its decode worker. None: unknown, or known already."""
        charge = self._charges.get(request_id)
        if charge is None or charge.prefilled:
            return None
        if charge.prefill_slot != NOWHERE:
            self._accounts[charge.prefill_slot].end_prefill(charge)
            self._refresh(charge.prefill_slot)
        charge.prefilled = True
        if charge.decode_slot != NOWHERE:
            self._accounts[charge.decode_slot].arrive_decode(charge)
            self._refresh(charge.decode_slot)
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
        if charge.prefill_slot != NOWHERE and not charge.prefilled:
            self._accounts[charge.prefill_slot].end_prefill(charge)
            self._refresh(charge.prefill_slot)
        if charge.decode_slot != NOWHERE:
            self._accounts[charge.decode_slot].end_decode(charge)
            self._refresh(charge.decode_slot)
        self._drop(charge)
        return charge

    def _drop(self, charge: Charge) -> None:
        del self._charges[charge.request_id]
        own = self._by_frontend[charge.frontend_id]
        own.discard(charge.request_id)
        if not own:
            del self._by_frontend[charge.frontend_id]

    def _refresh(self, slot: int) -> None:
        account = self._accounts[slot]
        self.queued_tokens[slot] = account.queued_tokens
        sequences = account.sequences
        self.sequences[slot] = sequences
        self.excess[slot] = max(0, sequences + 1 - account.max_seqs)
        self.kv_blocks[slot] = account.kv_blocks

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
