"""The KV cache's memory as a segment that a peer on the same host can map.

It is a memfd: anonymous memory that lives as long as some process has it open. Nothing has a name in
/dev/shm, so no crash, not even SIGKILL, leaves a segment behind.

    +-------------------+---------+---------+-- ... --+-----------------+--------+
    | header page       | block 0 | block 1 |         | block n - 1     | canary |
    | magic nonce sizes |         |         |         |                 |        |
    +-------------------+---------+---------+-- ... --+-----------------+--------+

The canary is one more block, which no engine ever writes: a probe moves it as a hand-off moves the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt

from disagg.errors import ConfigError, KVLostError
from disagg.pages import populate, prefer_large_pages
from disagg.v1 import worker_pb2

Blocks = npt.NDArray[np.uint8]

_NAME = "disagg-kv"
_MAGIC = b"disagg02"
_NONCE_BYTES = 16
# magic, nonce, blocks, bytes per block
_HEADER = struct.Struct(f"<8s{_NONCE_BYTES}sQQ")
# A mapping faults with SIGBUS where its file was cut short, so its size must be fixed.
_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
# linux/fcntl.h; Python names it from 3.14 on.
_F_SEAL_FUTURE_WRITE = 0x0010
# Taken at a time by `populate`, which looks after each whether to go on.
_POPULATE_BYTES = 8 * 1024 * 1024


class SharedSegment:
    """A worker's own KV memory: `blocks` is uint8 [num_blocks, block_bytes], zeroed and writable.

    rows: the same and the canary after it. canary: its one row, uint8 [block_bytes].
    """

    def __init__(self, fd: int, memory: mmap.mmap, nonce: bytes, num_blocks: int, block_bytes: int) -> None:
        self._fd: int | None = fd
        self._nonce = nonce
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.rows = _row_view(memory, num_blocks, block_bytes)
        self.blocks = self.rows[:num_blocks]
        self.canary = self.rows[num_blocks]
        prefer_large_pages(self.rows.ctypes.data, self.rows.nbytes)

    @classmethod
    def create(cls, num_blocks: int, block_bytes: int, *, seal: bool = True) -> SharedSegment:
        """Return a new segment. Raises ConfigError naming a size that is not positive or can't be had.

        seal: False leaves it to `seal`, until when this worker's other processes may map it writable.
        """
        for name, value in (("num_blocks", num_blocks), ("block_bytes", block_bytes)):
            if value < 1:
                raise ConfigError(f"{name} must be positive, got {value}", param=name)
        size = _size_of(num_blocks, block_bytes)
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            memory = mmap.mmap(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
            if seal:
                _seal(fd)
        except (OSError, OverflowError) as error:
            os.close(fd)
            message = f"{size} bytes of shared memory can't be had: {error}"
            raise ConfigError(message, param="kv_cache_memory") from None
        nonce = secrets.token_bytes(_NONCE_BYTES)
        _HEADER.pack_into(memory, 0, _MAGIC, nonce, num_blocks, block_bytes)
        return cls(fd, memory, nonce, num_blocks, block_bytes)

    @property
    def buffer(self) -> memoryview:
        """The blocks as one flat writable buffer, for whoever builds tensors over it."""
        return self.blocks.reshape(-1).data

    @property
    def file(self) -> tuple[int, int]:
        """Descriptor and offset from which this worker's processes map `buffer`. KVLostError after close."""
        if self._fd is None:
            raise KVLostError("the KV segment is closed")
        return self._fd, mmap.PAGESIZE

    def seal(self) -> None:
        """Let nobody else map it writable from now on: call it before any peer may know of it."""
        if self._fd is not None:
            _seal(self._fd)

    def populate(self) -> None:
        """Take all of the segment's memory now, on whatever thread, until that is done or `close` is called.

        Pages are taken from the cores that this thread may run on. Systems that can't do so take each page
        when it is first written, in the middle of somebody's prompt or hand-off.
        """
        first, size = self.rows.ctypes.data - mmap.PAGESIZE, self.rows.nbytes + mmap.PAGESIZE
        for start in range(0, size, _POPULATE_BYTES):
            length = min(_POPULATE_BYTES, size - start)
            if self._fd is None or not populate(first + start, length):
                return

    def describe(self) -> worker_pb2.SharedSegment:
        """Return what a peer needs to map the segment. Raises KVLostError after close."""
        if self._fd is None:
            raise KVLostError("the KV segment is closed")
        size = _size_of(self.num_blocks, self.block_bytes)
        return worker_pb2.SharedSegment(pid=os.getpid(), fd=self._fd, num_bytes=size, nonce=self._nonce)

    def close(self) -> None:
        """Let no further peer map the segment. Its memory goes with the last array or tensor over it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class PeerSegment:
    """A peer's KV memory, mapped read-only: rows as in SharedSegment. Unmapped with its last reference."""

    def __init__(self, rows: Blocks) -> None:
        self.rows = rows


def map_peer(description: worker_pb2.SharedSegment, num_blocks: int, block_bytes: int) -> PeerSegment:
    """Map a peer's segment. The sizes are the agreed ones, not the peer's word.

    Raises KVLostError where what is found there is not that segment: another process, another pid namespace,
    a peer that is gone.
    """
    size = _size_of(num_blocks, block_bytes)
    if description.num_bytes != size:
        raise KVLostError(f"the peer's KV segment has {description.num_bytes} bytes, the layout says {size}")
    memory = _map_read_only(f"/proc/{description.pid}/fd/{description.fd}", size)
    expected = _HEADER.pack(_MAGIC, description.nonce[:_NONCE_BYTES], num_blocks, block_bytes)
    if memory[: _HEADER.size] != expected:
        raise KVLostError("the peer's KV segment has another header than the peer said")
    return PeerSegment(_row_view(memory, num_blocks, block_bytes))


def _map_read_only(path: str, size: int) -> mmap.mmap:
    try:
        # Looked at before it is opened, since opening a pipe or a device can block or do something.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise KVLostError("the peer's KV segment is not where it said")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                raise KVLostError("the peer's KV segment does not have the agreed size")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _FIXED_SIZE != _FIXED_SIZE:
                raise KVLostError("the peer's KV segment is not sealed")
            return mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
    except (OSError, OverflowError) as error:
        raise KVLostError(f"the peer's KV segment can't be mapped: {error}") from None


def host_id() -> str:
    """Return an identity that two processes share only if one can open the other's /proc/PID/fd.

    The kernel's boot id alone would make two containers on one machine believe that they share memory. Where
    the system does not tell, the identity is nobody else's.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
    except OSError:
        return uuid.uuid4().hex


def _seal(fd: int) -> None:
    # Our mapping stays writable and no further one can be. Kernels before 5.1 don't know this seal; there
    # it is only the peers' own O_RDONLY.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)


def _size_of(num_blocks: int, block_bytes: int) -> int:
    return mmap.PAGESIZE + (num_blocks + 1) * block_bytes


def _row_view(memory: mmap.mmap, num_blocks: int, block_bytes: int) -> Blocks:
    flat = np.frombuffer(memory, dtype=np.uint8, offset=mmap.PAGESIZE)
    return flat.reshape(num_blocks + 1, block_bytes)
