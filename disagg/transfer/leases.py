"""Leases on published KV: pure, with time as an argument.

                 ┌──renew──┐
                 ▼         │
    publish ──► LIVE ──────┘
                 ├──release────────► RELEASED   its reader is done
                 ├──drop───────────► DROPPED    its owner took it back
                 └──time runs out──► EXPIRED ──sweep or drop──► gone

RELEASED and DROPPED leases are gone from the table at once, an EXPIRED one with the next sweep; its blocks
are given back at that moment, once, and may hold another request's KV a moment later. Nothing leads back to
LIVE: publishing the request again opens another lease under another key. A reader therefore copies first and
releases after; only if its release finds the lease live is what it copied right.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from disagg.errors import KVLostError
from disagg.types import KVHandle

_GONE = "no such lease: unknown, expired or already released"


@dataclass(slots=True)
class Lease:
    """One request's published blocks. expires: on the table's clock, seconds; from then on it is not live."""

    request_id: str
    key: bytes
    block_ids: tuple[int, ...]
    num_tokens: int
    expires: float


class LeaseTable:
    """All leases of one worker that were not given back yet. lease_s: life of one that nobody renews."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def publish(
        self, request_id: str, key: bytes, block_ids: Sequence[int], num_tokens: int, now: float
    ) -> None:
        """Open a lease. Raises ValueError where the request has one that was not given back."""
        if request_id in self._leases:
            raise ValueError(f"request {request_id} is published already")
        self._leases[request_id] = Lease(request_id, key, tuple(block_ids), num_tokens, now + self._lease_s)

    def lookup(self, handle: KVHandle, now: float) -> Lease:
        """Return the live lease that a handle claims.

        A handle must also agree on the number of tokens: who is mistaken about it would read slots of the
        last block that were never written. Raises KVLostError, the same for every reason, so that nothing is
        learned from it.
        """
        lease = self._leases.get(handle.request_id)
        if lease is None or not hmac.compare_digest(lease.key, handle.key):
            raise KVLostError(_GONE)
        if lease.expires <= now or lease.num_tokens != handle.num_tokens:
            raise KVLostError(_GONE)
        return lease

    def renew(self, handle: KVHandle, now: float) -> None:
        """Let a live lease's time begin anew. Raises KVLostError."""
        self.lookup(handle, now).expires = now + self._lease_s

    def release(self, handle: KVHandle, now: float) -> bool:
        """End a lease from the reader's side. True: it was live until now; the caller frees its blocks."""
        try:
            lease = self.lookup(handle, now)
        except KVLostError:
            return False
        del self._leases[lease.request_id]
        return True

    def drop(self, request_id: str) -> bool:
        """End a lease from the owner's side. True: there was one; the caller frees its blocks."""
        return self._leases.pop(request_id, None) is not None

    def sweep(self, now: float) -> list[str]:
        """Remove every lease whose time has run out; the caller frees their blocks."""
        expired = [lease.request_id for lease in self._leases.values() if lease.expires <= now]
        for request_id in expired:
            del self._leases[request_id]
        return expired

    def clear(self) -> list[str]:
        """Remove every lease; the caller frees their blocks."""
        ended = list(self._leases)
        self._leases.clear()
        return ended

    def next_expiry(self) -> float | None:
        return min((lease.expires for lease in self._leases.values()), default=None)
