"""The shared segment, in one process and across processes."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from disagg.errors import ConfigError, KVLostError
from disagg.transfer.segment import SharedSegment, host_id, map_peer
from disagg.v1 import worker_pb2

OWNER = """
import sys
from disagg.transfer.segment import SharedSegment
segment = SharedSegment.create(8, 4096)
for index in range(8):
    segment.blocks[index] = index + 1
print(segment.describe().SerializeToString().hex(), flush=True)
for line in sys.stdin:
    segment.blocks[int(line)] = 99
    print("done", flush=True)
"""


class Owner:
    """A segment in another process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.description = worker_pb2.SharedSegment.FromString(bytes.fromhex(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def overwrite(self, block: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{block}\n")
        self.process.stdin.flush()
        assert self._line() == "done"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        with self.process:
            pass


@pytest.fixture
def owner() -> Iterator[Owner]:
    running = Owner()
    try:
        yield running
    finally:
        with contextlib.suppress(BrokenPipeError):
            running.kill()


@pytest.fixture
def segment() -> Iterator[SharedSegment]:
    created = SharedSegment.create(4, 512)
    yield created
    created.close()


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:disagg-kv")


def changed(description: worker_pb2.SharedSegment, **fields: object) -> worker_pb2.SharedSegment:
    copy = worker_pb2.SharedSegment()
    copy.CopyFrom(description)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def test_memory_is_zeroed_writable_and_seen_through_the_buffer(segment: SharedSegment) -> None:
    assert segment.blocks.shape == (4, 512)
    assert not segment.blocks.any()
    segment.buffer[512] = 7
    assert segment.blocks[1, 0] == 7
    assert segment.buffer.nbytes == 4 * 512
    assert not segment.buffer.readonly
    assert segment.blocks.ctypes.data % 4096 == 0


def test_canary_is_outside_the_blocks(segment: SharedSegment) -> None:
    segment.canary[:] = 5
    assert not segment.blocks.any()
    assert (segment.rows[4] == 5).all()


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "param"),
    [(0, 512, "num_blocks"), (-1, 512, "num_blocks"), (4, 0, "block_bytes"), (2**60, 512, "kv_cache_memory")],
)
def test_sizes_that_cannot_be_are_refused(num_blocks: int, block_bytes: int, param: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        SharedSegment.create(num_blocks, block_bytes)
    assert caught.value.param == param
    assert len(os.listdir("/proc/self/fd")) == before


def test_size_is_sealed_and_nobody_else_can_map_it_writable(segment: SharedSegment) -> None:
    fd = os.open(f"/proc/self/fd/{segment.describe().fd}", os.O_RDWR)
    try:
        for size in (4096, 2**20):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, segment.describe().num_bytes)
    finally:
        os.close(fd)
    segment.blocks[0] = 1
    assert segment.blocks[0, 0] == 1


def test_own_processes_map_it_writable_until_it_is_sealed() -> None:
    segment = SharedSegment.create(2, 4096, seal=False)
    fd, offset = segment.file
    memory = mmap.mmap(fd, 0)
    segment.seal()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0)
    memory[offset + 4096] = 7
    assert segment.blocks[1, 0] == 7 and segment.buffer[4096] == 7
    memory.close()
    segment.close()
    with pytest.raises(KVLostError):
        assert segment.file


def test_peer_sees_what_the_owner_writes_and_cannot_write(owner: Owner) -> None:
    peer = map_peer(owner.description, 8, 4096)
    assert [int(row[0]) for row in peer.rows[:8]] == list(range(1, 9))
    owner.overwrite(3)
    assert (peer.rows[3] == 99).all()
    with pytest.raises(ValueError, match="read-only"):
        peer.rows[0, 0] = 1


def test_killed_owner_leaves_nothing_and_its_reader_lives(owner: Owner) -> None:
    before = set(os.listdir("/dev/shm"))
    peer = map_peer(owner.description, 8, 4096)
    owner.kill()
    assert set(os.listdir("/dev/shm")) <= before
    # The mapping keeps the memory until we let go of it: no fault, the bytes as they were.
    assert int(peer.rows.astype(np.int64).sum()) == 4096 * sum(range(1, 9))
    with pytest.raises(KVLostError):
        map_peer(owner.description, 8, 4096)
    assert mappings() == 1
    del peer
    gc.collect()
    assert mappings() == 0


