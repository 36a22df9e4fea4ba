"""OpenAI's response objects, whole and as stream chunks.

A chunk differs from the one before it in a text and little else, so the JSON around it is built once per
request and choice; what is left per step is one string escape and a concatenation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Protocol

from disagg.frontend.text_generation import Usage
from disagg.service.text import TextDelta
from disagg.service.tokenizer import Tokenizer
from disagg.types import FinishReason, TokenLogprobs

DONE = b"data: [DONE]\n\n"
# OpenAI's stand-in for "very unlikely"; JSON has no infinity.
_MIN_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """What a client wants to see besides the text.

    echoes: text before each choice's own, by index. eos_token_ids: as vLLM has it, they are no stop_reason.
    """

    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    prompt_token_ids: Sequence[Sequence[int]] = ()
    echoes: Sequence[str] = ()
    eos_token_ids: frozenset[int] = frozenset()

    def stop_reason(self, matched_stop: str | int | None) -> str | int | None:
        return None if matched_stop in self.eos_token_ids else matched_stop


@dataclass(slots=True)
class Choice:
    """What one sequence has produced so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: str | int | None = None

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = finish_name(delta.finish_reason)
            self.matched_stop = delta.matched_stop


# Members that are not OpenAI's, for clients that ask for them.
Extra = dict[str, Any]


