"""Bodies of requests: OpenAI's fields and vLLM's, bounded. What isn't implemented is refused by name.

Unknown fields are ignored, as OpenAI's own servers and vLLM do. Types are strict: "0.5" is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from disagg.errors import InvalidRequestError
from disagg.frontend.backend import SamplingDefaults
from disagg.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP, MAX_STOP_CHARS, SamplingParams

MAX_MESSAGES = 4096
MAX_PROMPTS = 128
MAX_CHOICES = 128
"""Prompts times n: sequences that one request may start."""
DEFAULT_COMPLETION_TOKENS = 16

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
PositiveInt32 = Annotated[int, Field(ge=1, le=2**31 - 1)]
ShortText = Annotated[str, Field(max_length=512)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
Body = TypeVar("Body", bound=BaseModel)


def parse_body(model: type[Body], data: bytes) -> Body:
    """Parse and validate a JSON body. Raises InvalidRequestError with the offending field as `param`."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message, location = first["msg"].removeprefix("Value error, "), first["loc"]
    if not location:
        what = "is not valid JSON" if first["type"] == "json_invalid" else "must be a JSON object"
        return InvalidRequestError(f"the request body {what}: {message}")
    param = _field_name(location)
    return InvalidRequestError(f"{param}: {message}", param=param)


def _field_name(location: tuple[int | str, ...]) -> str:
    """Return `messages[1].content` for a message's field, else the top-level name.

    Deeper parts of other locations name alternatives of a union, which mean nothing to a client.
    """
    if location[0] != "messages" or len(location) < 2:
        return str(location[0])
    field = f".{location[2]}" if len(location) > 2 else ""
    return f"messages[{location[1]}]{field}"


def _join_parts(value: Any) -> Any:
    """Message content is a string or a list of text parts, which templates take as lines."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts {"type": "text", "text": "..."} are supported')
        texts.append(part["text"])
    return "\n".join(texts)


def _as_tuple(value: Any) -> Any:
    """`stop` is one string or a list of them."""
    return [value] if isinstance(value, str) else value


def _parse_bias(value: Any) -> Any:
    """JSON's keys are strings; these are token ids."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} token ids")
    if not all(isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise ValueError("keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """Return the prompts of `str | list[str] | list[int] | list[list[int]]`. Raises ValueError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, of token ids, or of lists of token ids")
    if _is_token_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in a request")
    if all(isinstance(item, str) for item in value) or all(_is_token_ids(item) for item in value):
        return value
    raise ValueError("must be a string, a list of strings, of token ids, or of lists of token ids")


def _is_token_ids(value: Any) -> bool:
    # bool is an int to isinstance.
    return isinstance(value, list) and all(type(item) is int for item in value)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    name: ShortText | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None

    def as_template_sees_it(self) -> dict[str, str]:
        # OpenAI's newer name for the system prompt; templates only know the old one.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


# What a request may carry only with these values, because what it asks for isn't there.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),
    "logits_processors": ([],),
    "logit_processors": ([],),
    "suffix": ("",),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": (),
}


class SamplingBody(_Strict):
    """Fields that chat completions and completions share."""

    # Kept, so that what is not supported can be told from what is not known.
    model_config = ConfigDict(extra="allow")

    model: ShortText | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt32 | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    best_of: Annotated[int, Field(ge=0, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: (
        Annotated[
            dict[int, Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(_parse_bias),
        ]
        | None
    ) = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_STOP),
            BeforeValidator(_as_tuple),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[Int32], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    priority: Int32 | None = None
    cache_salt: ShortText | None = None
    service_tier: ServiceTier | None = None
    user: ShortText | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def tier(self) -> str:
        return "default" if self.service_tier in (None, "auto") else str(self.service_tier)

    def num_logprobs(self) -> int | None:
        """Return how many alternatives to report at each position, None for no log-probabilities."""
        raise NotImplementedError

    def check_supported(self) -> None:
        """Raise InvalidRequestError naming the first field that asks for something this server lacks."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
                raise InvalidRequestError(f"{name} is not supported by this server", param=name)
        if self.best_of is not None and self.best_of > self.num_choices:
            raise InvalidRequestError("best_of above n is not supported by this server", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")

    def sampling_params(self, defaults: SamplingDefaults, max_tokens: int | None) -> SamplingParams:
        """Return the parameters of all n choices. Raises InvalidRequestError naming a field out of range."""
        given = {name: getattr(self, name) for name in _PARAM_FIELDS}
        return SamplingParams(
            **{name: getattr(defaults, name) for name in SamplingDefaults.__dataclass_fields__}
            | {name: value for name, value in given.items() if value is not None},
            logit_bias=self.logit_bias or {},
            logprobs=self.num_logprobs(),
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
        )


_PARAM_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "n", "ignore_eos", "min_tokens"),
)


class ChatCompletionRequest(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: PositiveInt32 | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        check_messages(self.messages)
        check_template_variables(self.chat_template_kwargs)

    @property
    def requested_max_tokens(self) -> tuple[int | None, str]:
        """The limit and the name of the field that set it; the newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return self.max_tokens, "max_tokens"

    @property
    def chat(self) -> list[dict[str, str]]:
        return [message.as_template_sees_it() for message in self.messages]


def check_messages(messages: list[ChatMessage]) -> None:
    """Raise InvalidRequestError naming the message that carries more than text."""
    for index, message in enumerate(messages):
        for name in ("tool_calls", "function_call", "audio"):
            if getattr(message, name) not in (None, []):
                raise InvalidRequestError(
                    f"messages[{index}].{name} is not supported by this server",
                    param=f"messages[{index}].{name}",
                )


def check_template_variables(variables: dict[str, Any] | None) -> None:
    """Raise InvalidRequestError unless these are the switches templates have, such as enable_thinking.

    Neither a template nor anything a template trusts the server for can be passed this way.
    """
    for name, value in (variables or {}).items():
        if name not in ("enable_thinking", "thinking", "reasoning_effort"):
            raise InvalidRequestError(
                f"chat_template_kwargs: `{name[:64]}` is not supported", param="chat_template_kwargs"
            )
        if not isinstance(value, bool) and not (isinstance(value, str) and len(value) <= 64):
            raise InvalidRequestError(
                f"chat_template_kwargs: {name} must be true, false or a short string",
                param="chat_template_kwargs",
            )


class CompletionRequest(SamplingBody):
    prompt: Annotated[list[str | list[int]], PlainValidator(_parse_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check_supported(self) -> None:
        super().check_supported()
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError("echo with logprobs is not supported by this server", param="echo")
        if len(self.prompt) * self.num_choices > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts with n = {self.num_choices} are more than {MAX_CHOICES} choices",
                param="n" if self.num_choices > 1 else "prompt",
            )


class TokenizeRequest(_Strict):
    model: ShortText | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    return_token_strs: bool | None = None

    def check_supported(self) -> None:
        """Raise InvalidRequestError unless there is exactly one of prompt and messages."""
        if self.chat_template is not None:
            raise InvalidRequestError("chat_template is not supported by this server", param="chat_template")
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        check_messages(self.messages or [])
        check_template_variables(self.chat_template_kwargs)


class DetokenizeRequest(_Strict):
    model: ShortText | None = None
    tokens: list[Int32]
