"""The one definition of a block's identity: a SHA-256 chain over model, adapter, tenant salt and tokens.

Workers key their prefix caches by it and the router its prefix index, so both must compute it here. A
cryptographic hash is used because a forged collision would hand one tenant's KV to another
(CVE-2026-105754).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

BlockHash = bytes
SHORT_HASH_BITS = 64


@lru_cache(maxsize=1024)
def chain_root(model: str, *, adapter: str = "", salt: str = "") -> BlockHash:
    """Return the parent of a sequence's first block: 32 bytes that depend on everything but the tokens."""
    digest = hashlib.sha256(b"disagg-kv-1")
    for part in (model, adapter, salt):
        encoded = part.encode()
        # Lengths go in too, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def next_hash(parent: BlockHash, block_tokens: Sequence[int]) -> BlockHash:
    """Return the hash of one full block that follows `parent`; token ids are signed 64-bit."""
    return hashlib.sha256(parent + array("q", block_tokens).tobytes()).digest()


def block_hashes(token_ids: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """Return the chained hashes of all full blocks of `token_ids`, len(token_ids) // block_size of them."""
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = next_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes


def short_hash(block_hash: BlockHash) -> int:
    """Return the first 64 bits, for indexes whose mistakes cost time and never correctness."""
    return int.from_bytes(block_hash[: SHORT_HASH_BITS // 8], "little")
