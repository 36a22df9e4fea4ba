"""From an engine's tokens to the text a client sees: detokenisation, stop strings, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg.service.tokenizer import IncrementalDetokenizer, Tokenizer
from disagg.types import FinishReason, SamplingParams, StepOutput, TokenLogprobs


class StopStrings:
    """Cuts a stream of text before the first stop string, wherever chunks begin and end.

    The match that ends first wins, and of several that end together the longest, so the result does not
    depend on how the text was cut up. Text that may still turn out to begin a stop string is held back.
    One automaton per string (Knuth, Morris, Pratt 1977), so each character costs O(1) amortised.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        # Longest first: of two that end together it is found first.
        self._stop = sorted(stop, key=len, reverse=True)
        self._failure = [_failure_table(string) for string in self._stop]
        self._state = [0] * len(self._stop)
        self._first = frozenset(string[0] for string in self._stop)
        self._held = ""
        self.matched: str | None = None

    def ended(self) -> bool:
        return self.matched is not None

    def push(self, text: str) -> str:
        """Return what can be shown. After a match, which `matched` names, there is nothing more."""
        if self.ended():
            return ""
        if not self._stop or (not self._held and self._first.isdisjoint(text)):
            return text
        for position, char in enumerate(text):
            found = self._advance(char)
            if found is not None:
                self.matched = found
                shown = self._held + text[: position + 1]
                self._held = ""
                return shown[: -len(found)]
        return self._hold_back(self._held + text)

    def flush(self) -> str:
        """Return what was held back: the text ended without a stop string."""
        held, self._held = self._held, ""
        self._state = [0] * len(self._stop)
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for i, string in enumerate(self._stop):
            failure, state = self._failure[i], self._state[i]
            while state and string[state] != char:
                state = failure[state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                found = found or string
                state = failure[state - 1]
            self._state[i] = state
        return found

    def _hold_back(self, text: str) -> str:
        keep = max(self._state)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _failure_table(pattern: str) -> list[int]:
    """Return for each prefix the length of its longest proper border."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one step adds to a generation.

    finish_reason: set on the last delta. matched_stop: the stop string or stop token id that ended it.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None


class TextAssembler:
    """Joins detokenisation and stop strings for one sequence; push takes its StepOutputs in order.

    A stop token ends the text before itself, and a stop string before its first character, while both
    tokens stay in token_ids. Text of the first min_tokens tokens is not searched for stop strings.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, *, skip_special_tokens: bool = True
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(params.stop)
        self._has_stops = bool(params.stop)
        self._min_tokens = params.min_tokens
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False

    def push(self, output: StepOutput) -> TextDelta:
        """Return the step's delta. If a stop string ended the text, `finished` is set before the engine's
        own end, and the sequence is to be cancelled."""
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        ends_itself = output.finish_reason is not None
        visible = len(output.token_ids)
        if output.matched_stop is not None and output.token_ids[-1:] == (output.matched_stop,):
            visible -= 1
        text, taken = self._take(output.token_ids[:visible])
        if self._stops.ended():
            return self._end(output, text, taken)
        taken = len(output.token_ids)
        self.num_tokens += taken - visible
        if not ends_itself:
            return TextDelta(output.token_ids, text, output.logprobs)
        text += self._pass(self._detokenizer.flush())
        if self._stops.ended():
            return self._end(output, text, taken)
        self.finished = True
        return TextDelta(
            output.token_ids,
            text + self._stops.flush(),
            output.logprobs,
            output.finish_reason,
            output.matched_stop,
        )

    def _take(self, token_ids: tuple[int, ...]) -> tuple[str, int]:
        """Return the text of the tokens up to a stop string, and how many tokens that took."""
        if not self._has_stops:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids), len(token_ids)
        text = ""
        for taken, token in enumerate(token_ids, start=1):
            # One at a time, so that what counts as generated doesn't depend on how steps were cut.
            self.num_tokens += 1
            text += self._pass(self._detokenizer.push((token,)))
            if self._stops.ended():
                return text, taken
        return text, len(token_ids)

    def _pass(self, text: str) -> str:
        return text if self.num_tokens <= self._min_tokens else self._stops.push(text)

    def _end(self, output: StepOutput, text: str, taken: int) -> TextDelta:
        self.finished = True
        return TextDelta(
            output.token_ids[:taken],
            text,
            output.logprobs[:taken],
            FinishReason.STOP,
            self._stops.matched,
        )
