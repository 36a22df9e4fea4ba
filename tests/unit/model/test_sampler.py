from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from disagg.engine.sequence import Sequence
from disagg.model import logits as logits_module
from disagg.model.logits import eligibility_threshold
from disagg.model.noise import gumbel, noise_key, random_bits
from disagg.model.sampler import Sampler
from disagg.types import Request, SamplingParams

VOCAB = 50
EOS = (2, 7)


def sequence(tokens, params, prompt=None):
    prompt = len(tokens) if prompt is None else prompt
    return Sequence(Request("r", tuple(tokens), prompt, params), now=0.0)


def draw(logits, *seqs, vocab=VOCAB):
    return Sampler(vocab, EOS).sample(logits.clone(), seqs)


def random_logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def chi_square_is_plausible(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's test, 5 standard deviations: the seeds are fixed, so this either always holds or never."""
    expected = probabilities.double() * counts.sum()
    # Cells of few expected counts together, as the test asks for.
    rare = expected < 5
    cells = list(zip(counts[~rare].double(), expected[~rare], strict=True))
    if expected[rare].sum() > 0:
        cells.append((counts[rare].sum().double(), expected[rare].sum()))
    statistic = sum(float((seen - wanted) ** 2 / wanted) for seen, wanted in cells)
    degrees = len(cells) - 1
    return abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


# Noise


def test_splitmix64_has_its_published_outputs():
    """First outputs of SplitMix64 started at 1234567, from Vigna's reference implementation."""
    bits = random_bits(torch.tensor(1234567), torch.arange(3))
    assert [value % 2**64 for value in bits.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_any_seed_and_position_has_a_key_of_its_own(seed):
    keys = {noise_key(seed, position) for position in range(2000)}
    assert len(keys) == 2000
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_noise_for_some_tokens_is_the_noise_for_all():
    key = torch.tensor(noise_key(3, 4))
    some = torch.tensor([5, 40_000, 127_999])
    torch.testing.assert_close(gumbel(key, torch.arange(128_000))[some], gumbel(key, some))


def test_noise_is_gumbel():
    values = gumbel(torch.tensor(noise_key(1, 2)), torch.arange(1_000_000)).double()
    assert bool(values.isfinite().all())
    assert values.mean().item() == pytest.approx(0.5772156649, abs=5e-3)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=2e-2)
    for point in (-1.0, 0.0, 1.0, 3.0, 8.0):
        below = (values <= point).double().mean().item()
        assert below == pytest.approx(math.exp(-math.exp(-point)), abs=2.5e-3)


def test_largest_and_smallest_uniforms_stay_finite(monkeypatch):
    for bits in (0, -1, 1, 2**63 - 1, -(2**63)):
        monkeypatch.setattr("disagg.model.noise.random_bits", lambda *_, bits=bits: torch.tensor([bits]))
        assert gumbel(torch.tensor(0), torch.tensor(0)).isfinite()


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_draws_follow_softmax(vary):
    logits = random_logits(1, vocab=20, scale=1.5)
    count = 20_000
    keys = [noise_key(i, 5) if vary == "seed" else noise_key(5, i) for i in range(count)]
    drawn = (logits + gumbel(torch.tensor(keys)[:, None], torch.arange(20))).argmax(-1)
    assert chi_square_is_plausible(drawn.bincount(minlength=20), logits[0].softmax(-1))


@pytest.mark.parametrize("neighbour", ["next_position", "next_seed", "seed_for_position"])
def test_neighbouring_draws_are_independent(neighbour):
    logits = random_logits(1, vocab=6, scale=0.7)
    keys = torch.tensor([noise_key(i, 1000 + i % 7) for i in range(20_000)])
    others = {
        "next_position": [noise_key(i, 1001 + i % 7) for i in range(20_000)],
        "next_seed": [noise_key(i + 50_000, 1000 + i % 7) for i in range(20_000)],
        "seed_for_position": [noise_key(1000 + i % 7, i + 10_000) for i in range(20_000)],
    }
    first = (logits + gumbel(keys[:, None], torch.arange(6))).argmax(-1)
    second = (logits + gumbel(torch.tensor(others[neighbour])[:, None], torch.arange(6))).argmax(-1)
    joint = logits[0].softmax(-1)[:, None] * logits[0].softmax(-1)[None, :]
    assert chi_square_is_plausible((first * 6 + second).bincount(minlength=36), joint.flatten())


# Drawing


def test_greedy_takes_the_largest_logit():
    logits = random_logits(3)
    params = SamplingParams(temperature=0.0)
    drawn = draw(logits, *(sequence([1], params) for _ in range(3)))
    assert [token.token_id for token in drawn] == logits.argmax(-1).tolist()
    assert all(token.logprobs is None for token in drawn)


def test_a_temperature_close_to_zero_is_greedy():
    logits = random_logits(1)
    assert draw(logits, sequence([1], SamplingParams(temperature=1e-30)))[0].token_id == logits.argmax()


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.95}, {"min_p": 0.02}, {"top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_the_sampler_draws_from_the_filtered_distribution(changes):
    logits = random_logits(1, scale=1.5)
    seqs = [sequence([1] * 3, SamplingParams(**{"seed": i, **changes})) for i in range(6000)]
    drawn = torch.tensor([token.token_id for token in draw(logits.expand(6000, -1), *seqs)])
    expected = filtered_by_transformers(logits, SamplingParams(**changes)).softmax(-1)[0]
    counts = drawn.bincount(minlength=VOCAB)
    assert int(counts[expected == 0].sum()) == 0
    assert chi_square_is_plausible(counts, expected)


def test_a_draw_does_not_depend_on_the_rest_of_the_batch():
    kinds = [{}, {"top_k": 4}, {"top_p": 0.6}, {"temperature": 0.0}, {"logprobs": 2}, {"min_p": 0.05}]
    logits = random_logits(60, seed=1)
    params = [SamplingParams(**{"seed": i, **kinds[i % len(kinds)]}) for i in range(60)]
    seqs = [sequence([1] * (i + 1), params[i]) for i in range(60)]
    together = draw(logits, *seqs)
    alone = [draw(logits[i : i + 1], sequence([1] * (i + 1), params[i]))[0] for i in range(60)]
    assert [token.token_id for token in together] == [token.token_id for token in alone]


def test_position_is_the_number_of_tokens_and_not_of_the_prompt():
    logits = random_logits(1, scale=0.1).expand(40, -1)
    params = [SamplingParams(seed=i) for i in range(40)]
    fresh = draw(logits, *(sequence([1, 1, 1, 1], p, prompt=4) for p in params))
    continued = draw(logits, *(sequence([1, 1, 1, 1], p, prompt=1) for p in params))
    later = draw(logits, *(sequence([1, 1, 1, 1, 1], p) for p in params))
    assert fresh == continued
    assert fresh != later


# Filters


def filtered_by_transformers(logits, params, tokens=()):
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain(torch.tensor([list(tokens)], dtype=torch.int64), logits.clone())


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.6},
    {"top_k": 3, "top_p": 0.99, "min_p": 0.01},
    {"top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("sort_all", [True, False], ids=["sorted", "prefix"])
def test_filters_keep_what_transformers_keeps(monkeypatch, scale, sort_all):
    """All filters in one batch. prefix: only the largest 16 of 300 are sorted at first."""
    if not sort_all:
        monkeypatch.setattr(logits_module, "SORT_ALL", 10)
        monkeypatch.setattr(logits_module, "SORTED_PREFIX", 16)
    logits = random_logits(len(FILTERS), vocab=300, scale=scale, seed=9)
    params = [SamplingParams(**changes) for changes in FILTERS]
    kept = logits >= eligibility_threshold(logits, params)[:, None]
    for row, each in enumerate(params):
        theirs = filtered_by_transformers(logits[row : row + 1], each)
        assert kept[row].tolist() == theirs.isfinite()[0].tolist(), FILTERS[row]


def test_the_whole_pipeline_is_that_of_transformers():
    params = SamplingParams(temperature=0.7, top_k=12, top_p=0.9, repetition_penalty=1.4, seed=1)
    tokens = [3, 4, 4, 9, 30, 3]
    logits = random_logits(1, scale=1.2, seed=4)
    expected = filtered_by_transformers(logits, params, tokens).softmax(-1)[0]
    count = 6000
    seqs = []
    for seed in range(count):
        own = SamplingParams(temperature=0.7, top_k=12, top_p=0.9, repetition_penalty=1.4, seed=seed)
        seqs.append(sequence(tokens, own, prompt=2))
    drawn = torch.tensor([token.token_id for token in draw(logits.expand(count, -1), *seqs)])
    assert chi_square_is_plausible(drawn.bincount(minlength=VOCAB), expected)


def test_tokens_tied_at_the_edge_all_stay():
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, -2.0]])
    for changes in ({"top_k": 2}, {"top_p": 0.85}):
        kept = logits >= eligibility_threshold(logits, [SamplingParams(**changes)])[:, None]
        assert kept[0].tolist() == [True, True, True, True, False]


