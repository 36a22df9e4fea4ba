"""Is a stream whole, and when did its tokens come? No sockets and no clock here: bytes and times in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from disagg.bench.failures import FailureKind, StreamFailure
from disagg.bench.http import ResponseHead

MAX_EVENT_BYTES = 16 * 1024 * 1024
MAX_ERROR_BYTES = 4_096
"""How much of an answer other than 200 is kept for its message."""

# Finish reasons with which a server ends a request that it did not serve.
_ABORTED = frozenset({"abort", "aborted", "error", "cancelled"})
# Where chat deltas carry what the model produced.
_DELTA_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call")

_decode_json = json.JSONDecoder().decode


class SseDecoder:
    """Server-sent events: bytes in, (event name, data) out."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The events that `data` completes."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise StreamFailure(FailureKind.MALFORMED, f"an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    yield self._name, self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    self._data = []
                self._name = b""
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
            # Other fields (id, retry) and comments, which start with a colon, say nothing about tokens.

    @property
    def inside_event(self) -> bool:
        """Whether the stream would end in the middle of an event."""
        return bool(self._rest or self._data)


class StreamCheck:
    """Follows one response and decides at its end whether the request was served.

    Served means: 200, an event stream, every event a well-formed chunk, no error event, at least one
    token, exactly one finish reason and nothing generated after it, `[DONE]` as the last event, and,
    where `expected_tokens` is given, exactly that many completion tokens in `usage`.

    Which chunks carry tokens? If the server states usage with each chunk (`continuous_usage_stats`), those
    with which it grows, empty text or not. Otherwise those with text: tokens whose text is held back
    (half a UTF-8 character) then count with the chunk that shows them, as users see it.
    """

    def __init__(self, chat: bool, expected_tokens: int | None) -> None:
        self._chat = chat
        self._expected = expected_tokens
        self._sse = SseDecoder()
        self._status = 0
        self._error_body = b""
        self._finish_reasons: list[str] = []
        self._first_choice_s: float | None = None
        self._usage_tokens: int | None = None
        self._continuous_usage = False
        self._done = False
        self.token_times: list[float] = []
        """When each chunk that carries tokens was read, in seconds."""
        self.end_s = 0.0
        """When `[DONE]` was read."""
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        """Completion tokens by the server's count, else the number of chunks that carried text."""
        return len(self.token_times) if self._usage_tokens is None else self._usage_tokens

    @property
    def counted_by_usage(self) -> bool:
        return self._usage_tokens is not None

    @property
    def finish_reason(self) -> str | None:
        return self._finish_reasons[0] if self._finish_reasons else None

    @property
    def stage(self) -> str:
        """How far the stream came, for messages."""
        if not self._status:
            return "before any answer"
        return f"after {self.output_tokens} tokens" if self.output_tokens else "before the first token"

    def on_head(self, head: ResponseHead) -> None:
        self._status = head.status
        content_type = head.headers.get("content-type", "none")
        if head.status == 200 and content_type.partition(";")[0].strip().lower() != "text/event-stream":
            raise StreamFailure(FailureKind.CONTENT_TYPE, f"{content_type} instead of text/event-stream")

    def on_body(self, data: bytes, now: float) -> None:
        if self._status != 200:
            self._error_body += data[: MAX_ERROR_BYTES - len(self._error_body)]
            return
        for name, payload in self._sse.feed(data):
            if self._done:
                raise StreamFailure(FailureKind.MALFORMED, "an event after [DONE]")
            if payload == b"[DONE]":
                self._done = True
                self.end_s = now
            else:
                self._on_chunk(name, payload, now)

    def close(self) -> None:
        """The response is complete; raises StreamFailure if the request was not served."""
        if self._status != 200:
            detail = f"HTTP {self._status}: {_error_message(self._error_body)}"
            raise StreamFailure(FailureKind.HTTP_STATUS, detail, self._status)
        if not self._done:
            where = "in the middle of an event" if self._sse.inside_event else "without [DONE]"
            raise StreamFailure(FailureKind.NO_DONE, f"the stream ended {where}, {self.stage}")
        self._check_tokens()
        self._check_finish()

    def _check_tokens(self) -> None:
        if self.output_tokens < 1:
            raise StreamFailure(FailureKind.NO_TOKENS, "the stream ended without a token")
        if not self.token_times:
            if self._first_choice_s is None:
                raise StreamFailure(FailureKind.NO_TOKENS, "usage counts tokens, but no chunk carried any")
            # Tokens without any text, and a server that counts only at the end.
            self.token_times.append(self._first_choice_s)
        if self._expected is None:
            return
        if self._usage_tokens is None:
            raise StreamFailure(FailureKind.USAGE, "no usage in the stream, so the token count is unknown")
        if self._usage_tokens != self._expected:
            detail = f"{self._usage_tokens} tokens generated where {self._expected} were asked for"
            raise StreamFailure(FailureKind.TOKEN_COUNT, detail)

    def _check_finish(self) -> None:
        reasons = self._finish_reasons
        if len(reasons) != 1:
            raise StreamFailure(FailureKind.FINISH_REASON, f"{len(reasons)} finish reasons instead of one")
        if reasons[0] in _ABORTED:
            raise StreamFailure(
                FailureKind.FINISH_REASON, f"the server ended the request with {reasons[0]!r}"
            )

    def _on_chunk(self, name: bytes, payload: bytes, now: float) -> None:
        try:
            chunk = _decode_json(payload.decode())
        except ValueError as error:
            detail = f"event {_excerpt(payload)} is not JSON: {error}"
            raise StreamFailure(FailureKind.MALFORMED, detail) from None
        if not isinstance(chunk, dict):
            raise _malformed("a JSON object", payload)
        if chunk.get("error") is not None or name == b"error":
            raise StreamFailure(FailureKind.ERROR_EVENT, f"{_error_message(payload)} ({self.stage})")
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise _malformed("choices", payload)
        finish_reasons = len(self._finish_reasons)
        carries = False
        for choice in choices:
            carries |= self._on_choice(choice, payload)
        usage = chunk.get("usage")
        if usage is not None:
            grew = self._on_usage(usage, payload)
            # Usage beside the finish reason alone is the total, not the first of many counts.
            if len(self._finish_reasons) == finish_reasons and choices:
                self._continuous_usage = True
            if self._continuous_usage:
                carries = grew
        if choices:
            if self._first_choice_s is None:
                self._first_choice_s = now
            if carries:
                self.token_times.append(now)

    def _on_choice(self, choice: Any, payload: bytes) -> bool:
        """Whether the choice carries text."""
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            raise _malformed("one choice, with index 0", payload)
        has_text = self._delta_has_text(choice, payload) if self._chat else _has_text(choice, payload)
        if has_text and self._finish_reasons:
            raise StreamFailure(FailureKind.MALFORMED, "text after the finish reason")
        reason = choice.get("finish_reason")
        if reason is not None:
            if not isinstance(reason, str):
                raise _malformed("finish_reason", payload)
            self._finish_reasons.append(reason)
        return has_text

    def _delta_has_text(self, choice: dict[str, Any], payload: bytes) -> bool:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            raise _malformed("delta", payload)
        if not isinstance(delta.get("content"), str | None):
            raise _malformed("delta.content", payload)
        return any(delta.get(field) for field in _DELTA_FIELDS)

    def _on_usage(self, usage: Any, payload: bytes) -> bool:
        """Whether the count of completion tokens grew."""
        tokens = usage.get("completion_tokens", 0) if isinstance(usage, dict) else None
        if type(tokens) is not int:
            raise _malformed("usage", payload)
        grew = tokens > (self._usage_tokens or 0)
        self._usage_tokens = tokens
        prompt = usage.get("prompt_tokens")
        if type(prompt) is int:
            self.prompt_tokens = prompt
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and type(details.get("cached_tokens")) is int:
            self.cached_tokens = details["cached_tokens"]
        return grew


def _has_text(choice: dict[str, Any], payload: bytes) -> bool:
    text = choice.get("text")
    if not isinstance(text, str):
        raise _malformed("text", payload)
    return bool(text)


def _malformed(field: str, payload: bytes) -> StreamFailure:
    return StreamFailure(FailureKind.MALFORMED, f"event {_excerpt(payload)}: expected {field}")


def _error_message(body: bytes) -> str:
    """What an OpenAI error object says, else the beginning of the text."""
    try:
        value = json.loads(body)
    except ValueError:
        return _excerpt(body) if body else "no message"
    if isinstance(value, dict):
        error = value.get("error") or value.get("detail") or value.get("message") or value
        value = error.get("message", error) if isinstance(error, dict) else error
    return str(value)[:300]


def _excerpt(data: bytes) -> str:
    text = data[:120].decode("utf-8", "replace")
    return repr(text + ("..." if len(data) > 120 else ""))
