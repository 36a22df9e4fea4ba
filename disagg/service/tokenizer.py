"""Text to token ids and back, from a model's folder, with the `tokenizers` library alone.

Ids equal those of transformers' fast tokenizers; importing transformers itself costs seconds of start-up.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from disagg.errors import ConfigError, InvalidRequestError
from disagg.service.chat_template import ChatTemplate, Message

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Normalisation may shorten a text, though hardly ever to less than this part of it.
_MAX_SHRINK = 4


class Tokenizer:
    """A model's tokenizer and chat template.

    vocab_size: largest id + 1, added tokens included. bos_token_id, eos_token_id: None where the folder
    names none. Raises ConfigError where the folder holds no usable tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer, definition = _load(folder)
        config = _read_json(folder / "tokenizer_config.json")
        self._special_map = _special_tokens_map(folder, config)
        self._mark_special(config)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.max_token_chars = max(map(len, vocab), default=1)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self.is_byte_level = _is_byte_level(definition.get("decoder"))
        self._bytes: dict[int, bytes] = {}
        source = _template_source(folder, config)
        self._template = None if source is None else ChatTemplate(source, self._special_map)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids; add_special_tokens puts BOS or EOS where tokenizer.json says so.

        As transformers does since version 5, flags in tokenizer_config.json don't overrule tokenizer.json.
        """
        # Unlike encode, the batch call lets other threads run meanwhile; "fast" leaves out offsets.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text. Ids outside the vocabulary have none."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, str | bool] | None = None,
    ) -> str:
        """Return the prompt's text, which carries its special tokens: encode it without adding any.

        Raises InvalidRequestError where the model has no chat template or its template refuses.
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use completions with a prompt", param="messages"
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation, as transformers' apply_chat_template does."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def can_fit(self, text: str, max_tokens: int) -> bool:
        """Return False for text so long that counting its tokens isn't needed to refuse it."""
        return len(text) <= max_tokens * self.max_token_chars * _MAX_SHRINK

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for, which need not be whole UTF-8; b"" for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """Return token_bytes as text, with U+FFFD for what isn't whole UTF-8."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_string(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, None for an unknown id."""
        return self._tokenizer.id_to_token(token_id)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            mapped = [_UNICODE_TO_BYTE.get(char) for char in token]
            known = [value for value in mapped if value is not None]
            # The decoder takes a token with any other character literally.
            return bytes(known) if len(known) == len(mapped) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def _named_id(self, name: str) -> int | None:
        token = self._special_map.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _mark_special(self, config: Mapping[str, Any]) -> None:
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        names = [*self._special_map.values(), *filter(None, map(_content, extra))]
        known = self._tokenizer.get_added_tokens_decoder().values()
        marked = {token.content for token in known if token.special}
        missing = [
            AddedToken(name, special=True, normalized=False)
            for name in dict.fromkeys(names)
            if name not in marked and self._tokenizer.token_to_id(name) is not None
        ]
        if missing:
            self._tokenizer.add_special_tokens(missing)


class IncrementalDetokenizer:
    """Text of a growing list of token ids, at constant cost per token.

    What push returned, joined, plus flush, equals Tokenizer.decode of all ids. A character is returned only
    when all its bytes are there; bytes that can't become one give U+FFFD, as in decode.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strategy: _ByteLevel | _Windowed = (
            _ByteLevel(tokenizer, skipped) if tokenizer.is_byte_level else _Windowed(tokenizer, skipped)
        )

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete, which may be empty."""
        return self._strategy.push(token_ids)

    def flush(self) -> str:
        """Return what was held back; the end of the text."""
        return self._strategy.flush()


class _ByteLevel:
    """Each token is a string of bytes: an incremental UTF-8 decoder does the rest."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        skipped = self._skipped
        data = b"".join([self._token_bytes(token) for token in token_ids if token not in skipped])
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """Other decoders look at a token's neighbours, so new tokens are decoded behind the last one before.

    A run of byte tokens (`<0xE4>`) is held until it ends: whether it is valid decides about all of it.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._context: list[int] = []
        self._run: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for token in token_ids:
            spelled = self._tokenizer.token_string(token)
            if token in self._skipped or spelled is None:
                continue
            self._run.append(token)
            if not _BYTE_TOKEN.fullmatch(spelled):
                pieces.append(self._emit(token))
        return "".join(pieces)

    def flush(self) -> str:
        return self._emit(None) if self._run else ""

    def _emit(self, last: int | None) -> str:
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special_tokens=False)
        text = decode(self._context + self._run, skip_special_tokens=False)
        self._context = [] if last is None else [last]
        self._run = []
        return text[len(before) :]


def _load(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    path = folder / "tokenizer.json"
    try:
        source = path.read_text(encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(source)
        definition: dict[str, Any] = json.loads(source)
    except OSError as error:
        raise ConfigError(f"can't read the tokenizer: {error}", param="model") from None
    except Exception as error:  # the library raises bare Exception for a file that it can't parse
        raise ConfigError(f"{path} is no tokenizer: {error}", param="model") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, definition


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}", param="model") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object", param="model")
    return data


def _content(token: object) -> str | None:
    """Return a special token's text; files hold either a string or an AddedToken as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens_map(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    found = {name: _content(named.get(name)) for name in _NAMED_TOKENS}
    return {name: token for name, token in found.items() if token is not None}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders", [])
        return len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _unicode_to_byte() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + i): byte for i, byte in enumerate(others)},
    }


_UNICODE_TO_BYTE = _unicode_to_byte()