def test_equal_logits_pass_every_filter():
    logits = torch.zeros(1, 5000)
    params = SamplingParams(top_p=0.5, top_k=3, min_p=0.5)
    assert bool((logits >= eligibility_threshold(logits, [params])[:, None]).all())


# Penalties, bias, min_tokens


def adjusted(logits, seq):
    """Return the logits from which a sequence's token is drawn."""
    sampler = Sampler(VOCAB, EOS)
    own = logits.clone()
    sampler.sample(own, [seq])
    return own[0]


def test_penalties_are_those_of_vllm():
    tokens, prompt = [5, 6, 6, 8, 9, 9, 9, 5], 4
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
    )
    logits = random_logits(1, seed=2)
    expected = logits[0].clone()
    for token in {5, 6, 8, 9}:  # repetition: prompt and output
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    for token, count in {9: 3, 5: 1}.items():  # presence and frequency: output alone
        expected[token] -= 0.5 + 0.25 * count
    torch.testing.assert_close(adjusted(logits, sequence(tokens, params, prompt)), expected)


def test_penalties_counted_step_by_step_are_those_counted_at_once():
    params = SamplingParams(seed=3, presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.3)
    logits = random_logits(30, seed=3, scale=1.0)
    sampler = Sampler(VOCAB, EOS)
    seq = sequence([4, 5, 6], params)
    for row in range(30):
        moved = sequence(seq.token_ids, params, prompt=3)
        token = sampler.sample(logits[row : row + 1].clone(), [seq])[0]
        assert sampler.sample(logits[row : row + 1].clone(), [moved])[0] == token
        seq.token_ids.append(token.token_id)


