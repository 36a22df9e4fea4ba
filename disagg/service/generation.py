"""What a front end asks of the cluster, whatever the protocol it speaks to clients."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from disagg.types import SamplingParams, StepOutput


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, one sequence: n is unrolled and the seed drawn by the front end.

    timeout_s: seconds until the deadline. slo_ttft_s, slo_tpot_s: objectives, None for the defaults.
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


class Generator(Protocol):
    """Runs requests. The orchestrator is one; tests have others."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Yield each step's tokens; the last output, and only it, has a finish_reason (STOP or LENGTH).

        Closing the generator early (aclose, or cancelling the task that iterates) cancels the request on
        every worker. Raises InvalidRequestError, OverloadedError, NoCapacityError or DeadlineExceededError.
        """
        ...
