"""What clients send and receive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from disagg.types import FinishReason, TokenLogprobs

Messages = Sequence[Mapping[str, str]]
"""A conversation: [{"role": "user", "content": "Hello"}, ...]."""


class GenerationOptions(TypedDict, total=False):
    """Optional arguments of generate and stream; what is left out takes the server's default.

    Sampling fields are those of disagg.SamplingParams. request_id: names the request for abort, unique among
    those that run. priority: lower is served first. slo_ttft_ms, slo_tpot_ms: objectives. timeout: seconds
    for the whole answer, the client's own by default.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    request_id: str
    model: str
    priority: int
    cache_salt: str
    slo_ttft_ms: float
    slo_tpot_ms: float
    timeout: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. cached_tokens: prompt tokens whose KV was already there."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What one step added. finish_reason and usage are set on the last chunk."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer. logprobs: one entry per token if they were asked for."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the server serves. max_model_len: prompt and answer together, in tokens."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    version: str
