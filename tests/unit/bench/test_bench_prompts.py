import json
import subprocess
import sys

import numpy as np
import pytest

from disagg.bench.failures import BenchError
from disagg.bench.prompts import ChatPrompts, EndpointKind, RequestBuilder, RequestOptions, TokenPrompts
from disagg.workload import AllAtOnce, FixedLength, TimedRequest, Workload, synthesize

POOL = np.arange(100, 1100)


def test_equal_blocks_have_equal_tokens_and_the_rest_differs() -> None:
    prompts = TokenPrompts(POOL, seed=1)
    first = prompts.tokens(TimedRequest(0.0, 20, 1, (7, 8), 8), 0)
    second = prompts.tokens(TimedRequest(0.0, 30, 1, (7, 9), 8), 1)
    assert len(first) == 20 and len(second) == 30
    assert first[:8] == second[:8]
    assert first[8:16] != second[8:16]
    assert first[16:] != second[16:20]
    assert set(first + second) <= set(POOL.tolist())


def test_block_cut_short_agrees_with_the_whole() -> None:
    prompts = TokenPrompts(POOL, seed=1)
    short = prompts.tokens(TimedRequest(0.0, 5, 1, (7,), 8), 0)
    assert short == prompts.tokens(TimedRequest(0.0, 8, 1, (7,), 8), 1)[:5]


def test_same_seed_same_prompt() -> None:
    request = TimedRequest(0.0, 20, 1, (7,), 8)
    assert TokenPrompts(POOL, 1).tokens(request, 3) == TokenPrompts(POOL, 1).tokens(request, 3)
    assert TokenPrompts(POOL, 1).tokens(request, 3) != TokenPrompts(POOL, 2).tokens(request, 3)
    assert TokenPrompts(POOL, 1).tokens(request, 3)[8:] != TokenPrompts(POOL, 1).tokens(request, 4)[8:]


def test_too_few_tokens_to_draw_from() -> None:
    with pytest.raises(BenchError, match="--vocab-size"):
        TokenPrompts(np.arange(3), 0)


def test_chat_text_has_as_many_words_as_planned_and_shares_prefixes() -> None:
    prompts = ChatPrompts(tokens_per_word=2.0, seed=1)
    first = prompts.text(TimedRequest(0.0, 40, 1, (7,), 20), 0).split()
    second = prompts.text(TimedRequest(0.0, 40, 1, (7,), 20), 1).split()
    assert len(first) == len(second) == 20
    assert first[:10] == second[:10] and first[10:] != second[10:]


def builder(ignore_eos: bool, continuous: bool, kind: EndpointKind) -> RequestBuilder:
    workload = synthesize(2, AllAtOnce(), FixedLength(6), FixedLength(3), np.random.default_rng(0))
    prompts = ChatPrompts(1.0, 0) if kind is EndpointKind.CHAT else TokenPrompts(POOL, 0)
    return RequestBuilder(workload, prompts, RequestOptions(kind, "m", 0.5, ignore_eos, continuous))


def test_body_of_a_completion() -> None:
    request = builder(True, True, EndpointKind.COMPLETIONS).build(1)
    body = json.loads(request.body)
    assert request.path == "/v1/completions" and request.expected_tokens == 3
    assert len(body.pop("prompt")) == 6
    assert body == {
        "model": "m",
        "max_tokens": 3,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
    }


def test_body_with_openai_fields_only() -> None:
    request = builder(False, False, EndpointKind.CHAT).build(0)
    body = json.loads(request.body)
    assert request.chat and request.expected_tokens is None
    assert body["stream_options"] == {"include_usage": True} and "ignore_eos" not in body
    assert body["messages"][0]["role"] == "user"


def test_warm_up_shares_nothing_with_the_load() -> None:
    shared = TimedRequest(0.0, 16, 1, (7,), 8)
    made = RequestBuilder(
        Workload("w", (shared,)),
        TokenPrompts(POOL, 0),
        RequestOptions(EndpointKind.COMPLETIONS, "m", 0.0, True, True),
    )
    load, warm = json.loads(made.build(0).body)["prompt"], json.loads(made.warm_up(0).body)["prompt"]
    assert len(load) == len(warm) and load[:8] != warm[:8]
    plain = builder(True, True, EndpointKind.COMPLETIONS)
    assert plain.warm_up(0).body != plain.build(0).body


def test_neither_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys, disagg.bench.cli, disagg.workload; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
