"""Assumptions: how long a placed request's blocks count as cached on its workers before they are reported.

The rule. From placement, the request's full blocks are assumed on its prefill and on its decode worker. On
the prefill worker that ends when prefill is done, on the decode worker when the request has ended; in both
cases not at once, but with the second report of that worker from then on. By then the worker's own events
say what is true: the first report may have been on its way already when prefill ended. A worker that never
reports again dies, and all its entries with it. No clock is needed.
"""

from __future__ import annotations

from typing import Any

from disagg.routing.charges import NOWHERE, Charge
from disagg.routing.prefix_index import PrefixIndex


class _Ending:
    __slots__ = ("due", "recent")

    def __init__(self) -> None:
        self.recent: list[Any] = []
        self.due: list[Any] = []


class Assumptions:
    """Expects blocks of a PrefixIndex and takes that back, following the story of each charge."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._ending: dict[int, _Ending] = {}
        # Request id -> its chain, and the slots on which it is still expected.
        self._active: dict[str, tuple[Any, tuple[int, ...]]] = {}

    def placed(self, charge: Charge) -> None:
        if not charge.hashes:
            return
        prefill, decode = charge.prefill_slot, charge.decode_slot
        slots = (prefill,) if prefill == decode else (prefill, decode)
        chain = self._index.expect(charge.hashes, slots)
        if chain is not None:
            self._active[charge.request_id] = chain, slots

    def prefilled(self, charge: Charge) -> None:
        self._release(charge, keep=charge.decode_slot)

    def ended(self, charge: Charge) -> None:
        self._release(charge, keep=NOWHERE)

    def _release(self, charge: Charge, keep: int) -> None:
        active = self._active.pop(charge.request_id, None)
        if active is None:
            return
        chain, slots = active
        for slot in slots:
            if slot != keep:
                ending = self._ending.get(slot)
                if ending is None:
                    ending = self._ending[slot] = _Ending()
                ending.recent.append(chain)
        if keep in slots:
            self._active[charge.request_id] = chain, (keep,)

    def reported(self, slot: int) -> None:
        """A report came; take back what has had its time."""
        ending = self._ending.get(slot)
        if ending is None:
            return
        for chain in ending.due:
            self._index.unexpect(chain, slot)
        ending.due, ending.recent = ending.recent, []
        if not ending.due:
            del self._ending[slot]

    def worker_left(self, slot: int) -> None:
        """Expect nothing of a worker that is gone: its slot may go to another one."""
        ending = self._ending.pop(slot, None)
        for chain in [*ending.due, *ending.recent] if ending is not None else ():
            self._index.unexpect(chain, slot)
        for request_id, (chain, slots) in list(self._active.items()):
            if slot in slots:
                self._index.unexpect(chain, slot)
                left = tuple(other for other in slots if other != slot)
                if left:
                    self._active[request_id] = chain, left
                else:
                    del self._active[request_id]
