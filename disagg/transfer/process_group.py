"""A torch.distributed process group of two workers: NCCL between GPUs, Gloo between CPUs.

Not the process's default group, which may be busy with tensor parallelism: every pair has its own, under a
prefix of its own in the owner's store, and it is replaced when anything goes wrong in it. Where two ranks
disagree about what is sent next, no group can be brought in step again.

Calls of torch block, so a group has a thread. Nothing waits longer than the time-out: a call that outlives
its group touches nothing but the group's own buffers, which go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from disagg.transfer.agreement import Device
from disagg.transfer.calls import DamagedKVError
from disagg.transfer.staging import Staging, make_staging

Result = TypeVar("Result")
# Stores and groups come from a compiled module, which exports them without types.
dist: Any = torch.distributed
Store = Any

OWNER, PULLER = 0, 1
GROUP_ID_BYTES = 16
# Bytes that go at once. One part is gathered or scattered while another is on its way.
PART_BYTES = 8 * 1024 * 1024
_NUM_BUFFERS = 2
_LONGEST_NAP_S = 0.002
# Gloo tries five times to reach a peer that has gone since it was found, each for its own time-out.
_GLOO_ATTEMPTS = 5


class GroupBrokenError(DamagedKVError):
    """The group can't be used any more; another can be made."""


def backend_name(device: Device) -> str:
    return "nccl" if device == "cuda" else "gloo"


def serve_store(host: str, timeout_s: float) -> Store:
    """Return a store that listens on a port of `host` alone, which the OS picks.

    Whoever can reach the port can talk to it, but not find a group without its random prefix.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        # The store closes it.
        master_listen_fd=listener.detach(),
    )


def reach_store(host: str, port: int, timeout_s: float) -> Store:
    """Return a connection to a peer's store. Raises RuntimeError."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


class PairGroup:
    """One pair's group. Its coroutines run one after the other, in the order in which they were called.

    get_store: called on the group's thread; a connection of its own, since one on which somebody waits for a
    peer serves nobody else. host: this worker's own, for Gloo's sockets. buffers: what is
    sent and received, taken in turns.
    """

    def __init__(
        self,
        get_store: Callable[[], Store],
        group_id: bytes,
        rank: int,
        *,
        host: str,
        device: Device,
        block_bytes: int,
        timeout_s: float,
    ) -> None:
        self.group_id = group_id
        self._device = device
        self._timeout_s = timeout_s
        self._peer = PULLER if rank == OWNER else OWNER
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-group")
        capacity = max(1, PART_BYTES // block_bytes)
        self.buffers = [make_staging(device, capacity, block_bytes) for _ in range(_NUM_BUFFERS)]
        self._group: Any = None
        self._aborted = threading.Event()
        self._opened = self._call(self._open, get_store, group_id.hex(), rank, host)

    async def opened(self) -> None:
        """Return once the peer has joined. Raises GroupBrokenError."""
        await asyncio.shield(self._opened)

    async def send(self, buffer: Staging, num_blocks: int) -> None:
        """Send the first blocks of a buffer. Raises GroupBrokenError."""
        await self._call(lambda: self._finish(self._group.send([buffer.first(num_blocks)], self._peer, 0)))

    async def receive(self, buffer: Staging, num_blocks: int) -> None:
        """Fill the first blocks of a buffer. Raises GroupBrokenError."""
        await self._call(lambda: self._finish(self._group.recv([buffer.first(num_blocks)], self._peer, 0)))

    def abort(self) -> None:
        """End the group; calls that run fail, at the latest with the time-out. Returns at once."""
        if self._aborted.is_set():
            return
        self._aborted.set()
        # Not on the group's thread, which may wait for the very call that this ends.
        threading.Thread(target=self._abort, name="kv-group-abort", daemon=True).start()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()

    def _call(self, function: Callable[..., Result], *args: object) -> asyncio.Future[Result]:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._thread, _guarded, function, *args)
        except RuntimeError:
            raise GroupBrokenError("the process group was ended") from None
        # Looked at even where nobody waits any more.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    def _open(self, get_store: Callable[[], Store], prefix: str, rank: int, host: str) -> None:
        store = dist.PrefixStore(prefix, get_store())
        make = _nccl if self._device == "cuda" else _gloo
        self._group = make(store, rank, host, self._timeout_s)

    def _finish(self, work: Any) -> None:
        if self._device == "cpu":
            work.wait(timedelta(seconds=self._timeout_s))
        else:
            self._poll(work)

    def _poll(self, work: Any) -> None:
        """Wait for a work of NCCL, whose own wait holds up the stream and not the caller."""
        deadline, nap = time.monotonic() + self._timeout_s, 20e-6
        while not work.is_completed():
            if self._aborted.is_set() or time.monotonic() > deadline:
                raise GroupBrokenError("the process group was ended or timed out")
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)
        if not work.is_success():
            raise GroupBrokenError("NCCL reports a failure")


def _guarded(function: Callable[..., Result], *args: object) -> Result:
    """Call a function of torch, which raises RuntimeError and kinds of it for whatever goes wrong."""
    try:
        return function(*args)
    except (RuntimeError, AttributeError, OSError) as error:
        # AttributeError: of the group that an abort took away.
        raise GroupBrokenError(f"the process group broke: {str(error)[:300]}") from None


def _gloo(store: Store, rank: int, host: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s / _GLOO_ATTEMPTS)
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, 2, options)


# Guards the environment, from which NCCL's groups read how to behave while they are made.
_nccl_environment = threading.Lock()


def _nccl(store: Store, rank: int, _host: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    # A watchdog of torch's own ends the process when this has passed; `_poll` is to notice long before.
    options._timeout = timedelta(seconds=10 * timeout_s)
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    with _nccl_environment:
        before = os.environ.get(name)
        # A peer's death is an error of this pair, not this process's end.
        os.environ[name] = "0"
        try:
            return dist.ProcessGroupNCCL(store, rank, 2, options)
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
