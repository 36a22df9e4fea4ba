"""Data generator of the bundled model: chats and plain texts with answers that can be checked.

Everything is drawn from a ``random.Random``, so the same seed gives the same data. A *script* is a list
of turns that belong together (a list of codes, then questions about it). A *session* is a chat made of
scripts until a token budget is used up; a *document* is a list of ``(text, supervised)`` segments.

Few ways to ask are taught, so that a short training goes into the answers. Most answers restate what was
asked ("fox=4821", "12+34=46"): the last few tokens then say what comes next, wherever it is found.

Problems are split by a checksum of what is asked (``is_held_out``): the training stream never contains
a held-out problem, so the accuracy of ``evaluate.py`` is not recall of the training data.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from disagg.tinymodel import words
from disagg.tinymodel.tokenizer import BOS, IM_END, IM_START

Segment = tuple[str, bool]
Document = list[Segment]
Pairs = list[tuple[str, str]]

#: One problem in this many is kept for the held-out measurement.
HELD_OUT_SHARE = 10
LARGEST_TERM = 99
LARGEST_COUNT = 999


@dataclass(frozen=True)
class Turn:
    """One question and its one right answer; ``task`` names the kind of problem."""

    task: str
    user: str
    assistant: str


@dataclass
class State:
    """What a session has used so far, so that later questions have a single right answer."""

    held_out: bool = False
    used_keys: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)


def rough_tokens(text: str) -> int:
    """Number of pre-tokens of ``text``: the token count when every word is one token."""
    return len(re.findall(r"[^\W\d_]+|[\W\d_]", text))


def is_held_out(*problem: object) -> bool:
    """Whether the problem belongs to the held-out part; a fixed function of its description."""
    return zlib.crc32(repr(problem).encode()) % HELD_OUT_SHARE == 0


def log_uniform(rng: Random, low: int, high: int) -> int:
    """An integer in ``[low, high]`` whose logarithm is uniform: short and long are both common."""
    if high <= low:
        return low
    return min(high, int(low * ((high + 1) / low) ** rng.random()))


def vary(rng: Random, phrase: str) -> str:
    """A spelling variant of ``phrase``: without its last mark, in lower case, or with another mark."""
    kind = rng.random()
    bare = phrase.rstrip("?.!")
    if kind < 0.6:
        return phrase
    if kind < 0.75:
        return bare.lower()
    return phrase.lower() if kind < 0.85 else bare + rng.choice(["", ".", "!", "?"])


# --- recall -----------------------------------------------------------------------------------------

#: Tokens of ``key=1234`` and the separator after it.
PAIR_TOKENS = 7


def draw_pairs(rng: Random, count: int, state: State) -> Pairs:
    """Up to ``count`` (word, four digits) pairs with keys that are new to the session."""
    free = [word for word in words.ITEMS if word not in state.used_keys]
    keys = rng.sample(free, min(count, len(free)))
    state.used_keys.update(keys)
    return [(key, str(rng.randrange(1000, 10000))) for key in keys]


def _one_question(rng: Random, pairs: Pairs) -> Turn:
    key, value = rng.choice(pairs)
    return Turn("recall", f"What is the code for {key}?", f"{key}={value}")


def _many_question(rng: Random, pairs: Pairs, room: int) -> Turn:
    asked = rng.sample(pairs, min(len(pairs), log_uniform(rng, 2, max(2, min(10, room // 12)))))
    keys = ", ".join(key for key, _ in asked)
    answer = ", ".join(f"{key}={value}" for key, value in asked)
    return Turn("recall_many", f"What are the codes for {keys}?", answer)


def recall_questions(rng: Random, pairs: Pairs, room: int) -> list[Turn]:
    """Questions about ``pairs`` that fill about ``room`` tokens; at least one."""
    turns: list[Turn] = []
    while room > 0 or not turns:
        many = len(pairs) > 2 and rng.random() < 0.4
        turns.append(_many_question(rng, pairs, room) if many else _one_question(rng, pairs))
        room -= rough_tokens(turns[-1].user + turns[-1].assistant) + 10
    return turns


def recall_script(rng: Random, room: int, state: State, list_room: int | None = None) -> list[Turn]:
    """A list of codes and questions about it; the list takes ``list_room`` tokens, default log-uniform.

    Nothing when the session has used up the keys.
    """
    size = list_room or log_uniform(rng, 2 * PAIR_TOKENS, max(2 * PAIR_TOKENS, room * 3 // 4))
    while True:
        fresh = State(used_keys=set(state.used_keys))
        pairs = draw_pairs(rng, max(2, size // PAIR_TOKENS), fresh)
        if not pairs:
            return []
        if is_held_out("recall", pairs) == state.held_out:
            break
    state.used_keys |= fresh.used_keys
    separator = "\n" if rng.random() < 0.75 else ", "
    listing = "Codes:\n" + separator.join(f"{key}={value}" for key, value in pairs)
    first, *later = recall_questions(rng, pairs, room - rough_tokens(listing) - 10)
    return [Turn(first.task, f"{listing}\n{first.user}", first.assistant), *later]


# --- copy -------------------------------------------------------------------------------------------

SENTENCE_WORDS = sorted(
    {w for answer, _, _ in words.INTENTS.values() for w in re.findall(r"[A-Za-z]+", answer)}
    | {w for phrase in words.FALLBACK_PHRASES for w in re.findall(r"[A-Za-z]+", phrase)}
)
COPY_WORDS = sorted({*words.ITEMS, *SENTENCE_WORDS})


def made_up_word(rng: Random) -> str:
    """A pronounceable word that is in no list, so it is spelled by several tokens."""
    parts = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(parts) + rng.choice(["", "", "n", "r", "x", "sh"])


def copy_text(rng: Random, room: int) -> str:
    """A text of at most about ``room`` tokens to be repeated; no word of it comes twice."""
    if rng.random() < 0.15:
        return " ".join(
            {made_up_word(rng): None for _ in range(log_uniform(rng, 1, max(1, min(8, room // 5))))}
        )
    count = log_uniform(rng, 1, max(1, min(len(COPY_WORDS), room // 2)))
    return " ".join(rng.sample(COPY_WORDS, count)) + rng.choice(["", "", "", "."])


def copy_script(rng: Random, room: int, state: State) -> list[Turn]:
    """One request to repeat a text."""
    while True:
        text = copy_text(rng, max(2, (room - 15) // 2))
        if is_held_out("copy", text) == state.held_out:
            return [Turn("copy", f"Repeat: {text}", text)]


# --- counting ---------------------------------------------------------------------------------------


def count_script(rng: Random, room: int, state: State) -> list[Turn]:
    """One request to count up to a bound.

    The answer ends with a full stop as the question does: the bound is the number that has one.
    """
    while True:
        start = 1 if rng.random() < 0.3 else log_uniform(rng, 1, LARGEST_COUNT - 1)
        stop = start + log_uniform(rng, 1, max(2, min(400, (room - 20) // 3)))
        if stop <= LARGEST_COUNT and is_held_out("count", start, stop) == state.held_out:
            break
    short = start == 1 and rng.random() < 0.5
    question = f"Count to {stop}." if short else f"Count from {start} to {stop}."
    return [Turn("count", question, " ".join(map(str, range(start, stop + 1))) + ".")]


# --- arithmetic -------------------------------------------------------------------------------------

SUM_QUESTIONS = ["What is {0}{1}{2}?", "What is {0} {1} {2}?", "{0}{1}{2}"]


def draw_sum(rng: Random, held_out: bool) -> tuple[int, str, int]:
    """A sum, or a difference that is not negative, of the asked side of the split, as (a, sign, b)."""
    while True:
        a, b = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
        sign = rng.choice("+-")
        if sign == "-" and a < b:
            a, b = b, a
        if is_held_out("sum", a, sign, b) == held_out:
            return a, sign, b


def solve_sum(a: int, sign: str, b: int) -> int:
    """``a + b`` or ``a - b``."""
    return a + b if sign == "+" else a - b


def sum_script(rng: Random, room: int, state: State) -> list[Turn]:
    """One addition or subtraction; the answer restates it."""
    a, sign, b = draw_sum(rng, state.held_out)
    question = rng.choice(SUM_QUESTIONS).format(a, sign, b)
    return [Turn("arithmetic", question, f"{a}{sign}{b}={solve_sum(a, sign, b)}")]


# --- JSON -------------------------------------------------------------------------------------------

FIELDS: dict[str, Sequence[str | int]] = {
    "name": words.FIRST_NAMES,
    "city": words.CITIES,
    "job": words.JOBS,
    "pet": words.PETS,
    "food": words.FOODS,
    "color": words.COLORS,
    "age": range(1, 100),
    "id": range(100, 10000),
    "size": range(1, 100),
    "score": range(0, 1000),
}


def draw_record(rng: Random) -> dict[str, str | int]:
    """A flat record of one to six fields."""
    return {name: rng.choice(FIELDS[name]) for name in rng.sample(list(FIELDS), rng.randint(1, 6))}


def json_script(rng: Random, room: int, state: State) -> list[Turn]:
    """Facts to be written as a JSON object, or a JSON object of which a field is asked."""
    while True:
        record = draw_record(rng)
        if is_held_out("json", record) == state.held_out:
            break
    text = json.dumps(record)
    if rng.random() < 0.6:
        return [Turn("json", "JSON: " + ", ".join(f"{k}={v}" for k, v in record.items()), text)]
    asked = rng.choice(list(record))
    return [Turn("json", f"{text}\nWhat is the {asked}?", json.dumps({asked: record[asked]})[1:-1])]


# --- talk -------------------------------------------------------------------------------------------

#: Words whose questions have an answer of their own, so they never stand in a text without one.
CONCEPTS = set("disagg prefill decode token tokens tokenizer ray kv cache you your my name tiny".split())
FALLBACK_WORDS = [w for w in SENTENCE_WORDS if w.lower() not in CONCEPTS]


def talk_script(rng: Random, room: int, state: State) -> list[Turn]:
    """A greeting, a question about the model or disagg, or something the model does not understand."""
    if rng.random() < 0.25:
        return [Turn("fallback", fallback_prompt(rng, state.held_out), words.FALLBACK)]
    names = [n for n in words.INTENTS if n != "noname" or "name" not in state.told]
    # An intent is as common as it has phrases, so that each phrase is seen equally often.
    intent = rng.choices(names, [len(words.INTENTS[n][1]) for n in names])[0]
    answer, train, held = words.INTENTS[intent]
    if state.held_out:
        return [Turn(intent, rng.choice(held), answer)]
    return [Turn(intent, vary(rng, rng.choice(train)), answer)]


def _bare(text: str) -> str:
    return text.lower().strip("?.! ")


KNOWN_PHRASES = {_bare(p) for _, train, held in words.INTENTS.values() for p in [*train, *held]}


def _gibberish(rng: Random) -> str:
    """Characters of several scripts, so that every byte is seen in training."""
    scripts = [(33, 126), (161, 0x2FF), (0x4E00, 0x4EFF)]
    length = rng.randint(2, 8)
    return "".join(chr(rng.choice([rng.randint(*script) for script in scripts])) for _ in range(length))


def fallback_prompt(rng: Random, held_out: bool) -> str:
    """Something that is in no phrase book and no task."""
    if held_out and rng.random() < 0.5:
        return rng.choice(words.FALLBACK_HELD)
    while True:
        kind = rng.random()
        if kind < 0.4 and not held_out:
            return vary(rng, rng.choice(words.FALLBACK_PHRASES))
        fill = [rng.choice(words.ITEMS if rng.random() < 0.6 else FALLBACK_WORDS) for _ in range(4)]
        text = _gibberish(rng) if kind > 0.92 else rng.choice(words.FALLBACK_TEMPLATES).format(*fill)
        if _bare(text) not in KNOWN_PHRASES and is_held_out("fallback", text) == held_out:
            return vary(rng, text)


FACTS: dict[str, Sequence[str | int]] = {
    "name": words.FIRST_NAMES,
    "favorite color": words.COLORS,
    "favorite food": words.FOODS,
    "pet": words.PETS,
    "job": words.JOBS,
    "city": words.CITIES,
    "lucky number": range(1, 1000),
}


def memory_script(rng: Random, room: int, state: State) -> list[Turn]:
    """A fact that the user tells and asks back in a later turn, with other turns in between."""
    free = [fact for fact in FACTS if fact not in state.told]
    if not free:
        return sum_script(rng, room, state)
    fact = rng.choice(free)
    state.told.add(fact)
    value = rng.choice(FACTS[fact])
    answer = f"Your {fact} is {value}."
    between: list[Turn] = []
    for _ in range(rng.choice([0, 1, 2])):
        between += rng.choice([sum_script, json_script, talk_script])(rng, 60, state)
    told, asked = vary(rng, f"My {fact} is {value}."), vary(rng, f"What is my {fact}?")
    return [Turn("memory", told, f"Okay. {answer}"), *between, Turn("memory", asked, answer)]


# --- sessions and documents -------------------------------------------------------------------------

SCRIPTS = {
    "recall": recall_script,
    "copy": copy_script,
    "count": count_script,
    "arithmetic": sum_script,
    "json": json_script,
    "talk": talk_script,
    "memory": memory_script,
}


def session(rng: Random, budget: int, weights: dict[str, int]) -> list[Turn]:
    """Turns of a training chat that fill about ``budget`` tokens."""
    state = State()
    turns: list[Turn] = []
    room = budget
    while room > 0:
        name = rng.choices(list(weights), list(weights.values()))[0]
        script = SCRIPTS[name](rng, room, state)
        turns += script
        room -= sum(rough_tokens(t.user + t.assistant) + 10 for t in script)
    return turns


def render_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The text of the chat template for ``messages`` with the assistant's turn opened."""
    body = "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)
    return f"{body}{IM_START}assistant\n"


