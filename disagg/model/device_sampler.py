"""DeviceSampler: draws the tokens that Sampler draws, without the host waiting for the device.

    logits ─► adjust rows that ask for it ─► thresholds (top_k, top_p, min_p) ─► sample ─► drawn ─► next step
                                                                                     └──► copy to the host

The noise is Sampler's, keyed by (seed, position), so where a sequence is sampled does not show in its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from disagg.engine.sequence import Sequence
from disagg.model.host_memory import Download, upload
from disagg.model.kernels.eligibility import eligibility_threshold
from disagg.model.kernels.sampling import sample
from disagg.model.logits import SamplingState, sampling_state
from disagg.model.noise import noise_key
from disagg.model.sampler import measures, reports
from disagg.types import SampledToken


class PendingTokens:
    """Drawn tokens that are on their way to the host."""

    def __init__(self, tokens: Tensor, measured: SequenceOf[Tensor], wanted: dict[int, int]) -> None:
        self._download = Download([tokens, *measured])
        self._wanted = wanted

    def result(self) -> list[SampledToken]:
        """Wait, and return one token per row."""
        tokens, *measured = self._download.wait()
        made = reports(measured, list(self._wanted.values())) if self._wanted else []
        described = dict(zip(self._wanted, made, strict=True))
        return [SampledToken(token, described.get(row)) for row, token in enumerate(tokens.tolist())]


class DeviceSampler:
    """Samples on the device of `drawn`, int64 [max_num_seqs], where it leaves what it draws."""

    def __init__(self, vocab_size: int, eos_token_ids: SequenceOf[int], drawn: Tensor) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._drawn = drawn
        self._device = drawn.device
        self._greedy = torch.zeros(len(drawn), dtype=torch.float32, device=self._device)
        self._no_keys = torch.zeros(len(drawn), dtype=torch.int64, device=self._device)

    def compile(self) -> None:
        """Compile the kernels that the first request to ask for them would wait for."""
        one = torch.ones(1, device=self._device)
        logits, key = torch.zeros(1, self._vocab_size, device=self._device), self._no_keys[:1]
        sample(logits, one, key, eligibility_threshold(logits, one, one, key, one.double()))

    def start(
        self, logits: Tensor, seqs: SequenceOf[Sequence], latest: SequenceOf[int | None]
    ) -> PendingTokens:
        """Draw a token per row of float32 logits [S, V], which are overwritten.

        latest: the row of `drawn` that holds a sequence's last token, where the host does not know it yet.
        """
        states = [self._state(seq) for seq in seqs]
        count = len(seqs)
        measured: list[Tensor] = []
        wanted = {row: seq.params.logprobs for row, seq in enumerate(seqs) if seq.params.logprobs is not None}
        if all(state.plain for state in states):
            tokens = sample(logits, self._greedy[:count], self._no_keys[:count])
        else:
            rows, *columns = self._columns(seqs, states, wanted)
            # Of the model's own distribution, before anything below changes the logits.
            logprobs = logits.index_select(0, rows).log_softmax(-1) if wanted else None
            self._adjust_(logits, seqs, states, latest)
            tokens = self._draw(logits, columns, any(state.filtered for state in states))
            if logprobs is not None:
                measured = measures(logprobs, tokens.index_select(0, rows), max(wanted.values()))
        self._drawn[:count].copy_(tokens)
        return PendingTokens(tokens, measured, wanted)

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

    def _adjust_(
        self,
        logits: Tensor,
        seqs: SequenceOf[Sequence],
        states: SequenceOf[SamplingState],
        latest: SequenceOf[int | None],
    ) -> None:
        for row, (seq, state, unknown) in enumerate(zip(seqs, states, latest, strict=True)):
            if state.adjusts:
                token = None if unknown is None else self._drawn[unknown : unknown + 1]
                state.adjust_(logits[row], seq, token)

    def _columns(
        self, seqs: SequenceOf[Sequence], states: SequenceOf[SamplingState], wanted: dict[int, int]
    ) -> list[Tensor]:
        """Return the rows whose log-probabilities are wanted, and keys, top_k, and as float64 temperatures,
        log_min_p and top_p of all rows, after one copy.
        """
        params = [seq.params for seq in seqs]
        # The drawn token's index in its sequence is the number of tokens before it.
        keys = [noise_key(seq.params.seed or 0, seq.num_tokens) for seq in seqs]
        floats = np.array(
            [
                [0.0 if state.greedy else p.temperature for p, state in zip(params, states, strict=True)],
                [math.log(p.min_p) if p.min_p else -math.inf for p in params],
                [p.top_p for p in params],
            ]
        )
        whole = np.array([keys, [p.top_k for p in params]], dtype=np.int64)
        chosen = np.array(list(wanted), dtype=np.int64)
        rows, integers, bits = upload([chosen, whole, floats.view(np.int64)], self._device)
        return [rows, *integers.view(2, -1), *bits.view(torch.float64).view(3, -1)]

    def _draw(self, logits: Tensor, columns: SequenceOf[Tensor], filtered: bool) -> Tensor:
        keys, top_k, temperatures, log_min_p, top_p = columns
        temperatures = temperatures.float()
        thresholds = None
        if filtered:
            thresholds = eligibility_threshold(logits, temperatures, log_min_p.float(), top_k, top_p)
        return sample(logits, temperatures, keys, thresholds)
