"""Checkpoints: safetensors read straight into a model's parameters, and a checkpoint's identity.

Only safetensors is read: anything pickled would run code from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from disagg.errors import ConfigError
from disagg.model.config import read_json
from disagg.model.shard import Span

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own bound
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
SAMPLE_BYTES = 64
SAMPLES_PER_TENSOR = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: byte `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Part of a tensor: `span` along dimension `dim`, which is 0 or 1."""

    dim: int
    span: Span


def load_weights(
    folder: Path,
    targets: Mapping[str, Tensor],
    *,
    cuts: Mapping[str, Cut] | None = None,
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Copy the checkpoint's tensors into `targets`, which may be views of fused parameters.

    One tensor at a time is read through the page cache and converted on the way, so nothing is held twice.
    cuts: targets that take a part of their tensor; no more than that is read. ignored: names that may be
    there and are not read. All names, shapes and dtypes are checked first.
    Raises ConfigError naming the tensor that is missing, unknown or of a wrong shape, or the broken file.
    """
    entries = read_headers(folder)
    cuts = cuts or {}
    _check_names(folder, entries, targets, ignored)
    for name, target in targets.items():
        _check_entry(name, entries[name], _whole_shape(target, cuts.get(name)))
    by_file: dict[Path, list[str]] = {}
    for name in targets:
        by_file.setdefault(entries[name].file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    targets[name].copy_(_read(tensors, name, cuts.get(name)))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} can't be read: {error}", param="model") from None


def _whole_shape(target: Tensor, cut: Cut | None) -> tuple[int, ...]:
    shape = list(target.shape)
    if cut is not None:
        shape[cut.dim] = cut.span.total
    return tuple(shape)


def _read(tensors: Any, name: str, cut: Cut | None) -> Tensor:
    part: Tensor
    if cut is None:
        part = tensors.get_tensor(name)
    elif cut.dim == 0:
        part = tensors.get_slice(name)[cut.span.start : cut.span.end]
    else:
        part = tensors.get_slice(name)[:, cut.span.start : cut.span.end]
    return part


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint by name. Raises ConfigError where a file is missing or broken."""
    entries: dict[str, TensorEntry] = {}
    for file in checkpoint_files(folder):
        for name, entry in _read_header(file):
            if name in entries:
                raise ConfigError(f"{name} is in both {entries[name].file.name} and {file.name}", param=name)
            entries[name] = entry
    return entries


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted by name."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ConfigError(f"{folder} has neither {SINGLE} nor {INDEX}", param="model")
        return [folder / SINGLE]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX} has no weight_map", param="weight_map")
    names = set(weight_map.values())
    for name in names:
        # The index comes with the checkpoint; it must not reach outside its folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{folder / INDEX} names {name!r}, which is no file name", param="weight_map")
    return [folder / name for name in sorted(names)]


def _read_header(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ConfigError(f"{file} is no safetensors file: its header is cut off", param="model")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ConfigError(f"can't read {file}: {error.strerror}", param="model") from None
    except ValueError:
        raise ConfigError(f"{file} is no safetensors file: its header is no JSON", param="model") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{file} is no safetensors file: its header is no object", param="model")
    header.pop("__metadata__", None)
    for name, fields in header.items():
        yield name, _parse_entry(file, name, fields, 8 + length, size)


def _parse_entry(file: Path, name: str, fields: Any, base: int, size: int) -> TensorEntry:
    try:
        start, end = (base + int(offset) for offset in fields["data_offsets"])
        entry = TensorEntry(file, str(fields["dtype"]), tuple(map(int, fields["shape"])), start, end)
    except (TypeError, KeyError, ValueError):
        raise ConfigError(f"{file}: the entry of {name} is malformed", param=name) from None
    if not base <= start <= end <= size:
        raise ConfigError(f"{file}: {name} lies beyond the file's end, the file is cut off", param=name)
    return entry


def _check_names(
    folder: Path, entries: Mapping[str, TensorEntry], targets: Mapping[str, Tensor], ignored: frozenset[str]
) -> None:
    missing = sorted(targets.keys() - entries.keys())
    if missing:
        raise ConfigError(f"{folder} lacks {_some(missing)}", param=missing[0])
    # Old Llama checkpoints store rotary frequencies, which are derived from the config.
    surplus = sorted(
        name
        for name in entries.keys() - targets.keys() - ignored
        if not name.endswith(".rotary_emb.inv_freq")
    )
    if surplus:
        raise ConfigError(f"{folder} has tensors that the model does not: {_some(surplus)}", param=surplus[0])


def _check_entry(name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.dtype not in FLOAT_BYTES:
        raise ConfigError(
            f"{name} has dtype {entry.dtype}; quantised checkpoints are not supported", param=name
        )
    if entry.shape != shape:
        raise ConfigError(
            f"{name} has shape {list(entry.shape)}, the config asks for {list(shape)}", param=name
        )
    if entry.end - entry.start != math.prod(entry.shape) * FLOAT_BYTES[entry.dtype]:
        raise ConfigError(f"{entry.file}: the size of {name} does not fit its shape", param=name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def fingerprint(folder: Path) -> str:
    """Return the identity of a checkpoint: 32 hex digits, equal for copies of it in any folder.

    SHA-256 over config.json (without the keys that say where it came from), every tensor's name, dtype,
    shape and file position, every file's name and size, and SAMPLES_PER_TENSOR windows of SAMPLE_BYTES
    spread over each tensor. It costs milliseconds and tells a fine-tuned model from its base, whichever
    layers were trained; it is no protection against somebody who builds two checkpoints to collide.
    Raises ConfigError as read_headers does.
    """
    config = read_json(folder / "config.json")
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    entries = read_headers(folder)
    for file in checkpoint_files(folder):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        inside = sorted((entry.start, name, entry) for name, entry in entries.items() if entry.file == file)
        with file.open("rb") as stream:
            for start, name, entry in inside:
                digest.update(f"{name} {entry.dtype} {entry.shape} {start}\n".encode())
                for offset in _sample_offsets(entry):
                    digest.update(os.pread(stream.fileno(), min(SAMPLE_BYTES, entry.end - offset), offset))
    return digest.hexdigest()[:32]


def _sample_offsets(entry: TensorEntry) -> list[int]:
    last = max(entry.end - entry.start - SAMPLE_BYTES, 0)
    return [entry.start + last * i // (SAMPLES_PER_TENSOR - 1) for i in range(SAMPLES_PER_TENSOR)]
