"""What must hold of an engine between any two steps, however it came there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from disagg.engine.block_pool import BlockPool
from disagg.engine.scheduler import Scheduler
from disagg.engine.sequence import Sequence, SequenceStatus
from disagg.engine.waiting_queue import rank


def check_sequences(seqs: Iterable[Sequence], pool: BlockPool, block_size: int) -> None:
    """Compare block tables with what they are to hold and are cached as. Raises AssertionError."""
    for seq in seqs:
        if len(seq.block_table) != len(set(seq.block_table)):
            raise AssertionError(f"{seq.request_id} has a block twice")
        if len(seq.block_table) * block_size < seq.num_computed_tokens:
            raise AssertionError(f"{seq.request_id} has computed more tokens than its blocks hold")
        for index, block_id in enumerate(seq.block_table):
            found_as = pool.hash_of(block_id)
            if found_as is None:
                continue
            computed = (index + 1) * block_size <= seq.num_computed_tokens
            if not computed or found_as != seq.block_hashes[index]:
                raise AssertionError(f"block {block_id} of {seq.request_id} is cached with other content")


def check_queues(counts: Counter[SequenceStatus], scheduler: Scheduler, num_held: int) -> None:
    """Compare how many sequences have each status with the queues. Raises AssertionError.

    num_held: how many are counted as held for a peer.
    """
    sizes = {
        SequenceStatus.WAITING: len(scheduler.waiting) + len(scheduler.early),
        SequenceStatus.RECEIVING: len(scheduler.receiving),
        SequenceStatus.RUNNING: len(scheduler.running),
        SequenceStatus.HELD: num_held,
    }
    for status, size in sizes.items():
        if counts[status] != size:
            raise AssertionError(f"{counts[status]} sequences are {status.name}, queues have {size}")
    growing = [seq for seq in (*scheduler.running, *scheduler.receiving.values()) if not seq.hold]
    if len(growing) != scheduler.num_growing:
        raise AssertionError(f"{len(growing)} sequences may grow, {scheduler.num_growing} are counted")
    if scheduler.running != sorted(scheduler.running, key=rank):
        raise AssertionError("the running sequences are out of order")
