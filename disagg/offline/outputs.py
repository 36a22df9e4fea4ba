"""What LLM.generate returns; field names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.types import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. token_ids: all that were generated, a stop token included, while text ends before it.

    logprobs: one entry per token where they were asked for, else None. cumulative_logprob: their sum.
    stop_reason: the stop string or stop token id that ended it, None for EOS or length.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stop_reason: str | int | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        if self.logprobs is None:
            return None
        return sum(entry.logprob for entry in self.logprobs)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its choices. prompt: its text, None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    finished: bool = True
