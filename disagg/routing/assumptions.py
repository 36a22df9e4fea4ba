"""Assumptions: how long a placed request's blocks count as cached on its workers before they are reported.

The rule. From placement, the request's full blocks are assumed on its prefill and on its decode worker. On
the prefill worker that ends when prefill is done, on the decode worker when the request has ended; in both
cases not at once, but with the second report of that worker from then on. By then the worker's own events
say what is true: the first report may have been on its way already when prefill ended. A worker that never
reports again dies, and all its entries with it. No clock is needed.
"""

from __future__ import annotations

from disagg.routing.charges import NOWHERE, Charge
from disagg.routing.prefix_index import PrefixIndex

Hashes = tuple[int, ...]


class _Ending:
    __slots__ = ("due", "recent")

    def __init__(self) -> None:
        self.recent: list[Hashes] = []
        self.due: list[Hashes] = []


class Assumptions:
    """Adds to a PrefixIndex and takes back, following the story of each charge."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._ending: dict[int, _Ending] = {}
        # Request id -> slots on which its blocks are assumed.
        self._active: dict[str, list[int]] = {}

    def placed(self, charge: Charge) -> None:
        if not charge.hashes:
            return
        slots = {charge.prefill_slot, charge.decode_slot}
        active = [slot for slot in slots if self._index.assume(slot, charge.hashes)]
        if active:
            self._active[charge.request_id] = active

    def prefilled(self, charge: Charge) -> None:
        self._release(charge, keep=charge.decode_slot)

    def ended(self, charge: Charge) -> None:
        self._release(charge, keep=NOWHERE)

    def _release(self, charge: Charge, keep: int) -> None:
        active = self._active.pop(charge.request_id, None)
        if active is None:
            return
        for slot in active:
            if slot != keep:
                self._ending.setdefault(slot, _Ending()).recent.append(charge.hashes)
        if keep in active:
            self._active[charge.request_id] = [keep]

    def reported(self, slot: int) -> None:
        """A report came; take back what has had its time."""
        ending = self._ending.get(slot)
        if ending is None:
            return
        for hashes in ending.due:
            self._index.retract(slot, hashes)
        ending.due, ending.recent = ending.recent, []
        if not ending.due:
            del self._ending[slot]

    def worker_left(self, slot: int) -> None:
        """The index forgot the slot; it may go to another worker, on which nothing is assumed yet."""
        self._ending.pop(slot, None)
        for request_id, slots in list(self._active.items()):
            if slot in slots:
                slots.remove(slot)
                if not slots:
                    del self._active[request_id]
