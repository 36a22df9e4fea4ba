"""What became of one request and when, on the front end's clock; metrics, traces and answers read it.

Workers report durations, never times of day, so the clocks of two hosts are never compared.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Transfer:
    """What the decode side told of a hand-off. reason: the error's type where the KV was recomputed."""

    transport: str
    num_bytes: int
    exposed_s: float
    recomputed: bool = False
    reason: str = ""


@dataclass(slots=True)
class Attempt:
    """One placement of a request and how it went. Times are on the timeline's clock.

    asked, placed: when the router was asked and had answered. queued_s, prefill_s: as the prefill worker
    counted them. handed_off: when the decode worker was given the request; kv_ready: when its word came that
    it has the KV. lost: the worker whose loss ended the attempt.
    """

    asked: float
    placed: float
    prefill_worker: str
    decode_worker: str
    policy: str = ""
    kind: str = ""
    num_cached_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    first_output: float | None = None
    handed_off: float | None = None
    kv_ready: float | None = None
    transfer: Transfer | None = None
    ended: float | None = None
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Parts:
    """A request's time in seconds.

    queue + prefill is the time to the first token; kv_transfer + first_decode the gap to the second; queue +
    prefill + kv_transfer + decode all of it. frontend is the part of queue that the front end took to read
    and tokenise the request, before it asked for a place. first_decode: None without a second token.
    """

    queue: float
    prefill: float
    kv_transfer: float
    decode: float
    frontend: float
    first_decode: float | None

    @property
    def ttft(self) -> float:
        return self.queue + self.prefill

    @property
    def e2e(self) -> float:
        return self.ttft + self.kv_transfer + self.decode


@dataclass(slots=True)
class Timeline:
    """One request from its arrival at the front end to its end, on time.monotonic.

    traceparent: the client's W3C trace context, or "". trace_id: of the trace that all choices of a request
    share where the client gave none. operation: GenAI's name of what was asked for. outcome: set with
    `finished`, as in disagg_requests_total. complete: set by a reader that has all it wants (a stop string)
    before it closes the generator, which otherwise takes that for a client that left.
    """

    arrived: float = field(default_factory=time.monotonic)
    traceparent: str = ""
    trace_id: int = 0
    operation: str = "text_completion"
    attempts: list[Attempt] = field(default_factory=list)
    first_token: float | None = None
    second_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    num_output_tokens: int = 0
    outcome: str = ""
    complete: bool = False

    @property
    def current(self) -> Attempt:
        """The attempt that runs, or ran last. Raises IndexError before the first placement."""
        return self.attempts[-1]

    @property
    def streamed_s(self) -> float:
        """Seconds from the first token to the last, 0 where there are not two."""
        if self.first_token is None or self.last_token is None:
            return 0.0
        return self.last_token - self.first_token

    def parts(self) -> Parts | None:
        """Return where the time went, None while there is no first token or no end.

        Clamped so that the parts add up to the whole even where a resume repeated one of them.
        """
        if self.first_token is None or self.finished is None:
            return None
        ttft, e2e = self.first_token - self.arrived, self.finished - self.arrived
        producer = next(each for each in self.attempts if each.first_output is not None)
        frontend = self.attempts[0].asked - self.arrived
        prefill = min(producer.prefill_s, ttft - frontend)
        transfer = min(sum(map(_transfer_s, self.attempts)), e2e - ttft)
        first_decode = None
        if self.second_token is not None:
            early = [each for each in self.attempts if each.placed <= self.second_token]
            first_decode = max(0.0, self.second_token - self.first_token - sum(map(_transfer_s, early)))
        return Parts(ttft - prefill, prefill, transfer, e2e - ttft - transfer, frontend, first_decode)


def describe(timeline: Timeline) -> dict[str, Any]:
    """Return a timeline that has ended as JSON, for the client that asked: seconds, and who did what."""
    parts = timeline.parts()
    return {
        "outcome": timeline.outcome,
        "ttft_s": None if parts is None else parts.ttft,
        "e2e_s": None if parts is None else parts.e2e,
        "parts": None if parts is None else asdict(parts),
        "attempts": [
            {
                "prefill_worker": attempt.prefill_worker,
                "decode_worker": attempt.decode_worker,
                "policy": attempt.policy,
                "kind": attempt.kind,
                "cached_tokens": attempt.num_cached_tokens,
                "transfer": None if attempt.transfer is None else asdict(attempt.transfer),
                "lost": attempt.lost or None,
            }
            for attempt in timeline.attempts
        ],
    }


def _transfer_s(attempt: Attempt) -> float:
    if attempt.handed_off is None or attempt.kv_ready is None:
        return 0.0
    return attempt.kv_ready - attempt.handed_off
