"""Readers of published traces: Azure LLM inference and BurstGPT (CSV), Mooncake and Bailian (JSON lines).

A reader goes through the file once, keeps only what lies in the window, and stops where the window
ends, so that the first minutes of a trace of many millions of rows are read in a moment.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from disagg.workload.types import TimedRequest, Workload, WorkloadError, window_end

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one entry of `hash_ids` stands for."""
BAILIAN_BLOCK_TOKENS = 16
"""Likewise in the Bailian (Qwen) traces."""

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


class TraceFormat(StrEnum):
    AZURE = "azure"
    MOONCAKE = "mooncake"
    BURSTGPT = "burstgpt"
    BAILIAN = "bailian"


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
    parse = _PARSERS[trace_format]
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
    origin: datetime | None = None
    for line, (stamp, prompt, output) in _csv_rows(path, file, _AZURE_COLUMNS):
        when = _timestamp(path, line, stamp)
        origin = origin or when
        try:
            since: timedelta = when - origin
        except TypeError:
            raise TraceError(
                path, line, "TIMESTAMP", f"{stamp!r}: only some lines have a time zone"
            ) from None
        yield line, _csv_row(path, line, _AZURE_COLUMNS, prompt, output), since.total_seconds()


def _parse_burstgpt(path: Path, file: TextIO) -> Iterator[Row]:
    origin: float | None = None
    for line, (stamp, prompt, output) in _csv_rows(path, file, _BURSTGPT_COLUMNS):
        try:
            seconds = float(stamp)
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds):
            raise TraceError(path, line, "Timestamp", f"must be a number of seconds, got {stamp!r}")
        origin = seconds if origin is None else origin
        yield line, _csv_row(path, line, _BURSTGPT_COLUMNS, prompt, output), seconds - origin


def _csv_rows(path: Path, file: TextIO, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the wanted columns of each row, wherever they are."""
    reader = csv.reader(file)
    columns = _columns(path, next(reader, []), wanted)
    for cells in reader:
        if not cells:
            continue
        line = reader.line_num
        if len(cells) <= max(columns):
            raise TraceError(path, line, "columns", f"{len(cells)} fields where {len(columns)} are needed")
        yield line, [cells[column] for column in columns]


def _columns(path: Path, header: list[str], wanted: Sequence[str]) -> list[int]:
    names = [name.strip().removeprefix("\ufeff") for name in header]
    for column in wanted:
        if column not in names:
            raise TraceError(
                path, 1, column, f"no such column in the header ({', '.join(names) or 'empty file'})"
            )
    return [names.index(column) for column in wanted]


def _csv_row(
    path: Path, line: int, columns: Sequence[str], prompt: str, output: str
) -> Callable[[float], TimedRequest]:
    def build(arrival_s: float) -> TimedRequest:
        return TimedRequest(
            arrival_s,
            _tokens(path, line, columns[1], _integer(prompt)),
            _tokens(path, line, columns[2], _integer(output)),
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
    return _parse_hashed(path, file, "milliseconds", 1000, MOONCAKE_BLOCK_TOKENS)


def _parse_bailian(path: Path, file: TextIO) -> Iterator[Row]:
    return _parse_hashed(path, file, "seconds", 1, BAILIAN_BLOCK_TOKENS)


def _parse_hashed(path: Path, file: TextIO, unit: str, per_second: int, block_tokens: int) -> Iterator[Row]:
    origin: float | None = None
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        entry = _json_object(path, line, text)
        stamp = _field(path, line, entry, "timestamp")
        if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not math.isfinite(stamp):
            raise TraceError(path, line, "timestamp", f"must be a number of {unit}, got {stamp!r}")
        origin = stamp if origin is None else origin
        yield line, _hashed_row(path, line, entry, block_tokens), (stamp - origin) / per_second


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


def _hashed_row(
    path: Path, line: int, entry: dict[str, Any], block_tokens: int
) -> Callable[[float], TimedRequest]:
    def build(arrival_s: float) -> TimedRequest:
        prompt = _tokens(path, line, "input_length", _field(path, line, entry, "input_length"))
        output = _tokens(path, line, "output_length", _field(path, line, entry, "output_length"))
        blocks = _block_ids(path, line, entry, prompt, block_tokens)
        return TimedRequest(arrival_s, prompt, output, blocks, block_tokens)

    return build


def _block_ids(
    path: Path, line: int, entry: dict[str, Any], prompt: int, block_tokens: int
) -> tuple[int, ...]:
    ids = entry.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(block) is int and block >= 0 for block in ids):
        raise TraceError(path, line, "hash_ids", "must be a list of integers that are not negative")
    most = math.ceil(prompt / block_tokens)
    if len(ids) > most:
        raise TraceError(
            path,
            line,
            "hash_ids",
            f"{len(ids)} blocks, but {prompt} tokens fill only {most} of {block_tokens} tokens",
        )
    return tuple(ids)


def _tokens(path: Path, line: int, field: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise TraceError(path, line, field, f"must be a count of tokens, got {value!r}")
    return max(value, 1)


_PARSERS: dict[TraceFormat, Callable[[Path, TextIO], Iterator[Row]]] = {
    TraceFormat.AZURE: _parse_azure,
    TraceFormat.MOONCAKE: _parse_mooncake,
    TraceFormat.BURSTGPT: _parse_burstgpt,
    TraceFormat.BAILIAN: _parse_bailian,
}
