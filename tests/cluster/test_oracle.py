"""The oracle: disaggregated tokens == colocated tokens == transformers' tokens.

Prompts are made of what the bundled model was trained on, so that its top-2 margins are clear and equality
of tokens is a fair demand of two programs that round differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from disagg.config import BUNDLED_MODEL
from disagg.service.tokenizer import Tokenizer
from tests.cluster.harness import Cluster, ask, running_cluster

BLOCK, CHUNK, MAX_TOKENS = 16, 64, 12
# Around every block boundary up to three chunks, and far beyond.
LENGTHS = sorted(
    {1, 2}
    | {edge + delta for edge in range(BLOCK, 3 * CHUNK + 1, BLOCK) for delta in (-1, 0, 1)}
    | {CHUNK * 5 + 1, 500}
)
# Below this the two programs may round to different tokens, and neither is wrong.
CLEAR_MARGIN = 1e-3


@pytest.fixture(scope="module")
def text_tokens() -> list[int]:
    """One long prompt of the kind the model knows; tests take its first n tokens."""
    tokenizer = Tokenizer(BUNDLED_MODEL)
    counting = " ".join(str(number) for number in range(1, 400))
    tokens: list[int] = tokenizer.encode(counting)
    return tokens[: max(LENGTHS)]


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    return model.eval()


def greedy_reference(model: LlamaForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    """Return transformers' greedy tokens up to the first one whose margin is not clear."""
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = generated.sequences[0, len(prompt) :].tolist()
    for index, logits in enumerate(generated.logits):
        top = logits[0].topk(2).values
        if top[0] - top[1] < CLEAR_MARGIN:
            return tokens[:index]
    return tokens


@pytest.fixture
async def disaggregated() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster


async def both(prompts: list[list[int]], cluster: Cluster, **params: Any) -> tuple[list[Any], list[Any]]:
    """Return the answers of the given cluster and of a colocated one."""
    there = [await ask(cluster, prompt, **params) for prompt in prompts]
    async with running_cluster(prefill=0, decode=0, mixed=1) as colocated:
        here = [await ask(colocated, prompt, **params) for prompt in prompts]
    return there, here


async def test_greedy_at_every_boundary(
    disaggregated: Cluster, text_tokens: list[int], reference: LlamaForCausalLM
) -> None:
    prompts = [text_tokens[:length] for length in LENGTHS]
    # A salt of its own for each, so that none finds another's prefix.
    cold = [
        await ask(disaggregated, prompt, max_tokens=MAX_TOKENS, cache_salt=str(index))
        for index, prompt in enumerate(prompts)
    ]
    assert all(answer.num_cached_tokens == 0 for answer in cold)
    warm = [
        await ask(disaggregated, prompt, max_tokens=MAX_TOKENS, cache_salt=str(index))
        for index, prompt in enumerate(prompts)
    ]
    compared = 0
    for length, prompt, first, second in zip(LENGTHS, prompts, cold, warm, strict=True):
        expected = greedy_reference(reference, prompt, MAX_TOKENS)
        compared += len(expected)
        assert first.token_ids[: len(expected)] == expected, f"prompt of {length} tokens, cold"
        assert second.token_ids == first.token_ids, f"prompt of {length} tokens, prefix hit"
        if length > BLOCK:
            assert second.num_cached_tokens >= (length - 1) // BLOCK * BLOCK
    # The margin rule must not empty the comparison.
    assert compared > 0.9 * MAX_TOKENS * len(LENGTHS)
    await disaggregated.wait_idle()


async def test_colocated_equals_disaggregated(disaggregated: Cluster, text_tokens: list[int]) -> None:
    prompts = [text_tokens[:length] for length in LENGTHS]
    there, here = await both(prompts, disaggregated, max_tokens=MAX_TOKENS)
    assert [answer.token_ids for answer in there] == [answer.token_ids for answer in here]


async def test_seeded_sampling_does_not_depend_on_the_hand_off(
    disaggregated: Cluster, text_tokens: list[int]
) -> None:
    prompts = [text_tokens[:length] for length in (1, 15, 16, 17, 63, 64, 65, 129, 300)]
    params: dict[str, Any] = {
        "max_tokens": 24,
        # High, since the model is sure of these prompts and every seed would draw the same.
        "temperature": 2.5,
        "top_p": 0.98,
        "top_k": 40,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 1234,
    }
    there, here = await both(prompts, disaggregated, **params)
    assert [answer.token_ids for answer in there] == [answer.token_ids for answer in here]
    other = [await ask(disaggregated, prompt, **{**params, "seed": 99}) for prompt in prompts]
    assert [answer.token_ids for answer in other] != [answer.token_ids for answer in there]


async def test_concurrent_requests_do_not_disturb_each_other(
    disaggregated: Cluster, text_tokens: list[int]
) -> None:
    prompts = [text_tokens[start : start + 40 + 7 * start] for start in range(24)]
    alone = [await ask(disaggregated, prompt, max_tokens=16) for prompt in prompts]
    together = await asyncio.gather(
        *(
            ask(disaggregated, prompt, max_tokens=16, cache_salt=f"s{index}")
            for index, prompt in enumerate(prompts)
        )
    )
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    await disaggregated.wait_idle()


async def test_tiny_pools_preempt_and_still_agree(text_tokens: list[int]) -> None:
    prompts = [text_tokens[start : start + 60] for start in range(0, 80, 10)]
    async with running_cluster() as roomy:
        expected = [await ask(roomy, prompt, max_tokens=40) for prompt in prompts]
    async with running_cluster({"engine": {"num_kv_blocks": 16}}) as tight:
        answers = await asyncio.gather(*(ask(tight, prompt, max_tokens=40) for prompt in prompts))
        await tight.wait_idle()
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


@pytest.mark.parametrize(
    ("transport", "used"), [("shm", "shm"), ("grpc", "grpc"), ("nccl", "gloo"), ("nixl", "nixl")]
)
async def test_every_transport_is_exact(transport: str, used: str, text_tokens: list[int]) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="NIXL is not installed")
    prompts = [text_tokens[:length] for length in (1, 17, 64, 200, 500)]
    async with running_cluster({"transfer": {"kv_transport": transport}}) as cluster:
        answers = [await ask(cluster, prompt, max_tokens=8) for prompt in prompts]
        exposition = await cluster.gateway.metrics()
    async with running_cluster(prefill=0, decode=0, mixed=1) as colocated:
        expected = [await ask(colocated, prompt, max_tokens=8) for prompt in prompts]
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert f'transport="{used}"' in exposition.decode()
