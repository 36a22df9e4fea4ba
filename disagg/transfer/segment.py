"""The KV cache's memory as a segment that a peer on the same host can map.

It is a memfd: anonymous memory that lives as long as some process has it open. Nothing has a name in
/dev/shm, so no crash, not even SIGKILL, leaves a segment behind.

    +--------------------+---------+---------+-- ... --+
    | header page        | block 0 | block 1 |         |
    | magic nonce sizes  |         |         |         |
    +--------------------+---------+---------+-- ... --+
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from disagg.errors import KVLostError
from disagg.v1 import worker_pb2

Blocks = npt.NDArray[np.uint8]

_NAME = "disagg-kv"
_MAGIC = b"disagg01"
_NONCE_BYTES = 16
# magic, nonce, blocks, bytes per block
_HEADER = struct.Struct(f"<8s{_NONCE_BYTES}sQQ")


class SharedSegment:
    """A worker's own KV memory: `blocks` is [num_blocks, block_bytes], zeroed and writable."""

    def __init__(self, fd: int, memory: mmap.mmap, nonce: bytes, num_blocks: int, block_bytes: int) -> None:
        self._fd = fd
        self._memory: mmap.mmap | None = memory
        self._nonce = nonce
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.blocks = _block_view(memory, num_blocks, block_bytes)

    @classmethod
    def create(cls, num_blocks: int, block_bytes: int) -> SharedSegment:
        """Return a new segment. Raises OSError where there is not enough memory."""
        size = _size_of(num_blocks, block_bytes)
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # A peer's mapping must not fault because we, or whoever opens the file, cut it short.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(fd, size)
        except OSError:
            os.close(fd)
            raise
        nonce = secrets.token_bytes(_NONCE_BYTES)
        _HEADER.pack_into(memory, 0, _MAGIC, nonce, num_blocks, block_bytes)
        return cls(fd, memory, nonce, num_blocks, block_bytes)

    @property
    def buffer(self) -> memoryview:
        """The blocks as one flat writable buffer, for whoever builds tensors over it."""
        return self.blocks.reshape(-1).data

    def describe(self) -> worker_pb2.SharedSegment:
        """Return what a peer needs to map the segment."""
        size = _size_of(self.num_blocks, self.block_bytes)
        return worker_pb2.SharedSegment(pid=os.getpid(), fd=self._fd, num_bytes=size, nonce=self._nonce)

    def close(self) -> None:
        """Close our handle. Memory that tensors still view goes with them."""
        if self._memory is not None:
            os.close(self._fd)
            self._memory = None


class PeerSegment:
    """A peer's KV memory, mapped read-only."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks


def map_peer(description: worker_pb2.SharedSegment, num_blocks: int, block_bytes: int) -> PeerSegment:
    """Map a peer's segment. The sizes are the agreed ones, not the peer's word.

    Raises KVLostError where what is found there is not that segment: another process, another pid namespace,
    a peer that is gone.
    """
    path = f"/proc/{description.pid}/fd/{description.fd}"
    size = _size_of(num_blocks, block_bytes)
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise KVLostError(f"{path} is no KV segment")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != size:
                raise KVLostError("the peer's KV segment does not have the agreed size")
            memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
    except OSError as error:
        raise KVLostError(f"the peer's KV segment can't be mapped: {error.strerror}") from None
    expected = _HEADER.pack(_MAGIC, description.nonce[:_NONCE_BYTES], num_blocks, block_bytes)
    if memory[: _HEADER.size] != expected:
        raise KVLostError("the peer's KV segment has another header than the peer said")
    return PeerSegment(_block_view(memory, num_blocks, block_bytes))


def host_id() -> str:
    """Return an identity that two processes share only if one can open the other's /proc/PID/fd.

    The kernel's boot id alone would make two containers on one machine believe that they share memory.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"


def _size_of(num_blocks: int, block_bytes: int) -> int:
    return mmap.PAGESIZE + num_blocks * block_bytes


def _block_view(memory: mmap.mmap, num_blocks: int, block_bytes: int) -> Blocks:
    flat = np.frombuffer(memory, dtype=np.uint8, offset=mmap.PAGESIZE)
    return flat.reshape(num_blocks, block_bytes)
