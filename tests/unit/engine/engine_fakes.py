"""A runner without a model that believes nothing: it checks every KV slot that a sequence relies on.

The KV of a position is a digest of all tokens up to it and of the tenant's salt, kept per (block, offset).
The next token is a function of the last KV digest alone. So a block that is leaked, shared by mistake,
overwritten or found under a wrong hash is noticed when it is read, and what is generated must not depend on
batching, chunking, preemption, prefix hits or hand-offs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf

from disagg.config import EngineConfig
from disagg.engine.engine import Engine
from disagg.engine.runner import Batch, ScheduledSequence
from disagg.errors import InvalidRequestError
from disagg.types import FinishReason, Request, SampledToken, SamplingParams, StepOutput

VOCAB = 13
EOS = 0
NULL_BLOCK = 0
BLOCK_SIZE = 4


def next_kv(parent: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(parent + token_id.to_bytes(4, "little"), digest_size=12).digest()


def kv_root(salt: str) -> bytes:
    return salt.encode()


def kv_chain(token_ids: SequenceOf[int], salt: str) -> list[bytes]:
    """Return the KV digest of each position."""
    chain, parent = [], kv_root(salt)
    for token_id in token_ids:
        parent = next_kv(parent, token_id)
        chain.append(parent)
    return chain


def token_after(kv: bytes) -> int:
    return kv[0] % VOCAB


def reference(
    request: Request, *, max_model_len: int, eos: frozenset[int] = frozenset({EOS})
) -> tuple[list[int], FinishReason]:
    """Return the new tokens of a request and why it ends, written without any engine."""
    tokens, params = list(request.token_ids), request.params
    kv = kv_chain(tokens, request.cache_salt)[-1]
    while True:
        token = token_after(kv)
        tokens.append(token)
        kv = next_kv(kv, token)
        num_outputs = len(tokens) - request.num_prompt_tokens
        stops = token in params.stop_token_ids or (token in eos and not params.ignore_eos)
        new = tokens[len(request.token_ids) :]
        if stops and num_outputs >= params.min_tokens:
            return new, FinishReason.STOP
        if num_outputs == params.max_tokens or len(tokens) == max_model_len:
            return new, FinishReason.LENGTH


class FakeRunner:
    """Writes and verifies fake KV. `fail_next`: the next execution raises after it wrote half of its KV."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.kv: dict[tuple[int, int], bytes] = {}
        self.shapes: list[list[tuple[str, int]]] = []
        self.fail_next = False

    def check_request(self, request: Request) -> None:
        if any(not 0 <= token < VOCAB for token in request.token_ids):
            raise InvalidRequestError("no such token", param="prompt")

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        self.shapes.append([(item.seq.request_id, item.num_tokens) for item in batch.items])
        written: set[tuple[int, int]] = set()
        chains = [self._verify(item) for item in batch.items]
        for index, (item, chain) in enumerate(zip(batch.items, chains, strict=True)):
            if self.fail_next and 2 * index >= len(batch.items):
                break
            self._write(item, chain, written)
        if self.fail_next:
            self.fail_next = False
            raise OSError("device lost")
        return [
            SampledToken(token_after(chain[-1])) if item.samples else None
            for item, chain in zip(batch.items, chains, strict=True)
        ]

    def _slot(self, block_table: SequenceOf[int], position: int) -> tuple[int, int]:
        block_id = block_table[position // self.block_size]
        assert NULL_BLOCK < block_id < self.num_blocks
        return block_id, position % self.block_size

    def _verify(self, item: ScheduledSequence) -> list[bytes]:
        """Check all that was computed before; return the digests up to the end of this chunk."""
        seq = item.seq
        assert item.num_tokens >= 1
        end = seq.num_computed_tokens + item.num_tokens
        assert end <= seq.num_tokens
        chain = kv_chain(seq.token_ids[:end], seq.request.cache_salt)
        for position in range(seq.num_computed_tokens):
            found = self.kv.get(self._slot(seq.block_table, position))
            assert found == chain[position], f"{seq.request_id}: wrong KV at {position}"
        return chain

    def _write(self, item: ScheduledSequence, chain: list[bytes], written: set[tuple[int, int]]) -> None:
        first = item.seq.num_computed_tokens
        for position in range(first, first + item.num_tokens):
            slot = self._slot(item.seq.block_table, position)
            assert slot not in written, "two sequences of one batch write the same slot"
            written.add(slot)
            self.kv[slot] = chain[position]

    # -- the wire --------------------------------------------------------------------------------

    def copy_from(
        self, peer: FakeRunner, theirs: SequenceOf[int], ours: SequenceOf[int], first: int, last: int
    ) -> None:
        """Copy the KV of positions first to last - 1; both lists cover a sequence from position 0."""
        for position in range(first, last):
            self.kv[self._slot(ours, position)] = peer.kv[peer._slot(theirs, position)]

    def scribble(self, block_ids: SequenceOf[int]) -> None:
        """Leave what a transfer leaves that broke off."""
        for block_id in block_ids:
            for offset in range(self.block_size):
                self.kv[block_id, offset] = b"garbage"


class CheckedEngine(Engine):
    """Does not mistake what the fake runner found wrong for a broken device."""

    def fail(self, batch: Batch, error: str) -> list[StepOutput]:
        if error.startswith("AssertionError"):
            raise AssertionError(error)
        return super().fail(batch, error)


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = BLOCK_SIZE,
    max_num_seqs: int = 8,
    budget: int = 16,
    max_prefill_tokens: int | None = None,
    max_model_len: int = 64,
    max_waiting: int = 100,
    prefix_caching: bool = True,
) -> tuple[Engine, FakeRunner]:
    config = EngineConfig(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_tokens=max_prefill_tokens,
        enable_prefix_caching=prefix_caching,
        max_waiting=max_waiting,
    )
    runner = FakeRunner(num_blocks, block_size)
    engine = CheckedEngine(
        config,
        runner,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        hash_model="fake",
        eos_token_ids=(EOS,),
    )
    return engine, runner


def make_request(
    request_id: str = "r",
    prompt: SequenceOf[int] = (1, 2, 3),
    *,
    outputs: SequenceOf[int] = (),
    max_tokens: int | None = 4,
    min_tokens: int = 0,
    ignore_eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
    priority: int = 0,
    deadline: float | None = None,
    salt: str = "",
) -> Request:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )
    return Request(
        request_id,
        [*prompt, *outputs],
        len(prompt),
        params,
        priority=priority,
        deadline=deadline,
        cache_salt=salt,
    )


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    """Return a prompt that shares no block with one of another seed."""
    return [1 + (seed * 7 + (index + seed) * (index + 3)) % (VOCAB - 1) for index in range(num_tokens)]


def run_until_idle(engine: Engine, *, now: float = 0.0, limit: int = 1000) -> list[StepOutput]:
    """Step until nothing can be done without an outside event."""
    outputs: list[StepOutput] = []
    for _ in range(limit):
        if not engine.has_work():
            return outputs
        outputs += engine.step(now)
        engine.check_integrity()
    raise AssertionError(f"the engine still has work after {limit} steps")


def tokens_of(outputs: SequenceOf[StepOutput], request_id: str) -> list[int]:
    return [token for output in outputs if output.request_id == request_id for token in output.token_ids]


def last_of(outputs: SequenceOf[StepOutput], request_id: str) -> StepOutput:
    return [output for output in outputs if output.request_id == request_id][-1]
