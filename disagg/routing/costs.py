"""What a worker's queue and batch amount to in seconds, for whoever would come next.

The order in which an engine takes prompts (disagg.engine.scheduler): the one with the fewest tokens left
first, and a quarter of each step to the one that is due first. So a prompt waits for the step that runs, for
prompts that are shorter, and for a third of what these and it need, which goes to a longer one meanwhile.
Which prompts are shorter is kept in classes of length ("turns").
"""

from __future__ import annotations

from bisect import bisect_left

from disagg.routing.core import NUM_TURNS, CostFields
from disagg.routing.predictors import DEFAULT_DECODE, DEFAULT_PREFILL, DEFAULT_PULL

# Longest prompt of each turn but the first and the last, which are for priorities below and above 0.
TURN_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 8192)
assert len(TURN_TOKENS) + 3 == NUM_TURNS
# While longer prompts wait, one token in so many goes to them for each that goes to shorter ones.
DUE_PART = 1 / 3
# Prompts take no larger share of who decodes than this, for what is predicted.
MOST_ASIDE = 0.8
# From this fill on a KV cache makes newcomers wait for others to end.
FULL = 0.9


def turn_of(num_tokens: int, priority: int) -> int:
    """Return when a prompt of so many tokens to compute has its turn: smaller is earlier."""
    if priority:
        return 0 if priority < 0 else NUM_TURNS - 1
    return 1 + bisect_left(TURN_TOKENS, num_tokens)


class WorkerCosts(CostFields):
    """One worker's present prices, in seconds.

    begin_s: until a prompt that came now could begin, were the queue empty. chunk_s: what a step costs apart
    from its prompts' tokens, of which it takes `chunk`; token_s: each of them; attended_s: each token that
    one of them attends to. idle_chunk_s: of a chunk were nobody else here.
    step_s: a decode step with one more sequence, lengthened by the share of the time (`aside`) that prompts
    take lately; bare_step_s: without that; joined_s: without the prompts that are queued here either;
    idle_step_s: were nobody else here; sequence_s: what a further sequence adds. place_s: wait of a sequence
    for a place in the batch and for blocks.
    pull: coefficients of a pull. links: hand-offs that occupy the worker's link. fitted: whether all this is
    measured; prefill_fitted, decode_fitted: whether that part is. queued, sequences: what it is worked out
    for.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.prefill, self.decode, self.pull = DEFAULT_PREFILL, DEFAULT_DECODE, DEFAULT_PULL
        self.fitted = self.prefill_fitted = self.decode_fitted = False
        self.budget = self.beside_streams = self.chunk = 512
        self.max_seqs, self.links = 1, 0
        self.begin_s = self.chunk_s = self.token_s = self.attended_s = self.idle_chunk_s = 0.0
        self.step_s = self.bare_step_s = self.joined_s = self.aside = 0.0
        self.idle_step_s = self.sequence_s = 0.0
        self.place_s = self.queued = self.sequences = 0.0

    def refresh(
        self,
        queued: float,
        sequences: float,
        context: float,
        fill: float,
        expected_tokens: float,
        aside: float = 0.0,
    ) -> None:
        """Work prices out anew.

        queued: tokens to prefill. sequences: that decode, or will. context: tokens that these attend to.
        fill: share of the KV cache in use. expected_tokens: of an answer. aside: share of the time that
        prompts take of who decodes.
        """
        self.idle_chunk_s, self.token_s, self.attended_s = self.prefill
        decode_base, self.sequence_s, per_context = self.decode
        self.queued, self.sequences = queued, sequences
        batch = sequences if sequences < self.max_seqs else self.max_seqs
        streams_s = decode_base + self.sequence_s * batch + per_context * context
        # A prompt beside streams goes in smaller chunks, and each lasts as long as the streams' step besides.
        running = 0.0
        if batch > 0:
            self.chunk_s, self.chunk, running = streams_s, self.beside_streams, streams_s
        else:
            self.chunk_s, self.chunk = self.idle_chunk_s, self.budget
        disturbed_s = full_s = 0.0
        if queued > 0:
            running = self.chunk_s + self.token_s * min(queued, self.chunk)
            # Prompts that are queued here lengthen the steps of whoever decodes here.
            disturbed_s = min(queued / expected_tokens, self.chunk) * self.token_s
        if fill > FULL:
            full_s = (fill - FULL) / (1 - FULL) * 0.25 * expected_tokens * streams_s
        # Half of the step that runs is over when somebody comes.
        self.begin_s = running / 2 + full_s
        self.joined_s = streams_s + (self.sequence_s if batch == sequences else 0.0)
        self.bare_step_s = self.joined_s + disturbed_s
        self.aside = aside
        self.step_s = self.bare_step_s / (1 - min(aside, MOST_ASIDE))
        self.idle_step_s = decode_base + self.sequence_s
        excess = sequences + 1 - self.max_seqs
        self.place_s = full_s
        if excess > 0:
            self.place_s += excess * expected_tokens * streams_s / self.max_seqs

    def first_token_s(self, ahead: float, num_tokens: float, attended: float) -> float:
        """Return seconds to the first token of a prompt that comes now, behind `ahead` tokens."""
        total = ahead + num_tokens
        chunks = -(-total // self.chunk)
        return self.begin_s + chunks * self.chunk_s + total * self.token_s + attended * self.attended_s

    def service_s(self, num_tokens: float, attended: float) -> float:
        """Return the same were the worker idle."""
        chunks = -(-num_tokens // self.budget)
        return chunks * self.idle_chunk_s + num_tokens * self.token_s + attended * self.attended_s

    def own_s(self, num_tokens: float, gaps: float) -> float:
        """Return what a sequence's own tokens add to its steps: those that it came with, and the answer's."""
        return self.decode[2] * (num_tokens + gaps / 2)

    def beside_s(self, left: float, gaps: float) -> float:
        """Return what `left` tokens of prompts add to each of `gaps` steps that are taken meanwhile."""
        return min(left / gaps, self.chunk) * self.token_s

    def left_after(self, seconds: float) -> float:
        """Return how many of the tokens that are queued here will be left to prefill after so long."""
        chunk_s = self.chunk_s + self.chunk * self.token_s
        return max(0.0, self.queued - seconds * self.chunk / chunk_s) if chunk_s > 0 else 0.0

    def pull_s(self, num_tokens: float, num_others: int) -> float:
        """Return how long it takes to pull the KV of so many tokens beside other pulls."""
        if num_tokens <= 0:
            return 0.0
        base, per_token, per_other = self.pull
        return base + num_tokens * (per_token + per_other * num_others)


def ahead_of(num_tokens: float, shorter: float, queued: float) -> float:
    """Return how many queued tokens are computed before a prompt of num_tokens has been.

    shorter: queued tokens whose turn is not later. queued: all.
    """
    before = shorter if shorter < queued else queued
    return before + min(queued - before, (before + num_tokens) * DUE_PART)
