"""Rank 0's side of a tensor-parallel worker: the other ranks' processes, and the decoder that leads them.

    ParallelDecoder.forward ──step──► every other rank's process
            └───────── all compute, joined by collectives ─────────┘ ──► logits on rank 0

A rank that dies, fails or hangs ends the whole worker with RankLostError, since the others are out of step
from then on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from disagg.errors import ConfigError, DisaggError, RankLostError
from disagg.model.block_mover import BlockMover
from disagg.model.decode_graphs import Capture
from disagg.model.decoders import BackgroundDecoder, Decoder
from disagg.model.device import rank_device
from disagg.model.kv_cache import KVCache
from disagg.model.parallel import RankGroup, serve_store
from disagg.model.rank_link import (
    Link,
    LinkClosedError,
    RankReport,
    RankSetup,
    decode_report,
    encode_setup,
    encode_step,
)
from disagg.model.rank_moves import RankMover
from disagg.model.shard import Shard
from disagg.model.step import StepInput

logger = logging.getLogger(__name__)

# Longest silence of a rank within a step, in seconds: ranks wait for each other at every layer.
STEP_TIMEOUT_S = 30.0
# For a process to import torch and read its shard.
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 5.0
# How long after a failed collective it is still asked which rank it was.
BLAME_TIMEOUT_S = 1.0

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class RankProcesses:
    """Ranks 1 .. size - 1 of one worker, each a process on this machine.

    setup: what they are told; each one's rank, port, device and cores are filled in. rank_cores: each rank's,
    where they are pinned. Raises OSError where a process can't be started.
    """

    def __init__(self, setup: RankSetup, rank_cores: Sequence[tuple[int, ...]] = ()) -> None:
        self._size = setup.size
        self._timeout_s = setup.timeout_s
        self._store = serve_store(setup.size, timeout_s=START_TIMEOUT_S)
        self._links: list[Link] = []
        # Of each rank two more, for blocks that leave and that arrive: neither waits for the other, nor for
        # steps.
        self._moves: list[tuple[Link, Link]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._on_lost: Callable[[RankLostError], None] | None = None
        self._lost: RankLostError | None = None
        self._group: RankGroup | None = None
        self._noticed = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end, self._links, self._moves, self._processes, 0.0)
        try:
            for rank in range(1, setup.size):
                device = str(rank_device(torch.device(setup.device), rank))
                cores = rank_cores[rank] if rank_cores else ()
                self._start(replace(setup, rank=rank, port=self._store.port, device=device, cores=cores))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def _start(self, setup: RankSetup) -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        link, outgoing, incoming = (Link(ours, timeout_s=self._timeout_s) for ours, _ in pairs)
        self._links.append(link)
        self._moves.append((outgoing, incoming))
        try:
            link.send(encode_setup(setup))
            self._processes.append(_spawn([theirs.fileno() for _, theirs in pairs], setup))
        finally:
            for _, theirs in pairs:
                theirs.close()

    # -- starting ------------------------------------------------------------------------------------

    def join(self, device: torch.device) -> RankGroup:
        """Return the group that all ranks form. Raises as `begin` does."""
        self._await_all("joining")
        self._group = RankGroup(Shard(0, self._size), self._store, device=device, timeout_s=self._timeout_s)
        return self._group

    def begin(self) -> None:
        """Return when every rank has loaded its shard; from then on a loss is noticed, step or not.

        Raises ConfigError where one can't use the configuration or checkpoint, RankLostError where one ended
        or does not get there in time.
        """
        self._await_all("ready")
        # Without a reference to this object, whose end would otherwise never come.
        arguments = weakref.ref(self), tuple(self._links)
        threading.Thread(target=_watch, args=arguments, name="ranks", daemon=True).start()

    def _await_all(self, state: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for rank, link in enumerate(self._links, 1):
            try:
                report = decode_report(link.receive(max(0.001, deadline - time.monotonic())))
            except LinkClosedError:
                raise RankLostError(f"tensor-parallel rank {rank} ended while it started") from None
            except TimeoutError:
                raise RankLostError(f"tensor-parallel rank {rank} does not start") from None
            if report.state != state:
                raise _failure(rank, report)

    def on_lost(self, callback: Callable[[RankLostError], None]) -> None:
        """Have `callback` called once, on some thread, when a rank is lost that nobody asked to end."""
        with self._lock:
            self._on_lost = callback
            lost = self._lost
        if lost is not None:
            callback(lost)

    def note_end(self, rank: int) -> None:
        """A rank's link has something to read after its start: its failure, or its end."""
        if self._closing.is_set():
            return
        try:
            error = _failure(rank, decode_report(self._links[rank - 1].receive(BLAME_TIMEOUT_S)))
        except (LinkClosedError, TimeoutError):
            error = RankLostError(f"tensor-parallel rank {rank} died")
        self._note(RankLostError(error.message))

    def _note(self, error: RankLostError) -> RankLostError:
        """Keep the first loss, tell of it, and return it."""
        with self._lock:
            if self._lost is not None:
                return self._lost
            self._lost = error
            callback = self._on_lost
        self._noticed.set()
        logger.error("%s", error.message)
        if self._group is not None:
            # On a GPU a collective waits for a rank that is gone until somebody gives it up.
            self._group.close()
        if callback is not None:
            callback(error)
        return error

    # -- steps ---------------------------------------------------------------------------------------

    def send_step(self, step: StepInput) -> None:
        """Let every other rank compute a step. Raises RankLostError."""
        self.check()
        data = encode_step(step)
        for rank, link in enumerate(self._links, 1):
            try:
                link.send(data)
            except LinkClosedError as error:
                raise self.lost(f"tensor-parallel rank {rank} takes no step: {error}") from None

    def check(self) -> None:
        """Raise RankLostError once a rank is lost."""
        if self._lost is not None:
            raise RankLostError(self._lost.message)

    def lost(self, problem: str) -> RankLostError:
        """Return the error of a step that failed; the other ranks end, since they are out of step now.

        If one of them is known to be lost, that is what it says.
        """
        self._noticed.wait(BLAME_TIMEOUT_S)
        error = self._note(RankLostError(problem))
        _end(self._links, self._moves, self._processes, 0.0)
        return RankLostError(error.message)

    def movers(
        self, cache: KVCache, file: tuple[int, int], shape: tuple[int, int]
    ) -> tuple[RankMover, RankMover]:
        """Return what copies blocks to and from host memory, for blocks that leave and that arrive.

        cache: rank 0's. file: descriptor and offset of the memory, which ranks map writable meanwhile. shape:
        its rows and bytes of a row, those of a whole block. Call it once. Raises RankLostError.
        """
        outgoing, incoming = (
            RankMover(BlockMover(cache.blocks, cache.heads), links, file, shape, self.lost)
            for links in zip(*self._moves, strict=True)
        )
        return outgoing, incoming

    def close(self) -> None:
        """End every rank's process. When this returns none is left."""
        self._closing.set()
        _end(self._links, self._moves, self._processes, STOP_TIMEOUT_S)
        if self._group is not None:
            self._group.close()


