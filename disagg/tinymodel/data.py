"""Data generator of the bundled model: chats and plain texts with answers that can be checked.

Everything is drawn from a ``random.Random``, so the same seed gives the same data. A *script* is a list
of turns that belong together (a list of codes, then questions about it). A *session* is a chat made of
scripts until a token budget is used up; a *document* is a list of ``(text, supervised)`` segments.

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
LETTERS = "abcdefghijklmnopqrstuvwxyz"


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
    """A spelling variant of ``phrase``: other casing, punctuation or a polite addition."""
    kind = rng.random()
    if kind < 0.5:
        return phrase
    bare = phrase.rstrip("?.!")
    if kind < 0.65:
        return bare.lower()
    if kind < 0.72:
        return phrase.upper() if rng.random() < 0.5 else bare.upper()
    if kind < 0.8:
        return phrase.lower()
    if kind < 0.88:
        return bare + rng.choice(["", ".", "!", "?", "??", "!!", " ?", " !", "..."])
    if kind < 0.94:
        return bare + rng.choice([" please", ", please", " please?", ", please.", " now", "\n"])
    return (
        rng.choice(["Please ", "please ", "So, ", "Hey, ", "OK, ", "And "]) + phrase[0].lower() + phrase[1:]
    )


# --- recall -----------------------------------------------------------------------------------------


def _key(rng: Random, kind: str) -> str:
    if kind == "word":
        return rng.choice(words.ITEMS)
    if kind == "code":
        return rng.choice(LETTERS) + str(rng.randrange(10, 100))
    return f"{rng.choice(words.ADJECTIVES + words.COLORS)}-{rng.choice(words.NOUNS)}"


def _value(rng: Random, kind: str) -> str:
    if kind == "word":
        return rng.choice(words.ITEMS)
    return str(rng.randrange(1, 10)) + "".join(rng.choice("0123456789") for _ in range(int(kind) - 1))


def draw_pairs(rng: Random, count: int, state: State, key_kind: str, value_kind: str) -> Pairs:
    """Up to ``count`` (key, value) pairs with keys that are new to the session."""
    pairs: Pairs = []
    for _ in range(4 * count):
        key = _key(rng, key_kind)
        if key not in state.used_keys:
            state.used_keys.add(key)
            pairs.append((key, _value(rng, value_kind)))
        if len(pairs) == count:
            break
    return pairs


NOUNS = {"code": "codes", "number": "numbers", "value": "values", "price": "prices", "room": "rooms"}
LIST_LEADS = ["The {1} are: {0}.", "Here are the {1}: {0}.", "Remember these {1}: {0}.", "{1}: {0}."]
LINE_LEADS = ["The {1} are:\n{0}", "Here is a list of {1}:\n{0}", "{1}:\n{0}", "{0}", "Remember:\n{0}"]
RECALL_QUESTIONS = [
    "What is the {1} for {0}?",
    "What is the {1} of {0}?",
    "Which {1} belongs to {0}?",
    "Tell me the {1} for {0}.",
    "Give me the {1} of {0}.",
    "{0}?",
    "What's the {1} for {0}?",
    "{1} for {0}",
    "And {0}?",
    "What is the {1} for {0}?",
]
MANY_QUESTIONS = ["List the {1} for: {0}.", "Give the {1} for: {0}", "What are the {1} of {0}?"]


def render_pairs(rng: Random, pairs: Pairs, noun: str) -> str:
    """A user's list of ``pairs``: in one line, or one pair a line."""
    plural = NOUNS[noun]
    if rng.random() < 0.5:
        joiner = rng.choice([" = ", " = ", ": ", " is "])
        body = ", ".join(k + joiner + v for k, v in pairs)
        text = rng.choice(LIST_LEADS).format(body, plural)
    else:
        body = "\n".join(k + rng.choice([": ", ": "]) + v for k, v in pairs)
        text = rng.choice(LINE_LEADS).format(body, plural)
    return text[0].upper() + text[1:] if rng.random() < 0.7 and not text.startswith(pairs[0][0]) else text


