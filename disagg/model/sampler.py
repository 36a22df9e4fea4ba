"""Draws the next token of every sequence in a batch from its logits."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from disagg.engine.sequence import Sequence
from disagg.model.logits import SamplingState, eligibility_threshold, sampling_state
from disagg.model.noise import gumbel, noise_key
from disagg.types import SampledToken, TokenLogprobs

# Elements of int64 noise held at a time when whole vocabularies are drawn from.
NOISE_ELEMENTS = 1 << 19


class Sampler:
    """Samples with noise keyed by (params.seed, index of the token in its sequence) alone."""

    def __init__(
        self, vocab_size: int, eos_token_ids: SequenceOf[int], *, device: torch.device | str = "cpu"
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = torch.device(device)
        self._token_ids = torch.arange(vocab_size, dtype=torch.int64, device=self._device)

    def sample(self, logits: Tensor, seqs: SequenceOf[Sequence]) -> list[SampledToken]:
        """Return one token per row of float32 logits [S, V], which are overwritten."""
        states = [self._state(seq) for seq in seqs]
        if all(state.plain for state in states):
            return [SampledToken(token) for token in logits.argmax(-1).tolist()]
        wanted = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
        # Of the model's own distribution, before anything below changes the logits.
        logprobs = logits[wanted].log_softmax(-1) if wanted else None
        for row, (seq, state) in enumerate(zip(seqs, states, strict=True)):
            if state.adjusts:
                state.adjust_(logits[row], seq)
        drawn = self._choose(logits, seqs, states)
        reports: dict[int, TokenLogprobs] = {}
        if logprobs is not None:
            params = [seqs[row].params.logprobs or 0 for row in wanted]
            reports = dict(zip(wanted, _report(logprobs, drawn[wanted], params), strict=True))
        return [SampledToken(token, reports.get(row)) for row, token in enumerate(drawn.tolist())]

    def _state(self, seq: Sequence) -> SamplingState:
        state = seq.runner_state
        if not isinstance(state, SamplingState):
            state = sampling_state(
                seq.params,
                vocab_size=self._vocab_size,
                eos_token_ids=self._eos_token_ids,
                device=self._device,
            )
            seq.runner_state = state
        return state

    def _choose(
        self, logits: Tensor, seqs: SequenceOf[Sequence], states: SequenceOf[SamplingState]
    ) -> Tensor:
        """Return the drawn ids [S]."""
        drawn = torch.empty(len(seqs), dtype=torch.int64, device=self._device)
        greedy = [row for row, state in enumerate(states) if state.greedy]
        whole = [row for row, state in enumerate(states) if not state.greedy and not state.filtered]
        filtered = [row for row, state in enumerate(states) if not state.greedy and state.filtered]
        if greedy:
            drawn[greedy] = logits[greedy].argmax(-1)
        step = max(1, NOISE_ELEMENTS // self._vocab_size)
        for start in range(0, len(whole), step):
            rows = whole[start : start + step]
            scaled, keys = self._scaled(logits, seqs, rows)
            drawn[rows] = scaled.add_(gumbel(keys[:, None], self._token_ids)).argmax(-1)
        if filtered:
            scaled, keys = self._scaled(logits, seqs, filtered)
            threshold = eligibility_threshold(scaled, [seqs[row].params for row in filtered])
            drawn[filtered] = _draw_above(scaled, threshold, keys)
        return drawn

    def _scaled(self, logits: Tensor, seqs: SequenceOf[Sequence], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return the rows' logits over their temperatures, and the rows' noise keys."""
        temperature = torch.tensor([seqs[row].params.temperature for row in rows], device=self._device)
        # The drawn token's index in its sequence is the number of tokens before it.
        keys = [noise_key(seqs[row].params.seed or 0, seqs[row].num_tokens) for row in rows]
        scaled = logits[rows].div_(temperature[:, None])
        return scaled, torch.tensor(keys, dtype=torch.int64, device=self._device)


def _draw_above(logits: Tensor, threshold: Tensor, keys: Tensor) -> Tensor:
    """Draw from each row's logits [R, V] at or above its threshold [R]; noise is made for those alone."""
    rows, tokens = (logits >= threshold[:, None]).nonzero(as_tuple=True)
    scores = torch.full_like(logits, -torch.inf)
    scores[rows, tokens] = logits[rows, tokens] + gumbel(keys[rows], tokens)
    return scores.argmax(-1)


def _report(logprobs: Tensor, drawn: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Describe the drawn tokens [R] by log-probabilities [R, V], with counts[r] most likely ones each."""
    return reports(measures(logprobs, drawn, max(counts)), counts)


def measures(logprobs: Tensor, drawn: Tensor, count: int) -> list[Tensor]:
    """Return what a report is made of: the drawn tokens [R], their log-probabilities and ranks [R], the most
    likely ids and their log-probabilities [R, count].
    """
    chosen = logprobs.gather(1, drawn[:, None])
    ranks = (logprobs > chosen).sum(-1).add_(1)
    top = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    return [drawn, chosen[:, 0], ranks, top.indices, top.values]


def reports(measured: SequenceOf[Tensor], counts: list[int]) -> list[TokenLogprobs]:
    """Return a report per row of `measures`, with counts[r] most likely tokens each."""
    rows = zip(*(part.tolist() for part in measured), counts, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, rank, ids, values, count in rows
    ]
