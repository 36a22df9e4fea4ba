"""What rank 0 and another rank of its worker say to each other, over a pair of connected sockets.

    rank 0                                    rank r
      RankSetup ────────────────────────────►    once
                ◄──────────── RankReport(joining), RankReport(ready)
      step, step, ... ──────────────────────►    each computed by all ranks together
                ◄──────────── RankReport(failed)   at most once, then its end

A message is its length and its bytes: setup and reports are JSON, a step is int64 arrays. The end of either
process is the end of the stream for the other, however it ended.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from disagg.config import EngineConfig
from disagg.model.step import StepInput

_LENGTH = struct.Struct("<Q")
# A step of a million tokens stays below it.
MAX_MESSAGE_BYTES = 1 << 30
# Tokens, chunks, table entries, sample rows.
_COUNTS = 4


@dataclass(frozen=True, slots=True)
class RankSetup:
    """What a rank must know to load its shard. Names as in load_runner.

    port: of rank 0's store. model: see plan_cache. num_blocks: of the cache, None for as many as fit
    the devices. buffer_fd, buffer_offset: the file that holds the worker's KV cache and where in it, None for
    memory of the rank's own. cores: of its threads, none for any.
    """

    rank: int
    size: int
    port: int
    timeout_s: float
    folder: str
    model: str
    dtype: str
    engine: EngineConfig
    num_blocks: int | None
    max_model_len: int | None
    num_threads: int
    device: str
    buffer_fd: int | None = None
    buffer_offset: int = 0
    cores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RankReport:
    """How a rank is. error, param: why it failed, and the ConfigError's field if it was one."""

    state: Literal["joining", "ready", "failed"]
    error: str = ""
    param: str | None = None


class LinkClosedError(Exception):
    """The process at the other end is gone."""


class Link:
    """One end. timeout_s: bound on sending; receiving waits for as long as it is told."""

    def __init__(self, sock: socket.socket, *, timeout_s: float) -> None:
        self.socket = sock
        self._timeout_s = timeout_s

    def send(self, data: bytes) -> None:
        """Raises LinkClosedError where the other end is gone or takes nothing for timeout_s."""
        try:
            self.socket.settimeout(self._timeout_s)
            self.socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LinkClosedError(str(error)) from None

    def receive(self, timeout_s: float | None = None) -> bytes:
        """Return the next message; timeout_s None waits for ever. Raises LinkClosedError, TimeoutError."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, timeout_s))
        if length > MAX_MESSAGE_BYTES:
            raise LinkClosedError(f"a message of {length} bytes can't be meant")
        return self._read(length, self._timeout_s)

    def _read(self, size: int, timeout_s: float | None) -> bytes:
        data = bytearray(size)
        filled = 0
        try:
            self.socket.settimeout(timeout_s)
            while filled < size:
                count = self.socket.recv_into(memoryview(data)[filled:])
                if count == 0:
                    raise LinkClosedError("the other end is gone")
                filled += count
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkClosedError(str(error)) from None
        return bytes(data)

    def close(self) -> None:
        self.socket.close()


def encode_setup(setup: RankSetup) -> bytes:
    fields = {**_fields(setup), "engine": setup.engine.model_dump(mode="json")}
    return json.dumps(fields).encode()


def decode_setup(data: bytes) -> RankSetup:
    fields = json.loads(data)
    engine, cores = EngineConfig.model_validate(fields["engine"]), tuple(fields["cores"])
    return RankSetup(**{**fields, "engine": engine, "cores": cores})


def _fields(setup: RankSetup) -> dict[str, object]:
    return {name: getattr(setup, name) for name in RankSetup.__slots__}


def encode_report(report: RankReport) -> bytes:
    return json.dumps(asdict(report)).encode()


def decode_report(data: bytes) -> RankReport:
    return RankReport(**json.loads(data))


def encode_step(step: StepInput) -> bytes:
    arrays = [
        step.token_ids,
        step.positions,
        step.query_start,
        step.block_tables,
        step.table_start,
        step.sample_rows,
    ]
    counts = [len(step.token_ids), step.num_chunks, len(step.block_tables), len(step.sample_rows)]
    return np.concatenate([np.array(counts), *arrays]).astype(np.int64, copy=False).tobytes()


def decode_step(data: bytes) -> StepInput:
    """Raises ValueError where the arrays are not as long as they say."""
    flat = np.frombuffer(data, dtype=np.int64)
    tokens, chunks, tables, samples = flat[:_COUNTS].tolist()
    lengths = [tokens, tokens, chunks + 1, tables, chunks + 1, samples]
    if min(lengths) < 0 or _COUNTS + sum(lengths) != len(flat):
        raise ValueError(f"a step of {len(flat)} numbers says that it has {lengths}")
    parts = np.split(flat[_COUNTS:], np.cumsum(lengths)[:-1])
    # Tensors over them are made without a copy, and torch wants memory that it may write to.
    token_ids, positions, query_start, block_tables, table_start, sample_rows = map(np.copy, parts)
    return StepInput(
        token_ids, positions, query_start.astype(np.int32), block_tables, table_start, sample_rows
    )
