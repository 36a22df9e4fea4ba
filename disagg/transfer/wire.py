"""KVTransfer messages as types, and back. What came from a peer is checked here, before anything is done."""

from __future__ import annotations

import hashlib
import hmac

from disagg.errors import InvalidRequestError, KVLostError, LayoutMismatchError
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2

KEY_BYTES = 16
MAX_ID_CHARS = 256
PROBE_REQUEST_ID = "probe"
# How a block's bytes are arranged: [layer, K/V, head, token, dim]. Another number for another arrangement.
LAYOUT_VERSION = 1

_SAME_FIELDS = ("model", "dtype", "block_size", "num_layers", "num_kv_heads", "head_dim")
# Longer than any fingerprint; a peer must not choose how long our error messages are.
_MAX_SHOWN_CHARS = 80


def layout_to_proto(layout: KVLayout) -> worker_pb2.KVLayout:
    fields = {name: getattr(layout, name) for name in _SAME_FIELDS}
    return worker_pb2.KVLayout(version=LAYOUT_VERSION, tp_size=layout.tp_size, **fields)


def check_layout(ours: KVLayout, theirs: worker_pb2.KVLayout) -> None:
    """Raise LayoutMismatchError naming every field that differs.

    Tensor-parallel degrees may differ: blocks have all heads, in one order. One into which the heads can't be
    divided is refused, since who claims it does not have that order.
    """
    differences = [
        f"{name}: {_shown(getattr(ours, name))} here, {_shown(getattr(theirs, name))} there"
        for name in _SAME_FIELDS
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if theirs.version != LAYOUT_VERSION:
        differences.append(f"version: {LAYOUT_VERSION} here, {theirs.version} there")
    if not _divides_heads(theirs.tp_size, ours.num_kv_heads):
        told = f"tp_size: {ours.tp_size} here, {theirs.tp_size} there"
        differences.append(f"{told}, which can't share {ours.num_kv_heads} key heads")
    if differences:
        raise LayoutMismatchError("KV layouts differ in " + "; ".join(differences))


def _divides_heads(tp_size: int, num_kv_heads: int) -> bool:
    """Whether each rank has equally many heads, or each head equally many ranks that hold it."""
    return tp_size > 0 and (num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0)


def _shown(value: str | int) -> str:
    return ascii(value)[:_MAX_SHOWN_CHARS]


def handle_to_proto(handle: KVHandle) -> worker_pb2.KVHandle:
    return worker_pb2.KVHandle(
        worker_id=handle.worker_id,
        incarnation=handle.incarnation,
        request_id=handle.request_id,
        key=handle.key,
        num_tokens=handle.num_tokens,
    )


def handle_from_proto(message: worker_pb2.KVHandle) -> KVHandle:
    """Raises KVLostError where no lease can have such a handle."""
    ids = (message.worker_id, message.incarnation, message.request_id)
    if len(message.key) != KEY_BYTES or not all(0 < len(item) <= MAX_ID_CHARS for item in ids):
        raise KVLostError("malformed KV handle")
    return KVHandle(*ids, message.key, message.num_tokens)


def check_published(request_id: str, key: bytes) -> None:
    """Raise InvalidRequestError naming the field with which no peer could claim the KV."""
    if len(key) != KEY_BYTES:
        raise InvalidRequestError(f"hold_key must have {KEY_BYTES} bytes, got {len(key)}", param="hold_key")
    if not 0 < len(request_id) <= MAX_ID_CHARS:
        raise InvalidRequestError(f"request_id must have 1 to {MAX_ID_CHARS} characters", param="request_id")


def probe_handle(worker_id: str, incarnation: str, secret: str) -> KVHandle:
    """Return the claim on a worker's canary block, which any member of the cluster can derive."""
    text = f"{PROBE_REQUEST_ID}/{worker_id}/{incarnation}".encode()
    key = hmac.new(secret.encode(), text, hashlib.sha256).digest()[:KEY_BYTES]
    return KVHandle(worker_id, incarnation, PROBE_REQUEST_ID, key, num_tokens=1)


def canary_bytes(probe: KVHandle, num_bytes: int) -> bytes:
    """Return what the canary block behind a probe's handle holds: no two workers' are alike."""
    return hashlib.shake_256(probe.key).digest(num_bytes)
