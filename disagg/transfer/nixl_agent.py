"""A NIXL agent: registered memory, and reads out of other agents' (backend UCX).

    https://github.com/ai-dynamo/nixl

Agents have a thread that makes progress, if wished. It takes a third to a half of a core while nothing is
there to do (nixl 1.5.1), so ours have none: they move when they are called, see nixl_reader.py.

A read that was begun can't be taken back: with UCX over TCP, bytes of a read whose handle was released, and
whose peer was removed, are written all the same once the peer sends them (seen with a peer that was stopped
and went on). So reads go to buffers of the agent, never to the cache, and a buffer whose read was given up is
not used until NIXL says that it has ended.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from disagg.errors import ConfigError, KVLostError
from disagg.transfer.agreement import Device
from disagg.transfer.calls import DamagedKVError
from disagg.transfer.staging import Staging, make_staging

logger = logging.getLogger(__name__)

PART_BYTES = 8 * 1024 * 1024
# Of all peers together: who finds none free waits for one.
MAX_BUFFERS = 16
# Address and length in bytes.
Span = tuple[int, int]
_MEMORY: dict[Device, str] = {"cpu": "DRAM", "cuda": "VRAM"}


class NixlError(DamagedKVError):
    """NIXL reports a failure: of this read, or of the peer's connection."""


@dataclass(slots=True)
class Read:
    """One read that was begun, into a buffer."""

    handle: Any
    buffer: Staging
    done: bool


class NixlAgent:
    """One worker's agent. Its methods may block for the time of a copy and may be called on any thread.

    name: unique in the cluster. host: own address; where that is loopback, UCX listens nowhere else. Raises
    ConfigError where NIXL is not installed or can't start.
    """

    def __init__(self, name: str, host: str, device: Device, block_bytes: int) -> None:
        self._device = device
        self._block_bytes = block_bytes
        # Agents without a thread of their own are not safe to be called by several.
        self._lock = threading.Lock()
        self._agent = _create(name, host)
        self._registered: list[Any] = []
        self._free: list[Staging] = []
        self._num_buffers = 0
        self._given_up: list[Read] = []
        self._closed = False

    def register(self, address: int, num_bytes: int) -> None:
        """Let peers read (and NIXL use) memory until the agent is closed. Raises ConfigError."""
        try:
            self._register(address, num_bytes)
        except NixlError as error:
            raise ConfigError(f"kv_transport: {error.message}", param="kv_transport") from None

    def _register(self, address: int, num_bytes: int) -> None:
        with self._calling() as agent:
            region = [(address, num_bytes, 0, "")]
            self._registered.append(agent.register_memory(region, _MEMORY[self._device]))

    def metadata(self) -> bytes:
        """Return what a peer needs to read what was registered."""
        with self._calling() as agent:
            return bytes(agent.get_agent_metadata())

    def meet(self, metadata: bytes, expected_name: str) -> None:
        """Get to know a peer. Raises KVLostError where the metadata is somebody else's."""
        with self._calling() as agent:
            name = agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            if name != expected_name:
                agent.remove_remote_agent(name)
                raise KVLostError("the peer's NIXL metadata is another agent's")

    def part_with(self, name: str) -> None:
        """Forget a peer, if it is known. Raises nothing."""
        with contextlib.suppress(KVLostError), self._calling() as agent:
            agent.remove_remote_agent(name)

    def progress(self) -> None:
        """Serve what peers ask for, where no hardware does."""
        with self._calling() as agent:
            agent.get_new_notifs()

    # -- reading -------------------------------------------------------------------------------------

    def take_buffer(self) -> Staging | None:
        """Return a buffer that nobody uses, None where all are in use."""
        self._collect()
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._num_buffers >= MAX_BUFFERS:
                return None
            self._num_buffers += 1
        buffer = make_staging(self._device, max(1, PART_BYTES // self._block_bytes), self._block_bytes)
        memory = buffer.first(buffer.capacity)
        self._register(memory.data_ptr(), memory.numel())
        return buffer

    def give_back(self, buffer: Staging) -> None:
        with self._lock:
            self._free.append(buffer)

    def begin(self, name: str, spans: Sequence[Span], buffer: Staging) -> Read:
        """Read spans of a peer's memory, one after the other, to the front of a buffer. Raises NixlError."""
        kind, at = _MEMORY[self._device], buffer.first(1).data_ptr()
        local = []
        for _, length in spans:
            local.append((at, length, 0))
            at += length
        remote = [(address, length, 0) for address, length in spans]
        with self._calling() as agent:
            handle = agent.initialize_xfer(
                "READ", agent.get_xfer_descs(local, kind), agent.get_xfer_descs(remote, kind), name
            )
            return Read(handle, buffer, self._is_done(agent.transfer(handle)))

    def check(self, read: Read) -> bool:
        """Return whether a read has ended well; makes progress. Raises NixlError where it failed."""
        if not read.done:
            with self._calling() as agent:
                read.done = self._is_done(agent.check_xfer_state(read.handle))
        return read.done

    def release(self, read: Read) -> None:
        """Free what a read held that has ended; its buffer stays the caller's. Raises nothing."""
        with contextlib.suppress(NixlError), self._calling() as agent:
            agent.release_xfer_handle(read.handle)

    def give_up(self, read: Read) -> None:
        """End a read that nobody wants any more, and take its buffer: now, or when nothing is on its way.

        Raises nothing.
        """
        try:
            ended = self.check(read)
        except NixlError:
            ended = True
        if ended:
            self.release(read)
            self.give_back(read.buffer)
        else:
            with self._lock:
                self._given_up.append(read)

    def _collect(self) -> None:
        """Take the buffers back of reads that were given up and have ended since."""
        with self._lock:
            given_up, self._given_up = self._given_up, []
        for read in given_up:
            self.give_up(read)

    @staticmethod
    def _is_done(state: str) -> bool:
        if state == "ERR":
            raise NixlError("NIXL: the read failed")
        return state == "DONE"

    # -- life ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Deregister all memory. Where a read that was given up may still write, its buffer is kept."""
        self._collect()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for region in self._registered if not self._given_up else ():
                with contextlib.suppress(Exception):
                    self._agent.deregister_memory(region)
            if self._given_up:
                # Python must not free what the network may write to; the process's end does.
                _kept_for_ever.append((self._agent, self._given_up))
                logger.warning("%d NIXL reads never ended: their buffers are kept", len(self._given_up))
            self._agent = None

    @contextlib.contextmanager
    def _calling(self) -> Iterator[Any]:
        """Hold the agent; raise NixlError for whatever it raises."""
        with self._lock:
            if self._closed:
                raise NixlError("the NIXL agent is closed")
            try:
                yield self._agent
            except KVLostError:
                raise
            except Exception as error:
                # Its exceptions have no base of their own.
                raise NixlError(f"NIXL: {type(error).__name__}: {str(error)[:200]}") from None


_kept_for_ever: list[Any] = []


def _create(name: str, host: str) -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if host in ("127.0.0.1", "::1", "localhost"):
        # UCX would listen on every interface.
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
    try:
        nixl: Any = importlib.import_module("nixl")
    except ImportError as error:
        raise ConfigError(
            f"kv_transport: nixl is not installed ({error}); install disagg[nixl]", param="kv_transport"
        ) from None
    try:
        return nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    except Exception as error:
        raise ConfigError(f"kv_transport: NIXL can't start: {error}", param="kv_transport") from None
