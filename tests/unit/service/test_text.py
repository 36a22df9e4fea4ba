"""Stop strings against a naive search of the full text, and the assembly of deltas."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disagg.service.text import StopStrings, TextAssembler
from disagg.service.tokenizer import Tokenizer
from disagg.tinymodel.tokenizer import build_tokenizer, save_tokenizer
from disagg.types import FinishReason, SamplingParams, StepOutput, TokenLogprobs

# Few letters, so that prefixes, overlaps and near misses are common.
few_letters = st.text(alphabet="abé", min_size=1, max_size=5)


def naive(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Return the text before the match that ends first, the longest of those, and the match."""
    matches = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not matches:
        return text, None
    end, _, found = min(matches)
    return text[: end - len(found)], found


@settings(max_examples=1000, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abé", max_size=6), max_size=8),
    stop=st.lists(few_letters, max_size=4),
)
@example(chunks=["ab", "ab", "aé"], stop=["abaé"])
@example(chunks=["aaab"], stop=["aab", "b"])
def test_same_cut_as_a_search_of_the_whole(chunks: list[str], stop: list[str]) -> None:
    strings = StopStrings(stop)
    shown = "".join(strings.push(chunk) for chunk in chunks)
    shown += "" if strings.ended() else strings.flush()
    assert (shown, strings.matched) == naive("".join(chunks), stop)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abé", max_size=20), stop=few_letters)
def test_single_stop_is_str_find(text: str, stop: str) -> None:
    strings = StopStrings([stop])
    shown = "".join(strings.push(char) for char in text)
    if stop in text:
        assert shown == text[: text.find(stop)] and strings.matched == stop
    else:
        assert shown + strings.flush() == text


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="ab", max_size=4), max_size=8), stop=st.lists(few_letters, max_size=3)
)
def test_no_more_is_held_back_than_needed(chunks: list[str], stop: list[str]) -> None:
    strings = StopStrings(stop)
    shown = seen = ""
    for chunk in chunks:
        shown, seen = shown + strings.push(chunk), seen + chunk
        if strings.ended():
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(s.startswith(held) for s in stop)


# -- assembly --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tok")
    save_tokenizer(build_tokenizer(["hello wide world stop here"] * 4, 300), folder, 512)
    return Tokenizer(folder)


def outputs(
    tokenizer: Tokenizer, text: str, size: int, *, eos: bool = True, logprobs: bool = False
) -> list[StepOutput]:
    """Return steps of `size` tokens that say `text`, then end by EOS or by length."""
    ids = tokenizer.encode(text) + ([tokenizer.eos_token_id or 0] if eos else [])
    steps = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    last = len(steps) - 1
    return [
        StepOutput(
            "r",
            step,
            tuple(TokenLogprobs(token, -1.0, 1) for token in step) if logprobs else (),
            finish_reason=(FinishReason.STOP if eos else FinishReason.LENGTH) if i == last else None,
            matched_stop=tokenizer.eos_token_id if eos and i == last else None,
            num_cached_tokens=16 if i == 0 else 0,
        )
        for i, step in enumerate(steps)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_text_to_the_end(tokenizer: Tokenizer, size: int) -> None:
    assembler = TextAssembler(tokenizer, SamplingParams())
    deltas = [assembler.push(step) for step in outputs(tokenizer, "hello wörld 🙂", size, logprobs=True)]
    assert "".join(delta.text for delta in deltas) == "hello wörld 🙂"
    assert deltas[-1].finish_reason is FinishReason.STOP and assembler.finished
    assert deltas[-1].matched_stop == tokenizer.eos_token_id
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tokens == [*tokenizer.encode("hello wörld 🙂"), tokenizer.eos_token_id]
    assert [p.token_id for delta in deltas for p in delta.logprobs] == tokens
    assert assembler.num_tokens == len(tokens) and assembler.num_cached_tokens == 16


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_string_across_tokens_ends_it_whatever_the_steps(tokenizer: Tokenizer, size: int) -> None:
    text, stop = "hello wide world stop here", "ld sto"
    assembler = TextAssembler(tokenizer, SamplingParams(stop=(stop,)))
    shown, tokens, logprobs = "", 0, 0
    for step in outputs(tokenizer, text, size, logprobs=True):
        delta = assembler.push(step)
        shown, tokens = shown + delta.text, tokens + len(delta.token_ids)
        logprobs += len(delta.logprobs)
        if assembler.finished:
            break
    assert shown == "hello wide wor"
    assert delta.finish_reason is FinishReason.STOP and delta.matched_stop == stop
    ids = tokenizer.encode(text)
    needed = next(n for n in range(len(ids)) if stop in tokenizer.decode(ids[:n]))
    assert tokens == logprobs == assembler.num_tokens == needed


def test_held_text_comes_at_the_end(tokenizer: Tokenizer) -> None:
    assembler = TextAssembler(tokenizer, SamplingParams(stop=("world!",)))
    deltas = [assembler.push(step) for step in outputs(tokenizer, "hello world", 1, eos=False)]
    assert "".join(delta.text for delta in deltas[:-1]) + deltas[-1].text == "hello world"
    assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_unfinished_character_at_the_end_is_flushed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")[:2]
    assembler = TextAssembler(tokenizer, SamplingParams())
    delta = assembler.push(StepOutput("r", tuple(ids), finish_reason=FinishReason.LENGTH))
    assert delta.text == tokenizer.decode(ids) == "�"


def test_min_tokens_comes_before_stop_strings(tokenizer: Tokenizer) -> None:
    text = "hello hello hello hello"
    first = len(tokenizer.encode("hello hello"))
    assembler = TextAssembler(tokenizer, SamplingParams(stop=("hello",), min_tokens=first, max_tokens=64))
    shown = ""
    for step in outputs(tokenizer, text, 1):
        shown += assembler.push(step).text
        if assembler.finished:
            break
    assert shown == "hello hello "


def test_stop_token_that_is_not_special_ends_the_text_before_itself(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello stop")
    assembler = TextAssembler(tokenizer, SamplingParams(stop_token_ids=(ids[-1],)))
    step = StepOutput("r", tuple(ids), finish_reason=FinishReason.STOP, matched_stop=ids[-1])
    delta = assembler.push(step)
    assert delta.text == tokenizer.decode(ids[:-1]) and delta.token_ids == tuple(ids)
    assert assembler.num_tokens == len(ids)
