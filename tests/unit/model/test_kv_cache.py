from __future__ import annotations

import numpy as np
import pytest
import torch
from model_support import Driver, random_tokens, runner_for

from disagg.config import EngineConfig
from disagg.errors import ConfigError, InvalidRequestError
from disagg.model import kv_cache
from disagg.model.config import read_spec
from disagg.model.kv_cache import KVCache, num_blocks_for
from disagg.model.runner import load_runner, plan_cache, resolve_dtype
from disagg.model.weights import fingerprint
from disagg.types import KVLayout, Request, SamplingParams

LAYOUT = KVLayout("m", "float32", block_size=3, num_layers=2, num_kv_heads=2, head_dim=4)


def test_a_block_is_one_contiguous_run_of_bytes():
    buffer = np.zeros(5 * LAYOUT.block_bytes, dtype=np.uint8)
    cache = KVCache(LAYOUT, 5, buffer=buffer)
    cache.blocks[3].fill_(1.0)
    ones = buffer.view(np.float32).reshape(5, -1)
    assert ones[3].all()
    assert not ones[[0, 1, 2, 4]].any()


def test_write_puts_heads_before_tokens():
    cache = KVCache(LAYOUT, 5)
    kv = torch.randn(2, 2, 2, 4)
    cache.write(1, kv, torch.tensor([4, 0]), torch.tensor([2, 0]))
    assert torch.equal(cache.blocks[4, 1, :, :, 2], kv[0])
    assert torch.equal(cache.blocks[0, 1, :, :, 0], kv[1])
    assert int((cache.blocks != 0).sum()) == kv.numel()


def test_rows_count_from_the_layer():
    cache = KVCache(LAYOUT, 5)
    cache.blocks.copy_(torch.randn_like(cache.blocks))
    for block, layer, c, head in ((0, 0, 0, 0), (4, 1, 1, 1), (2, 0, 1, 0)):
        row = block * cache.rows_per_block + c * 2 + head
        assert torch.equal(cache.rows(layer)[row], cache.blocks[block, layer, c, head].flatten())


def test_buffers_of_another_size_or_read_only_are_refused():
    with pytest.raises(ConfigError, match="needs"):
        KVCache(LAYOUT, 5, buffer=memoryview(bytearray(4 * LAYOUT.block_bytes)))
    with pytest.raises(ConfigError, match="read-only"):
        KVCache(LAYOUT, 5, buffer=memoryview(bytes(5 * LAYOUT.block_bytes)))


def test_number_of_blocks(monkeypatch):
    assert num_blocks_for(EngineConfig(kv_cache_memory=10_500), 1000) == 10
    assert num_blocks_for(EngineConfig(kv_cache_memory=10_500, num_kv_blocks=3), 1000) == 3
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 100_000)
    assert num_blocks_for(EngineConfig(kv_cache_memory=0.25), 1000) == 25
    with pytest.raises(ConfigError) as caught:
        num_blocks_for(EngineConfig(kv_cache_memory=1999), 1000)
    assert caught.value.param == "kv_cache_memory"


def test_available_memory_heeds_the_container(monkeypatch):
    machine = kv_cache.available_memory()
    assert machine > 1 << 20
    limits = {"/sys/fs/cgroup/memory.max": 5000, "/sys/fs/cgroup/memory.current": 2000}
    monkeypatch.setattr(kv_cache, "_number", limits.get)
    assert kv_cache.available_memory() == 3000
    monkeypatch.setattr(kv_cache, "_number", lambda _: None)
    assert kv_cache.available_memory() > 1 << 20


def test_the_plan_comes_before_the_memory(checkpoint):
    """Layout and size first, then a buffer made by somebody else, then the runner over it."""
    _, folder = checkpoint("qwen3")
    config = EngineConfig(block_size=4, kv_cache_memory=500_000)
    layout, num_blocks = plan_cache(read_spec(folder), config)
    assert layout == KVLayout(fingerprint(folder), "float32", 4, 3, 2, 16)
    assert num_blocks == 500_000 // layout.block_bytes
    buffer = bytearray(num_blocks * layout.block_bytes)
    runner = load_runner(folder, config, buffer=memoryview(buffer), num_blocks=num_blocks)
    assert (runner.layout, runner.num_blocks, runner.fingerprint) == (layout, num_blocks, layout.model)
    assert runner.eos_token_ids == (2,)
    over, own = Driver(runner), Driver(runner_for(folder))
    tokens = random_tokens(13)
    ours, theirs = over.add(tokens), own.add(tokens)
    over.generate(ours, 5)
    own.generate(theirs, 5)
    assert ours.token_ids == theirs.token_ids
    used = np.frombuffer(buffer, dtype=np.uint8).reshape(num_blocks, -1).any(axis=1)
    assert np.flatnonzero(used).tolist() == sorted(ours.block_table)


def test_max_model_len_is_bounded_by_the_cache(checkpoint):
    folder = checkpoint("qwen2")[1]
    assert runner_for(folder).max_model_len == 128
    assert runner_for(folder, num_blocks=10).max_model_len == 36
    assert runner_for(folder, num_blocks=10, max_model_len=33).max_model_len == 33
    for num_blocks, length in ((10, 37), (64, 129)):
        with pytest.raises(ConfigError) as caught:
            runner_for(folder, num_blocks=num_blocks, max_model_len=length)
        assert caught.value.param == "max_model_len"


def test_dtypes(checkpoint):
    spec = read_spec(checkpoint("qwen2")[1])
    assert resolve_dtype("auto", spec) == "float32"
    assert resolve_dtype("bfloat16", spec) == "bfloat16"
    with pytest.raises(ConfigError) as caught:
        resolve_dtype("int8", spec)
    assert caught.value.param == "dtype"


@pytest.mark.parametrize(
    ("tokens", "params", "param"),
    [
        ([1, 97], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"logit_bias": {97: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": (200,)}, "stop_token_ids"),
        ([1], {"seed": None}, "seed"),
    ],
)
def test_requests_beyond_the_vocabulary(checkpoint, tokens, params, param):
    runner = runner_for(checkpoint("qwen2")[1])
    runner.check_request(Request("r", [1, 96], 2, SamplingParams(seed=1)))
    with pytest.raises(InvalidRequestError) as caught:
        runner.check_request(Request("r", tokens, len(tokens), SamplingParams(**{"seed": 1, **params})))
    assert caught.value.param == param
