"""Measure a saved model on held-out problems: ``python -m disagg.tinymodel.evaluate DIR``.

An item counts as right only if every token of the greedy answer and its end mark are right. That is
checked in one pass over prompt and right answer: as long as each token is the most likely one, greedy
decoding makes exactly this text. The margin is the difference between the two largest logits at the
answer tokens of right items; it says how much numerical noise a greedy answer survives.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer

from disagg.tinymodel import data, words
from disagg.tinymodel.data import State, Turn
from disagg.tinymodel.tokenizer import BOS, IM_END

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Item:
    """A prompt and its right continuation, both as text; the continuation includes the end mark."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Result of one suite; margins are in logits, lengths in tokens."""

    suite: str
    items: int
    accuracy: float
    token_accuracy: float
    prompt_tokens: float
    answer_tokens: float
    smallest_margin: float
    median_margin: float


def chat_item(turns: list[Turn]) -> Item:
    """The last turn as the question, the turns before it as history with their right answers."""
    messages: list[dict[str, str]] = []
    for turn in turns[:-1]:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.assistant}]
    messages.append({"role": "user", "content": turns[-1].user})
    return Item(data.render_prompt(messages), turns[-1].assistant + IM_END)


def _length(turn: Turn) -> int:
    return data.rough_tokens(turn.assistant)


def _held() -> State:
    return State(held_out=True)


def recall_item(rng: Random, tokens: int, many: bool = False) -> Item:
    """A question about a list of about ``tokens`` tokens."""
    task = "recall_many" if many else "recall"
    while True:
        first = data.recall_script(rng, tokens + (150 if many else 1), _held(), list_room=tokens)[0]
        if first.task == task:
            return chat_item([first])


def script_item(
    script: Callable[[Random, int, State], list[Turn]], rng: Random, room: int, shortest: int = 0
) -> Item:
    """A script's last turn, with an answer of at least ``shortest`` tokens."""
    while True:
        turns = script(rng, room, _held())
        if _length(turns[-1]) >= shortest:
            return chat_item(turns)


def fixed_items(held_out: bool) -> list[Item]:
    """Every phrase of the phrase book that is (not) held out, with its answer."""
    items: list[Item] = []
    for answer, train, held in words.INTENTS.values():
        items += [chat_item([Turn("talk", phrase, answer)]) for phrase in (held if held_out else train)]
    unknown = words.FALLBACK_HELD if held_out else words.FALLBACK_PHRASES
    return items + [chat_item([Turn("fallback", phrase, words.FALLBACK)]) for phrase in unknown]


