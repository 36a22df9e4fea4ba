"""The kernel keeps exactly the tokens that the sampler's threshold keeps."""

from __future__ import annotations

import math

import pytest
import torch
from kernels_support import DEVICE

from disagg.errors import ConfigError
from disagg.model import logits as sampler_logits
from disagg.model.kernels.eligibility import eligibility_threshold
from disagg.model.kernels.sampling import sample
from disagg.types import SamplingParams

FILTERS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 7, "top_p": 0.5},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.6},
    {"top_p": 0.999, "temperature": 2.5},
    {"top_k": 10_000_000},
    {},
]


def columns(params: list[SamplingParams]) -> list[torch.Tensor]:
    """Return temperatures, log_min_p, top_k and top_p as the kernel takes them."""
    log_min_p = [math.log(p.min_p) if p.min_p else -math.inf for p in params]
    return [
        torch.tensor([p.temperature for p in params], device=DEVICE),
        torch.tensor(log_min_p, device=DEVICE),
        torch.tensor([p.top_k for p in params], dtype=torch.int64, device=DEVICE),
        torch.tensor([p.top_p for p in params], dtype=torch.float64, device=DEVICE),
    ]


def check(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Return which tokens the kernel keeps, after a comparison with those that the sampler keeps."""
    given = columns(params)
    scaled = logits / given[0][:, None]
    kept = scaled >= eligibility_threshold(logits, *given)[:, None]
    expected = sampler_logits.eligibility_threshold(scaled, params)
    assert torch.equal(kept, scaled >= expected[:, None])
    return kept


@pytest.mark.parametrize("vocab_size", [1, 2, 97, 5000])
def test_every_filter(vocab_size: int) -> None:
    params = [SamplingParams(**{"temperature": 1.0, **options}) for options in FILTERS]
    logits = torch.randn(len(params), vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    kept = check(logits.to(DEVICE), params)
    assert kept[-1].all() and kept[-2].all()
    assert kept[0].sum() == 1
    assert kept.any(-1).all()


def test_ties_are_kept_together_and_signs_do_not_matter() -> None:
    row = torch.tensor([-3.0, -1.0, -1.0, -1.0, -8.0, -0.0, 0.0, 2.0, -torch.inf, 2.0])
    params = [SamplingParams(temperature=1.0, top_k=k) for k in (1, 3, 5, 9)]
    params += [SamplingParams(temperature=1.0, top_p=p) for p in (0.01, 0.6, 0.9)]
    logits = row.expand(len(params), -1).contiguous().to(DEVICE)
    kept = check(logits, params)
    assert kept[0].nonzero()[:, 0].tolist() == [7, 9], "both that share the first place"
    assert kept[2].sum() == 7, "the fifth place is shared by three"


def test_a_flat_distribution_and_one_token() -> None:
    params = [SamplingParams(temperature=1.0, top_p=0.5), SamplingParams(temperature=1.0, top_p=0.5)]
    logits = torch.zeros(2, 3000, device=DEVICE)
    logits[1, 17] = 50.0
    kept = check(logits, params)
    assert kept[0].all(), "all tie"
    assert kept[1].sum() == 1


def test_greedy_rows_filter_nothing() -> None:
    logits = torch.randn(2, 50, device=DEVICE)
    given = columns([SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_k=2)])
    given[0][0] = 0.0
    thresholds = eligibility_threshold(logits, *given)
    assert thresholds[0] == -torch.inf and thresholds[1] > -torch.inf


def test_only_eligible_tokens_are_drawn() -> None:
    """One token a row passes, in a part of the row whose noise alone would not win."""
    logits = torch.zeros(8, 9000, device=DEVICE)
    places = [0, 4095, 4096, 8191, 8192, 8999, 17, 5000]
    logits[range(8), places] = 1e-3
    given = columns([SamplingParams(temperature=1.0, top_k=1)] * 8)
    keys = torch.arange(8, dtype=torch.int64, device=DEVICE)
    assert sample(logits, given[0], keys, eligibility_threshold(logits, *given)).tolist() == places
    assert sample(logits, given[0], keys).tolist() != places


def test_wrong_arguments_are_named() -> None:
    logits = torch.zeros(2, 5, device=DEVICE)
    given = columns([SamplingParams(temperature=1.0)] * 2)
    with pytest.raises(ConfigError) as error:
        eligibility_threshold(logits.double(), *given)
    assert error.value.param == "logits"
    with pytest.raises(ConfigError) as error:
        eligibility_threshold(logits, given[0], given[1], given[2], given[3].float())
    assert error.value.param == "top_p"
