"""Caches on GPUs of one host. On a CPU, another driver stands in for the calls that need a GPU."""

from __future__ import annotations

import asyncio
import ctypes
import json
import random
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from disagg.errors import KVLostError
from disagg.transfer.cuda_memory import (
    HANDLE_BYTES,
    CudaDriver,
    ExportedCache,
    PeerCache,
    export_cache,
)

ROWS, ROW_BYTES = 40, 4096
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@dataclass
class StandIn:
    """A driver over this process's own memory. allocations: handle to (address, length)."""

    allocations: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    opened: list[int] = field(default_factory=list)

    def allocate(self, num_bytes: int) -> Tensor:
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        handle = bytes([len(self.allocations)]) * HANDLE_BYTES
        self.allocations[handle] = (memory.data_ptr(), num_bytes)
        return memory

    def uuids(self) -> list[str]:
        return ["gpu-a", "gpu-b"]

    def export(self, address: int, device: int) -> tuple[bytes, int]:
        for handle, (base, length) in self.allocations.items():
            if base <= address < base + length:
                return handle, base
        raise KVLostError("no such allocation")

    def open(self, handle: bytes, device: int) -> tuple[int, int]:
        if handle not in self.allocations:
            raise KVLostError("CUDA refuses")
        self.opened.append(self.allocations[handle][0])
        return self.allocations[handle]

    def close(self, address: int, device: int) -> None:
        self.opened.remove(address)

    def view(self, address: int, rows: int, row_bytes: int, device: int) -> Tensor:
        memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).reshape(rows, row_bytes)


@pytest.fixture
def driver() -> StandIn:
    return StandIn()


def cache_in(memory: Tensor, offset: int) -> Tensor:
    cache = memory[offset : offset + ROWS * ROW_BYTES].reshape(ROWS, ROW_BYTES)
    cache.copy_(torch.randint(0, 256, cache.shape, dtype=torch.uint8))
    return cache


def test_a_cache_in_the_middle_of_an_allocation_is_found(driver: StandIn) -> None:
    driver.allocate(100)
    cache = cache_in(driver.allocate(4096 + ROWS * ROW_BYTES + 17), 4096)
    exported = export_cache(cache, driver)
    assert (exported.offset, exported.num_bytes, exported.device_uuid) == (4096, ROWS * ROW_BYTES, "gpu-a")
    peer = PeerCache(exported, ROWS, ROW_BYTES, driver)
    assert torch.equal(peer.rows, cache) and peer.rows.data_ptr() == cache.data_ptr()
    peer.close()
    peer.close()
    assert driver.opened == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"handle": b"short"}, "handle has 5 bytes"),
        ({"handle": b"x" * HANDLE_BYTES}, "refuses"),
        ({"num_bytes": ROWS * ROW_BYTES - 1}, "has 163839 bytes"),
        ({"num_bytes": 2**62}, "bytes, not"),
        ({"offset": -1}, "outside its allocation"),
        ({"offset": 4097}, "outside its allocation"),
        ({"offset": 2**63}, "outside its allocation"),
        ({"device_uuid": "gpu-z"}, "can't be seen"),
    ],
)
def test_a_peer_s_word_is_checked(driver: StandIn, change: dict[str, Any], words: str) -> None:
    exported = export_cache(cache_in(driver.allocate(4096 + ROWS * ROW_BYTES), 4096), driver)
    with pytest.raises(KVLostError, match=words):
        PeerCache(replace(exported, **change), ROWS, ROW_BYTES, driver)
    assert driver.opened == []


def test_without_a_driver_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> Any:
        raise OSError("libcuda.so.1: not found")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(KVLostError, match="no CUDA driver"):
        CudaDriver()


# -- reading: needs gRPC's Python package, which a bare GPU machine may lack -----------------------------


def reading(driver: StandIn | CudaDriver, exported: ExportedCache) -> Any:
    pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    from disagg.transfer.connections import Reached
    from disagg.transfer.cuda_reader import CudaIpcReader, exported_to_proto
    from disagg.v1 import worker_pb2

    response = worker_pb2.ConnectResponse(num_blocks=ROWS - 1, cuda=exported_to_proto(exported))
    reached = Reached(cast(Any, None), cast(Any, None), response, "127.0.0.1:1")
    return CudaIpcReader(reached, (), ThreadPoolExecutor(1), ROW_BYTES, driver)


async def read_some(reader: Any, source: Tensor, target: Any, shift: int = 0) -> None:
    """Read random rows and compare all of the target; with the least and the most stretches."""
    rng = random.Random(5)
    before = torch.as_tensor(target).clone()
    for rows in (list(range(3, 30)), rng.sample(range(ROWS), ROWS), [7]):
        onto = rng.sample(range(ROWS), len(rows))
        await reader.read(None, 0, target, onto, source_rows=rows)
        before[onto] = source.to(before.device)[rows]
        assert torch.equal(torch.as_tensor(target), before)