def raw_item(document: data.Document, rng: Random) -> Item:
    """A plain-text document cut before one supervised segment in its second half."""
    spots = [i for i, (_, supervised) in enumerate(document) if supervised and i >= len(document) // 2]
    spot = rng.choice(spots)
    return Item("".join(text for text, _ in document[:spot]), document[spot][0].removesuffix(BOS))


def suites(count: int, seed: int) -> Iterator[tuple[str, list[Item]]]:
    """All suites with ``count`` items each (the phrase book has its own number)."""
    makers: dict[str, Callable[[Random], Item]] = {
        "recall, 100 tokens": lambda rng: recall_item(rng, 100),
        "recall, 500 tokens": lambda rng: recall_item(rng, 500),
        "recall, 1,000 tokens": lambda rng: recall_item(rng, 1000),
        "recall, 1,500 tokens": lambda rng: recall_item(rng, 1500),
        "recall of several, 500 tokens": lambda rng: recall_item(rng, 500, many=True),
        "recall, plain text, 1,000 tokens": lambda rng: raw_item(data.raw_recall(rng, 1000), rng),
        "copy, up to 40 tokens": lambda rng: script_item(data.copy_script, rng, 95),
        "copy, 150 to 480 tokens": lambda rng: script_item(data.copy_script, rng, 1000, 150),
        "count, up to 50 tokens": lambda rng: script_item(data.count_script, rng, 70),
        "count, 200 to 1,100 tokens": lambda rng: script_item(data.count_script, rng, 1000, 200),
        "count, plain text, 1,000 tokens": lambda rng: raw_item(data.raw_count(rng, 500), rng),
        "add and subtract": lambda rng: script_item(data.sum_script, rng, 60),
        "JSON": lambda rng: script_item(data.json_script, rng, 60),
        "memory over turns": lambda rng: script_item(data.memory_script, rng, 60),
        "unknown questions": lambda rng: chat_item(
            [Turn("fallback", data.fallback_prompt(rng, True), words.FALLBACK)]
        ),
    }
    for name, make in makers.items():
        rng = Random(f"{seed} {name}")
        yield name, [make(rng) for _ in range(count)]
    yield "phrase book, trained phrases", fixed_items(held_out=False)
    yield "phrase book, new phrases", fixed_items(held_out=True)


@dataclass(frozen=True)
class Trial:
    """What the model says to one item, token by token, when all tokens before are the right ones."""

    item: Item
    prompt_tokens: int
    right: list[int]
    said: list[int]
    #: Difference of the two largest logits at each token of the answer.
    margins: list[float]


def _batches(encoded: list[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
    """Indices of items of similar length, so many that a batch has about ``BATCH_TOKENS`` tokens."""
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * sum(map(len, encoded[index])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def try_items(model: Any, tokenizer: Tokenizer, items: list[Item]) -> list[Trial]:
    """The trial of every item, in the order of ``items``."""
    encoded = [(tokenizer.encode(item.prompt).ids, tokenizer.encode(item.answer).ids) for item in items]
    trials: dict[int, Trial] = {}
    for batch in _batches(encoded):
        rows = [torch.tensor(encoded[i][0] + encoded[i][1]) for i in batch]
        # Attention is causal, so what pads a row at its end changes nothing before it.
        hidden = model.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).last_hidden_state
        for i, row in zip(batch, hidden, strict=True):
            prompt, answer = encoded[i]
            logits = model.lm_head(row[len(prompt) - 1 : len(prompt) + len(answer) - 1])
            best = logits.topk(2, dim=-1)
            margins = (best.values[:, 0] - best.values[:, 1]).tolist()
            trials[i] = Trial(items[i], len(prompt), answer, best.indices[:, 0].tolist(), margins)
    return [trials[i] for i in range(len(items))]


def score(suite: str, trials: list[Trial]) -> Score:
    """The score of one suite."""
    hits = [sum(a == b for a, b in zip(t.right, t.said, strict=True)) for t in trials]
    tokens = sum(len(t.right) for t in trials)
    margins = sorted(m for t in trials if t.right == t.said for m in t.margins) or [0.0]
    return Score(
        suite,
        len(trials),
        sum(t.right == t.said for t in trials) / len(trials),
        sum(hits) / tokens,
        sum(t.prompt_tokens for t in trials) / len(trials),
        tokens / len(trials),
        margins[0],
        margins[len(margins) // 2],
    )


def load(directory: Path) -> tuple[Any, Tokenizer]:
    """The model as ``transformers`` loads it, and the bare tokenizer."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    return model, Tokenizer.from_file(str(directory / "tokenizer.json"))


def table(scores: list[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| task (held-out items) | items | exact answers | right tokens | prompt tokens | answer tokens "
        "| smallest margin | median margin |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s.suite} | {s.items} | {s.accuracy:.1%} | {s.token_accuracy:.2%} | {s.prompt_tokens:.0f} "
        f"| {s.answer_tokens:.0f} | {s.smallest_margin:.2f} | {s.median_margin:.1f} |"
        for s in scores
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--items", type=int, default=200, help="items per suite")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong items per suite")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.directory)
    scores: list[Score] = []
    for name, items in suites(args.items, args.seed):
        trials = try_items(model, tokenizer, items)
        scores.append(score(name, trials))
        for trial in [t for t in trials if t.right != t.said][: args.show_wrong]:
            said = tokenizer.decode(trial.said, skip_special_tokens=False)
            print(
                f"WRONG {name}\n  prompt ...{trial.item.prompt[-160:]!r}\n"
                f"  right {trial.item.answer!r}\n  model {said!r}"
            )
    print(table(scores))
    if args.json:
        args.json.write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n")


if __name__ == "__main__":
    main()