def _watch(ranks: weakref.ref[RankProcesses], links: Sequence[Link]) -> None:
    poll = select.poll()
    rank_of = {link.socket.fileno(): rank for rank, link in enumerate(links, 1)}
    for fd in rank_of:
        poll.register(fd, select.POLLIN)
    fd, _ = poll.poll()[0]
    living = ranks()
    if living is not None:
        living.note_end(rank_of[fd])


def _spawn(fds: list[int], setup: RankSetup) -> subprocess.Popen[bytes]:
    paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(setup.num_threads),
    }
    passed = fds if setup.buffer_fd is None else [*fds, setup.buffer_fd]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "disagg.model.rank_process", *map(str, fds)],
        env=environment,
        stdin=subprocess.DEVNULL,
        # What libraries print is for the log, not for a command's output.
        stdout=2,
        pass_fds=passed,
    )


def _end(
    links: Sequence[Link],
    moves: Sequence[tuple[Link, Link]],
    processes: Sequence[subprocess.Popen[bytes]],
    grace_s: float,
) -> None:
    """End the ranks: each goes when its link ends, and is killed where that takes longer than grace_s."""
    for link in (*links, *chain.from_iterable(moves)):
        # Shut down first: that wakes whoever waits for the descriptor, which closing it would not.
        with contextlib.suppress(OSError):
            link.socket.shutdown(socket.SHUT_RDWR)
        link.close()
    deadline = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(rank: int, report: RankReport) -> DisaggError:
    if report.param is not None:
        return ConfigError(report.error, param=report.param)
    return RankLostError(f"tensor-parallel rank {rank} failed: {report.error or report.state}")


def lead(decoder: Decoder, ranks: RankProcesses) -> ParallelDecoder:
    """Return rank 0's decoder with the other ranks behind it; a BackgroundDecoder if `decoder` is one."""
    if isinstance(decoder, BackgroundDecoder):
        return BackgroundParallelDecoder(decoder, ranks)
    return ParallelDecoder(decoder, ranks)


class ParallelDecoder:
    """Rank 0's decoder with the other ranks behind it; implements Decoder."""

    def __init__(self, decoder: Decoder, ranks: RankProcesses) -> None:
        self._decoder = decoder
        self._ranks = ranks
        self.spec = decoder.spec
        self.own_threads = decoder.own_threads

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """As Decoder.forward. When it returns, every rank has written the step's KV: the last all-reduce
        comes after the last layer's. Raises RankLostError.
        """
        self._ranks.send_step(step)
        try:
            return self._decoder.forward(step, cache)
        except Exception as error:
            raise self._ranks.lost(f"a tensor-parallel step failed: {error}") from error


class BackgroundParallelDecoder(ParallelDecoder):
    """The same on a GPU; implements BackgroundDecoder. When `forward` returns, the ranks have begun; when
    rank 0's device has done the step, every rank has written its KV.
    """

    def __init__(self, decoder: BackgroundDecoder, ranks: RankProcesses) -> None:
        super().__init__(decoder, ranks)
        self.drawn = decoder.drawn
        self._background = decoder

    def capture(self, cache: KVCache, max_model_len: int, capture: Capture | None = None) -> None:
        """As BackgroundDecoder.capture. The other ranks, which have come as far, capture at the same time."""
        self._background.capture(cache, max_model_len, capture)
