"""DeviceSampler draws what Sampler draws, for every kind of request and whatever else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch
from kernels_support import DEVICE

from disagg.engine.runner import PLACEHOLDER
from disagg.engine.sequence import Sequence
from disagg.model.device_sampler import DeviceSampler
from disagg.model.sampler import Sampler
from disagg.types import Request, SampledToken, SamplingParams

VOCAB = 700
EOS = (2, 5)
KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.9},
    {"temperature": 0.0, "logit_bias": {3: 9.0, 699: 4.0}},
    {"temperature": 0.0, "min_tokens": 6, "max_tokens": 9, "stop_token_ids": (7,)},
    {"temperature": 0.7, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0, "top_k": 3, "logprobs": 1, "repetition_penalty": 0.8, "min_tokens": 4},
]


def sequences(kinds: list[dict], seed: int = 0) -> list[Sequence]:
    source = random.Random(seed)
    made = []
    for index, kind in enumerate(kinds):
        prompt = source.choices(range(VOCAB), k=source.randint(1, 9))
        request = Request(f"r{index}", prompt, len(prompt), SamplingParams(seed=index * 31 + seed, **kind))
        made.append(Sequence(request, now=0.0))
    return made


def logits_of(count: int, seed: int) -> torch.Tensor:
    return (torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2.5).to(DEVICE)


def samplers(count: int) -> tuple[Sampler, DeviceSampler]:
    drawn = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    return Sampler(VOCAB, EOS, device=DEVICE), DeviceSampler(VOCAB, EOS, drawn)


def same(ours: list[SampledToken], theirs: list[SampledToken]) -> None:
    assert [token.token_id for token in ours] == [token.token_id for token in theirs]
    for own, other in zip(ours, theirs, strict=True):
        if other.logprobs is None:
            assert own.logprobs is None
            continue
        assert own.logprobs is not None
        assert own.logprobs.rank == other.logprobs.rank
        assert own.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)
        assert [pair[0] for pair in own.logprobs.top] == [pair[0] for pair in other.logprobs.top]


def test_every_kind_alone_and_together_over_many_steps():
    plain, device = samplers(len(KINDS))
    alone = samplers(1)[1]
    known, ahead, single = (sequences(KINDS) for _ in range(3))
    rows: list[int | None] = [None] * len(KINDS)
    for step in range(4):
        logits = logits_of(len(KINDS), step)
        expected = plain.sample(logits.clone(), known)
        # The host of the second does not know the token that was drawn last.
        pending = device.start(logits.clone(), ahead, rows)
        assert torch.equal(device._drawn.cpu(), torch.tensor([token.token_id for token in expected]))
        same(pending.result(), expected)
        if step == 2:
            one_by_one = [
                alone.start(logits[row : row + 1].clone(), [seq], [None]).result()[0]
                for row, seq in enumerate(single)
            ]
            same(one_by_one, expected)
        for seq, other, third, token in zip(known, ahead, single, expected, strict=True):
            seq.token_ids.append(token.token_id)
            third.token_ids.append(token.token_id)
            if other.token_ids[-1] == PLACEHOLDER:
                other.token_ids[-1] = seq.token_ids[-2]
            other.token_ids.append(PLACEHOLDER)
        rows = list(range(len(KINDS)))


def test_noise_depends_on_seed_and_position_alone():
    device = samplers(4)[1]
    logits = logits_of(1, 0).expand(4, -1).contiguous()
    seqs = [sequences([{"temperature": 1.0}])[0] for _ in range(4)]
    first = [token.token_id for token in device.start(logits.clone(), seqs, [None] * 4).result()]
    assert len(set(first)) == 1
    seqs[3].token_ids.append(1)
    again = [token.token_id for token in device.start(logits.clone(), seqs, [None] * 4).result()]
    assert again[:3] == first[:3] and again[3] != again[0]


def test_greedy_rows_take_the_first_of_equals():
    device = samplers(2)[1]
    logits = torch.zeros(2, VOCAB, device=DEVICE)
    logits[1, [300, 650]] = 1.0
    seqs = sequences([{"temperature": 0.0}] * 2)
    assert [t.token_id for t in device.start(logits, seqs, [None] * 2).result()] == [0, 300]


def test_the_filter_kernel_follows_torch_in_a_large_vocabulary():
    """Larger than what the plain sampler sorts whole, so that its widening is compared too."""
    size, count = 9000, 6
    kinds = [{"temperature": t, "top_p": p} for t in (0.5, 1.0, 3.0) for p in (0.3, 0.97)]
    logits = torch.randn(count, size, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seqs = [
        Sequence(Request(f"r{i}", (1,), 1, SamplingParams(seed=i, **kind)), now=0.0)
        for i, kind in enumerate(kinds)
    ]
    expected = Sampler(size, EOS, device=DEVICE).sample(logits.clone(), seqs)
    drawn = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    for seq in seqs:
        seq.runner_state = None
    same(DeviceSampler(size, EOS, drawn).start(logits.clone(), seqs, [None] * count).result(), expected)
