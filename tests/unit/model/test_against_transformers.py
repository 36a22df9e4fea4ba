"""Logits and greedy tokens equal those of transformers, whatever the batch and the block table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_support import CASES, Driver, make_model, random_tokens, reference_logits, runner_for, save
from transformers import AutoModelForCausalLM

from disagg.config import BUNDLED_MODEL
from disagg.engine.runner import Batch, ScheduledSequence

pytestmark = pytest.mark.usefixtures("each_backend")

ATOL = 1e-4
WINDOWS = ["mistral_short_window", "qwen2_window_tied", "qwen3_biases_window"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_prefill_then_decode_follows_the_reference(checkpoint, name):
    model, folder = checkpoint(name)
    tokens = random_tokens(40)
    expected = reference_logits(model, tokens)
    driver = Driver(runner_for(folder))
    seq = driver.add(tokens[:17])
    driver.prefill(seq)
    assert_close(driver.logits[0], expected[16])
    for index in range(17, 40):
        driver.forced(seq, tokens[index])
        driver.prefill(seq)
        assert_close(driver.logits[0], expected[index])


@pytest.mark.parametrize("name", ["llama_gqa_tied", "qwen3", *WINDOWS])
def test_chunks_at_every_split(checkpoint, name):
    model, folder = checkpoint(name)
    tokens = random_tokens(18, seed=1)
    expected = reference_logits(model, tokens)[-1]
    runner = runner_for(folder)
    for split in range(1, 18):
        driver = Driver(runner, seed=split)
        seq = driver.add(tokens)
        assert driver.step((seq, split)) == [None]
        driver.prefill(seq)
        assert_close(driver.logits[0], expected)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("name", ["llama_gqa_tied", "qwen2", *WINDOWS])
def test_block_sizes(checkpoint, name, block_size):
    model, folder = checkpoint(name)
    tokens = random_tokens(37, seed=2)
    expected = reference_logits(model, tokens)
    driver = Driver(runner_for(folder, block_size=block_size))
    seq = driver.add(tokens[:34])
    driver.step((seq, 5))
    driver.step((seq, 16))
    driver.prefill(seq)
    assert_close(driver.logits[0], expected[33])
    for index in range(34, 37):
        driver.forced(seq, tokens[index])
        driver.prefill(seq)
        assert_close(driver.logits[0], expected[index])


@pytest.mark.parametrize("name", ["llama_mqa_biases", "llama_gqa_tied", *WINDOWS])
def test_mixed_batch_of_decodes_and_chunks(checkpoint, name):
    model, folder = checkpoint(name)
    driver = Driver(runner_for(folder, num_blocks=96))
    lengths = [1, 4, 5, 30, 70]
    texts = [random_tokens(length + 1, seed=length) for length in lengths]
    decodes = [driver.add(text[:-1]) for text in texts]
    for seq, text in zip(decodes, texts, strict=True):
        driver.prefill(seq)
        driver.forced(seq, text[-1])
    chunked, whole, partial = (driver.add(random_tokens(count, seed=count)) for count in (21, 9, 50))
    driver.step((chunked, 13))
    driver.step(*((seq, 1) for seq in decodes), (chunked, 8), (whole, 9), (partial, 20))
    expected = [reference_logits(model, text)[-1] for text in texts]
    expected += [
        reference_logits(model, seq.token_ids[:count])[-1] for seq, count in ((chunked, 21), (whole, 9))
    ]
    assert_close(driver.logits, torch.stack(expected))
    driver.prefill(partial)
    assert_close(driver.logits[0], reference_logits(model, partial.token_ids[:50])[-1])


def test_many_decodes_are_split_into_groups(checkpoint, monkeypatch):
    model, folder = checkpoint("llama_gqa_tied")
    monkeypatch.setattr("disagg.model.attention.GROUP_BYTES", 4096)
    driver = Driver(runner_for(folder, num_blocks=256))
    texts = [random_tokens(3 + 5 * i, seed=i) for i in range(12)]
    seqs = [driver.add(text[:-1]) for text in texts]
    for seq, text in zip(seqs, texts, strict=True):
        driver.prefill(seq)
        driver.forced(seq, text[-1])
    driver.step(*((seq, 1) for seq in seqs))
    assert_close(driver.logits, torch.stack([reference_logits(model, text)[-1] for text in texts]))


@pytest.mark.parametrize("name", ["llama_mha", "mistral_short_window", "qwen2", "qwen3"])
def test_greedy_tokens_are_the_reference_tokens(checkpoint, name):
    model, folder = checkpoint(name)
    prompts = [random_tokens(count, seed=count) for count in (1, 7, 16, 33)]
    driver = Driver(runner_for(folder))
    seqs = [driver.add(prompt) for prompt in prompts]
    driver.step(*((seq, len(prompt)) for seq, prompt in zip(seqs, prompts, strict=True)))
    for _ in range(15):
        driver.step(*((seq, 1) for seq in seqs))
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert seq.token_ids == reference_greedy(model, prompt, 16)


def reference_greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        logits = reference_logits(model, tokens)[-1]
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-3, "the reference itself is undecided; choose another seed"
        tokens.append(int(logits.argmax()))
    return tokens


def test_a_sequence_goes_on_from_blocks_copied_to_another_runner(checkpoint):
    """What a hand-off does: bytes of blocks into other block numbers of another worker's buffer."""
    _, folder = checkpoint("llama_gqa_tied")
    tokens = random_tokens(22, seed=5)
    alone = Driver(runner_for(folder))
    whole = alone.add(tokens)
    alone.generate(whole, 12)
    source, target = Driver(runner_for(folder), seed=1), Driver(runner_for(folder), seed=2)
    first = source.add(tokens)
    source.generate(first, 4)
    second = target.add(first.token_ids, prompt=22)
    second.num_computed_tokens = first.num_computed_tokens
    for block in first.block_table:
        second.block_table.append(target.free.pop())
        target.runner.kv_cache.blocks[second.block_table[-1]] = source.runner.kv_cache.blocks[block]
    target.generate(second, 8)
    assert second.token_ids == whole.token_ids


