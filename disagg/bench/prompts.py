"""Real prompts for requests that so far are only lengths and prefix ids.

Deterministic: the same seed, request index and block ids give the same prompt, and equal block ids give
equal tokens in every request, so a server's prefix cache hits where the workload says it can.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from disagg.bench.client import StreamRequest
from disagg.bench.failures import BenchError
from disagg.workload import TimedRequest, Workload

MIN_POOL = 16
"""Fewest distinct tokens to draw prompts from."""

# Short common words: about one token each in the usual vocabularies.
WORDS = tuple(
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind "
    "head house service friend father power hour game line end member law car city name team minute idea "
    "body back parent face level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force order good new first last long great little own "
    "other old big high small large next early young few public bad same able open red blue green cold "
    "warm fast slow light dark north south east west sun moon star sea river tree stone fire wind snow "
    "run walk speak read write think feel make take give find tell ask use leave call keep let "
    "begin help".split()
)


class EndpointKind(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is EndpointKind.CHAT else "/v1/completions"


class Prompts(Protocol):
    """Turns a planned request into prompt content."""

    def fields(self, request: TimedRequest, index: int) -> dict[str, Any]:
        """The body's `prompt` or `messages`."""
        ...


class _Draws:
    """Numbers in [0, bound) for the parts of a prompt, by what the part is."""

    _OWN, _SHARED = 0, 1

    def __init__(self, bound: int, seed: int) -> None:
        self._bound = bound
        self._seed = seed

    def own(self, index: int, count: int) -> NDArray[np.int64]:
        return self._draw(self._OWN, index, count)

    def shared(self, block_id: int, count: int) -> NDArray[np.int64]:
        return self._draw(self._SHARED, block_id, count)

    def _draw(self, kind: int, key: int, count: int) -> NDArray[np.int64]:
        return np.random.default_rng((self._seed, kind, key)).integers(0, self._bound, count)


class TokenPrompts:
    """Prompts as token ids, drawn from `pool`: exactly as long as planned, no tokenizer in between."""

    def __init__(self, pool: NDArray[np.int64], seed: int) -> None:
        if len(pool) < MIN_POOL:
            raise BenchError(
                "--vocab-size", f"{len(pool)} distinct tokens are too few, {MIN_POOL} are needed"
            )
        self._pool = pool
        self._draws = _Draws(len(pool), seed)

    def tokens(self, request: TimedRequest, index: int) -> list[int]:
        """`request.prompt_tokens` token ids."""
        parts = []
        for block_id, count in request.segments():
            if block_id is None:
                parts.append(self._draws.own(index, count))
            else:
                # Drawn whole and then cut, so that a block cut short by its prompt's end still agrees.
                parts.append(self._draws.shared(block_id, request.block_tokens)[:count])
        ids: list[int] = self._pool[np.concatenate(parts)].tolist()
        return ids

    def fields(self, request: TimedRequest, index: int) -> dict[str, Any]:
        return {"prompt": self.tokens(request, index)}


class ChatPrompts:
    """Prompts as one user message of common words.

    Its length in tokens is only about what was planned: the server adds its chat template, and words are
    not tokens. `tokens_per_word` is measured with `/tokenize` where there is one; reports give the
    number of tokens that the server counted.
    """

    def __init__(self, tokens_per_word: float, seed: int) -> None:
        self._tokens_per_word = tokens_per_word
        self._draws = _Draws(len(WORDS), seed)

    def text(self, request: TimedRequest, index: int) -> str:
        words: list[str] = []
        for block_id, count in request.segments():
            if block_id is None:
                drawn = self._draws.own(index, self._words(count))
            else:
                drawn = self._draws.shared(block_id, self._words(request.block_tokens))[: self._words(count)]
            words += [WORDS[number] for number in drawn]
        return " ".join(words)

    def fields(self, request: TimedRequest, index: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self.text(request, index)}]}

    def _words(self, tokens: int) -> int:
        return max(1, round(tokens / self._tokens_per_word))


@dataclass(frozen=True)
class RequestOptions:
    """What every request of a run has in common."""

    kind: EndpointKind
    model: str
    temperature: float
    ignore_eos: bool
    continuous_usage: bool
    """Ask for usage with each chunk (vLLM's `continuous_usage_stats`); OpenAI itself refuses it."""


class RequestBuilder:
    """The requests of a workload as they go over the wire, by index."""

    def __init__(self, workload: Workload, prompts: Prompts, options: RequestOptions) -> None:
        self.workload = workload
        self._prompts = prompts
        self._options = options

    def __len__(self) -> int:
        return len(self.workload)

    def arrival_s(self, index: int) -> float:
        return self.workload.requests[index].arrival_s

    def build(self, index: int) -> StreamRequest:
        return self.build_one(self.workload.requests[index], index)

    def warm_up(self, number: int) -> StreamRequest:
        """The `number`-th warm-up request: lengths as in the workload, content that no other has."""
        timed = self.workload.requests[number % len(self.workload)]
        alone = TimedRequest(0.0, timed.prompt_tokens, timed.output_tokens)
        return self.build_one(alone, len(self.workload) + number)

    def build_one(self, timed: TimedRequest, index: int) -> StreamRequest:
        options = self._options
        stream_options: dict[str, Any] = {"include_usage": True}
        if options.continuous_usage:
            stream_options["continuous_usage_stats"] = True
        body: dict[str, Any] = {
            "model": options.model,
            **self._prompts.fields(timed, index),
            "max_tokens": timed.output_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": stream_options,
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        return StreamRequest(
            path=options.kind.path,
            body=json.dumps(body, separators=(",", ":")).encode(),
            prompt_tokens=timed.prompt_tokens,
            expected_tokens=timed.output_tokens if options.ignore_eos else None,
        )