class ResponseFormat(Protocol):
    """Chat completions and completions, as HTTP's one way of serving both sees them."""

    def first(self, index: int) -> bytes:
        """Return the event with which a choice's stream begins, b"" for none."""
        ...

    def step(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        """Return the events of one step, b"" where a client has nothing to see."""
        ...

    def last(self, usage: Usage, extra: Extra | None = None) -> bytes:
        """Return the events with which the stream ends. extra: members of an event more."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage, extra: Extra | None = None) -> bytes:
        """Return the body of an answer that isn't streamed. extra: more of its members."""
        ...


class ChatFormat:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(
        self, tokenizer: Tokenizer, response_id: str, created: int, model: str, options: ResponseOptions
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._base = {"id": response_id, "object": "chat.completion", "created": created, "model": model}
        self._head = _event_head({**self._base, "object": "chat.completion.chunk"})
        self._tail = _event_tail(options)

    def first(self, index: int) -> bytes:
        delta = '{"role":"assistant","content":""}'
        return self._event(index, delta, "null", "null", self._tail, self._prompt_ids(index)).encode()

    def step(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        tail = self._tail if usage is None else _usage_tail(usage)
        events = ""
        shows_tokens = self._options.return_token_ids and delta.token_ids
        if (
            delta.text
            or delta.logprobs
            or shows_tokens
            or (usage is not None and delta.finish_reason is None)
        ):
            content = f'{{"content":{encode_basestring(delta.text)}}}'
            logprobs = _dumps(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
            extra = f',"token_ids":{_dumps(delta.token_ids)}' if shows_tokens else ""
            events = self._event(index, content, logprobs, "null", tail, extra)
        if delta.finish_reason is not None:
            finish = f'"{finish_name(delta.finish_reason)}"'
            extra = f',"stop_reason":{_dumps(self._options.stop_reason(delta.matched_stop))}'
            events += self._event(index, "{}", "null", finish, tail, extra)
        return events.encode()

    def last(self, usage: Usage, extra: Extra | None = None) -> bytes:
        return _usage_event(self._head, usage, self._options) + _extra_event(self._head, extra) + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage, extra: Extra | None = None) -> bytes:
        body: dict[str, Any] = {
            **self._base,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(usage),
            **(extra or {}),
        }
        if self._options.return_token_ids:
            body["prompt_token_ids"] = self._options.prompt_token_ids[0]
        return _dumps(body).encode()

    def _choice(self, choice: Choice) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": self._options.stop_reason(choice.matched_stop),
        }
        return shown | ({"token_ids": choice.token_ids} if self._options.return_token_ids else {})

    def _event(self, index: int, delta: str, logprobs: str, finish: str, tail: str, extra: str) -> str:
        return (
            f'{self._head}{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{extra}}}]{tail}'
        )

    def _prompt_ids(self, index: int) -> str:
        if not self._options.return_token_ids or index:
            return ""
        return f',"prompt_token_ids":{_dumps(self._options.prompt_token_ids[0])}'

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        content = [
            {
                **self._token(position.token_id, position.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in position.top],
            }
            for position in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, _MIN_LOGPROB),
            "bytes": list(data),
        }


class CompletionFormat:
    """`text_completion`; its chunks have the same shape."""

    def __init__(
        self, tokenizer: Tokenizer, response_id: str, created: int, model: str, options: ResponseOptions
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._base = {"id": response_id, "object": "text_completion", "created": created, "model": model}
        self._head = _event_head(self._base)
        self._tail = _event_tail(options)
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> bytes:
        echo = self._echo(index)
        if not echo and not self._options.return_token_ids:
            return b""
        extra = f',"prompt_token_ids":{_dumps(self._prompt_ids(index))}' if self._prompt_ids(index) else ""
        return self._event(index, echo, "null", "null", self._tail, extra).encode()

    def step(self, index: int, delta: TextDelta, usage: Usage | None) -> bytes:
        finished = delta.finish_reason is not None
        shows_tokens = self._options.return_token_ids and delta.token_ids
        if not (delta.text or delta.logprobs or shows_tokens or finished or usage is not None):
            return b""
        tail = self._tail if usage is None else _usage_tail(usage)
        logprobs = _dumps(self._logprobs(index, delta.logprobs)) if delta.logprobs else "null"
        finish = f'"{finish_name(delta.finish_reason)}"' if delta.finish_reason is not None else "null"
        extra = f',"token_ids":{_dumps(delta.token_ids)}' if shows_tokens else ""
        if finished:
            extra += f',"stop_reason":{_dumps(self._options.stop_reason(delta.matched_stop))}'
        return self._event(index, delta.text, logprobs, finish, tail, extra).encode()

    def last(self, usage: Usage, extra: Extra | None = None) -> bytes:
        return _usage_event(self._head, usage, self._options) + _extra_event(self._head, extra) + DONE

    def whole(self, choices: Sequence[Choice], usage: Usage, extra: Extra | None = None) -> bytes:
        body = {
            **self._base,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(usage),
            **(extra or {}),
        }
        return _dumps(body).encode()

    def _choice(self, choice: Choice) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "index": choice.index,
            "text": self._echo(choice.index) + choice.text,
            "logprobs": self._logprobs(choice.index, choice.logprobs) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": self._options.stop_reason(choice.matched_stop),
        }
        if self._options.return_token_ids:
            shown["token_ids"] = choice.token_ids
            shown["prompt_token_ids"] = self._prompt_ids(choice.index)
        return shown

    def _event(self, index: int, text: str, logprobs: str, finish: str, tail: str, extra: str) -> str:
        return (
            f'{self._head}{{"index":{index},"text":{encode_basestring(text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{extra}}}]{tail}'
        )

    def _echo(self, index: int) -> str:
        return self._options.echoes[index] if self._options.echoes else ""

    def _prompt_ids(self, index: int) -> Sequence[int]:
        return self._options.prompt_token_ids[index] if self._options.return_token_ids else ()

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens = [self._name(position.token_id) for position in logprobs]
        offset = self._offsets.get(index, 0)
        offsets = []
        for position in logprobs:
            offsets.append(offset)
            offset += len(self._tokenizer.token_text(position.token_id))
        self._offsets[index] = offset
        return {
            "text_offset": offsets,
            "token_logprobs": [max(position.logprob, _MIN_LOGPROB) for position in logprobs],
            "tokens": tokens,
            "top_logprobs": [self._top(position) for position in logprobs],
        }

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        pairs = [*position.top, (position.token_id, position.logprob)]
        return {self._name(token): max(logprob, _MIN_LOGPROB) for token, logprob in pairs}

    def _name(self, token_id: int) -> str:
        """Return a token's text, or as OpenAI does `bytes:\\xe4\\xb8` for what isn't whole UTF-8."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finish_name(reason: FinishReason) -> str:
    return reason.value


def error_event(body: dict[str, Any]) -> bytes:
    """Return the event that ends a stream which failed after its first byte."""
    return f"data: {_dumps(body)}\n\n".encode()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _event_head(base: dict[str, Any]) -> str:
    return f'data: {_dumps(base)[:-1]},"choices":['


def _event_tail(options: ResponseOptions) -> str:
    return ',"usage":null}\n\n' if options.include_usage else "}\n\n"


def _usage_tail(usage: Usage) -> str:
    return f',"usage":{_dumps(usage_object(usage))}}}\n\n'


def _usage_event(head: str, usage: Usage, options: ResponseOptions) -> bytes:
    return f"{head}]{_usage_tail(usage)}".encode() if options.include_usage else b""


def _extra_event(head: str, extra: Extra | None) -> bytes:
    return b"" if not extra else f"{head}],{_dumps(extra)[1:]}\n\n".encode()
