"""Tables in the format of splitwise-sim's performance model, and its way of reading them.

Source of the model: Patel et al., "Splitwise" (ISCA '24) and its simulator (Mutinifni/splitwise-sim, MIT):
medians of the measured times by tokens in the batch (prompt_size * batch_size), linear between them and
beyond both ends. A batch of prompts costs the prompt time at its tokens, a batch of decodes the token time
at its number of requests, a mixed batch 1.1 times the prompt time at all its tokens.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from disagg.errors import ConfigError
from disagg.sim.costs.base import Chunk

_COLUMNS = (
    *("model", "hardware", "tensor_parallel", "prompt_size", "batch_size"),
    *("prompt_time", "token_time"),
)
MIXED_FACTOR = 1.1
# Limits of one step in splitwise-sim.
BATCH_TOKENS = 2048


class Interpolation:
    """Piecewise linear through given points, the outermost pieces going on beyond the ends."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """`points`: (x, y), at least two, x strictly rising."""
        self._x = [x for x, _ in points]
        self._y = [y for _, y in points]
        self._cache: dict[int, float] = {}

    def __call__(self, x: int) -> float:
        value = self._cache.get(x)
        if value is None:
            right = min(max(bisect_right(self._x, x), 1), len(self._x) - 1)
            x0, x1, y0, y1 = self._x[right - 1], self._x[right], self._y[right - 1], self._y[right]
            value = self._cache[x] = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return value


class TableCost:
    """Step times from measured prompt and token times, in seconds over tokens in the batch.

    batch_tokens: splitwise-sim puts prompts into one batch up to this many tokens, and pauses the decodes
    beside a prompt that does not fit. The live Scheduler neither splits such a step nor pauses decodes, so
    the step is priced as the batches that splitwise-sim would run in turn, and the decodes' one token comes
    free with them if there is no room for it. None prices every step as one batch.
    """

    def __init__(
        self,
        prompt_s: Interpolation,
        token_s: Interpolation,
        *,
        mixed_factor: float = MIXED_FACTOR,
        batch_tokens: int | None = BATCH_TOKENS,
    ) -> None:
        self._prompt_s = prompt_s
        self._token_s = token_s
        self._mixed_factor = mixed_factor
        self._batch_tokens = batch_tokens

    def step_s(self, chunks: Sequence[Chunk], num_decodes: int, decode_context: int) -> float:
        if not chunks:
            return self._token_s(num_decodes)
        *earlier, last = self._groups(chunks)
        seconds = sum(map(self._prompt_s, earlier))
        limit = self._batch_tokens
        if num_decodes == 0 or (limit is not None and last + num_decodes > limit):
            return seconds + self._prompt_s(last)
        return seconds + self._mixed_factor * self._prompt_s(last + num_decodes)

    def _groups(self, chunks: Sequence[Chunk]) -> list[int]:
        """Return the tokens of the prompt batches, each within the limit or of one prompt."""
        limit = self._batch_tokens
        groups: list[int] = []
        for chunk in chunks:
            if groups and (limit is None or groups[-1] + chunk.num_tokens <= limit):
                groups[-1] += chunk.num_tokens
            else:
                groups.append(chunk.num_tokens)
        return groups

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        return self._token_s(num_decodes), 0.0


def load_table(
    path: Path,
    model: str,
    hardware: str,
    tensor_parallel: int,
    *,
    batch_tokens: int | None = BATCH_TOKENS,
) -> TableCost:
    """Read one model on one kind of GPU. Raises ConfigError naming the column, or what the file has."""
    prompt: dict[int, list[float]] = {}
    token: dict[int, list[float]] = {}
    wanted, present = (model, hardware, tensor_parallel), set()
    for line, row in _rows(path):
        key = (row["model"], row["hardware"], int(_number(path, line, row, "tensor_parallel")))
        present.add(key)
        if key != wanted:
            continue
        tokens = int(_number(path, line, row, "prompt_size") * _number(path, line, row, "batch_size"))
        prompt.setdefault(tokens, []).append(_number(path, line, row, "prompt_time") / 1000)
        token.setdefault(tokens, []).append(_number(path, line, row, "token_time") / 1000)
    if len(prompt) < 2:
        known = ", ".join(f"{name} on {gpu} (TP {tp})" for name, gpu, tp in sorted(present))
        raise ConfigError(
            f"cost.file: {path} has fewer than two points for {model} on {hardware} "
            f"with tensor_parallel_size {tensor_parallel}; it has {known or 'nothing'}",
            param="cost.file",
        )
    return TableCost(_medians(prompt), _medians(token), batch_tokens=batch_tokens)


def _medians(samples: dict[int, list[float]]) -> Interpolation:
    return Interpolation([(tokens, median(times)) for tokens, times in sorted(samples.items())])


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            for column in _COLUMNS:
                if column not in (reader.fieldnames or ()):
                    raise ConfigError(f"cost.file: {path} has no column {column}", param="cost.file")
            return [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ConfigError(f"cost.file: can't read {path}: {error.strerror}", param="cost.file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cost.file: {path} is not UTF-8 text", param="cost.file") from None


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise ConfigError(
            f"cost.file: {path}:{line}: {column} must be a number, got {row[column]!r}", param="cost.file"
        ) from None
