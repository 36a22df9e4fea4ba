"""The sampling kernel draws what the sampler draws."""

from __future__ import annotations

import pytest
import torch
from kernels_support import DEVICE

from disagg.engine.sequence import Sequence
from disagg.model.kernels.sampling import sample
from disagg.model.noise import gumbel, noise_key
from disagg.model.sampler import Sampler
from disagg.types import Request, SamplingParams


def keys_of(seeds: list[int], position: int = 3) -> torch.Tensor:
    return torch.tensor([noise_key(seed, position) for seed in seeds], device=DEVICE)


def random_logits(rows: int, vocab_size: int, *, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE)


@pytest.mark.parametrize("vocab_size", [1, 2, 100, 4096, 4097, 13000])
def test_equals_torch_over_temperatures(vocab_size: int) -> None:
    logits = random_logits(12, vocab_size)
    temperatures = torch.tensor([0.0, 0.3, 1.0, 1.7] * 3, device=DEVICE)
    keys = keys_of([0, 1, 2, 2**62, -5, 77, 8, 9, 10, 11, 12, 13])
    before = logits.clone()
    drawn = sample(logits, temperatures, keys)
    noise = gumbel(keys[:, None], torch.arange(vocab_size, device=DEVICE))
    noisy = (logits / temperatures[:, None].clamp_min(1e-9) + noise).argmax(-1)
    assert torch.equal(drawn, torch.where(temperatures > 0, noisy, logits.argmax(-1)))
    assert torch.equal(logits, before)


def test_equals_the_sampler() -> None:
    rows, vocab_size = 40, 5000
    logits = random_logits(rows, vocab_size)
    params = [SamplingParams(temperature=(row % 4) * 0.5, seed=row * 7919) for row in range(rows)]
    seqs = [Sequence(Request(f"r{row}", (1, 2, 3), 3, params[row]), now=0.0) for row in range(rows)]
    expected = Sampler(vocab_size, [], device=DEVICE).sample(logits.clone(), seqs)
    keys = torch.tensor([noise_key(p.seed or 0, s.num_tokens) for p, s in zip(params, seqs, strict=True)])
    temperatures = torch.tensor([p.temperature for p in params])
    drawn = sample(logits, temperatures.to(DEVICE), keys.to(DEVICE))
    assert drawn.tolist() == [token.token_id for token in expected]


def test_ties_take_the_first_and_filters_hold() -> None:
    logits = torch.full((2, 9000), -torch.inf, device=DEVICE)
    logits[0, [4095, 4096, 8999]] = 5.0
    logits[1, 8191] = -100.0
    assert sample(logits, torch.tensor([0.0, 1.0], device=DEVICE), keys_of([1, 2])).tolist() == [4095, 8191]


def test_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert sample(random_logits(0, 10), torch.zeros(0, device=DEVICE), none).shape == (0,)
