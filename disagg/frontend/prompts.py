"""From what a client sent to generations: encoding, and every bound that can be checked before any work."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagg.errors import InvalidRequestError, ModelNotFoundError
from disagg.frontend.backend import Backend
from disagg.service.chat_template import Message
from disagg.service.tokenizer import IncrementalDetokenizer
from disagg.types import SamplingParams

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
# Encoding is about 1 MB/s, and the library lets go of the interpreter lock meanwhile.
_ENCODE_IN_THREAD_CHARS = 8192
_DECODE_AT_ONCE = 4096
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Prompt:
    """token_ids: what the model reads. text: what the client wrote, None if it wrote token ids."""

    token_ids: list[int]
    text: str | None = None


def check_model(backend: Backend, model: str | None) -> None:
    """Raise ModelNotFoundError unless `model` is the one served here, or left out."""
    if model and model != backend.model_name:
        raise ModelNotFoundError(
            f"the model `{model[:200]}` does not exist; this server has `{backend.model_name}`", param="model"
        )


async def encode_text(
    backend: Backend, text: str, *, param: str, add_special_tokens: bool = True, bounded: bool = True
) -> Prompt:
    """Encode a text without holding up other requests. Raises InvalidRequestError naming `param`."""
    if bounded and not backend.tokenizer.can_fit(text, backend.max_model_len):
        raise _too_long(backend, f"{len(text)} characters", param)

    def encode() -> list[int]:
        return backend.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    ids = await asyncio.to_thread(encode) if len(text) > _ENCODE_IN_THREAD_CHARS else encode()
    return Prompt(ids, text)


async def encode_chat(
    backend: Backend,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, str | bool] | None = None,
    add_special_tokens: bool = False,
    bounded: bool = True,
) -> Prompt:
    """Render and encode a conversation. Raises InvalidRequestError naming `messages`."""

    def render() -> str:
        return backend.tokenizer.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    long = sum(len(message["content"]) for message in messages) > _ENCODE_IN_THREAD_CHARS
    text = await asyncio.to_thread(render) if long else render()
    return await encode_text(
        backend, text, param="messages", add_special_tokens=add_special_tokens, bounded=bounded
    )


async def decode_ids(backend: Backend, token_ids: Sequence[int]) -> str:
    """Return the text of any number of token ids, special ones shown, a piece at a time."""
    detokenizer = IncrementalDetokenizer(backend.tokenizer, skip_special_tokens=False)
    pieces = []
    for start in range(0, len(token_ids), _DECODE_AT_ONCE):
        pieces.append(detokenizer.push(token_ids[start : start + _DECODE_AT_ONCE]))
        # Streams of other clients go on in between.
        await asyncio.sleep(0)
    return "".join(pieces) + detokenizer.flush()


def check_prompt(backend: Backend, token_ids: Sequence[int], param: str) -> None:
    """Raise InvalidRequestError naming `param` for a prompt that this model can't continue."""
    if not token_ids:
        raise InvalidRequestError(f"{param} must hold at least one token", param=param)
    if len(token_ids) >= backend.max_model_len:
        raise _too_long(backend, f"{len(token_ids)} tokens", param)
    if min(token_ids) < 0 or max(token_ids) >= backend.vocab_size:
        raise InvalidRequestError(
            f"{param}: token ids must be in [0, {backend.vocab_size - 1}] for this model", param=param
        )


def check_token_ids(backend: Backend, params: SamplingParams) -> None:
    """Raise InvalidRequestError for ids outside the vocabulary in logit_bias or stop_token_ids."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if any(not 0 <= token < backend.vocab_size for token in ids):
            raise InvalidRequestError(
                f"{name}: token ids must be in [0, {backend.vocab_size - 1}] for this model", param=name
            )


def resolve_max_tokens(
    backend: Backend, requested: int | None, default: int | None, num_prompt_tokens: int, param: str
) -> int:
    """Return how many tokens may be produced: at most up to the model's length.

    requested: what the client asked for, which must fit; default: used if it asked for nothing, None for
    as many as fit. Raises InvalidRequestError naming `param`.
    """
    room = backend.max_model_len - num_prompt_tokens
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise InvalidRequestError(
            f"{param} is {requested} and the prompt has {num_prompt_tokens} tokens; together they exceed the "
            f"model's length of {backend.max_model_len} tokens",
            param=param,
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    return requested


def check_request_id(value: str, param: str) -> str:
    """Return a client's request id. Raises InvalidRequestError unless it is short and harmless in a log."""
    if not is_sane_id(value):
        raise InvalidRequestError(
            f"{param} must have 1 to 128 letters, digits or any of . _ : -", param=param
        )
    return value


def is_sane_id(value: str) -> bool:
    return _SANE_ID.fullmatch(value) is not None


def draw_request_id() -> str:
    return secrets.token_hex(16)


def internal_ids(request_id: str, count: int) -> list[str]:
    """Return ids for a request's sequences inside the cluster, unique even if clients repeat theirs."""
    base = f"{request_id}-{secrets.token_hex(4)}"
    return [base] if count == 1 else [f"{base}-{i}" for i in range(count)]


def _too_long(backend: Backend, size: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}: the prompt has {size}; this model's length is {backend.max_model_len} tokens, of which at "
        "least one is left for the answer",
        param=param,
        code=CONTEXT_LENGTH_EXCEEDED,
    )
