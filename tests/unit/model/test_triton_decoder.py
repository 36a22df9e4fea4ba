"""TritonDecoder under the interpreter: logits equal those of transformers and of the torch decoder."""

from __future__ import annotations

import pytest
import torch
from model_support import CASES, Driver, make_model, random_tokens, reference_logits, runner_for, save

from disagg.config import EngineConfig
from disagg.errors import ConfigError
from disagg.model.kernels import tiling
from disagg.model.runner import load_runner
from disagg.model.triton_decoder import TritonDecoder

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

# Head dimensions of 16 and more: fewer than a tensor core takes are refused.
WIDER = {"hidden_size": 64, "num_hidden_layers": 2}
FAMILIES = {
    "llama_gqa_tied": {},
    "llama_mqa_biases": {},
    "llama_head_dim": {},
    "llama_yarn_mscale": {},
    "mistral_short_window": {},
    "qwen2_window_tied": {},
    "qwen3": {},
    "qwen3_biases_window": {"head_dim": 16},
}
WINDOWS = ["mistral_short_window", "qwen2_window_tied", "qwen3_biases_window"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a family's random model and its folder; each is made once."""
    made = {}

    def get(name):
        if name not in made:
            model = make_model(name, **{**WIDER, **FAMILIES[name]})
            made[name] = model, save(model, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def triton(folder, **options) -> Driver:
    driver = Driver(runner_for(folder, kernels="triton", **options))
    assert isinstance(driver.runner.model, TritonDecoder)
    return driver


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_every_family_is_one_of_the_cases():
    assert set(FAMILIES) <= set(CASES)
    assert {CASES[name][0] for name in FAMILIES} == {config for config, _ in CASES.values()}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama_gqa_tied", "qwen3")])
def test_chunks_and_decodes_follow_transformers(wide, name):
    model, folder = wide(name)
    tokens = random_tokens(19)
    expected = reference_logits(model, tokens)
    driver = triton(folder)
    seq = driver.add(tokens[:17])
    driver.step((seq, 6))
    driver.step((seq, 2))
    driver.prefill(seq)
    assert_close(driver.logits[0], expected[16])
    for index in range(17, 19):
        driver.forced(seq, tokens[index])
        driver.prefill(seq)
        assert_close(driver.logits[0], expected[index])


@pytest.mark.parametrize("name", ["llama_gqa_tied", *WINDOWS])
def test_decodes_and_chunks_in_one_step(wide, name):
    model, folder = wide(name)
    results = []
    for kernels in ("triton", "torch"):
        driver = Driver(runner_for(folder, num_blocks=96, kernels=kernels))
        texts = [random_tokens(length + 1, seed=length) for length in (1, 4, 22)]
        decodes = [driver.add(text[:-1]) for text in texts]
        driver.step(*((seq, len(seq.token_ids)) for seq in decodes))
        for seq, text in zip(decodes, texts, strict=True):
            driver.forced(seq, text[-1])
        chunked, single, partial = (driver.add(random_tokens(count, seed=count)) for count in (12, 1, 30))
        driver.step((chunked, 7))
        # A prompt of one token is a decode to the kernels; one that stands after chunks is not.
        driver.step(*((seq, 1) for seq in decodes), (chunked, 5), (single, 1), (partial, 9))
        results.append(driver.logits)
        texts += [chunked.token_ids[:12], single.token_ids[:1]]
        assert_close(driver.logits, torch.stack([reference_logits(model, text)[-1] for text in texts]))
    assert_close(*results)


@pytest.mark.parametrize("block_size", [1, 16])
def test_block_sizes(wide, block_size):
    model, folder = wide("qwen2_window_tied")
    tokens = random_tokens(21, seed=2)
    driver = triton(folder, block_size=block_size)
    seq = driver.add(tokens[:20])
    driver.step((seq, 7))
    driver.prefill(seq)
    assert_close(driver.logits[0], reference_logits(model, tokens)[19])
    driver.forced(seq, tokens[20])
    driver.prefill(seq)
    assert_close(driver.logits[0], reference_logits(model, tokens)[20])


def test_a_context_that_is_split(wide, monkeypatch):
    model, folder = wide("llama_gqa_tied")
    monkeypatch.setattr(tiling, "MIN_SPLIT_TOKENS", 16)
    tokens = random_tokens(61, seed=3)
    driver = triton(folder)
    seq = driver.add(tokens[:-1])
    driver.prefill(seq)
    driver.forced(seq, tokens[-1])
    driver.prefill(seq)
    assert_close(driver.logits[0], reference_logits(model, tokens)[-1])


def test_nothing_is_written_outside_the_block_table(wide):
    driver = triton(wide("qwen3")[1])
    seq = driver.add(random_tokens(10))
    driver.prefill(seq)
    written = driver.runner.kv_cache.blocks.flatten(1).abs().sum(1).nonzero()[:, 0].tolist()
    assert sorted(seq.block_table) == written


def test_a_head_dimension_that_no_tile_holds_is_refused(checkpoint):
    with pytest.raises(ConfigError) as error:
        runner_for(checkpoint("llama_mha")[1], kernels="triton")  # 12
    assert error.value.param == "head_dim"


def test_a_block_size_that_is_no_power_of_two_is_refused(wide):
    with pytest.raises(ConfigError) as error:
        runner_for(wide("qwen3")[1], kernels="triton", block_size=24)
    assert error.value.param == "block_size"


def test_without_the_interpreter_a_cpu_is_refused(wide, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET") as error:
        load_runner(wide("qwen3")[1], EngineConfig(num_kv_blocks=8, kernels="triton"))
    assert error.value.param == "kernels"


def test_quantised_weights_are_refused(wide):
    with pytest.raises(ConfigError) as error:
        load_runner(wide("qwen3")[1], EngineConfig(num_kv_blocks=8, kernels="triton"), quantization="int8")
    assert error.value.param == "quantization"


def test_the_log_names_what_computes(wide, caplog):
    caplog.set_level("INFO")
    triton(wide("qwen3")[1])
    assert "computing with Triton kernels on cpu" in caplog.text
