"""A request with an arrival time and lengths but no content, and an ordered list of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple


class WorkloadError(ValueError):
    """A workload that cannot be built: `field` names what is wrong, `problem` says why."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Segment(NamedTuple):
    """A run of prompt tokens. Equal `block_id` means equal content; None is the request's own."""

    block_id: int | None
    tokens: int


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request: when it arrives, and how many tokens go in and come out.

    `block_ids` names the content of the prompt's first `len(block_ids) * block_tokens` tokens (the last
    block may be cut short by the prompt's end). As in the Mooncake traces an id stands for a block *and
    everything before it*: two requests whose n-th id is equal share the first n blocks.
    """

    arrival_s: float
    """Seconds since the workload's start."""
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 0
    session: int | None = None
    """Requests of one conversation or prefix group, where that is known."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_s) and self.arrival_s >= 0):
            raise WorkloadError("arrival_s", f"must be finite and not negative, got {self.arrival_s}")
        if self.prompt_tokens < 1:
            raise WorkloadError("prompt_tokens", f"must be at least 1, got {self.prompt_tokens}")
        if self.output_tokens < 1:
            raise WorkloadError("output_tokens", f"must be at least 1, got {self.output_tokens}")
        if self.block_ids:
            self._check_blocks()

    def _check_blocks(self) -> None:
        if self.block_tokens < 1:
            raise WorkloadError("block_tokens", f"must be at least 1, got {self.block_tokens}")
        most = math.ceil(self.prompt_tokens / self.block_tokens)
        if len(self.block_ids) > most:
            raise WorkloadError(
                "block_ids",
                f"{len(self.block_ids)} blocks of {self.block_tokens} tokens are more than the "
                f"{self.prompt_tokens} prompt tokens can fill ({most})",
            )

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens whose content is named by `block_ids`."""
        return min(len(self.block_ids) * self.block_tokens, self.prompt_tokens)

    def segments(self) -> Iterator[Segment]:
        """The prompt from its start, as runs of tokens; their lengths sum to `prompt_tokens`."""
        left = self.prompt_tokens
        for block_id in self.block_ids:
            tokens = min(self.block_tokens, left)
            yield Segment(block_id, tokens)
            left -= tokens
        if left:
            yield Segment(None, left)

    def capped(self, max_prompt_tokens: int | None, max_output_tokens: int | None) -> TimedRequest:
        """The same request with its lengths cut to the caps (None: no cap)."""
        prompt = min(self.prompt_tokens, max_prompt_tokens or self.prompt_tokens)
        output = min(self.output_tokens, max_output_tokens or self.output_tokens)
        if (prompt, output) == (self.prompt_tokens, self.output_tokens):
            return self
        blocks = self.block_ids
        if blocks:
            blocks = blocks[: math.ceil(prompt / self.block_tokens)]
        return replace(self, prompt_tokens=prompt, output_tokens=output, block_ids=blocks)


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival. Every change returns a new workload."""

    name: str
    requests: tuple[TimedRequest, ...]

    def __post_init__(self) -> None:
        previous = 0.0
        for index, request in enumerate(self.requests):
            if request.arrival_s < previous:
                raise WorkloadError(
                    "requests",
                    f"request {index} arrives at {request.arrival_s} s, before the one ahead of it",
                )
            previous = request.arrival_s

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TimedRequest]:
        return iter(self.requests)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second over the span; infinite when all arrive at once."""
        if len(self.requests) < 2:
            return math.inf
        return (len(self.requests) - 1) / self.span_s if self.span_s else math.inf

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)

    def block_hit_share(self) -> float:
        """Share of prompt blocks seen before: what a prefix cache of infinite size would hit."""
        seen: set[int] = set()
        blocks = hits = 0
        for request in self.requests:
            blocks += len(request.block_ids)
            hits += sum(block in seen for block in request.block_ids)
            seen.update(request.block_ids)
        return hits / blocks if blocks else 0.0

    def head(self, count: int) -> Workload:
        """The first `count` requests."""
        if count < 1:
            raise WorkloadError("count", f"must be at least 1, got {count}")
        return replace(self, requests=self.requests[:count])

    def window(self, start_s: float = 0.0, duration_s: float | None = None) -> Workload:
        """What arrives in [start_s, start_s + duration_s), with `start_s` as the new time 0."""
        end = window_end(start_s, duration_s)
        kept = (request for request in self.requests if start_s <= request.arrival_s < end)
        return replace(self, requests=tuple(replace(r, arrival_s=r.arrival_s - start_s) for r in kept))

    def scale_rate(self, factor: float) -> Workload:
        """The same requests `factor` times as fast: 2 halves every gap between arrivals."""
        if not (math.isfinite(factor) and factor > 0):
            raise WorkloadError("factor", f"must be finite and above 0, got {factor}")
        return replace(
            self, requests=tuple(replace(r, arrival_s=r.arrival_s / factor) for r in self.requests)
        )

    def cap_lengths(
        self, max_prompt_tokens: int | None = None, max_output_tokens: int | None = None
    ) -> Workload:
        """Every request cut to the caps (tokens; None: no cap), prefix blocks included."""
        for field, cap in (
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_output_tokens", max_output_tokens),
        ):
            if cap is not None and cap < 1:
                raise WorkloadError(field, f"must be at least 1, got {cap}")
        return replace(
            self, requests=tuple(r.capped(max_prompt_tokens, max_output_tokens) for r in self.requests)
        )


def window_end(start_s: float, duration_s: float | None) -> float:
    if not (math.isfinite(start_s) and start_s >= 0):
        raise WorkloadError("start_s", f"must be finite and not negative, got {start_s}")
    if duration_s is None:
        return math.inf
    if not duration_s > 0:
        raise WorkloadError("duration_s", f"must be above 0, got {duration_s}")
    return start_s + duration_s
