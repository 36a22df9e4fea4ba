"""Chat templates as transformers renders them, without importing transformers (seconds of start-up).

The environment is that of `transformers.utils.chat_template_utils`: sandboxed and immutable, blocks trimmed,
`tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls and the `generation` tag.
Templates come from the model's folder only; a client can't supply one (CVE-2025-61620).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from disagg.errors import ConfigError, InvalidRequestError

Message = Mapping[str, str]
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class ChatTemplate:
    """A compiled template with the special tokens that it may name. Raises ConfigError if it is no Jinja2."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template can't be compiled: {error}", param="model") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, str | bool] | None = None,
    ) -> str:
        """Return the prompt's text; it is to be encoded without adding special tokens.

        Raises InvalidRequestError naming `messages` where the template refuses them, for example because
        roles don't alternate.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt to be false",
                param="continue_final_message",
            )
        chat = [dict(message) for message in messages]
        final = chat[-1]["content"] if chat else ""
        if continue_final_message:
            chat[-1]["content"] = final + _CONTINUE_TAG
        text = self._render(chat, add_generation_prompt, variables or {})
        return _cut_at_tag(text, final) if continue_final_message else text

    def _render(
        self, chat: list[dict[str, str]], add_generation_prompt: bool, variables: Mapping[str, str | bool]
    ) -> str:
        values: dict[str, Any] = {**variables, **self._special_tokens}
        values |= {"messages": chat, "tools": None, "documents": None}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return self._template.render(values)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # What a template does with unforeseen messages can fail in any of these ways.
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def _cut_at_tag(text: str, final: str) -> str:
    where = text.rfind(_CONTINUE_TAG.strip())
    if where < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "the model's chat template does not keep the final message, so it can't be continued",
            param="continue_final_message",
        )
    kept_spacing = text.startswith(_CONTINUE_TAG, where)
    return text[:where] if kept_spacing else text[:where].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
