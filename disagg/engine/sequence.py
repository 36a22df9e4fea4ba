"""Sequence: one request inside an engine, and the states it goes through.

    add ──► WAITING ──schedule──► RUNNING ──finish──► FINISHED
               ▲  │                 │  │
               │  └─remote KV─► RECEIVING ──activate──► RUNNING
               └────preempt─────────┘  └──first token, hold──► HELD ──release──► FINISHED

RECEIVING: blocks are reserved and a peer's KV is being copied into them, maybe while the peer still computes
it; then the token that it draws comes before `activate`. HELD: the first token is out, the
blocks stay until whoever pulls them is done or the lease ends.
"""

from __future__ import annotations

import sys
from enum import Enum, auto

from disagg.hashing import BlockHash
from disagg.types import FinishReason, Request, SamplingParams

# When the first token of a request without an objective is due, after it was added.
DEFAULT_TTFT_S = 10.0


class SequenceStatus(Enum):
    WAITING = auto()
    RECEIVING = auto()
    RUNNING = auto()
    HELD = auto()
    FINISHED = auto()


class Sequence:
    """A request's tokens, and how many of them have their KV in this engine's blocks.

    token_ids: prompt and output so far. num_computed_tokens: tokens whose KV is written; the next step
    starts there. block_table: ids of the blocks that hold token 0, block_size, ... block_hashes: hashes of
    its full blocks as far as they are known, a chain that starts at hash_root. hold: keep the blocks after
    the first token. remote_kv: tokens whose KV a peer will deliver before the first step, 0 for none.
    max_num_tokens: length at which it ends at the latest. stop_token_ids: all that end it, EOS included.
    due: when its first token is wanted, on the engine's clock; the order in which sequences are served.
    awaits_token: the last token is a stand-in for the one that a peer has yet to draw.
    arrival_order: its place among those that are due at once.
    """

    __slots__ = (
        "added_at",
        "announced_epoch",
        "arrival_order",
        "awaits_token",
        "block_hashes",
        "block_table",
        "due",
        "finish_reason",
        "first_scheduled_at",
        "hash_root",
        "hold",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prior_tokens",
        "remote_kv",
        "request",
        "request_id",
        "runner_state",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        *,
        now: float,
        hold: bool = False,
        remote_kv: int = 0,
        awaits_token: bool = False,
        hash_root: BlockHash = b"",
        max_num_tokens: int = sys.maxsize,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.token_ids: list[int] = list(request.token_ids)
        self.num_prior_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.block_table: list[int] = []
        self.hash_root = hash_root
        self.block_hashes: list[BlockHash] = []
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.hold = hold
        self.remote_kv = remote_kv
        self.awaits_token = awaits_token
        self.max_num_tokens = max_num_tokens
        self.stop_token_ids = stop_token_ids
        self.due = now + (DEFAULT_TTFT_S if request.slo_ttft_s is None else request.slo_ttft_s)
        self.arrival_order = 0
        self.num_preemptions = 0
        # Of one that is to be held: that in which a peer was last told that it is being computed.
        self.announced_epoch = -1
        self.added_at = now
        self.first_scheduled_at: float | None = None
        # A runner may keep what it derived from the sequence (penalty counts, a slot in a GPU table) here.
        self.runner_state: object | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the client's prompt; everything after it counts as output."""
        return self.request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Tokens that this engine produced, not counting those the request arrived with."""
        return len(self.token_ids) - self.num_prior_tokens
