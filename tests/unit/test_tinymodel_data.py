"""The data of the bundled model: reproducible, split cleanly, and every answer right."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer

from disagg.tinymodel import data, words
from disagg.tinymodel.data import State, Turn
from disagg.tinymodel.tokenizer import IM_END, build_tokenizer, save_tokenizer

SESSIONS = 400


def sessions(seed: int = 7, budget: int = 400) -> list[list[Turn]]:
    rng = Random(seed)
    return [data.session(rng, budget) for _ in range(SESSIONS)]


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
        return [data.training_document(rng, 256) for _ in range(200)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_sums_are_right(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "arithmetic"):
        first, second = map(int, re.findall(r"\d+", turn.user))
        question = turn.user.lower()
        if "subtract" in question:
            expected = second - first
        elif "minus" in question or "-" in question:
            expected = first - second
        else:
            assert re.search(r"plus|\+|add", question)
            expected = first + second
        assert int(turn.assistant) == expected


def test_counts_are_right(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "count"):
        numbers = [int(n) for n in re.findall(r"\d+", turn.user)]
        answer = [int(n) for n in turn.assistant.split(" ")]
        question = turn.user.lower()
        if "after" in question or "follows" in question:
            assert answer == [numbers[0] + 1]
        elif "before" in question:
            assert answer == [numbers[0] - 1]
        else:
            start, stop = (numbers if len(numbers) > 1 else [1, *numbers])[:2]
            step = numbers[2] if len(numbers) == 3 else 1
            expected = [start]
            while expected[-1] != stop:
                expected.append(expected[-1] + (step if stop > start else -step))
                assert len(expected) <= len(answer)
            assert answer == expected


def test_copies_are_exact(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "copy"):
        assert turn.user.endswith(turn.assistant)
        assert re.fullmatch(
            r"(please )?(repeat|copy|say|echo)( this| the following| after me)?:?\s",
            turn.user.removesuffix(turn.assistant),
            re.IGNORECASE,
        )


#: In a look-ahead, because the lead of a list ("The codes are: ") looks like a key itself.
PAIR = re.compile(r"(?<![\w-])(?=([a-z]+-[a-z]+|[a-z]\d\d|[a-z]+)(?: = | is |: )(\d+|[a-z]+)(?![\w-]))")


def test_recalled_values_are_in_the_list(chats: list[list[Turn]]) -> None:
    checked = 0
    for chat in chats:
        table: dict[str, str] = {}
        for turn in chat:
            if turn.task not in ("recall", "recall_many"):
                continue
            if turn.assistant == "Okay.":
                table.update(PAIR.findall(turn.user))
                continue
            # The question is the last line or sentence; the list before it may be in the same message.
            table.update(PAIR.findall(re.sub(r"What is the \w+", "", turn.user, flags=re.IGNORECASE)))
            if turn.task == "recall":
                keys = [k for k in table if re.search(rf"(?<![\w-]){k}(?![\w-])", turn.user)]
                assert turn.assistant in {table[k] for k in keys}
            else:
                for pair in turn.assistant.split(", "):
                    key, value = pair.split(" = ")
                    assert table[key] == value
            checked += 1
    assert checked > 200


def test_json_answers_are_right(chats: list[list[Turn]]) -> None:
    for turn in turns_of(chats, "json"):
        if turn.assistant.startswith("{"):
            for key, value in json.loads(turn.assistant).items():
                assert re.search(rf"\b{key}( is | = |: ){value}\b", turn.user)
        else:
            shown = re.search(r"\{.*\}", turn.user)
            assert shown is not None
            record = json.loads(shown.group())
            question = turn.user.replace(shown.group(), "")
            asked = [key for key in record if re.search(rf"\b{key}\b", question)]
            assert turn.assistant in {str(record[key]) for key in asked}


def test_memory_returns_what_was_told(chats: list[list[Turn]]) -> None:
    for chat in chats:
        memory = [turn for turn in chat if turn.task == "memory"]
        for told, asked in zip(memory[::2], memory[1::2], strict=True):
            value = asked.assistant.split(" is ")[1].rstrip(".")
            assert value.lower() in told.user.lower()
            assert value in told.assistant


def test_a_key_names_one_value_in_a_session(chats: list[list[Turn]]) -> None:
    rng = Random(5)
    state = State()
    first = data.draw_pairs(rng, 100, state, "pair", "4")
    second = data.draw_pairs(rng, 100, state, "pair", "4")
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


def test_raw_documents_are_right() -> None:
    rng = Random(2)
    for _ in range(50):
        for question, answer in zip(*[iter(data.raw_sums(rng, 200))] * 2, strict=True):
            first, sign, second = re.findall(r"\d+|[+-]", question[0])
            expected = int(first) + int(second) if sign == "+" else int(first) - int(second)
            assert int(answer[0]) == expected
        listing, *lines = data.raw_recall(rng, 300)
        for (key, _), (value, _) in zip(lines[::2], lines[1::2], strict=True):
            assert listing[0].count("\n" + key + value) or listing[0].startswith(key + value)
        numbers = [int(n) for n in re.findall(r"\d+", "".join(text for text, _ in data.raw_count(rng, 200)))]
        steps = {after - before for before, after in itertools.pairwise(numbers)}
        assert len(steps) == 1


def test_tokenizer_round_trips_and_splits_at_segment_borders(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(data.corpus(0, documents=200))
    save_tokenizer(tokenizer, tmp_path, 2048)
    for text in ["12 + 345 = 357\n", "naïve café 日本語 🙂", " \t\r\n  x", "red-fox: 4821", "\x00\x7f", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    rng = Random(9)
    for _ in range(100):
        document = data.training_document(rng, 200)
        parts = [token for text, _ in document for token in tokenizer.encode(text).ids]
        assert parts == tokenizer.encode("".join(text for text, _ in document)).ids


def test_chat_template_renders_the_training_format(tmp_path: Path) -> None:
    save_tokenizer(build_tokenizer(data.corpus(0, documents=50)), tmp_path, 2048)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = data.session(Random(1), 200)
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
