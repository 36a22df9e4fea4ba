"""What a front end asks of the cluster, whatever the protocol it speaks to clients."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from disagg.service.timeline import Timeline
from disagg.types import MAX_SEED, SamplingParams, StepOutput


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, one sequence: n is unrolled and the seed drawn by the front end.

    timeout_s: seconds until the deadline. slo_ttft_s, slo_tpot_s: objectives, None for the defaults.
    timeline: begins when the front end received the request; the generator writes down what becomes of it.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    timeout_s: float = 600.0
    cache_salt: str = ""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    service_tier: str = field(default="default")
    timeline: Timeline = field(default_factory=Timeline, compare=False)


class Generator(Protocol):
    """Runs requests. The orchestrator is one; tests have others."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Yield each step's tokens; the last output, and only it, has a finish_reason (STOP or LENGTH).

        Closing the generator early (aclose, or cancelling the task that iterates) cancels the request on
        every worker. Raises InvalidRequestError, OverloadedError, NoCapacityError or DeadlineExceededError.
        """
        ...


def unroll(params: SamplingParams, draw_seed: Callable[[], int] | None = None) -> list[SamplingParams]:
    """Return the parameters of each of n choices: seeds count up from a given one, else are drawn."""
    draw = draw_seed or _draw_seed
    seeds = [draw() if params.seed is None else _wrap(params.seed + i) for i in range(params.n)]
    return [replace(params, n=1, seed=seed) for seed in seeds]


def _draw_seed() -> int:
    return secrets.randbits(63)


def _wrap(seed: int) -> int:
    return seed if seed <= MAX_SEED else seed - 2 * (MAX_SEED + 1)
