"""The measurement of the bundled model: batches change nothing, and only whole answers count as right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from disagg.tinymodel import data
from disagg.tinymodel.evaluate import Item, Trial, score, suites, try_items
from disagg.tinymodel.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(data.corpus(0, documents=20))


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def test_an_item_is_judged_the_same_alone_and_in_a_batch(model: Any, tokenizer: Tokenizer) -> None:
    items = [Item("a b c " * n, " x y" * (n % 3 + 1)) for n in (40, 1, 7, 300, 8, 299)]
    together = try_items(model, tokenizer, items)
    for item, trial in zip(items, together, strict=True):
        ids = torch.tensor([tokenizer.encode(item.prompt + item.answer).ids])
        with torch.inference_mode():
            logits = model(ids).logits[0, trial.prompt_tokens - 1 : -1]
        assert trial.item == item
        assert trial.right == ids[0, trial.prompt_tokens :].tolist()
        assert trial.said == logits.argmax(-1).tolist()
        best = logits.topk(2).values
        assert trial.margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-3)


def test_one_wrong_token_makes_an_answer_wrong() -> None:
    item = Item("p", "a")
    right = Trial(item, 3, [5, 6], [5, 6], [4.0, 2.0])
    wrong = Trial(item, 5, [5, 6], [5, 7], [9.0, 0.1])
    result = score("suite", [right, wrong])
    assert (result.accuracy, result.token_accuracy) == (0.5, 0.75)
    assert (result.prompt_tokens, result.answer_tokens) == (4, 2)
    # The margins of a wrong answer say nothing about how stable the right ones are.
    assert result.smallest_margin == 2.0


def test_suites_repeat_fit_the_context_and_are_of_the_asked_size(tokenizer: Tokenizer) -> None:
    first, second = dict(suites(3, seed=1)), dict(suites(3, seed=1))
    assert first == second
    for name, items in first.items():
        assert len(items) == 3 or name.startswith("phrase book")
    longest = first["recall, 1,500 tokens"]
    assert all(1300 < data.rough_tokens(item.prompt) < 1700 for item in longest)
