"""Data that crosses layers: requests, sampling parameters, step outputs, KV handles, worker states.

Immutable and on the standard library alone, so that the engine, the router and the simulator share them
without importing torch, Ray or a wire format. What is made at every step is a named tuple, which costs an
eighth of a frozen dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from disagg.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP = 16
MAX_STOP_CHARS = 1024
MAX_SEED = 2**63 - 1


class Role(StrEnum):
    """Label of the pool that a worker belongs to. The engine does not know it."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class WorkerStatus(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends. Field names are OpenAI's and vLLM's.

    temperature: 0 is greedy. top_k: 0 (or -1) is off. logprobs: None is off, k >= 0 returns the drawn
    token's log-probability and those of the k most likely. seed: None lets the front end draw one, since
    a retry on another worker must draw the same noise. max_tokens: None means up to the model's length.

    Raises InvalidRequestError naming the field that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", max(self.top_k, 0) if self.top_k >= -1 else self.top_k)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("n", self.n, 1, MAX_N)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_range("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        self._check_collections()

    def _check_collections(self) -> None:
        if len(self.stop) > MAX_STOP:
            raise InvalidRequestError(f"stop takes at most {MAX_STOP} strings", param="stop")
        if any(not s or len(s) > MAX_STOP_CHARS for s in self.stop):
            raise InvalidRequestError(
                f"each stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop"
            )
        if len(self.stop_token_ids) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"stop_token_ids takes at most {MAX_LOGIT_BIAS} ids", param="stop_token_ids"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias takes at most {MAX_LOGIT_BIAS} ids", param="logit_bias")
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    too_low = value <= low if open_low else value < low
    if math.isnan(value) or too_low or value > high:
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        raise InvalidRequestError(f"{name} must be in {bounds}, got {value}", param=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue: token_ids are the prompt and whatever an earlier worker already produced.

    num_prompt_tokens: length of the client's prompt; token_ids[num_prompt_tokens:] count as output for
    penalties, max_tokens and min_tokens, so that a request continued elsewhere behaves as if it had never
    moved. params.n is 1 and params.seed is set: a front end has unrolled n and drawn a seed.
    priority: lower is served first. deadline: seconds on the receiving process's clock, or None.
    cache_salt: prefix-cache entries are shared only between equal salts. slo_ttft_s: seconds from arrival at
    the worker within which the first token is wanted, or None; what is due first is served first.
    """

    request_id: str
    token_ids: Sequence[int]
    num_prompt_tokens: int
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    slo_ttft_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, natural logarithm, of the unmodified distribution.

    rank: 1 is the most likely token. top: (token_id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a runner drew for one sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class StepOutput(NamedTuple):
    """What one engine step produced for one sequence.

    finish_reason: set on the last output of a sequence on this worker. held: the sequence was added with
    hold=True, has its first token, and its blocks stay until release. matched_stop: the stop token id that
    ended the sequence (EOS included), else None. num_cached_tokens: prompt tokens taken from the prefix
    cache, reported with the first output. queued_s, prefill_s: on the first output only, seconds from add
    to the first scheduled chunk, and from there to the first token. error: the text for FinishReason.ERROR.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    held: bool = False
    num_cached_tokens: int = 0
    queued_s: float | None = None
    prefill_s: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class KVHandle:
    """Claim on KV that a worker computed. It names no address and no size that the receiver trusts.

    key: 16 random bytes drawn for this hand-off; who does not know it gets nothing. incarnation: of the
    worker process, so that a restarted worker is a new peer. num_tokens: tokens whose KV is computed.
    """

    worker_id: str
    incarnation: str
    request_id: str
    key: bytes
    num_tokens: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What two workers must agree on before a block moves. dtype is torch's name without the prefix.

    tp_size: ranks among which the worker's cache is divided, by heads. A block is that of all of them, in one
    order whatever the degree.
    """

    model: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tp_size: int = 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and heads: keys and values."""
        itemsize = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}[self.dtype]
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is; does not change while its process lives.

    address: host:port of its gRPC server. model_fingerprint: identity of its checkpoint, the first link of
    every block hash. max_prefill_tokens: of prompts in a step in which streams decode, 0 for no such limit.
    """

    worker_id: str
    incarnation: str
    role: Role
    address: str
    host: str
    pid: int
    max_model_len: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks_total: int
    model_fingerprint: str = ""
    max_prefill_tokens: int = 0


class WorkerLoad(NamedTuple):
    """What a worker last said of itself. waiting_tokens: tokens still to be computed of all its requests."""

    num_running: int = 0
    num_waiting: int = 0
    num_held: int = 0
    waiting_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One row of the cluster view."""

    info: WorkerInfo
    status: WorkerStatus
    load: WorkerLoad = field(default_factory=WorkerLoad)