def test_prefix_blocks_shared_by_two_sequences(checkpoint):
    model, folder = checkpoint("qwen3")
    driver = Driver(runner_for(folder))
    shared = random_tokens(8, seed=3)
    one, two = driver.add(shared + random_tokens(5, seed=4)), driver.add(shared + random_tokens(6, seed=5))
    driver.prefill(one)
    two.block_table, two.num_computed_tokens = one.block_table[:2], 8
    driver.prefill(two)
    assert_close(driver.logits[0], reference_logits(model, two.token_ids[:14])[-1])


def test_nothing_is_written_outside_the_block_table(checkpoint):
    _, folder = checkpoint("qwen2")
    driver = Driver(runner_for(folder))
    seq = driver.add(random_tokens(10))
    driver.prefill(seq)
    written = driver.runner.kv_cache.blocks.flatten(1).abs().sum(1).nonzero()[:, 0].tolist()
    assert sorted(seq.block_table) == written


def test_an_empty_batch_is_no_work(checkpoint):
    assert runner_for(checkpoint("qwen2")[1]).execute(Batch(())) == []


def test_a_batch_without_samples(checkpoint):
    runner = runner_for(checkpoint("qwen2")[1])
    seq = Driver(runner).add(random_tokens(9))
    seq.block_table = [3, 1, 2]
    assert runner.execute(Batch((ScheduledSequence(seq, 4),))) == [None]


def test_sharded_checkpoint(tmp_path):
    model = make_model("llama_mqa_biases")
    folder = save(model, tmp_path, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    driver = Driver(runner_for(folder))
    seq = driver.add(random_tokens(12))
    driver.prefill(seq)
    assert_close(driver.logits[0], reference_logits(model, seq.token_ids[:12])[-1])


def test_bfloat16_checkpoint_computed_in_float32(tmp_path):
    folder = save(make_model("qwen2").to(torch.bfloat16), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    driver = Driver(runner_for(folder, dtype="float32"))
    assert driver.runner.spec.dtype == "bfloat16"
    seq = driver.add(random_tokens(12))
    driver.prefill(seq)
    assert_close(driver.logits[0], reference_logits(reference, seq.token_ids[:12])[-1])


def test_computing_in_bfloat16(checkpoint, tmp_path):
    model = make_model("llama_gqa_tied").to(torch.bfloat16)
    folder = save(model, tmp_path)
    driver = Driver(runner_for(folder, dtype="bfloat16", kernels="torch"))
    assert driver.runner.layout.dtype == "bfloat16"
    tokens = random_tokens(20)
    seq = driver.add(tokens)
    driver.step((seq, 11))
    driver.prefill(seq)
    exact = reference_logits(checkpoint("llama_gqa_tied")[0], tokens)[-1]
    theirs = (reference_logits(model, tokens)[-1] - exact).abs().max()
    assert (driver.logits[0] - exact).abs().max() < 2 * theirs + 1e-3


def test_rope_of_old_configs_is_read_the_same(checkpoint, tmp_path):
    model, folder = checkpoint("llama_llama3")
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    driver = Driver(runner_for(tmp_path / "old"))
    seq = driver.add(random_tokens(40))
    driver.prefill(seq)
    assert_close(driver.logits[0], reference_logits(model, seq.token_ids[:40])[-1])


def test_packed_layers_follow_the_reference(tmp_path):
    """Sizes from which oneDNN's packed weights are used, tied head and biases included."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 1031, "num_hidden_layers": 2}
    model = make_model("llama_gqa_tied", attention_bias=True, **sizes)
    folder = save(model, tmp_path)
    driver = Driver(runner_for(folder, kernels="torch"))
    layer = driver.runner.model.layers[0]
    assert layer.gate_up_proj.weight.numel() == 0, "expected a packed layer"
    tokens = random_tokens(9)
    theirs, exact = reference_logits(model, tokens), reference_logits(model.double(), tokens)
    seq = driver.add(tokens[:6])
    driver.prefill(seq)
    for index in range(6, 9):
        driver.forced(seq, tokens[index])
        driver.prefill(seq)
        # How much float32 loses in sums of a thousand differs from processor to processor.
        lost = (theirs[index] - exact[index]).abs().max()
        assert (driver.logits[0] - exact[index]).abs().max() < 4 * lost


def test_bundled_model():
    model = AutoModelForCausalLM.from_pretrained(Path(BUNDLED_MODEL), dtype=torch.float32)
    driver = Driver(runner_for(Path(BUNDLED_MODEL), block_size=16, num_blocks=128))
    vocab = driver.runner.spec.vocab_size
    prompts = [random_tokens(count, seed=count, vocab=vocab) for count in (1, 15, 16, 17, 200)]
    seqs = [driver.add(prompt) for prompt in prompts]
    driver.step(*((seq, len(prompt)) for seq, prompt in zip(seqs, prompts, strict=True)))
    for _ in range(11):
        driver.step(*((seq, 1) for seq in seqs))
    for seq, prompt in zip(seqs, prompts, strict=True):
        logits = reference_logits(model, seq.token_ids[:-1])[len(prompt) - 1 :]
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        agreed = logits.argmax(-1) == torch.tensor(seq.token_ids[len(prompt) :])
        assert bool((agreed | ~clear).all())
        assert int(clear.sum()) >= 6
