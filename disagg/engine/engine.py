"""Engine: continue requests. It knows no roles, no clock and no device.

add ──► schedule ──► runner.execute ──► update ──► outputs
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from disagg.config import EngineConfig
from disagg.engine.block_pool import BlockEvents, BlockPool
from disagg.engine.integrity import check_queues, check_sequences
from disagg.engine.runner import Batch, Runner
from disagg.engine.scheduler import Reservation, Scheduler
from disagg.engine.sequence import Sequence, SequenceStatus
from disagg.errors import InvalidRequestError, OverloadedError, RunnerLostError
from disagg.hashing import BlockHash, chain_root
from disagg.types import FinishReason, Request, SampledToken, StepOutput, WorkerLoad

logger = logging.getLogger(__name__)

DEADLINE_EXCEEDED = "deadline_exceeded"
# What a client is told to wait when the queue is full, in seconds.
RETRY_AFTER_S = 1.0

__all__ = ["DEADLINE_EXCEEDED", "Counters", "Engine", "Progress", "Reservation"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sequence has come that is to be held.

    epoch: how often its blocks were taken from it. block_ids: those that are whole and computed (none may be
    where it has just begun) or, if complete, all that cover its computed tokens: it is held.
    """

    request_id: str
    epoch: int
    block_ids: list[int]
    complete: bool


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the engine was made. prefix_queries, prefix_hits: tokens."""

    prefix_queries: int
    prefix_hits: int
    preemptions: int


class Engine:
    """One engine over one pool of blocks. Not thread-safe: one thread owns it.

    num_blocks: including the null block 0. max_model_len: tokens of the longest sequence, prompt and
    output; a pool that holds less lowers it, see the property. hash_model: identity of the checkpoint, for
    block hashes. Times are seconds on whatever clock the caller has.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        num_blocks: int,
        max_model_len: int,
        hash_model: str,
        eos_token_ids: Collection[int],
    ) -> None:
        self._config = config
        self._runner = runner
        self._hash_model = hash_model
        self._eos = frozenset(eos_token_ids)
        self._pool = BlockPool(
            num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        # The last token of a sequence needs no room: its KV is never computed.
        self._max_model_len = min(max_model_len, self._pool.capacity * config.block_size + 1)
        self._scheduler = Scheduler(config, self._pool)
        self._sequences: dict[str, Sequence] = {}
        self._num_held = 0
        self._progress: dict[str, Progress] = {}
        self._on_scheduled: Callable[[], None] = _nothing
        # A heap with an entry for each request that has a deadline; those of ended ones are dropped lazily.
        self._deadlines: list[tuple[float, str]] = []

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence that this engine can finish."""
        return self._max_model_len

    # -- requests ----------------------------------------------------------------------------------

    def add(
        self,
        request: Request,
        *,
        now: float,
        hold: bool = False,
        remote_kv: int = 0,
        awaits_token: bool = False,
    ) -> None:
        """Queue a request.

        hold: after its first token keep its blocks until `release`. remote_kv: a peer will deliver the KV of
        that many tokens, see take_reservations. awaits_token: the peer has yet to draw the last token; any
        that is valid stands in for it until `token_came`.
        Raises InvalidRequestError naming the field, OverloadedError where too many wait; then nothing is
        changed.
        """
        self._check(request, remote_kv)
        seq = Sequence(
            request,
            now=now,
            hold=hold,
            remote_kv=remote_kv,
            awaits_token=awaits_token,
            hash_root=chain_root(self._hash_model, salt=request.cache_salt),
            max_num_tokens=self._max_num_tokens(request),
            stop_token_ids=self._stop_token_ids(request),
        )
        self._sequences[request.request_id] = seq
        self._watch_deadline(seq)
        self._scheduler.add(seq)

    def _check(self, request: Request, remote_kv: int) -> None:
        num_tokens = len(request.token_ids)
        if request.request_id in self._sequences:
            raise InvalidRequestError("request_id is in use", param="request_id")
        if num_tokens == 0:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        if num_tokens >= self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens; at most {self._max_model_len - 1} can be taken",
                param="prompt",
            )
        if not 1 <= request.num_prompt_tokens <= num_tokens:
            raise InvalidRequestError(
                f"num_prompt_tokens must be in [1, {num_tokens}], got {request.num_prompt_tokens}",
                param="num_prompt_tokens",
            )
        if num_tokens >= self._max_num_tokens(request):
            raise InvalidRequestError("the request already has max_tokens outputs", param="max_tokens")
        if not 0 <= remote_kv < num_tokens:
            raise InvalidRequestError(
                f"remote_kv must be in [0, {num_tokens - 1}], got {remote_kv}", param="remote_kv"
            )
        self._runner.check_request(request)
        if self._scheduler.waiting.size + len(self._scheduler.early) >= self._config.max_waiting:
            raise OverloadedError(
                f"{self._config.max_waiting} requests are waiting", retry_after=RETRY_AFTER_S
            )

    def _max_num_tokens(self, request: Request) -> int:
        """Return the length at which the sequence ends at the latest."""
        limit = request.params.max_tokens
        if limit is None:
            return self._max_model_len
        return min(request.num_prompt_tokens + limit, self._max_model_len)

    def _stop_token_ids(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | self._eos

    def abort(self, request_id: str) -> bool:
        """End a request in any state without an output; False if there is none.

        Whoever writes into a receiving request's blocks, or reads a held one's, must have stopped.
        """
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._end(seq, FinishReason.ABORT)
        return True

    def release(self, request_id: str) -> bool:
        """Free the blocks of a held request; False if it is not (or no longer) held."""
        seq = self._sequences.get(request_id)
        if seq is None or seq.status is not SequenceStatus.HELD:
            return False
        self._end(seq, FinishReason.STOP)
        return True

    def held_blocks(self, request_id: str) -> list[int]:
        """Return the blocks that cover the computed tokens of a request. Raises KeyError."""
        seq = self._sequences[request_id]
        return seq.block_table[: -(-self.num_computed_tokens(request_id) // self._config.block_size)]

    def num_computed_tokens(self, request_id: str) -> int:
        """Return how many tokens of a request have their KV here. Raises KeyError."""
        return self._sequences[request_id].num_computed_tokens

    # -- holding -----------------------------------------------------------------------------------

    def on_hold_lost(self, callback: Callable[[str], None]) -> None:
        """Have `callback` called with the id of a request that was added with hold, on the stepping thread,
        before its blocks can be anybody else's: it was preempted or has ended.
        """
        self._scheduler.on_hold_lost = callback

    def on_scheduled(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on the stepping thread when a step was scheduled and before it is computed:
        reservations and beginnings need not wait for its end to be told.
        """
        self._on_scheduled = callback

    def take_progress(self) -> list[Progress]:
        """Return how far requests to be held have come, of those that got on since the last call."""
        progress = list(self._progress.values())
        self._progress.clear()
        return progress

    def _note_progress(self, seq: Sequence) -> None:
        complete = seq.status is SequenceStatus.HELD
        whole = seq.num_computed_tokens // self._config.block_size
        num_blocks = -(-seq.num_computed_tokens // self._config.block_size) if complete else whole
        self._progress[seq.request_id] = Progress(
            seq.request_id, seq.num_preemptions, seq.block_table[:num_blocks], complete
        )

    # -- remote KV ---------------------------------------------------------------------------------

    def take_reservations(self) -> list[Reservation]:
        """Return requests whose blocks were reserved since the last call, each once.

        Each waits for `activate`, except where the local prefix cache covers all that the peer has: such a
        request runs already, its reservation has nothing to fill, and activating it does nothing.
        """
        return self._scheduler.take_reservations()

    def token_came(self, request_id: str, token_id: int) -> None:
        """Give a request the token that it awaits; does nothing where it doesn't (any more)."""
        seq = self._sequences.get(request_id)
        if seq is not None and seq.awaits_token:
            self._scheduler.token_came(seq, token_id)

    def activate(self, request_id: str, num_computed_tokens: int, now: float) -> None:
        """Let a receiving request run on.

        num_computed_tokens: the leading tokens whose KV is in its blocks now, local hits included. The rest
        is computed here. Does nothing where the request is not receiving (any more) or awaits its token.
        """
        seq = self._sequences.get(request_id)
        if seq is None or seq.status is not SequenceStatus.RECEIVING or seq.awaits_token:
            return
        self._scheduler.activate(seq, num_computed_tokens)
        if seq.request.deadline is not None and seq.request.deadline <= now:
            self._watch_deadline(seq)  # `expire` let it pass while a peer wrote into the blocks

    # -- steps -------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a step could make progress without an outside event.

        False also where requests wait, nothing runs and the first does not fit: held or receiving requests
        have the blocks, and their release, activate or abort is that event.
        """
        return self._scheduler.has_work()

    def step(self, now: float) -> list[StepOutput]:
        """Expire, schedule, run and account. A runner that fails costs the batch, not the engine.

        Raises RunnerLostError where the runner can't compute anything from now on.
        """
        expired = self.expire(now)
        batch = self.schedule(now)
        if not batch.items:
            return expired
        try:
            sampled = self._runner.execute(batch)
            check_result(batch, sampled)
        except RunnerLostError:
            raise
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(batch.items))
            return expired + self.fail(batch, f"{type(error).__name__}: {error}")
        return expired + self.update(batch, sampled, now)

    def expire(self, now: float) -> list[StepOutput]:
        """End what is past its deadline, started or not.

        A receiving request follows once it is activated, since a peer writes into its blocks; a held one has
        done its part, and its lease bounds its life.
        """
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            seq = self._sequences.get(request_id)
            if seq is None or seq.request.deadline != deadline:
                continue
            if seq.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
                self._end(seq, FinishReason.ERROR)
                outputs.append(_error_output(seq, DEADLINE_EXCEEDED))
        return outputs

    def schedule(self, now: float) -> Batch:
        """Return the next batch, which may be empty. Each batch must go to `update` or `fail`."""
        batch = self._scheduler.schedule(now)
        for item in batch.items:
            seq = item.seq
            if seq.hold and seq.announced_epoch != seq.num_preemptions:
                seq.announced_epoch = seq.num_preemptions
                self._note_progress(seq)
        self._on_scheduled()
        return batch

    def update(self, batch: Batch, sampled: SequenceOf[SampledToken | None], now: float) -> list[StepOutput]:
        """Account for a batch that was run; `sampled` is aligned with its items."""
        outputs: list[StepOutput] = []
        for item, token in zip(batch.items, sampled, strict=True):
            if item.seq.status is not SequenceStatus.RUNNING:
                continue  # aborted while the step ran
            self._scheduler.advance(item.seq, item.num_tokens)
            if token is not None:
                outputs.append(self._append(item.seq, token, now))
            if item.seq.hold and item.seq.request_id in self._sequences:
                self._note_progress(item.seq)
        return outputs

    def fail(self, batch: Batch, error: str) -> list[StepOutput]:
        """End all sequences of a batch that could not be run; nothing that it wrote can be found."""
        outputs = []
        for item in batch.items:
            if item.seq.status is SequenceStatus.RUNNING:
                self._end(item.seq, FinishReason.ERROR)
                outputs.append(_error_output(item.seq, error))
        return outputs

    def _append(self, seq: Sequence, token: SampledToken, now: float) -> StepOutput:
        seq.token_ids.append(token.token_id)
        reason, matched = self._finish_reason(seq, token.token_id)
        output = _output(seq, token, reason, matched, now)
        if reason is not None:
            self._end(seq, reason)
        elif seq.hold:
            self._hold(seq)
        return output

    def _finish_reason(self, seq: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
        if token_id in seq.stop_token_ids and seq.num_output_tokens >= seq.params.min_tokens:
            return FinishReason.STOP, token_id
        if len(seq.token_ids) >= seq.max_num_tokens:
            return FinishReason.LENGTH, None
        return None, None

    # -- ends --------------------------------------------------------------------------------------

    def _hold(self, seq: Sequence) -> None:
        self._scheduler.leave(seq)
        seq.status = SequenceStatus.HELD
        self._num_held += 1

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.status is SequenceStatus.HELD:
            self._num_held -= 1
        else:
            self._scheduler.leave(seq)
        self._scheduler.free_blocks(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        del self._sequences[seq.request_id]
        self._progress.pop(seq.request_id, None)

    def _watch_deadline(self, seq: Sequence) -> None:
        if seq.request.deadline is None:
            return
        heapq.heappush(self._deadlines, (seq.request.deadline, seq.request_id))
        if len(self._deadlines) > 2 * len(self._sequences) + 64:
            # Deadlines are minutes away and most requests take seconds: don't keep the dead ones for that.
            self._deadlines = [
                (live.request.deadline, live.request_id)
                for live in self._sequences.values()
                if live.request.deadline is not None
            ]
            heapq.heapify(self._deadlines)

    def limit_prefill(self, max_prefill_tokens: int | None) -> None:
        """Set anew what EngineConfig.max_prefill_tokens says, from the next step on."""
        self._scheduler.limit_prefill(max_prefill_tokens)

    # -- state -------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        scheduler = self._scheduler
        return Counters(scheduler.prefix_queries, scheduler.prefix_hits, scheduler.num_preemptions)

    def load(self) -> WorkerLoad:
        """Return what the router wants to know; costs O(max_num_seqs) however many wait."""
        scheduler = self._scheduler
        return WorkerLoad(
            num_running=len(scheduler.running),
            num_waiting=scheduler.waiting.size + len(scheduler.receiving) + len(scheduler.early),
            num_held=self._num_held,
            waiting_tokens=scheduler.tokens_to_compute(),
            kv_blocks_used=self._pool.num_used,
            kv_blocks_cached=self._pool.num_cached,
        )

    def block_events(self) -> BlockEvents:
        """Return prefix-cache changes since the last call."""
        return self._pool.drain_events()

    def cached_hashes(self) -> list[BlockHash]:
        """Return every block hash that a lookup would find now."""
        return self._pool.snapshot()

    def reset_cache(self) -> None:
        """Forget all cached prefixes, such as after a change of weights. Call it when nothing runs."""
        self._pool.reset_cache()

    def check_integrity(self) -> None:
        """Compare blocks, tables, hashes and queues with each other, in O(blocks). Raises AssertionError."""
        self._pool.check_integrity(self._block_owners())
        check_sequences(self._sequences.values(), self._pool, self._config.block_size)
        check_queues(Counter(seq.status for seq in self._sequences.values()), self._scheduler, self._num_held)

    def _block_owners(self) -> Counter[int]:
        """Return how often each block is in use."""
        owners: Counter[int] = Counter()
        for seq in self._sequences.values():
            owners.update(seq.block_table)
        return owners


def _nothing() -> None:
    """Stand in for whoever has not asked to be told."""


def _output(
    seq: Sequence, token: SampledToken, reason: FinishReason | None, matched: int | None, now: float
) -> StepOutput:
    logprobs = () if token.logprobs is None else (token.logprobs,)
    held = reason is None and seq.hold
    if seq.num_new_tokens > 1:
        return StepOutput(seq.request_id, (token.token_id,), logprobs, reason, matched, held)
    started = now if seq.first_scheduled_at is None else seq.first_scheduled_at
    return StepOutput(
        request_id=seq.request_id,
        token_ids=(token.token_id,),
        logprobs=logprobs,
        finish_reason=reason,
        matched_stop=matched,
        held=held,
        num_cached_tokens=seq.num_cached_tokens,
        queued_s=started - seq.added_at,
        prefill_s=now - started,
    )


def _error_output(seq: Sequence, error: str) -> StepOutput:
    return StepOutput(seq.request_id, (), finish_reason=FinishReason.ERROR, error=error)


def check_result(batch: Batch, sampled: SequenceOf[SampledToken | None]) -> None:
    """Raise RuntimeError or ValueError unless there is a token for each item that samples and no other."""
    for item, token in zip(batch.items, sampled, strict=True):
        if item.samples is not (token is not None):
            raise RuntimeError(f"the runner's answer does not fit the batch at {item.seq.request_id}")
