"""Leases on published KV: pure, with time as an argument.

             ┌─progress, withdraw─┐            ┌──renew──┐
             ▼                    │            ▼         │
    open ──► OPEN ────────────────┴─complete─► LIVE ─────┘
             │                                  ├──release───► RELEASED   its reader is done
             └──────────────drop────────────────┼──drop──────► DROPPED    its owner took it back
                                                └──time up───► EXPIRED ──sweep or drop──► gone

OPEN: the owner still computes. It has the blocks anyway, so no time runs; readers get those that are done.
Where it needs them for something else meanwhile (a preemption), it withdraws: a new epoch begins, with no
blocks. From LIVE on only the lease keeps the blocks, and its time runs.

RELEASED and DROPPED leases are gone from the table at once, an EXPIRED one with the next sweep; its blocks
are given back at that moment, once, and may hold another request's KV a moment later. Nothing leads back:
publishing the request again opens another lease under another key. A reader therefore copies first and asks
after: only if it then finds the lease, and in the same epoch, is what it copied right.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from disagg.errors import KVLostError
from disagg.types import KVHandle

_GONE = "no such lease: unknown, expired or already released"


class LeaseState(Enum):
    """OPEN and LIVE leases can be read; EXPIRED ones wait for the sweep that gives their blocks back."""

    OPEN = auto()
    LIVE = auto()
    EXPIRED = auto()


@dataclass(frozen=True, slots=True)
class Published:
    """Blocks that can be read in one epoch. complete: there will be no more. begun: some are computed now."""

    epoch: int = 0
    block_ids: tuple[int, ...] = ()
    complete: bool = False
    begun: bool = False


@dataclass(slots=True)
class Lease:
    """One request's published blocks. expires: on the table's clock, seconds, None while it is OPEN.

    epoch is written by whoever takes blocks back, on any thread; `published` by the table's own. Each is one
    assignment, and what was published in another epoch does not count, so no lock is needed.
    """

    request_id: str
    key: bytes
    num_tokens: int
    expires: float | None = None
    epoch: int = 0
    published: Published = field(default_factory=Published)

    @property
    def current(self) -> Published:
        """What can be read now."""
        published, epoch = self.published, self.epoch
        return published if published.epoch == epoch else Published(epoch)

    @property
    def block_ids(self) -> tuple[int, ...]:
        return self.current.block_ids

    def state(self, now: float) -> LeaseState:
        if self.expires is None:
            return LeaseState.OPEN
        return LeaseState.LIVE if now < self.expires else LeaseState.EXPIRED


class LeaseTable:
    """All leases of one worker that were not given back yet. lease_s: life of one that nobody renews."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    # -- owner ---------------------------------------------------------------------------------------

    def open(self, request_id: str, key: bytes, num_tokens: int) -> None:
        """Open a lease on KV that is yet to be computed: that of `num_tokens` tokens.

        Raises ValueError where the request has one that was not given back.
        """
        if request_id in self._leases:
            raise ValueError(f"request {request_id} is published already")
        self._leases[request_id] = Lease(request_id, key, num_tokens)

    def publish(
        self, request_id: str, key: bytes, block_ids: Sequence[int], num_tokens: int, now: float
    ) -> None:
        """Open a lease that is complete at once. Raises ValueError as `open` does."""
        self.open(request_id, key, num_tokens)
        self.progress(request_id, 0, block_ids, complete=True, now=now)

    def progress(
        self, request_id: str, epoch: int, block_ids: Sequence[int], *, complete: bool, now: float
    ) -> bool:
        """Let the blocks be read that are computed by now, if any; with `complete` the lease is LIVE and time
        runs.

        Does nothing, and returns False, where the blocks were taken back since (another epoch has begun), or
        the lease is gone or LIVE.
        """
        lease = self._leases.get(request_id)
        if lease is None or lease.expires is not None or lease.epoch != epoch:
            return False
        lease.published = Published(epoch, tuple(block_ids), complete, begun=True)
        if complete:
            lease.expires = now + self._lease_s
        return True

    def withdraw(self, request_id: str) -> bool:
        """Begin a new epoch, without blocks. Call it before they are used for anything else, on any thread.

        True: there is such a lease.
        """
        lease = self._leases.get(request_id)
        if lease is not None:
            lease.epoch += 1
        return lease is not None

    def drop(self, request_id: str) -> bool:
        """End a lease from the owner's side. True: there was one; the caller frees its blocks."""
        return self._leases.pop(request_id, None) is not None

    def sweep(self, now: float) -> list[str]:
        """Remove every lease whose time has run out; the caller frees their blocks."""
        expired = [
            lease.request_id for lease in self._leases.values() if lease.state(now) is LeaseState.EXPIRED
        ]
        for request_id in expired:
            del self._leases[request_id]
        return expired

    def clear(self) -> list[str]:
        """Remove every lease; the caller frees their blocks."""
        ended = list(self._leases)
        self._leases.clear()
        return ended

    def next_expiry(self) -> float | None:
        times = (lease.expires for lease in self._leases.values() if lease.expires is not None)
        return min(times, default=None)

    def has(self, request_id: str) -> bool:
        """Whether the request has a lease that was not given back."""
        return request_id in self._leases

    # -- reader --------------------------------------------------------------------------------------

    def lookup(self, handle: KVHandle, now: float) -> Lease:
        """Return the OPEN or LIVE lease that a handle claims.

        A handle must also agree on the number of tokens: who is mistaken about it would read slots of the
        last block that were never written. Raises KVLostError, the same for every reason, so that nothing is
        learned from it.
        """
        lease = self._leases.get(handle.request_id)
        if lease is None or not hmac.compare_digest(lease.key, handle.key):
            raise KVLostError(_GONE)
        if lease.state(now) is LeaseState.EXPIRED or lease.num_tokens != handle.num_tokens:
            raise KVLostError(_GONE)
        return lease

    def renew(self, handle: KVHandle, now: float) -> None:
        """Let a LIVE lease's time begin anew; an OPEN one has none. Raises KVLostError."""
        lease = self.lookup(handle, now)
        if lease.expires is not None:
            lease.expires = now + self._lease_s

    def release(self, handle: KVHandle, epoch: int, now: float) -> bool:
        """End a LIVE lease from the reader's side. True: it was live, and in this epoch, until now; the
        caller frees its blocks. Otherwise nothing is changed.
        """
        try:
            lease = self.lookup(handle, now)
        except KVLostError:
            return False
        if lease.state(now) is not LeaseState.LIVE or lease.epoch != epoch:
            return False
        del self._leases[lease.request_id]
        return True
