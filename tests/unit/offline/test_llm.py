"""LLM: offline inference gives transformers' tokens, in the order of the prompts, whatever the batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from disagg import LLM, SamplingParams
from disagg.config import BUNDLED_MODEL
from disagg.errors import ConfigError, InvalidRequestError
from disagg.types import FinishReason

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def llm():
    return LLM(max_num_seqs=4, kv_cache_memory=64 << 20, num_threads=1)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)


def expected_tokens(reference, prompt, count):
    made = reference.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return tuple(made[0, len(prompt) :].tolist())


def test_tokens_are_those_of_transformers(llm, reference):
    tokenizer = llm.get_tokenizer()
    texts = [f"{i} {i + 1} {i + 2} " for i in range(5, 60, 5)]
    results = llm.generate(texts, GREEDY, use_tqdm=False)
    for text, result in zip(texts, results, strict=True):
        ids = tokenizer.encode(text)
        assert result.prompt == text
        assert result.prompt_token_ids == tuple(ids)
        (choice,) = result.outputs
        assert choice.token_ids == expected_tokens(reference, ids, 8)
        assert choice.finish_reason is FinishReason.LENGTH
        assert choice.text == tokenizer.decode(choice.token_ids)


def test_more_prompts_than_fit_at_once_keep_their_order(llm):
    prompts = [{"prompt_token_ids": [3 + i, 4 + i]} for i in range(60)]
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts[:5]]
    results = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [r.prompt_token_ids for r in results] == [tuple(p["prompt_token_ids"]) for p in prompts]
    assert [r.outputs[0].token_ids for r in results[:5]] == alone
    assert all(r.finished for r in results)


def test_every_form_of_a_prompt(llm):
    ids = llm.get_tokenizer().encode("7 8 9 ")
    forms = ["7 8 9 ", {"prompt": "7 8 9 "}, {"prompt_token_ids": ids}, ids]
    tokens = {llm.generate(form, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for form in forms}
    together = {r.outputs[0].token_ids for r in llm.generate(forms, GREEDY, use_tqdm=False)}
    assert tokens == together and len(tokens) == 1


def test_parameters_of_its_own_for_each_prompt(llm):
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (1, 2, 3)]
    results = llm.generate(["1 2 3 "] * 3, params, use_tqdm=False)
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 2, 3]


def test_choices_and_seeds(llm):
    params = SamplingParams(temperature=1.5, max_tokens=12, n=3, seed=11)
    (first,) = llm.generate("Hello", params, use_tqdm=False)
    (again,) = llm.generate("Hello", params, use_tqdm=False)
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert len({c.token_ids for c in first.outputs}) > 1


def test_stop_string_ends_before_itself_and_frees_the_blocks(llm):
    params = SamplingParams(temperature=0, max_tokens=64, stop=("12",))
    (result,) = llm.generate("7 8 9 ", params, use_tqdm=False)
    choice = result.outputs[0]
    assert choice.text == "10 11 "
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, "12")
    assert not llm._engine.has_work()
    assert llm._engine.load().kv_blocks_used == 0


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2)
    choice = llm.generate("1 2 3 ", params, use_tqdm=False)[0].outputs[0]
    assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
    assert all(len(entry.top) == 2 and entry.rank == 1 for entry in choice.logprobs)
    assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in choice.logprobs))


def test_chat(llm):
    hello = [{"role": "user", "content": "Hello, what can you do?"}]
    params = SamplingParams(temperature=0, max_tokens=300)
    (one,) = llm.chat(hello, params, use_tqdm=False)
    many = llm.chat([hello, hello], params, use_tqdm=False)
    assert len(one.outputs[0].text.split()) > 5
    assert one.outputs[0].finish_reason is FinishReason.STOP
    assert [r.outputs[0].text for r in many] == [one.outputs[0].text] * 2


def test_the_answer_ends_at_the_models_length(llm):
    prompt = [5] * (llm.max_model_len - 3)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    (result,) = llm.generate([prompt], params, use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("prompts", "param"),
    [
        (["fine", ""], "prompts[1]"),
        (["fine", {"text": "x"}], "prompts[1]"),
        ([[1, 2], [1, "2"]], "prompts[1]"),
        ([{"prompt_token_ids": [1, 10**9]}], "prompt"),
        ([{"prompt_token_ids": [5] * 5000}], "prompts[0]"),
        (7, "prompts"),
    ],
)
def test_a_bad_prompt_is_named_before_any_work(llm, prompts, param):
    with pytest.raises(InvalidRequestError) as error:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert error.value.param == param
    assert not llm._engine.has_work()


def test_parameters_must_match_the_prompts(llm):
    with pytest.raises(InvalidRequestError) as error:
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    assert error.value.param == "sampling_params"


def test_no_prompts_no_results(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_an_interrupt_leaves_it_usable(llm, monkeypatch):
    step = llm._engine.step
    calls = []

    def interrupted(now):
        calls.append(now)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(now)

    monkeypatch.setattr(llm._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["1 2 3 "] * 20, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm._engine.has_work()
    assert len(llm.generate("1 2 3 ", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory):
    """A checkpoint without a tokenizer, as `save_pretrained` of a bare model leaves it."""
    folder = tmp_path_factory.mktemp("bare")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_folder_without_a_tokenizer_takes_token_ids(bare_folder, quantization):
    llm = LLM(bare_folder, max_model_len=64, quantization=quantization, num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    (result,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    assert len(result.outputs[0].token_ids) == 5
    assert result.outputs[0].text == ""
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        llm.generate("text", params, use_tqdm=False)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        llm.generate([[1, 2]], SamplingParams(stop=("x",)), use_tqdm=False)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        LLM(tmp_path / "missing")
    assert error.value.param == "model"
    with pytest.raises(ConfigError) as error:
        LLM(block_size=0)
    assert error.value.param == "engine.block_size"


def test_neither_ray_nor_grpc_is_loaded():
    code = (
        "import sys, disagg\n"
        "assert 'torch' not in sys.modules, 'importing the package loads torch'\n"
        "disagg.LLM(num_threads=1, kv_cache_memory=16 << 20).generate('1 2 ', use_tqdm=False)\n"
        "sys.exit(any(name in sys.modules for name in ('ray', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
