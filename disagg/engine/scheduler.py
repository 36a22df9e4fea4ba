"""Scheduler: which sequences run in the next step, and how many tokens of each.

Continuous batching (Orca, OSDI '22): the batch is made anew for every step. Chunked prefill under a token
budget (Sarathi-Serve, OSDI '24; DeepSpeed-FastGen): decodes take one token each first, chunks of prompts
fill what is left, so a long prompt never stalls running streams. There is no prefill phase and no decode
phase (as in vLLM v1): a sequence's num_computed_tokens catches up with its tokens, one or many a step.

Among prompts a quarter of what is left goes to the one that is due first, the rest to those with the fewest
tokens left (shortest remaining time first). So a short prompt waits for the step that runs, not for the
long prompts in the queue, and a long one gets on in every step, however many short ones come.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from disagg.config import EngineConfig
from disagg.engine.block_pool import BlockPool
from disagg.engine.runner import Batch, ScheduledSequence
from disagg.engine.sequence import Sequence, SequenceStatus
from disagg.engine.waiting_queue import WaitingQueue, by_size, rank, tokens_to_compute
from disagg.hashing import next_hash

# The part of a step's prompt tokens that belongs to the prompt that is due first: one in so many.
DUE_SHARE = 4


class Reservation(NamedTuple):
    """Blocks that wait for a peer's KV.

    block_ids: those that cover the remote tokens. num_cached_tokens: how many of these tokens were found
    here, always whole blocks, so that block_ids[num_cached_tokens // block_size:] are to be filled. If that
    is none, the sequence runs already and only the peer has to be told that it can let go.
    """

    request_id: str
    block_ids: list[int]
    num_cached_tokens: int


def _nothing(_request_id: str) -> None:
    pass


class Scheduler:
    """Admits, chunks and preempts. Owns every sequence's blocks until it is told that the sequence ended.

    Short requests are admitted before long ones, but only while the one that is due first would fit: small
    requests must not take a large one's blocks for ever. A sequence is admitted only with blocks for all of
    its known tokens, so a prompt that is half computed never stands still for want of blocks, and only if
    one more block is left for each sequence that goes on, so that the newcomer is not preempted a few steps
    later.

    Only a decode that crosses a block's end can run short. Then the sequence that is served last gives its
    blocks back and waits again (preemption by recomputation); they stay cached until somebody takes them,
    so recomputing is mostly a prefix hit. The one served first is preempted only if it runs alone, hence
    some sequence always gets on.

    RECEIVING and HELD sequences can't be preempted: a peer writes into, or reads from, their blocks. They
    can't deadlock the rest either:
      - both end by an outside event within bounded time (a pull ends or fails, a lease ends);
      - receiving ones hold at most half of the pool together (or there is just one, and nothing else
        runs), so running ones do not starve beside a stream of arrivals;
      - a received sequence is an ordinary running one: it owns the blocks of its next step already, and
        can be preempted like any other.

    A sequence that awaits its token is early: a peer still computes its KV, and what is done can be copied
    meanwhile. Such a reservation is a luxury, for which nobody may wait: it is made only when nothing else
    waits, early ones hold at most a quarter of the pool and of the places together, and one that is not
    reserved when its token comes joins the others. Whoever reserves early gives back what a peer takes back
    (its own sequence was preempted), so that an early reservation always ends by a peer's work alone.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._pool = pool
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._token_budget = config.max_num_batched_tokens
        self.limit_prefill(config.max_prefill_tokens)
        # Each running sequence gets at least one token in each step, or the last ones would starve.
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._max_receiving_blocks = pool.capacity // 2
        self._max_early_blocks = pool.capacity // 4
        self._max_early = self._max_num_seqs // 4
        self._num_arrived = 0
        self.waiting = WaitingQueue()
        # By rank.
        self.running: list[Sequence] = []
        self.receiving: dict[str, Sequence] = {}
        # How many of these may need more blocks: who is held after the first token never does.
        self.num_growing = 0
        # Those that await their token and have no blocks yet, in order of arrival.
        self.early: dict[str, Sequence] = {}
        # Called with the id of a sequence that was to be held, before its blocks are anybody else's.
        self.on_hold_lost: Callable[[str], None] = _nothing
        self._reservations: dict[str, Reservation] = {}
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    def limit_prefill(self, max_prefill_tokens: int | None) -> None:
        """Set the budget for prompts in a step in which streams decode, None for no other than the step's."""
        self._prompt_budget = max_prefill_tokens or self._token_budget

    def add(self, seq: Sequence) -> None:
        seq.arrival_order = self._num_arrived
        self._num_arrived += 1
        if seq.awaits_token:
            self.early[seq.request_id] = seq
        else:
            self._wait(seq)

    def token_came(self, seq: Sequence, token_id: int) -> None:
        """Put a token in the place that awaits it. A sequence without blocks waits among the others now."""
        seq.token_ids[-1] = token_id
        seq.awaits_token = False
        if self.early.pop(seq.request_id, None) is not None:
            self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.WAITING
        self.waiting.push(seq)

    def has_work(self) -> bool:
        """Whether `schedule` would start or continue anything as things are now."""
        if self.running:
            return True
        if self.waiting.size > 0:
            return self._fit(self.waiting.peek()) is not None
        return self._next_early() is not None

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch:
        """Return the next batch, with blocks for all of it allocated; it may be empty."""
        num_preemptions = self.num_preemptions
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for seq in self.running:
            # Nothing is left of one whose last tokens are being computed, see overlap.py.
            uncomputed = len(seq.token_ids) - seq.num_computed_tokens
            if uncomputed == 1:
                decodes.append(seq)
            elif uncomputed > 0:
                prefills.append(seq)
        running = SequenceStatus.RUNNING
        shares = {seq: 1 for seq in decodes if seq.status is running and self._grow(seq)}
        # Blocks that a preemption freed belong to who runs, not to who comes.
        admitting = self.num_preemptions == num_preemptions
        # A prompt may have been preempted for a decode a moment ago.
        prefills = [seq for seq in prefills if seq.status is running]
        self._share_out(shares, prefills, self._left_for_prompts(len(shares)), admitting)
        if admitting:
            self._reserve_early()
        return _batch(shares, now)

    def schedule_beside(self, num_decodes: int, now: float) -> Batch:
        """Return what `schedule` would put beside the decodes of all that run.

        For who knows that all that runs decodes, and that there are blocks for it and for all that waits.
        """
        shares: dict[Sequence, int] = {}
        self._share_out(shares, [], self._left_for_prompts(num_decodes), admitting=True)
        return _batch(shares, now)

    def _left_for_prompts(self, num_decodes: int) -> int:
        left = self._token_budget - num_decodes
        # Where streams run, their next token waits for the whole step.
        return min(left, self._prompt_budget) if num_decodes else left

    def _share_out(
        self, shares: dict[Sequence, int], prefills: list[Sequence], budget: int, admitting: bool
    ) -> None:
        """Divide `budget` tokens among prompts that run and, if `admitting`, prompts that wait."""
        if budget > 0:
            first = self._due_first(prefills, admitting)
            if first is not None:
                shares[first] = min(first.num_uncomputed_tokens, max(1, budget // DUE_SHARE))
                budget -= shares[first]
                if not prefills or first is not prefills[0]:
                    prefills = [first, *prefills]
        prefills.sort(key=by_size)
        started = iter(prefills)
        seq = next(started, None)
        while True:
            newcomer = self._next_admission(seq, budget) if admitting else None
            if newcomer is not None:
                if self._admit(*newcomer) and budget > 0:
                    shares[newcomer[0]] = min(newcomer[0].num_uncomputed_tokens, budget)
                    budget -= shares[newcomer[0]]
            elif seq is not None and budget > 0:
                more = min(seq.num_uncomputed_tokens - shares.get(seq, 0), budget)
                if more > 0:
                    shares[seq] = shares.get(seq, 0) + more
                budget -= more
                seq = next(started, None)
            else:
                return

    def _due_first(self, prefills: list[Sequence], admitting: bool) -> Sequence | None:
        """Return the running prompt (they are by rank) that is due first, or admit one due before it."""
        first = prefills[0] if prefills else None
        while admitting and self.waiting.size:
            waiting = self.waiting.peek()
            if first is not None and rank(first) < rank(waiting):
                break
            cached = self._fit(waiting)
            if cached is None:
                break
            # One whose KV a peer delivers computes nothing now; then the turn is the next one's.
            if self._admit(waiting, cached):
                return waiting
        return first

    def _next_admission(self, seq: Sequence | None, budget: int) -> tuple[Sequence, list[int]] | None:
        """Return the waiting sequence that comes before the running prompt `seq`, and what `_fit` says of it.

        None if there is none.
        """
        if not self.waiting.size:
            return None
        shortest = self.waiting.peek_shortest()
        # A reservation computes nothing: a pull may begin while the budget goes to others.
        later = budget == 0 or (seq is not None and by_size(seq) < by_size(shortest))
        if later and shortest.remote_kv == 0:
            return None
        first = self.waiting.peek()
        cached = self._fit(first)
        if cached is not None and first is not shortest:
            cached = self._fit(shortest)
        return None if cached is None else (shortest, cached)

    def _grow(self, seq: Sequence) -> bool:
        """See that `seq` has a block for its last token, preempting others, or itself: then False."""
        if len(seq.block_table) * self._block_size >= len(seq.token_ids):
            return True
        while (blocks := self._pool.allocate(1)) is None:
            # Served last, hence not in this step's batch yet: decodes are scheduled by rank.
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        seq.block_table += blocks
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take everything from `seq` and let it wait."""
        self.running.remove(seq)
        self.num_growing -= not seq.hold
        self.free_blocks(seq)
        seq.num_computed_tokens = 0
        seq.runner_state = None
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(seq)

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """Account for tokens that a step has computed: blocks that they filled can be found from now on."""
        before = seq.num_computed_tokens
        seq.num_computed_tokens = before + num_tokens
        # Most decode steps end within a block and are done here.
        if before % self._block_size + num_tokens >= self._block_size:
            self._register(seq, before // self._block_size)

    # -- admission ---------------------------------------------------------------------------------

    def _admit(self, seq: Sequence, cached: list[int]) -> bool:
        """Take a sequence out of the queue of which `_fit` has just returned `cached`.

        True if it runs, False if it waits for a peer's KV.
        """
        self.waiting.remove(seq)
        self._allocate(seq, cached)
        self.num_growing += not seq.hold
        if seq.remote_kv > 0 and not self._reserve(seq):
            return False
        self._run(seq)
        return True

    def _reserve_early(self) -> None:
        while (found := self._next_early()) is not None:
            seq, cached = found
            del self.early[seq.request_id]
            self._allocate(seq, cached)
            self.num_growing += not seq.hold
            self._reserve(seq)

    def _next_early(self) -> tuple[Sequence, list[int]] | None:
        """Return the sequence to reserve for early now and its cached blocks, None if there is none."""
        if not self.early or self.waiting.size > 0:
            return None
        early = [seq for seq in self.receiving.values() if seq.awaits_token]
        if len(early) >= self._max_early:
            return None
        room = self._max_early_blocks - sum([len(seq.block_table) for seq in early])
        # Of those that are not too long the first, and no other: who came first is not overtaken for ever.
        fitting = (seq for seq in self.early.values() if seq.num_tokens <= room * self._block_size)
        seq = next(fitting, None)
        cached = None if seq is None else self._fit(seq)
        return None if seq is None or cached is None else (seq, cached)

    def _fit(self, seq: Sequence) -> list[int] | None:
        """Return the cached blocks with which a waiting sequence can be admitted now, None if it can't."""
        if len(self.running) + len(self.receiving) >= self._max_num_seqs:
            return None
        # What goes on may need a block each.
        num_free = self._pool.num_free - self.num_growing
        if num_free <= 0:
            return None  # at least its last block is its own
        cached = self._cached_prefix(seq) if self._caching else []
        num_blocks = -(-len(seq.token_ids) // self._block_size)
        if self._pool.num_needed(cached, num_blocks - len(cached)) > num_free:
            return None
        will_receive = seq.remote_kv > len(cached) * self._block_size
        if will_receive and self._too_many_receive(num_blocks):
            return None
        return cached

    def _too_many_receive(self, num_more: int) -> bool:
        if not self.running and not self.receiving:
            return False
        held = sum([len(seq.block_table) for seq in self.receiving.values()])
        return held + num_more > self._max_receiving_blocks

    def _cached_prefix(self, seq: Sequence) -> list[int]:
        # The last token is always computed: its logits are what the next one is drawn from.
        usable = (seq.num_tokens - 1) // self._block_size
        self._extend_hashes(seq, usable)
        return self._pool.lookup(islice(seq.block_hashes, usable))

    def _allocate(self, seq: Sequence, cached: list[int]) -> None:
        num_tokens = len(seq.token_ids)
        self._pool.acquire(cached)
        fresh = self._pool.allocate(-(-num_tokens // self._block_size) - len(cached))
        if fresh is None:
            raise RuntimeError(f"no blocks for {seq.request_id}, which was found to fit")
        seq.block_table = cached + fresh
        seq.num_computed_tokens = len(cached) * self._block_size
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.prefix_queries += num_tokens
            self.prefix_hits += seq.num_computed_tokens

    def _run(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        if self.running and rank(seq) < rank(self.running[-1]):
            insort(self.running, seq, key=rank)
        else:
            self.running.append(seq)

    # -- remote KV ---------------------------------------------------------------------------------

    def _reserve(self, seq: Sequence) -> bool:
        """Report the blocks of an admitted sequence for a pull; True if it can run without one."""
        covering = seq.block_table[: -(-seq.remote_kv // self._block_size)]
        num_cached = min(seq.num_computed_tokens, len(covering) * self._block_size)
        self._reservations[seq.request_id] = Reservation(seq.request_id, covering, num_cached)
        if seq.num_computed_tokens >= seq.remote_kv and not seq.awaits_token:
            seq.remote_kv = 0
            return True
        seq.status = SequenceStatus.RECEIVING
        self.receiving[seq.request_id] = seq
        return False

    def take_reservations(self) -> list[Reservation]:
        """Return what was reserved since the last call, less what has ended meanwhile."""
        taken = list(self._reservations.values())
        self._reservations.clear()
        return taken

    def activate(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Let a sequence run whose KV arrived (or did not: then the rest is computed here)."""
        del self.receiving[seq.request_id]
        self._reservations.pop(seq.request_id, None)
        # Never more than was asked for, which is less than all: the last token is always computed here.
        received = min(num_computed_tokens, seq.remote_kv)
        seq.remote_kv = 0
        self._run(seq)
        if received > seq.num_computed_tokens:
            self.advance(seq, received - seq.num_computed_tokens)

    # -- ends --------------------------------------------------------------------------------------

    def leave(self, seq: Sequence) -> None:
        """Take a sequence out of whatever it is in; its blocks stay its own until free_blocks."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self.num_growing -= not seq.hold
        elif self.early.pop(seq.request_id, None) is not None:
            pass
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        elif seq.status is SequenceStatus.RECEIVING:
            del self.receiving[seq.request_id]
            self.num_growing -= not seq.hold
            # Its blocks are about to be somebody else's: nobody may be told to write into them.
            self._reservations.pop(seq.request_id, None)

    def free_blocks(self, seq: Sequence) -> None:
        if seq.hold:
            self.on_hold_lost(seq.request_id)
        self._pool.free(seq.block_table)
        seq.block_table = []

    # -- blocks and hashes -------------------------------------------------------------------------

    def _register(self, seq: Sequence, first: int) -> None:
        """Make the full blocks findable whose KV is written, from block number `first` on."""
        num_full = seq.num_computed_tokens // self._block_size
        if num_full <= first or not self._caching:
            return
        self._extend_hashes(seq, num_full)
        for index in range(first, num_full):
            self._pool.register(seq.block_table[index], seq.block_hashes[index])

    def _extend_hashes(self, seq: Sequence, num_blocks: int) -> None:
        """See that the first `num_blocks` hashes of `seq` are known; each is computed once."""
        size, hashes = self._block_size, seq.block_hashes
        parent = hashes[-1] if hashes else seq.hash_root
        for start in range(len(hashes) * size, num_blocks * size, size):
            parent = next_hash(parent, seq.token_ids[start : start + size])
            hashes.append(parent)

    # -- state -------------------------------------------------------------------------------------

    def tokens_to_compute(self) -> int:
        """Return the tokens still to be computed of everything that waits, receives or runs."""
        pulled = (*self.receiving.values(), *self.early.values())
        # Of who runs nothing is to come from a peer.
        running = sum([len(seq.token_ids) - seq.num_computed_tokens for seq in self.running])
        return self.waiting.num_tokens + sum([tokens_to_compute(seq) for seq in pulled]) + running


def _batch(shares: dict[Sequence, int], now: float) -> Batch:
    """Return the batch of so many tokens of each sequence, in this order."""
    for seq in shares:
        if seq.first_scheduled_at is None:
            seq.first_scheduled_at = now
    return Batch(tuple(map(ScheduledSequence, shares.keys(), shares.values())))
