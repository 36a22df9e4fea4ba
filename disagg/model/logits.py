"""What SamplingParams do to logits before a token is chosen, and which tokens stay eligible.

Order and semantics are vLLM's: min_tokens, logit_bias, penalties; then temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from disagg.engine.sequence import Sequence
from disagg.types import SamplingParams

# Below it, dividing logits by the temperature would overflow; vLLM draws the same line.
MIN_TEMPERATURE = 1e-5
# Up to this vocabulary a full sort costs no more than finding the largest.
SORT_ALL = 4096
SORTED_PREFIX = 1024
WIDEN = 8


def to_device(values: SequenceOf[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of the values; the host does not wait for the copy."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


class PenaltyState:
    """Which tokens a sequence holds, as tensors over the vocabulary that grow with it.

    seen: bool [V], in prompt or output. counts: float32 [V], how often in the output.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self._num_counted = 0

    def update(self, seq: Sequence, latest: Tensor | None = None) -> None:
        """Take in the tokens since the last call.

        latest: int64 [1], the last token where only the device knows it yet.
        """
        start = self._num_counted
        known = seq.token_ids[start:] if latest is None else seq.token_ids[start:-1]
        new = to_device(known, torch.int64, self.seen.device)
        if latest is not None:
            new = torch.cat([new, latest])
        output = new[max(seq.num_prompt_tokens - start, 0) :]
        self.seen.index_fill_(0, new, True)
        self.counts.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))
        self._num_counted = seq.num_tokens

    def apply_(self, logits: Tensor, params: SamplingParams) -> None:
        """Penalise logits [V] in place."""
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            punished = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(self.seen, punished, logits, out=logits)
        logits.sub_(self.counts, alpha=params.frequency_penalty)
        logits.sub_((self.counts > 0).to(logits.dtype), alpha=params.presence_penalty)


@dataclass(slots=True)
class SamplingState:
    """What a sequence's parameters mean for the sampler, worked out once and kept in seq.runner_state.

    greedy: takes the largest logit. plain: nothing but that is asked for. blocked: ids that can't be drawn
    before min_tokens. bias: ids and what is added to their logits.
    """

    greedy: bool
    plain: bool
    filtered: bool
    blocked: Tensor | None
    bias: tuple[Tensor, Tensor] | None
    penalties: PenaltyState | None

    def adjust_(self, logits: Tensor, seq: Sequence, latest: Tensor | None = None) -> None:
        """Change the logits [V] of the sequence's next token in place. latest: see PenaltyState.update."""
        if self.blocked is not None and seq.num_output_tokens < seq.params.min_tokens:
            logits.index_fill_(0, self.blocked, -math.inf)
        if self.bias is not None:
            logits.index_add_(0, *self.bias)
        if self.penalties is not None:
            self.penalties.update(seq, latest)
            self.penalties.apply_(logits, seq.params)

    @property
    def adjusts(self) -> bool:
        return self.blocked is not None or self.bias is not None or self.penalties is not None


def sampling_state(
    params: SamplingParams, *, vocab_size: int, eos_token_ids: SequenceOf[int], device: torch.device
) -> SamplingState:
    """Return the state of a sequence that starts, or goes on here after it ran elsewhere."""
    greedy = params.temperature < MIN_TEMPERATURE
    state = SamplingState(
        greedy=greedy,
        plain=False,
        filtered=0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0,
        blocked=_blocked(params, vocab_size, eos_token_ids, device),
        bias=_bias(params, vocab_size, device),
        penalties=PenaltyState(vocab_size, device) if _penalised(params) else None,
    )
    state.plain = greedy and params.logprobs is None and not state.adjusts
    return state


def _penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _blocked(
    params: SamplingParams, vocab_size: int, eos_token_ids: SequenceOf[int], device: torch.device
) -> Tensor | None:
    if not params.min_tokens:
        return None
    ids = {token for token in (*eos_token_ids, *params.stop_token_ids) if token < vocab_size}
    return to_device(sorted(ids), torch.int64, device) if ids else None


def _bias(params: SamplingParams, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    bias = {token: value for token, value in params.logit_bias.items() if 0 <= token < vocab_size}
    if not bias:
        return None
    ids = to_device(list(bias), torch.int64, device)
    return ids, to_device(list(bias.values()), torch.float32, device)


def eligibility_threshold(logits: Tensor, params: SequenceOf[SamplingParams]) -> Tensor:
    """Return per row of logits [R, V] the least logit [R] that passes the row's min_p, top_k and top_p.

    logits are scaled by temperature. A threshold keeps tokens that tie with the last one kept, so the
    outcome does not depend on the order in which a sort leaves them (or on what else is in the batch).
    """
    vocab_size = logits.shape[1]
    rows = [(p.min_p, p.top_k if 0 < p.top_k < vocab_size else vocab_size, p.top_p) for p in params]
    min_p, top_k, top_p = torch.tensor(rows, dtype=torch.float64, device=logits.device).unbind(1)
    threshold = logits.amax(-1) + min_p.log().to(logits.dtype)
    limited_k = [k for _, k, _ in rows if k < vocab_size]
    if not limited_k and all(p == 1 for _, _, p in rows):
        return threshold
    width = vocab_size if vocab_size <= SORT_ALL else min(vocab_size, max([SORTED_PREFIX, *limited_k]))
    largest = logits.topk(width, dim=-1).values
    kth = largest.gather(1, (top_k.long().clamp(max=width) - 1)[:, None])[:, 0]
    threshold = torch.where(top_k < vocab_size, torch.maximum(threshold, kth), threshold)
    nucleus = (top_p < 1).nonzero()[:, 0]
    if len(nucleus):
        raised = _nucleus(logits[nucleus], largest[nucleus], threshold[nucleus], top_p[nucleus])
        threshold[nucleus] = raised
    return threshold


def _nucleus(logits: Tensor, largest: Tensor, threshold: Tensor, top_p: Tensor) -> Tensor:
    """Return thresholds [R], raised so that what passes is the fewest tokens that hold top_p of the mass.

    largest: the logits in descending order, or a first part of them [R, width].
    """
    peak = largest[:, :1]
    total = ((logits - peak).exp() * (logits >= threshold[:, None])).sum(-1, dtype=torch.float64)
    mass = ((largest - peak).exp() * (largest >= threshold[:, None])).to(torch.float64)
    reached = mass.cumsum(-1)
    goal = top_p * total
    last = (reached - mass < goal[:, None]).sum(-1) - 1
    result = torch.maximum(threshold, largest.gather(1, last[:, None])[:, 0])
    # A flat distribution's nucleus reaches beyond the part that is sorted.
    short = ((reached[:, -1] < goal) & (largest[:, -1] > threshold)).nonzero()[:, 0]
    if len(short) and largest.shape[1] < logits.shape[1]:
        width = min(logits.shape[1], WIDEN * largest.shape[1])
        wider = logits[short].topk(width, dim=-1).values
        result[short] = _nucleus(logits[short], wider, threshold[short], top_p[short])
    return result
