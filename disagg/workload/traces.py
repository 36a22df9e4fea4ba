"""Readers of published traces: Azure LLM inference (CSV) and Mooncake (JSON lines).

A reader goes through the file once, keeps only what lies in the window, and stops where the window
ends, so that the first minutes of a trace of many millions of rows are read in a moment.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from disagg.workload.types import TimedRequest, Workload, WorkloadError, window_end

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one entry of `hash_ids` stands for."""

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceFormat(StrEnum):
    AZURE = "azure"
    MOONCAKE = "mooncake"


class TraceError(WorkloadError):
    """A trace that cannot be read: which file, which line (from 1; None: the whole file), which field."""

    def __init__(self, path: Path, line: int | None, field: str, problem: str) -> None:
        super().__init__(f"{path}:{line}: {field}" if line else f"{path}: {field}", problem)
        self.path = path
        self.line = line
        self.field = field


def read_trace(
    path: Path,
    trace_format: TraceFormat,
    start_s: float = 0.0,
    duration_s: float | None = None,
    limit: int | None = None,
) -> Workload:
    """What arrives in [start_s, start_s + duration_s) of the trace, at most `limit` requests.

    Times are the trace's own seconds since its first row; `start_s` becomes time 0. A count of 0 tokens
    (a request that was rejected or cancelled) is read as 1, since no server can be asked for less.
    """
    parse = _parse_azure if trace_format is TraceFormat.AZURE else _parse_mooncake
    if limit is not None and limit < 1:
        raise WorkloadError("limit", f"must be at least 1, got {limit}")
    end_s = window_end(start_s, duration_s)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            kept = tuple(itertools.islice(_clip(path, parse(path, file), start_s, end_s), limit))
    except OSError as error:
        raise TraceError(path, None, "file", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise TraceError(path, None, "file", f"not UTF-8 text ({error.reason})") from error
    if not kept:
        raise TraceError(path, None, "file", f"no request arrives from {start_s} s to {end_s} s")
    return Workload(path.name, kept)


def read_azure(path: Path, start_s: float = 0.0, duration_s: float | None = None) -> Workload:
    """An Azure LLM inference trace of 2023 or 2024: `TIMESTAMP,ContextTokens,GeneratedTokens`."""
    return read_trace(path, TraceFormat.AZURE, start_s, duration_s)


def read_mooncake(path: Path, start_s: float = 0.0, duration_s: float | None = None) -> Workload:
    """A Mooncake trace: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` on each line."""
    return read_trace(path, TraceFormat.MOONCAKE, start_s, duration_s)


Row = tuple[int, Callable[[float], TimedRequest], float]
"""Line number, how to build its request for a given arrival time, and the time in seconds."""


def _clip(path: Path, rows: Iterable[Row], start_s: float, end_s: float) -> Iterator[TimedRequest]:
    previous = 0.0
    for line, build, time_s in rows:
        if time_s < previous:
            raise TraceError(path, line, "timestamp", "earlier than the line before; sort the file by time")
        previous = time_s
        if time_s >= end_s:
            return
        if time_s >= start_s:
            yield build(time_s - start_s)


def _parse_azure(path: Path, file: TextIO) -> Iterator[Row]:
    reader = csv.reader(file)
    columns = _azure_columns(path, next(reader, []))
    origin: datetime | None = None
    for cells in reader:
        line = reader.line_num
        if not cells:
            continue
        if len(cells) <= max(columns):
            raise TraceError(path, line, "columns", f"{len(cells)} fields where {len(columns)} are needed")
        stamp, prompt, output = (cells[column] for column in columns)
        when = _timestamp(path, line, stamp)
        origin = origin or when
        try:
            since: timedelta = when - origin
        except TypeError:
            raise TraceError(
                path, line, "TIMESTAMP", f"{stamp!r}: only some lines have a time zone"
            ) from None
        yield line, _azure_row(path, line, prompt, output), since.total_seconds()


def _azure_columns(path: Path, header: list[str]) -> list[int]:
    names = [name.strip().removeprefix("\ufeff") for name in header]
    for column in _AZURE_COLUMNS:
        if column not in names:
            raise TraceError(
                path, 1, column, f"no such column in the header ({', '.join(names) or 'empty file'})"
            )
    return [names.index(column) for column in _AZURE_COLUMNS]


def _azure_row(path: Path, line: int, prompt: str, output: str) -> Callable[[float], TimedRequest]:
    def build(arrival_s: float) -> TimedRequest:
        return TimedRequest(
            arrival_s,
            _tokens(path, line, "ContextTokens", _integer(prompt)),
            _tokens(path, line, "GeneratedTokens", _integer(output)),
        )

    return build


def _timestamp(path: Path, line: int, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        raise TraceError(path, line, "TIMESTAMP", f"{text!r} is not a date and time") from None


def _integer(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        return text


def _parse_mooncake(path: Path, file: TextIO) -> Iterator[Row]:
    origin: float | None = None
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        entry = _json_object(path, line, text)
        stamp = _field(path, line, entry, "timestamp")
        if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not math.isfinite(stamp):
            raise TraceError(path, line, "timestamp", f"must be a number of milliseconds, got {stamp!r}")
        origin = stamp if origin is None else origin
        yield line, _mooncake_row(path, line, entry), (stamp - origin) / 1000


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(path, line, f"column {error.colno}", f"not JSON: {error.msg}") from None
    if not isinstance(entry, dict):
        raise TraceError(path, line, "line", f"must be a JSON object, got {type(entry).__name__}")
    return entry


def _field(path: Path, line: int, entry: dict[str, Any], field: str) -> Any:
    if field not in entry:
        raise TraceError(path, line, field, "missing")
    return entry[field]


def _mooncake_row(path: Path, line: int, entry: dict[str, Any]) -> Callable[[float], TimedRequest]:
    def build(arrival_s: float) -> TimedRequest:
        prompt = _tokens(path, line, "input_length", _field(path, line, entry, "input_length"))
        output = _tokens(path, line, "output_length", _field(path, line, entry, "output_length"))
        blocks = _block_ids(path, line, entry, prompt)
        return TimedRequest(arrival_s, prompt, output, blocks, MOONCAKE_BLOCK_TOKENS)

    return build


def _block_ids(path: Path, line: int, entry: dict[str, Any], prompt: int) -> tuple[int, ...]:
    ids = entry.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(block) is int and block >= 0 for block in ids):
        raise TraceError(path, line, "hash_ids", "must be a list of integers that are not negative")
    most = math.ceil(prompt / MOONCAKE_BLOCK_TOKENS)
    if len(ids) > most:
        raise TraceError(
            path, line, "hash_ids", f"{len(ids)} blocks, but {prompt} tokens fill only {most} of 512 tokens"
        )
    return tuple(ids)


def _tokens(path: Path, line: int, field: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise TraceError(path, line, field, f"must be a count of tokens, got {value!r}")
    return max(value, 1)