def test_sizes_that_differ_from_the_agreed_ones_are_refused(owner: Owner) -> None:
    for num_blocks, block_bytes in ((7, 4096), (9, 4096), (8, 2048), (2**31, 4096), (17, 2048)):
        with pytest.raises(KVLostError):
            map_peer(owner.description, num_blocks, block_bytes)
        size = 4096 + (num_blocks + 1) * block_bytes
        with pytest.raises(KVLostError):
            map_peer(changed(owner.description, num_bytes=size), num_blocks, block_bytes)


@pytest.mark.parametrize("nonce", [b"", b"short", bytes(16), bytes(100)])
def test_another_nonce_is_refused(owner: Owner, nonce: bytes) -> None:
    with pytest.raises(KVLostError, match="header"):
        map_peer(changed(owner.description, nonce=nonce), 8, 4096)


@pytest.mark.parametrize("pid", [-1, 0, 2**31 - 1, 1])
def test_a_pid_that_is_no_such_process_is_refused(owner: Owner, pid: int) -> None:
    with pytest.raises(KVLostError):
        map_peer(changed(owner.description, pid=pid), 8, 4096)


def test_other_files_are_not_opened(segment: SharedSegment, tmp_path: Path) -> None:
    """A pipe would block who opens it, and a file of the right size is still no segment."""
    size = segment.describe().num_bytes
    reading, writing = os.pipe()
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    other = os.memfd_create("something-else")
    unsealed = os.memfd_create("disagg-kv")
    short = os.memfd_create("disagg-kv")
    header = os.pread(segment.describe().fd, 64, 0)
    try:
        for fd in (plain, other, unsealed):
            os.ftruncate(fd, size)
            os.pwrite(fd, header, 0)
        for fd in (reading, writing, plain, other, unsealed, short, -1, 2**31 - 1):
            with pytest.raises(KVLostError):
                map_peer(changed(segment.describe(), fd=fd), 4, 512)
    finally:
        for fd in (reading, writing, plain, other, unsealed, short):
            os.close(fd)
    assert map_peer(segment.describe(), 4, 512).rows.shape == (5, 512)


def test_closing_keeps_memory_that_is_still_viewed() -> None:
    before = mappings()
    segment = SharedSegment.create(4, 512)
    buffer = segment.buffer
    segment.close()
    segment.close()
    with pytest.raises(KVLostError):
        segment.describe()
    del segment
    buffer[0] = 3
    assert buffer[0] == 3
    assert mappings() == before + 1
    del buffer
    gc.collect()
    assert mappings() == before


def test_host_id_is_the_same_in_every_process_of_a_container() -> None:
    code = "from disagg.transfer.segment import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == host_id()


def test_host_id_without_proc_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os, "readlink", missing)
    assert host_id() != host_id()


def taken(segment: SharedSegment) -> int:
    """Return how many bytes of a segment the system has given."""
    descriptor, _ = segment.file
    return os.fstat(descriptor).st_blocks * 512


def test_a_segment_takes_memory_as_it_is_used_or_all_of_it_at_once() -> None:
    segment = SharedSegment.create(1000, 65536)
    segment.blocks[7] = 9
    assert taken(segment) < 1 << 21
    segment.populate()
    if taken(segment) < 1 << 21:
        pytest.skip("the system can't take pages at once")
    assert taken(segment) >= 1000 * 65536
    assert (segment.blocks[7] == 9).all() and not segment.blocks[8:].any()


def test_a_closed_segment_takes_no_more_memory() -> None:
    segment = SharedSegment.create(1000, 65536)
    descriptor = os.dup(segment.file[0])
    try:
        segment.close()
        segment.populate()
        assert os.fstat(descriptor).st_blocks * 512 < 1 << 21
    finally:
        os.close(descriptor)