@pytest.mark.parametrize("into", ["tensor", "array"])
async def test_blocks_are_copied_to_where_they_belong(driver: StandIn, into: str) -> None:
    cache = cache_in(driver.allocate(ROWS * ROW_BYTES), 0)
    reader = reading(driver, export_cache(cache, driver))
    target: Any = torch.full((ROWS, ROW_BYTES), 0xEE, dtype=torch.uint8)
    await read_some(reader, cache, target if into == "tensor" else target.numpy())
    for rows in ([-1, 0], [0, ROWS], [0]):
        with pytest.raises(KVLostError, match="other blocks"):
            await reader.read(None, 0, target, [1, 2], source_rows=rows)
    await reader.close()
    assert driver.opened == []
    with pytest.raises(KVLostError, match="left"):
        await reader.read(None, 0, target, [1], source_rows=[1])


async def test_a_cancelled_copy_has_ended_and_memory_is_unmapped_after_it(
    driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(driver.allocate(ROWS * ROW_BYTES), 0)
    reader = reading(driver, export_cache(cache, driver))
    from disagg.transfer import cuda_reader

    begun, go_on, mapped = threading.Event(), threading.Event(), []

    def copy(_source: Tensor, _rows: Any, _target: Any, _onto: Any, stop: threading.Event) -> None:
        begun.set()
        go_on.wait(10)
        mapped.append((stop.is_set(), list(driver.opened)))

    monkeypatch.setattr(cuda_reader, "copy_blocks", copy)
    read = asyncio.create_task(reader.read(None, 0, np.zeros((ROWS, 1)), [1], source_rows=[1]))
    await asyncio.to_thread(begun.wait, 10)
    read.cancel()
    closing = asyncio.create_task(reader.close())
    await asyncio.sleep(0.05)
    assert not read.done() and not closing.done()
    go_on.set()
    await asyncio.wait({read, closing})
    assert read.cancelled() and mapped == [(True, [cache.data_ptr()])] and driver.opened == []


# -- on a GPU --------------------------------------------------------------------------------------------

OWNER = """
import json, sys, torch
from disagg.transfer.cuda_memory import CudaDriver, export_cache
rows, row_bytes = int(sys.argv[1]), int(sys.argv[2])
torch.empty(12345, dtype=torch.uint8, device="cuda")
cache = torch.arange(rows * row_bytes, device="cuda").mul(37).div(11, rounding_mode="floor")
cache = cache.to(torch.uint8).reshape(rows, row_bytes)
torch.cuda.synchronize()
e = export_cache(cache, CudaDriver())
print(json.dumps([e.handle.hex(), e.offset, e.num_bytes, e.device_uuid]), flush=True)
sys.stdin.readline()
"""


@needs_gpu
def test_another_process_s_cache_on_a_gpu() -> None:
    command = [sys.executable, "-c", OWNER, str(ROWS), str(ROW_BYTES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        handle, *rest = json.loads(owner.stdout.readline())
        exported = ExportedCache(bytes.fromhex(handle), *rest)
        expected = torch.arange(ROWS * ROW_BYTES).mul(37).div(11, rounding_mode="floor")
        expected = expected.to(torch.uint8).reshape(ROWS, ROW_BYTES)
        peer = PeerCache(exported, ROWS, ROW_BYTES, CudaDriver())
        assert torch.equal(peer.rows.cpu(), expected)
        peer.close()
        asyncio.run(_read_on_a_gpu(exported, expected))
        owner.kill()


async def _read_on_a_gpu(exported: ExportedCache, expected: Tensor) -> None:
    for target in (
        torch.zeros((ROWS, ROW_BYTES), dtype=torch.uint8, device="cuda"),
        np.zeros((ROWS, ROW_BYTES), np.uint8),
    ):
        reader = reading(CudaDriver(), exported)
        await read_some(reader, expected, target)
        await reader.close()


@needs_gpu
def test_staging_on_a_gpu() -> None:
    pytest.importorskip("grpc")
    from disagg.transfer.staging import DeviceStaging

    cache = torch.randint(0, 256, (ROWS, ROW_BYTES), dtype=torch.uint8, device="cuda")
    staging, target = DeviceStaging(4, ROW_BYTES, cache.device), torch.zeros_like(cache)
    staging.gather(cache, [7, 3, 19, 4])
    assert torch.equal(staging.first(4), cache[[7, 3, 19, 4]])
    assert staging.scatter(target, [1, 0, 5, 6], None, threading.Event())
    assert torch.equal(target[[1, 0, 5, 6]], cache[[7, 3, 19, 4]])
