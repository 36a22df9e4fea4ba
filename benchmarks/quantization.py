"""What int8 and int4 weights cost in accuracy and save in memory, on the bundled model.

    python benchmarks/quantization.py --items 50 --json out.json

The model answers the held-out items of its own evaluation with each kind of weights, greedy. A row's value
is the share of answers that are right to the last token; its ratio is to the float32 weights of the same
run. Two more rows say how far the quantised distributions are from the full ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from disagg import LLM, SamplingParams
from disagg.bench.machine import describe_machine
from disagg.config import Quantization
from disagg.model.native.decoder import NativeDecoder
from disagg.tinymodel.evaluate import Item, suites

KINDS: tuple[Quantization | None, ...] = (None, "int8", "int4")
TOP = 20


def answers(llm: LLM, items: list[Item]) -> list[tuple[int, ...]]:
    """Return the ids of the right answers, end mark included."""
    tokenizer = llm.get_tokenizer()
    return [tuple(tokenizer.encode(item.answer, add_special_tokens=False)) for item in items]


def accuracy(llm: LLM, items: list[Item]) -> float:
    """Return the share of items that greedy decoding answers exactly."""
    right = answers(llm, items)
    params = [SamplingParams(temperature=0.0, max_tokens=len(ids), ignore_eos=True) for ids in right]
    made = llm.generate([item.prompt for item in items], params, use_tqdm=False)
    hits = [result.outputs[0].token_ids == ids for result, ids in zip(made, right, strict=True)]
    return sum(hits) / len(hits)


def first_token_logprobs(llm: LLM, items: list[Item]) -> list[dict[int, float]]:
    """Return the TOP most likely first tokens of each answer, with their log-probabilities."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=TOP)
    made = llm.generate([item.prompt for item in items], params, use_tqdm=False)
    logprobs = [result.outputs[0].logprobs for result in made]
    return [dict(entry[0].top) for entry in logprobs if entry]


def shift(full: list[dict[int, float]], other: list[dict[int, float]]) -> float:
    """Return the median change of the log-probability of the full model's most likely token."""
    changes = []
    for before, after in zip(full, other, strict=True):
        best = max(before, key=before.__getitem__)
        changes.append(abs(after.get(best, min(after.values())) - before[best]))
    return statistics.median(changes)


def measure(count: int, seed: int, console: Console) -> list[dict[str, Any]]:
    models = {kind: LLM(quantization=kind, kv_cache_memory=256 << 20) for kind in KINDS}
    rows: list[dict[str, Any]] = []
    everything: list[Item] = []
    for suite, items in suites(count, seed):
        everything += items
        values = {kind: accuracy(llm, items) for kind, llm in models.items()}
        console.print(f"{suite}: {values}", style="dim")
        rows += [
            _row(f"accuracy/{suite}", kind, value, "exact", values[None]) for kind, value in values.items()
        ]
    full = first_token_logprobs(models[None], everything)
    for kind, llm in models.items():
        decoder = llm.runner.model
        if isinstance(decoder, NativeDecoder):
            rows.append(_row("weights", kind, decoder.weight_bytes / 2**20, "MiB", None))
        if kind is not None:
            change = shift(full, first_token_logprobs(llm, everything))
            rows.append(_row("logprob_shift", kind, change, "nats, median", None))
    return rows


def _row(
    name: str, kind: Quantization | None, value: float, unit: str, reference: float | None
) -> dict[str, Any]:
    row = {
        "name": f"quantization/{name}/{kind or 'float32'}",
        "value": round(value, 4),
        "unit": unit,
        "runs": 1,
    }
    if reference:
        row |= {"peer": round(reference, 4), "ratio": round(value / reference, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=50, help="items per task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = describe_machine()
    rows = measure(arguments.items, arguments.seed, Console(stderr=True))
    table = Table("what", "value", "unit", "of float32", title=f"{machine['cpu']}, {machine['cores']} cores")
    for row in rows:
        ratio = f"{row['ratio']:.1%}" if "ratio" in row else ""
        table.add_row(row["name"], f"{row['value']:.4g}", row["unit"], ratio)
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
