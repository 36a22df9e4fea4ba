"""A cache in a GPU's memory, opened by another process on the same host: CUDA's own handles, through ctypes.

    cuIpcGetMemHandle, cuIpcOpenMemHandle: CUDA driver API, section "Memory management"

A handle names a whole allocation, of which torch's allocator gives out parts, so the cache's offset travels
beside it. torch's expandable segments have no such handles: a cache that is in one can't be opened.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from disagg.errors import KVLostError

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


@dataclass(frozen=True, slots=True)
class ExportedCache:
    """What a peer needs to open a cache. offset, num_bytes: where in the allocation it is."""

    handle: bytes
    offset: int
    num_bytes: int
    device_uuid: str


class Driver(Protocol):
    """All that needs a GPU. Raises KVLostError where the driver refuses."""

    def uuids(self) -> list[str]:
        """Return the GPUs that this process sees, by torch's numbers."""
        ...

    def export(self, address: int, device: int) -> tuple[bytes, int]:
        """Return the handle of the allocation in which an address is, and where that begins."""
        ...

    def open(self, handle: bytes, device: int) -> tuple[int, int]:
        """Return address and length of a peer's allocation, now in this process too."""
        ...

    def close(self, address: int, device: int) -> None:
        """End what `open` began; the memory is free once its owner is gone too."""
        ...

    def view(self, address: int, rows: int, row_bytes: int, device: int) -> Tensor:
        """Return memory as uint8 [rows, row_bytes]."""
        ...


def export_cache(cache: Tensor, driver: Driver) -> ExportedCache:
    """Describe a contiguous cache, uint8 [n, block_bytes], to peers. Raises KVLostError."""
    device = cache.device.index or 0
    handle, base = driver.export(cache.data_ptr(), device)
    uuid = driver.uuids()[device]
    return ExportedCache(handle, cache.data_ptr() - base, cache.numel(), uuid)


class PeerCache:
    """A peer's cache, mapped: rows is uint8 [n, block_bytes] until `close`.

    num_rows, block_bytes: as agreed, not as the peer says. Raises KVLostError where the cache is not of that
    size, does not lie in the allocation, or its GPU can't be seen from here.
    """

    def __init__(self, exported: ExportedCache, num_rows: int, block_bytes: int, driver: Driver) -> None:
        if len(exported.handle) != HANDLE_BYTES:
            raise KVLostError(f"the peer's CUDA handle has {len(exported.handle)} bytes")
        if exported.num_bytes != num_rows * block_bytes:
            raise KVLostError(
                f"the peer's cache has {exported.num_bytes} bytes, not {num_rows * block_bytes}"
            )
        uuids = driver.uuids()
        if exported.device_uuid not in uuids:
            raise KVLostError("the peer's GPU can't be seen from here")
        self._driver = driver
        self._device = uuids.index(exported.device_uuid)
        self._address, length = driver.open(exported.handle, self._device)
        if not 0 <= exported.offset <= length - exported.num_bytes:
            self.close()
            raise KVLostError("the peer's cache lies outside its allocation")
        self.rows = driver.view(self._address + exported.offset, num_rows, block_bytes, self._device)

    def close(self) -> None:
        """Unmap it: `rows` must not be touched any more. Raises nothing."""
        address, self._address = self._address, 0
        if address:
            self._driver.close(address, self._device)


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class _DeviceMemory:
    """Memory as torch takes it over from other libraries."""

    def __init__(self, address: int, rows: int, row_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (rows, row_bytes),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaDriver:
    """The driver of this machine. Raises KVLostError where there is none."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise KVLostError(f"there is no CUDA driver: {error}") from None

    def uuids(self) -> list[str]:
        return [
            str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())
        ]

    def export(self, address: int, device: int) -> tuple[bytes, int]:
        self._enter(device)
        handle, base, size = _Handle(), ctypes.c_uint64(), ctypes.c_size_t()
        pointer = ctypes.c_uint64(address)
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle), base.value

    def open(self, handle: bytes, device: int) -> tuple[int, int]:
        opened, base, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        self._enter(device)
        theirs = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(opened), theirs, ctypes.c_uint(_LAZY_PEER_ACCESS))
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), opened)
        return opened.value, size.value

    def close(self, address: int, device: int) -> None:
        self._enter(device)
        self._cuda.cuIpcCloseMemHandle(ctypes.c_uint64(address))

    def view(self, address: int, rows: int, row_bytes: int, device: int) -> Tensor:
        memory: Any = _DeviceMemory(address, rows, row_bytes)
        return torch.as_tensor(memory, device=f"cuda:{device}")

    @staticmethod
    def _enter(device: int) -> None:
        """Let this thread's calls mean a device's primary context, which is the one that torch uses."""
        torch.cuda.set_device(device)
        torch.cuda.current_stream(device).synchronize()

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            raise KVLostError(f"CUDA refuses {name} with error {status}")
