"""Which transports fit a pair of workers, best first: pure, from what each side says of itself.

    where the caches are        auto                   for `shm`
    CPU, same host              shm, grpc              shm
    CPU, different hosts        grpc                   refused
    GPU, same host              cuda_ipc, nccl         cuda_ipc
    GPU, different hosts        nccl                   refused

`grpc`, `nccl` and `nixl` are taken where they are asked for by name, on one host too; `nixl` only then. What
a side doesn't offer is left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from disagg.config import KVTransport
from disagg.errors import KVLostError

# Where a cache lives.
Device = Literal["cpu", "cuda"]


def device_from_proto(name: str) -> Device:
    """Raises KVLostError for a device that isn't known here. A peer that names none has a CPU."""
    if name in ("", "cpu"):
        return "cpu"
    if name == "cuda":
        return "cuda"
    raise KVLostError(f"the peer's cache is on a device that is not known here: {ascii(name)[:80]}")


_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("shm", "grpc"), "cuda": ("cuda_ipc", "nccl")}
# Which of them read the owner's memory as their own. Both ends of the others may be on any host.
_MAPPING: dict[str, Device] = {"shm": "cpu", "cuda_ipc": "cuda"}


@dataclass(frozen=True, slots=True)
class Side:
    """One worker's part. host_id: as in segment.host_id. transports: names of those that it offers."""

    host_id: str
    device: Device
    transports: Collection[str]


def transports_for(wanted: KVTransport, ours: Side, theirs: Side) -> tuple[str, ...]:
    """Return transports that both sides can do and the configuration allows, best first, at least one.

    Raises KVLostError saying of each that was considered why it does not fit.
    """
    considered = {"auto": _PREFERENCE[ours.device], "shm": tuple(_MAPPING)}.get(wanted, (wanted,))
    reasons = {name: _misfit(name, ours, theirs) for name in considered}
    fitting = tuple(name for name, reason in reasons.items() if reason is None)
    if not fitting:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise KVLostError(f"kv_transport {wanted} does not fit this pair: {told}")
    return fitting


def _misfit(name: str, ours: Side, theirs: Side) -> str | None:
    if name not in ours.transports:
        return "not offered here"
    if name in _MAPPING and ours.host_id != theirs.host_id:
        return "the peer is on another host"
    if ours.device != theirs.device:
        return f"the cache is on {ours.device} here, on {theirs.device} there"
    if name not in theirs.transports:
        return "the peer does not offer it"
    if name in _MAPPING and ours.device != _MAPPING[name]:
        return f"the caches are on {ours.device}"
    return None
