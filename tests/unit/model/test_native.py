"""The C++ kernels: equal bits in every batch, quantised weights, and what happens without a compiler."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from model_support import Driver, make_model, random_tokens, reference_logits, runner_for, save

from disagg.config import EngineConfig
from disagg.errors import ConfigError
from disagg.model.native import library
from disagg.model.native.decoder import NativeDecoder
from disagg.model.native.packing import GROUP, pack, quantize_int4, quantize_int8
from disagg.model.runner import load_runner, plan_cache, read_spec
from disagg.model.transformer import Transformer

try:
    library.load_library()
except library.KernelsUnavailableError as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)

# Odd sizes: no multiple of a panel, of a block of inputs, of a group of int4, or of a tile of rows.
ODD = {
    "hidden_size": 300,
    "intermediate_size": 333,
    "vocab_size": 259,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    model = make_model("llama_gqa_tied", **ODD)
    return model, save(model, tmp_path_factory.mktemp("odd"))


def native(folder: Path, **options) -> Driver:
    return Driver(runner_for(folder, kernels="native", **{"block_size": 16, "num_blocks": 128, **options}))


def whole(folder: Path, tokens: list[int], **options) -> torch.Tensor:
    """Logits after a prompt that is computed alone and in one piece."""
    driver = native(folder, **options)
    driver.prefill(driver.add(tokens))
    return driver.logits[0]


def test_odd_sizes_follow_the_reference(odd):
    model, folder = odd
    tokens = random_tokens(140, vocab=259)
    expected = reference_logits(model, tokens)[-1]
    torch.testing.assert_close(whole(folder, tokens), expected, atol=2e-4, rtol=1e-4)


def test_chunks_give_the_same_bits(odd):
    _, folder = odd
    tokens = random_tokens(200, vocab=259)
    expected = whole(folder, tokens)
    for cuts in ([1], [199], [64], [63, 65], [7, 100, 50, 42], [37] * 5):
        driver = native(folder)
        seq = driver.add(tokens)
        for cut in cuts:
            driver.step((seq, cut))
        driver.prefill(seq)
        assert torch.equal(driver.logits[0], expected), cuts


def test_a_recomputed_sequence_has_the_bits_of_its_decode_steps(odd):
    """What recovery rests on: tokens decoded one by one and then computed again as a prompt."""
    _, folder = odd
    driver = native(folder)
    seq = driver.add(random_tokens(60, vocab=259))
    driver.generate(seq, 20)
    assert torch.equal(driver.logits[0], whole(folder, seq.token_ids[:-1]))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_batch_does_not_change_the_bits(odd, quantization):
    _, folder = odd
    texts = [random_tokens(length, seed=length, vocab=259) for length in (1, 3, 16, 17, 64, 65, 130)]
    alone = [whole(folder, text, quantization=quantization) for text in texts]
    for count in range(1, len(texts) + 1):
        driver = native(folder, quantization=quantization)
        seqs = [driver.add(text) for text in texts[:count]]
        driver.step(*((seq, len(text)) for seq, text in zip(seqs, texts, strict=False)))
        assert torch.equal(driver.logits, torch.stack(alone[:count]))
        first = driver.logits
        # The same as decode steps of `count` rows: few rows take other code than many.
        driver = native(folder, quantization=quantization)
        longer = [text for text in texts[:count] if len(text) > 1]
        seqs = [driver.add(text) for text in longer]
        for seq, text in zip(seqs, longer, strict=True):
            driver.step((seq, len(text) - 1))
        if seqs:
            driver.step(*((seq, 1) for seq in seqs))
            assert torch.equal(
                driver.logits, first[[i for i, text in enumerate(texts[:count]) if len(text) > 1]]
            )


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_threads_give_the_same_bits(odd, rows):
    _, folder = odd
    tokens = random_tokens(rows, vocab=259)
    expected = whole(folder, tokens)
    for threads in (2, 3):
        assert torch.equal(whole(folder, tokens, num_threads=threads), expected)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama_gqa_tied", "llama_mqa_biases", "qwen3"])
def test_quantised_weights_are_those_that_transformers_computes_with(tmp_path, name, quantization):
    """Round every matrix of the reference to what the kernels hold: the logits must then agree."""
    model = make_model(name)
    folder = save(model, tmp_path)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if not key.endswith("weight") or weight.ndim != 2:
                continue
            if key == "model.embed_tokens.weight" and not tied:
                continue
            head = "embed_tokens" in key or "lm_head" in key
            weight.copy_(rounded(weight, "int8" if head else quantization))
    tokens = random_tokens(40)
    for count in (1, 2, 3, 5, 40):
        logits = whole(folder, tokens[:count], quantization=quantization)
        expected = reference_logits(model, tokens[:count])[-1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        levels, scale = quantize_int8(weight)
        return levels * scale[:, None]
    levels, scale = quantize_int4(weight)
    return levels * scale.repeat_interleave(GROUP, dim=1)[:, : weight.shape[1]]


def test_rounding_errors_are_within_half_a_level():
    weight = torch.randn(33, 200, generator=torch.Generator().manual_seed(0))
    levels, scale = quantize_int8(weight)
    assert ((levels * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (levels.abs().amax(1) == 127).all()
    levels, scale = quantize_int4(weight)
    assert levels.min() >= -8 and levels.max() <= 7
    error = (rounded(weight, "int4") - weight).square().mean().sqrt()
    assert error < 0.12, "a normal distribution over 15 levels loses about a tenth of its deviation"


def test_rows_of_zeros_stay_zero():
    for kind in ("float32", "int8", "int4"):
        packed = pack(torch.zeros(3, 70), None, kind)
        assert packed.n == 16 and packed.k == 70
        assert torch.isfinite(packed.scale).all() if packed.scale is not None else True
        assert (rounded(torch.zeros(3, 70), kind) == 0).all() if kind != "float32" else True


def test_quantised_weights_take_fewer_bytes(odd):
    reference, folder = odd
    sizes = {}
    for kind in ("float32", "int8", "int4"):
        spec = read_spec(folder)
        model = Transformer(spec, dtype=torch.float32, device=torch.device("cpu"))
        model.load()
        sizes[kind] = NativeDecoder(model, num_threads=1, weights=kind).weight_bytes
    plain = sum(weight.numel() for weight in reference.parameters()) * 4
    # Once, tied embedding included, but for what fills the last panels.
    assert plain <= sizes["float32"] < 1.1 * plain
    assert sizes["int8"] < 0.3 * sizes["float32"]
    assert sizes["int4"] < 0.75 * sizes["int8"]


def test_quantised_kv_is_not_mixed_with_that_of_full_weights(odd):
    _, folder = odd
    config = EngineConfig(num_kv_blocks=8)
    names = {
        plan_cache(read_spec(folder), config, quantization=kind)[0].model for kind in (None, "int8", "int4")
    }
    assert len(names) == 3


def test_torch_computes_where_no_compiler_is(odd, monkeypatch, caplog):
    def missing():
        raise library.KernelsUnavailableError("no C++ compiler found")

    monkeypatch.setattr(library, "load_library", missing)
    _, folder = odd
    config = EngineConfig(num_kv_blocks=8)
    runner = load_runner(folder, config)
    assert isinstance(runner.model, Transformer)
    assert "no C++ compiler found" in caplog.text
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler") as error:
        load_runner(folder, config.model_copy(update={"kernels": "native"}))
    assert error.value.param == "kernels"
    with pytest.raises(ConfigError) as error:
        load_runner(folder, config, quantization="int8")
    assert error.value.param == "quantization"


def test_quantization_needs_float32(odd):
    with pytest.raises(ConfigError) as error:
        load_runner(odd[1], EngineConfig(num_kv_blocks=8), dtype="bfloat16", quantization="int8")
    assert error.value.param == "quantization"


def test_the_compiler_that_is_named_must_exist(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(library.KernelsUnavailableError, match="no-such-compiler"):
        library.find_compiler()


def test_a_source_that_does_not_compile_is_reported(tmp_path, monkeypatch):
    broken = tmp_path / "kernels.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(library, "SOURCE", broken)
    monkeypatch.setenv("DISAGG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(library.KernelsUnavailableError, match="error"):
        library.build()
    assert list((tmp_path / "cache").iterdir()) == []


def test_code_is_not_loaded_from_a_folder_that_others_may_write_to(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(stat.S_IRWXU | stat.S_IWOTH)
    monkeypatch.setenv("DISAGG_CACHE", str(folder))
    with pytest.raises(library.KernelsUnavailableError, match="writable"):
        library.cache_folder()
