"""The data of the bundled model: reproducible, split cleanly, and every answer right."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer

from disagg.tinymodel import data, words
from disagg.tinymodel.data import State, Turn
from disagg.tinymodel.tokenizer import IM_END, build_tokenizer, save_tokenizer

SESSIONS = 400
MIX = data.MIXES["far"]


def sessions(seed: int = 7, budget: int = 400) -> list[list[Turn]]:
    rng = Random(seed)
    return [data.session(rng, budget, MIX.scripts) for _ in range(SESSIONS)]


@pytest.fixture(scope="module")
def chats() -> list[list[Turn]]:
    return sessions()


def turns_of(chats: list[list[Turn]], *tasks: str) -> list[Turn]:
    found = [turn for chat in chats for turn in chat if turn.task in tasks]
    assert len(found) > 50
    return found


def test_same_seed_gives_same_documents() -> None:
    def draw(seed: int) -> list[data.Document]:
        rng = Random(seed)
        return [data.training_document(rng, 256, MIX) for _ in range(200)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_sums_are_right(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "arithmetic"):
        asked = re.fullmatch(r"(?:What is )?(\d+) ?([+-]) ?(\d+)\??", turn.user)
        assert asked is not None
        first, sign, second = int(asked[1]), asked[2], int(asked[3])
        result = first + second if sign == "+" else first - second
        assert turn.assistant == f"{first}{sign}{second}={result}"
        assert result >= 0


def test_counts_are_right(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "count"):
        asked = re.fullmatch(r"Count (?:from (\d+) )?to (\d+)\.", turn.user)
        assert asked is not None
        expected, answer = int(asked[1] or 1), turn.assistant.removesuffix(".")
        assert answer != turn.assistant
        for number in answer.split(" "):
            assert int(number) == expected
            expected += 1
        assert expected == int(asked[2]) + 1


def test_copies_are_exact_and_name_nothing_twice(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "copy"):
        assert turn.user == f"Repeat: {turn.assistant}"
        copied = turn.assistant.removesuffix(".").split(" ")
        assert len(copied) == len(set(copied))


def test_recalled_values_are_in_the_list(chats: list[list[Turn]]) -> None:
    checked = 0
    for chat in chats:
        table: dict[str, str] = {}
        for turn in chat:
            if turn.task not in ("recall", "recall_many"):
                continue
            listed = re.findall(r"(\w+)=(\d{4})", turn.user)
            assert not table.keys() & {key for key, _ in listed}, "a key has two values in one session"
            table.update(listed)
            asked = re.search(r"What (?:is the code|are the codes) for ([a-z, ]+)\?$", turn.user)
            assert asked is not None
            keys = asked[1].split(", ")
            assert turn.assistant == ", ".join(f"{key}={table[key]}" for key in keys)
            checked += 1
    assert checked > 200


def test_json_answers_are_right(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "json"):
        if turn.user.startswith("JSON: "):
            facts = dict(fact.split("=") for fact in turn.user.removeprefix("JSON: ").split(", "))
            made = json.loads(turn.assistant)
            assert {key: str(value) for key, value in made.items()} == facts
        else:
            shown, question = turn.user.split("\n")
            asked = question.removeprefix("What is the ").removesuffix("?")
            assert json.loads("{" + turn.assistant + "}") == {asked: json.loads(shown)[asked]}


def test_memory_returns_what_was_told(chats: list[list[Turn]]) -> None:
    for chat in chats:
        memory = [turn for turn in chat if turn.task == "memory"]
        for told, asked in zip(memory[::2], memory[1::2], strict=True):
            assert told.assistant == f"Okay. {asked.assistant}"
            fact, value = asked.assistant.removeprefix("Your ").removesuffix(".").split(" is ")
            assert f"{fact} is {value}".lower() in told.user.lower()
            assert fact in asked.user.lower()


def test_a_key_names_one_value_in_a_session(chats: list[list[Turn]]) -> None:
    rng = Random(5)
    state = State()
    first = data.draw_pairs(rng, 100, state)
    second = data.draw_pairs(rng, 100, state)
    keys = [key for key, _ in first + second]
    assert len(keys) == len(set(keys)) == 200


def test_training_and_held_out_problems_are_disjoint() -> None:
    def problems(held_out: bool) -> dict[str, set[str]]:
        rng = Random(11)
        seen: dict[str, set[str]] = {}
        for script in (data.recall_script, data.copy_script, data.json_script):
            turns = [script(rng, 300, State(held_out=held_out))[0] for _ in range(400)]
            seen[script.__name__] = {turn.user for turn in turns}
        seen["sums"] = {str(data.draw_sum(rng, held_out)) for _ in range(3000)}
        return seen

    train, held = problems(False), problems(True)
    for name, questions in train.items():
        assert questions
        assert not questions & held[name]
    for _, trained, kept in words.INTENTS.values():
        assert not set(trained) & set(kept)
    assert not set(words.FALLBACK_PHRASES) & set(words.FALLBACK_HELD)


def in_pairs(document: data.Document) -> Iterator[tuple[data.Segment, data.Segment]]:
    return zip(document[::2], document[1::2], strict=True)


def test_raw_documents_are_right() -> None:
    rng = Random(2)
    for _ in range(50):
        for (question, _), (answer, _) in in_pairs(data.raw_sums(rng, 200)):
            first, sign, second = re.findall(r"\d+|[+-]", question)
            expected = int(first) + int(second) if sign == "+" else int(first) - int(second)
            assert int(answer) == expected
        listing, *lines = data.raw_recall(rng, 300)
        for (key, _), (value, _) in in_pairs(lines):
            assert f"\n{key}{value}" in f"\n{listing[0]}"
        numbers = [int(n) for n in re.findall(r"\d+", "".join(text for text, _ in data.raw_count(rng, 200)))]
        assert {after - before for before, after in itertools.pairwise(numbers)} == {1}


def test_tokenizer_round_trips_and_splits_at_segment_borders(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(data.corpus(0, documents=200))
    save_tokenizer(tokenizer, tmp_path, 2048)
    for text in ["12 + 345=357\n", "naïve café 日本語 🙂", " \t\r\n  x", "red-fox: 4821", "\x00\x7f", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    rng = Random(9)
    for _ in range(100):
        document = data.training_document(rng, 200, MIX)
        parts = [token for text, _ in document for token in tokenizer.encode(text).ids]
        assert parts == tokenizer.encode("".join(text for text, _ in document)).ids


def test_chat_template_renders_the_training_format(tmp_path: Path) -> None:
    save_tokenizer(build_tokenizer(data.corpus(0, documents=50)), tmp_path, 2048)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = data.session(Random(1), 200, MIX.scripts)
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.assistant})
    document = "".join(text for text, _ in data.chat_document(turns, system="Be brief."))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == document
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt == data.render_prompt(messages[:-1])
    assert document == prompt + turns[-1].assistant + IM_END + "\n"
    assert tokenizer.eos_token == IM_END