def chat_document(turns: Sequence[Turn], system: str | None = None) -> Document:
    """Segments of a chat; the answers and their end marks are supervised."""
    document: Document = [(f"{IM_START}system\n{system}{IM_END}\n", False)] if system else []
    for turn in turns:
        document.append((f"{IM_START}user\n{turn.user}{IM_END}\n{IM_START}assistant\n", False))
        document.append((turn.assistant + IM_END, True))
        document.append(("\n", False))
    return document


def raw_recall(rng: Random, budget: int) -> Document:
    """Lines ``key=value``, then some of them again in another order; the values are supervised."""
    pairs = draw_pairs(rng, log_uniform(rng, 4, max(4, budget * 3 // 4 // PAIR_TOKENS)), State())
    document: Document = [("".join(f"{k}={v}\n" for k, v in pairs), False)]
    for _ in range(max(1, budget // PAIR_TOKENS - len(pairs))):
        key, value = rng.choice(pairs)
        document += [(f"{key}=", False), (f"{value}\n", True)]
    return document


def raw_copy(rng: Random, budget: int) -> Document:
    """A line, then the same line again and again; every repetition is supervised."""
    text = copy_text(rng, max(4, budget // 2))
    times = budget // (rough_tokens(text) + 1)
    return [(text + "\n", False), ((text + "\n") * max(1, min(8, times - 1)), True)]


def raw_count(rng: Random, budget: int) -> Document:
    """Counting without a frame; it runs to the end of the window, or to the largest number."""
    start = 1 if rng.random() < 0.4 else log_uniform(rng, 1, LARGEST_COUNT - 100)
    numbers = range(start, min(LARGEST_COUNT, start + budget // 2) + 1)
    head, tail = " ".join(map(str, numbers[:3])), " ".join(map(str, numbers[3:]))
    return [(head, False), (f" {tail}" + (BOS if numbers[-1] == LARGEST_COUNT else ""), True)]


def raw_sums(rng: Random, budget: int) -> Document:
    """Lines ``a+b=c``, the results supervised."""
    document: Document = []
    for _ in range(max(1, budget // 9)):
        a, sign, b = draw_sum(rng, False)
        document += [(f"{a}{sign}{b}=", False), (f"{solve_sum(a, sign, b)}\n", True)]
    return document


@dataclass(frozen=True)
class Mix:
    """How often each kind of training document is drawn, and each script within a session."""

    documents: dict[str, int]
    scripts: dict[str, int]


#: The training run names its mixes: texts dense in answers first, then chats, and the longest windows
#: for what needs them.
MIXES = {
    "dense": Mix(
        {"session": 50, "recall": 6, "copy": 4, "count": 5, "sums": 35},
        {"recall": 2, "copy": 2, "count": 2, "arithmetic": 5, "json": 4, "talk": 10, "memory": 2},
    ),
    "chat": Mix(
        {"session": 82, "recall": 2, "copy": 2, "count": 2, "sums": 12},
        {"recall": 2, "copy": 2, "count": 2, "arithmetic": 9, "json": 5, "talk": 9, "memory": 2},
    ),
    "far": Mix(
        {"session": 80, "recall": 8, "copy": 6, "count": 6, "sums": 0},
        {"recall": 7, "copy": 4, "count": 3, "arithmetic": 4, "json": 2, "talk": 4, "memory": 1},
    ),
}


def training_document(rng: Random, budget: int, mix: Mix) -> Document:
    """A training document of about ``budget`` tokens (it may be longer; the trainer cuts it)."""
    kind = rng.choices(list(mix.documents), list(mix.documents.values()))[0]
    if kind == "session":
        system = rng.choice(words.SYSTEM_PROMPTS) if rng.random() < 0.15 else None
        return chat_document(session(rng, budget, mix.scripts), system)
    raw = {"recall": raw_recall, "copy": raw_copy, "count": raw_count, "sums": raw_sums}
    return raw[kind](rng, budget)


def corpus(seed: int, documents: int = 3000, budget: int = 256) -> list[str]:
    """Texts for training the tokenizer: training documents, and every fixed answer and word."""
    rng = Random(seed)
    texts = ["".join(t for t, _ in training_document(rng, budget, MIXES["dense"])) for _ in range(documents)]
    answers = [answer for answer, _, _ in words.INTENTS.values()] + [words.FALLBACK, *words.SYSTEM_PROMPTS]
    lists = [COPY_WORDS, words.FIRST_NAMES, words.CITIES]
    return texts + 50 * [*answers, *(" ".join(each) for each in lists)]