def test_penalty_state_takes_in_new_tokens_only(monkeypatch):
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    sampler = Sampler(VOCAB, EOS)
    seq = sequence([4] * 500, params)
    sampler.sample(random_logits(1), [seq])
    seq.token_ids.append(3)
    sizes = []
    tensor = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda data, **options: (sizes.append(len(data)), tensor(data, **options))[1]
    )
    sampler.sample(random_logits(1), [seq])
    assert sizes
    assert max(sizes) == 1


def test_logit_bias_moves_and_forbids():
    logits = torch.zeros(1, VOCAB)
    params = SamplingParams(temperature=0.0, logit_bias={11: 5.0, 12: -100.0})
    own = adjusted(logits, sequence([1], params))
    assert own[11] == 5
    assert own[12] == -100
    assert int((own != 0).sum()) == 2


def test_min_tokens_blocks_eos_and_stop_tokens_until_reached():
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 7, 20]] = 9.0
    logits[0, 30] = 1.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(20,))
    for outputs, expected in ((0, 30), (1, 30), (2, 2)):
        seq = sequence([1] * (3 + outputs), params, prompt=3)
        assert draw(logits, seq)[0].token_id == expected


# Log-probabilities


def test_logprobs_are_of_the_models_own_distribution():
    logits = random_logits(3, seed=6)
    expected = logits.log_softmax(-1)
    seqs = [
        sequence([1], SamplingParams(seed=1, temperature=3.0, logprobs=4, logit_bias={13: 100.0})),
        sequence([1], SamplingParams(temperature=0.0, logprobs=0, repetition_penalty=5.0)),
        sequence([1], SamplingParams(temperature=0.0)),
    ]
    first, second, third = draw(logits, *seqs)
    assert first.token_id == 13, "the bias decides the draw"
    assert first.logprobs.logprob == pytest.approx(expected[0, 13].item())
    order = expected[0].argsort(descending=True).tolist()
    assert first.logprobs.rank == order.index(13) + 1
    assert [token for token, _ in first.logprobs.top] == order[:4]
    assert [value for _, value in first.logprobs.top] == pytest.approx(expected[0, order[:4]].tolist())
    assert (second.logprobs.token_id, second.logprobs.rank, second.logprobs.top) == (second.token_id, 1, ())
    assert third.logprobs is None


def test_large_vocabularies_are_drawn_in_parts(monkeypatch):
    logits = random_logits(9, seed=8)
    seqs = [sequence([1], SamplingParams(seed=i)) for i in range(9)]
    whole = draw(logits, *seqs)
    monkeypatch.setattr("disagg.model.sampler.NOISE_ELEMENTS", 2 * VOCAB)
    assert draw(logits, *seqs) == whole
