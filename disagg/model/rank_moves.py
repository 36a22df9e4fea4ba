"""Copies of KV blocks between host memory and the caches of all of a worker's ranks, at the same time.

    rank 0: RankMover ──block ids, rows──► every other rank: serve_moves
                └── each moves its own heads of each block ──┘ ──► done, or what failed

The host memory is rank 0's segment, whose descriptor comes with the first message. Its rows hold whole blocks
with the heads of all ranks in order, so that what one degree of parallelism wrote another can read.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from disagg.model.block_mover import BlockMover, Rows
from disagg.model.kv_cache import KVCache
from disagg.model.rank_link import Link, LinkClosedError

logger = logging.getLogger(__name__)

# Of bytes that take milliseconds: whoever needs longer hangs.
MOVE_TIMEOUT_S = 30.0
# Offset into the file, rows, bytes of a row.
_MEMORY = struct.Struct("<QQQ")
_DONE = b""

Direction = Literal["to_host", "to_device"]
_DIRECTIONS: tuple[Direction, ...] = ("to_host", "to_device")


class RankMover:
    """Implements the BlockMover of disagg.transfer.staged over all ranks of a worker. Not for two threads.

    own: rank 0's. links: to serve_moves of the others. file: descriptor and offset of the host memory that is
    given as `target` and `source`; nothing else may be. lost: makes the error of a rank that does not answer.
    Raises what `lost` makes.
    """

    def __init__(
        self,
        own: BlockMover,
        links: Sequence[Link],
        file: tuple[int, int],
        shape: tuple[int, int],
        lost: Callable[[str], Exception],
    ) -> None:
        self._own = own
        self._links = links
        self._lost = lost
        fd, offset = file
        for link in links:
            try:
                socket.send_fds(link.socket, [_MEMORY.pack(offset, *shape)], [fd])
            except OSError as error:
                raise lost(f"a tensor-parallel rank is gone: {error}") from None
        self._await()

    def to_host(self, block_ids: Sequence[int], target: Rows, rows: Sequence[int]) -> None:
        """As BlockMover.to_host, of all heads."""
        self._send("to_host", block_ids, rows)
        try:
            self._own.to_host(block_ids, target, rows)
        finally:
            self._await()

    def to_device(self, source: Rows, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """As BlockMover.to_device, of all heads."""
        self._send("to_device", block_ids, rows)
        try:
            self._own.to_device(source, rows, block_ids)
        finally:
            self._await()

    def _send(self, direction: Direction, block_ids: Sequence[int], rows: Sequence[int]) -> None:
        data = encode_move(direction, block_ids, rows)
        for link in self._links:
            try:
                link.send(data)
            except LinkClosedError as error:
                raise self._lost(f"a tensor-parallel rank copies no blocks: {error}") from None

    def _await(self) -> None:
        """Return when every rank has done its part. Raises RuntimeError of one whose copy failed."""
        problems = []
        for link in self._links:
            try:
                answer = link.receive(MOVE_TIMEOUT_S)
            except (LinkClosedError, TimeoutError) as error:
                raise self._lost(f"a tensor-parallel rank copies no blocks: {error}") from None
            if answer != _DONE:
                problems.append(answer.decode(errors="replace"))
        if problems:
            raise RuntimeError(f"a tensor-parallel rank could not copy blocks: {problems[0]}")


def encode_move(direction: Direction, block_ids: Sequence[int], rows: Sequence[int]) -> bytes:
    return np.array([_DIRECTIONS.index(direction), *block_ids, *rows], dtype=np.int64).tobytes()


def decode_move(data: bytes) -> tuple[Direction, list[int], list[int]]:
    """Return the direction, the block ids and the rows."""
    kind, *numbers = np.frombuffer(data, dtype=np.int64).tolist()
    count = len(numbers) // 2
    return _DIRECTIONS[kind], numbers[:count], numbers[count:]


def serve_moves(link: Link, cache: KVCache) -> None:
    """Move this rank's heads as RankMover says, until rank 0 ends the link. Raises nothing."""
    try:
        rows = _receive_memory(link)
        mover = BlockMover(cache.blocks, cache.heads)
        link.send(_DONE)
        while True:
            link.send(_move(mover, rows, link.receive()))
    except (LinkClosedError, OSError):
        logger.info("rank 0 moves no more blocks")


def _move(mover: BlockMover, memory: Rows, data: bytes) -> bytes:
    try:
        direction, block_ids, rows = decode_move(data)
        if direction == "to_host":
            mover.to_host(block_ids, memory, rows)
        else:
            mover.to_device(memory, rows, block_ids)
    except Exception as error:
        logger.exception("blocks could not be copied")
        return f"{type(error).__name__}: {error}".encode()
    return _DONE


def _receive_memory(link: Link) -> Rows:
    link.socket.settimeout(None)
    data, fds, _, _ = socket.recv_fds(link.socket, _MEMORY.size, 1)
    if len(data) < _MEMORY.size or not fds:
        raise LinkClosedError("rank 0 is gone")
    offset, count, width = _MEMORY.unpack(data)
    memory = mmap.mmap(fds[0], offset + count * width)
    os.close(fds[0])
    return np.frombuffer(memory, np.uint8, count * width, offset).reshape(count, width)