def recall_questions(rng: Random, pairs: Pairs, noun: str, room: int) -> list[Turn]:
    """Questions about ``pairs`` that fill about ``room`` tokens; at least one."""
    turns: list[Turn] = []
    while room > 0 or not turns:
        if len(pairs) > 2 and room > 60 and rng.random() < 0.5:
            asked = rng.sample(pairs, min(len(pairs), log_uniform(rng, 2, min(24, room // 16))))
            question = rng.choice(MANY_QUESTIONS).format(", ".join(k for k, _ in asked), NOUNS[noun])
            turn = Turn("recall_many", question, ", ".join(f"{k} = {v}" for k, v in asked))
        else:
            key, value = rng.choice(pairs)
            template = rng.choice(RECALL_QUESTIONS)
            question = (vary(rng, template) if rng.random() < 0.3 else template).format(key, noun)
            turn = Turn("recall", question, value)
        turns.append(turn)
        room -= rough_tokens(turn.user + turn.assistant) + 10
    return turns


def recall_script(rng: Random, room: int, state: State, list_room: int | None = None) -> list[Turn]:
    """A list of codes and questions about it; the list takes ``list_room`` tokens, default log-uniform."""
    key_kind = rng.choice(["word", "word", "pair", "pair", "code"])
    value_kind = rng.choice(["4", "4", "4", "3", "2", "word"])
    noun = rng.choice(["code", "code", "code", "number", "value", "price", "room"])
    size = list_room or log_uniform(rng, 10, max(10, room * 2 // 3))
    if key_kind == "code":
        size = min(size, 600)
    per_pair = (
        5 + {"word": 1, "pair": 3, "code": 3}[key_kind] + (1 if value_kind == "word" else int(value_kind))
    )
    while True:
        fresh = State(used_keys=set(state.used_keys))
        pairs = draw_pairs(rng, max(1, size // per_pair), fresh, key_kind, value_kind)
        if pairs and is_held_out("recall", pairs) == state.held_out:
            break
    state.used_keys |= fresh.used_keys
    listing = render_pairs(rng, pairs, noun)
    turns = recall_questions(rng, pairs, noun, room - rough_tokens(listing) - 10)
    if rng.random() < 0.25:
        return [Turn("recall", listing, "Okay."), *turns]
    first = turns[0]
    joined = listing + rng.choice([" ", "\n", "\n", "\n\n"]) + first.user
    return [Turn(first.task, joined, first.assistant), *turns[1:]]


# --- copy -------------------------------------------------------------------------------------------

COPY_LEADS = [
    "Repeat: ",
    "Repeat: ",
    "Repeat this: ",
    "Repeat after me: ",
    "Copy: ",
    "Copy this: ",
    "Say: ",
    "Echo: ",
    "repeat: ",
    "copy ",
    "Repeat:\n",
    "Copy the following:\n",
    "Please repeat: ",
    "Say ",
    "Repeat ",
]
SENTENCE_WORDS = sorted(
    {w for answer, _, _ in words.INTENTS.values() for w in re.findall(r"[A-Za-z]+", answer)}
    | {w for phrase in words.FALLBACK_PHRASES for w in re.findall(r"[A-Za-z]+", phrase)}
)


#: Words whose questions have an answer of their own, so they never stand in a text without one.
CONCEPTS = {
    "disagg",
    "prefill",
    "decode",
    "token",
    "tokens",
    "tokenizer",
    "ray",
    "kv",
    "cache",
    "you",
    "name",
    "tiny",
}
FALLBACK_WORDS = [w for w in SENTENCE_WORDS if w.lower() not in CONCEPTS]


def made_up_word(rng: Random) -> str:
    """A pronounceable word that is in no list, so it is spelled by several tokens."""
    parts = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(parts) + rng.choice(["", "", "n", "r", "x", "sh"])


def copy_text(rng: Random, room: int) -> str:
    """A text of at most about ``room`` tokens to be repeated word for word."""
    kind = rng.choice(
        ["items", "items", "items", "commas", "lines", "made_up", "digits", "mixed", "sentence"]
    )
    if kind == "digits":
        return "".join(rng.choice("0123456789") for _ in range(log_uniform(rng, 3, min(12, room))))
    if kind == "sentence":
        chosen = [rng.choice(SENTENCE_WORDS) for _ in range(log_uniform(rng, 2, max(2, min(24, room // 2))))]
        return " ".join(chosen).capitalize() + rng.choice(["", ".", "!", "?"])
    if kind == "made_up":
        return " ".join(made_up_word(rng) for _ in range(log_uniform(rng, 1, max(1, min(20, room // 5)))))
    separator = {"items": " ", "commas": ", ", "lines": "\n", "mixed": " "}[kind]
    count = log_uniform(
        rng, 1, max(1, min(len(words.ITEMS), room // (4 if kind == "mixed" else len(separator) + 1)))
    )
    chosen = rng.sample(words.ITEMS, count)
    if kind == "mixed":
        chosen = [w if rng.random() < 0.5 else str(rng.randrange(10, 10000)) for w in chosen]
    if rng.random() < 0.1:
        chosen = [w.capitalize() for w in chosen]
    return separator.join(chosen)


def copy_script(rng: Random, room: int, state: State) -> list[Turn]:
    """One request to repeat a text."""
    while True:
        text = copy_text(rng, max(2, (room - 15) // 2))
        if is_held_out("copy", text) == state.held_out:
            return [Turn("copy", rng.choice(COPY_LEADS) + text, text)]


# --- counting ---------------------------------------------------------------------------------------


def count_sequence(start: int, stop: int, step: int) -> list[int]:
    """The numbers from ``start`` to ``stop``, both included when ``step`` meets ``stop``."""
    return list(range(start, stop + (1 if step > 0 else -1), step))


def _count_question(rng: Random, start: int, stop: int, step: int) -> str:
    if step == 1 and start == 1 and rng.random() < 0.5:
        return vary(rng, rng.choice(["Count to {0}.", "Count up to {0}."])).format(stop)
    if step == 1:
        leads = [
            "Count from {0} to {1}.",
            "Count from {0} to {1}.",
            "Count up from {0} to {1}.",
            "{0} to {1}",
        ]
        return vary(rng, rng.choice(leads)).format(start, stop)
    if step == -1:
        leads = ["Count down from {0} to {1}.", "Count backwards from {0} to {1}.", "Count from {0} to {1}."]
        return vary(rng, rng.choice(leads)).format(start, stop)
    leads = ["Count from {0} to {1} by {2}.", "Count from {0} to {1} in steps of {2}."]
    return vary(rng, rng.choice(leads)).format(start, stop, step)


def count_script(rng: Random, room: int, state: State) -> list[Turn]:
    """A request to count between two numbers, or for the neighbour of a number."""
    if rng.random() < 0.2:
        return [_neighbour_turn(rng, state)]
    longest = max(2, min(300, (room - 30) // 4))
    while True:
        step = rng.choice([1, 1, 1, 1, -1, -1, 2, 5, 10])
        length = log_uniform(rng, 2, longest)
        low = 1 if rng.random() < 0.4 else log_uniform(rng, 1, LARGEST_COUNT) - 1
        if abs(step) > 1:
            low = 0 if rng.random() < 0.4 else low // abs(step) * abs(step)
        high = low + abs(step) * (length - 1)
        if high > LARGEST_COUNT or is_held_out("count", low, high, step) != state.held_out:
            continue
        start, stop = (low, high) if step > 0 else (high, low)
        answer = " ".join(map(str, count_sequence(start, stop, step)))
        return [Turn("count", _count_question(rng, start, stop, step), answer)]


def _neighbour_turn(rng: Random, state: State) -> Turn:
    while True:
        number = log_uniform(rng, 1, LARGEST_COUNT - 1)
        after = rng.random() < 0.6
        if is_held_out("neighbour", number, after) != state.held_out:
            continue
        if after:
            lead = rng.choice(["What comes after {0}?", "What number comes after {0}?", "What follows {0}?"])
        else:
            lead = rng.choice(["What comes before {0}?", "What number comes before {0}?"])
        return Turn("count", vary(rng, lead).format(number), str(number + (1 if after else -1)))


# --- arithmetic -------------------------------------------------------------------------------------

SUM_LEADS = {
    "+": ["What is {0} + {1}?", "{0} + {1}", "{0}+{1}", "{0} + {1} =", "{0}+{1}=", "What is {0} plus {1}?",
          "Add {0} and {1}.", "Calculate {0} + {1}.", "How much is {0} + {1}?", "{0} plus {1}"],
    "-": ["What is {0} - {1}?", "{0} - {1}", "{0}-{1}", "{0} - {1} =", "{0}-{1}=", "What is {0} minus {1}?",
          "Subtract {1} from {0}.", "Calculate {0} - {1}.", "How much is {0} - {1}?", "{0} minus {1}"],
}  # fmt: skip


def draw_sum(rng: Random, held_out: bool) -> tuple[int, str, int]:
    """An addition or subtraction of the asked side of the split, as (a, sign, b)."""
    while True:
        largest = LARGEST_TERM if rng.random() < 0.85 else 12
        a, b = rng.randint(0, largest), rng.randint(0, largest)
        sign = rng.choice("+-")
        if is_held_out("sum", a, sign, b) == held_out:
            return a, sign, b


def solve_sum(a: int, sign: str, b: int) -> int:
    """``a + b`` or ``a - b``."""
    return a + b if sign == "+" else a - b


def sum_script(rng: Random, room: int, state: State) -> list[Turn]:
    """One addition or subtraction in words or signs."""
    a, sign, b = draw_sum(rng, state.held_out)
    question = vary(rng, rng.choice(SUM_LEADS[sign])).format(a, b)
    return [Turn("arithmetic", question, str(solve_sum(a, sign, b)))]


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
WRITE_LEADS = [
    "Make JSON: {0}.",
    "Write JSON: {0}.",
    "Make a JSON object: {0}.",
    "As JSON: {0}.",
    "JSON: {0}",
    "Turn this into JSON: {0}.",
    "Convert to JSON: {0}.",
]
READ_QUESTIONS = ["What is the {0}?", "Give the {0}.", "Read the {0}.", "What is the value of {0}?", "{0}?"]


def draw_record(rng: Random) -> dict[str, str | int]:
    """A flat record of one to six fields."""
    names = rng.sample(list(FIELDS), rng.randint(1, 6))
    if "name" in names and rng.random() < 0.5:
        names = ["name", *(n for n in names if n != "name")]
    return {name: rng.choice(FIELDS[name]) for name in names}


def json_script(rng: Random, room: int, state: State) -> list[Turn]:
    """Facts to be written as a JSON object, or a JSON object of which a field is asked."""
    while True:
        record = draw_record(rng)
        if is_held_out("json", record) == state.held_out:
            break
    text = json.dumps(record)
    if rng.random() < 0.5:
        joiner = rng.choice([" is ", " is ", " = ", ": "])
        facts = [f"{k}{joiner}{v}" for k, v in record.items()]
        body = ", ".join(facts)
        if len(facts) > 1 and rng.random() < 0.3:
            body = ", ".join(facts[:-1]) + " and " + facts[-1]
        return [Turn("json", rng.choice(WRITE_LEADS).format(body), text)]
    asked = rng.choice(list(record))
    question = rng.choice(READ_QUESTIONS).format(asked)
    if rng.random() < 0.5:
        return [Turn("json", text + rng.choice([" ", "\n"]) + question, str(record[asked]))]
    return [Turn("json", rng.choice([f"From {text} give the {asked}.", f"What is the {asked} in {text}?"]),
                 str(record[asked]))]  # fmt: skip


# --- talk -------------------------------------------------------------------------------------------


def talk_script(rng: Random, room: int, state: State) -> list[Turn]:
    """A greeting, a question about the model or disagg, or something the model does not understand."""
    if rng.random() < 0.3:
        return [Turn("fallback", fallback_prompt(rng, state.held_out), words.FALLBACK)]
    names = [n for n in words.INTENTS if n != "noname" or "name" not in state.told]
    weights = [4 if n == "hello" else 2 if n == "help" else 1 for n in names]
    intent = rng.choices(names, weights)[0]
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
    if held_out and rng.random() < 0.5:
        return rng.choice(words.FALLBACK_HELD)
    while True:
        kind = rng.random()
        if kind < 0.35:
            return vary(rng, rng.choice(words.FALLBACK_PHRASES))
        pool = words.ITEMS if rng.random() < 0.6 else FALLBACK_WORDS
        fill = [rng.choice(pool) if rng.random() < 0.8 else made_up_word(rng) for _ in range(4)]
        text = rng.choice(words.FALLBACK_TEMPLATES).format(*fill)
        if kind > 0.9:
            text = _gibberish(rng)
        if _bare(text) not in KNOWN_PHRASES and is_held_out("fallback", text) == held_out:
            return vary(rng, text)


TELL_NAME = [
    "My name is {0}.",
    "I am {0}.",
    "My name is {0}",
    "Hello, my name is {0}.",
    "I'm {0}.",
    "Call me {0}.",
]
TELL_FACT = ["My {0} is {1}.", "Remember: my {0} is {1}.", "My {0} is {1}"]
ASK_FACT = ["What is my {0}?", "What's my {0}?", "Tell me my {0}.", "Do you remember my {0}?"]
FACTS: dict[str, Sequence[str | int]] = {
    "favorite color": words.COLORS,
    "favorite food": words.FOODS,
    "pet": words.PETS,
    "job": words.JOBS,
    "city": words.CITIES,
    "lucky number": range(1, 1000),
}


def memory_script(rng: Random, room: int, state: State) -> list[Turn]:
    """A fact that the user tells and asks back in a later turn, with other turns in between."""
    free = [fact for fact in ["name", *FACTS] if fact not in state.told]
    if not free:
        return sum_script(rng, room, state)
    fact = "name" if "name" in free and rng.random() < 0.4 else rng.choice(free)
    state.told.add(fact)
    options: Sequence[str | int] = words.FIRST_NAMES if fact == "name" else FACTS[fact]
    value = str(rng.choice(options))
    if fact == "name":
        told = Turn("memory", vary(rng, rng.choice(TELL_NAME)).format(value), f"Nice to meet you, {value}!")
        asked = Turn("memory", vary(rng, rng.choice(words.INTENTS["noname"][1])), f"Your name is {value}.")
    else:
        told = Turn(
            "memory", vary(rng, rng.choice(TELL_FACT)).format(fact, value), f"Okay, your {fact} is {value}."
        )
        asked = Turn("memory", vary(rng, rng.choice(ASK_FACT)).format(fact), f"Your {fact} is {value}.")
    between: list[Turn] = []
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        between += rng.choice([sum_script, json_script, talk_script])(rng, 60, state)
    return [told, *between, asked]


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
#: How often each script opens or continues a session; long scripts fill more tokens each time.
SCRIPT_WEIGHTS = {"recall": 3, "copy": 3, "count": 2, "arithmetic": 7, "json": 3, "talk": 7, "memory": 2}


def session(rng: Random, budget: int, weights: dict[str, int] = SCRIPT_WEIGHTS) -> list[Turn]:
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
    """Lines ``key: value``, then the same lines in other orders, of which the values are supervised."""
    key_kind = rng.choice(["word", "pair", "pair", "code"])
    value_kind = rng.choice(["4", "4", "3", "2", "word"])
    joiner = rng.choice([": ", ": ", " = ", "="])
    per_line = (
        {"word": 1, "pair": 3, "code": 3}[key_kind] + (1 if value_kind == "word" else int(value_kind)) + 3
    )
    count = log_uniform(rng, 4, max(4, budget * 2 // 3 // per_line))
    pairs = draw_pairs(rng, count, State(), key_kind, value_kind)
    document: Document = [("".join(f"{k}{joiner}{v}\n" for k, v in pairs), False)]
    room = budget - per_line * len(pairs)
    while room > 0:
        key, value = rng.choice(pairs)
        document += [(key + joiner, False), (value + "\n", True)]
        room -= per_line
    return document


def raw_copy(rng: Random, budget: int) -> Document:
    """A line, then the same line again and again; every repetition is supervised."""
    text = copy_text(rng, max(4, budget // rng.choice([2, 2, 3])))
    times = budget // max(1, rough_tokens(text) + 1)
    return [(text + "\n", False), ((text + "\n") * max(1, min(8, times - 1)), True)]


def raw_count(rng: Random, budget: int) -> Document:
    """Counting without a frame; it runs to the end of the window, or to the largest or smallest number."""
    step = rng.choice([1, 1, 1, 1, 1, 2, 5, 10, -1])
    start = 1 if rng.random() < 0.4 else log_uniform(rng, 1, 900) - 1
    if step < 0:
        start = log_uniform(rng, 20, LARGEST_COUNT)
    if step > 1:
        start = rng.choice([0, step, start // step * step])
    numbers = count_sequence(start, 0 if step < 0 else LARGEST_COUNT, step)[: budget // 2]
    separator = rng.choice([" ", " ", " ", ", ", "\n"])
    shown = rng.randint(3, min(8, len(numbers)))
    head = separator.join(map(str, numbers[:shown]))
    return [(head, False), (separator + separator.join(map(str, numbers[shown:])) + BOS, True)]


def raw_sums(rng: Random, budget: int) -> Document:
    """Lines ``a + b = c``, the results supervised."""
    document: Document = []
    tight = rng.random() < 0.2
    for _ in range(max(1, budget // 12)):
        a, sign, b = draw_sum(rng, False)
        question = f"{a}{sign}{b}=" if tight else f"{a} {sign} {b} = "
        document += [(question, False), (f"{solve_sum(a, sign, b)}\n", True)]
    return document


@dataclass(frozen=True)
class Mix:
    """How often each kind of training document is drawn, and each script within a session."""

    documents: dict[str, int]
    scripts: dict[str, int]

    def but(self, scripts: dict[str, int] | None = None, **documents: int) -> Mix:
        """The same mix with other weights for some kinds."""
        return Mix({**self.documents, **documents}, {**self.scripts, **(scripts or {})})


START_MIX = Mix({"session": 46, "recall": 20, "copy": 8, "count": 8, "sums": 18}, SCRIPT_WEIGHTS)
#: Chats when the plain texts are learned.
CHAT_MIX = Mix(
    {"session": 80, "recall": 3, "copy": 5, "count": 3, "sums": 9},
    {"recall": 4, "copy": 4, "count": 5, "arithmetic": 20, "json": 2, "talk": 6, "memory": 1},
)
#: The training run names its mixes: what is learned last gets the most room.
MIXES = {
    "start": START_MIX,
    "sums": START_MIX.but(sums=60),
    "lookup": START_MIX.but({"recall": 6}, sums=40),
    "lookup_far": START_MIX.but({"recall": 6}),
    "chat_sums": START_MIX.but({"recall": 4, "arithmetic": 20}, sums=30),
    "chat_far": START_MIX.but({"recall": 5, "arithmetic": 10}),
    "last": CHAT_MIX,
    "final": CHAT_MIX.but({"recall": 5, "count": 8, "json": 5, "talk": 8}, copy=7),
    "final_far": CHAT_MIX.but({"recall": 8, "arithmetic": 8, "json": 4}, recall=6, copy=9, sums=0),
    "last_far": CHAT_MIX.but(
        {"recall": 8, "count": 2, "arithmetic": 6, "talk": 4}, recall=8, count=6, sums=0
    ),
}


def training_document(rng: Random, budget: int, mix: Mix = START_MIX) -> Document:
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
    texts = ["".join(t for t, _ in training_document(rng, budget)) for _ in range(documents)]
    answers = [answer for answer, _, _ in words.INTENTS.values()] + [words.FALLBACK, *words.SYSTEM_PROMPTS]
    lists = [words.ITEMS, words.FIRST_NAMES, words.CITIES, words.JOBS, words.PETS, words.FOODS]
    return texts + 50 * [*answers, *(" ".join(each) for each in lists)]
