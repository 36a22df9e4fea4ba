"""Ranks as threads of this process, joined by Gloo: sharded models against whole ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import VOCAB, Driver, random_tokens, reference_logits, runner_for

from disagg.config import EngineConfig
from disagg.errors import ConfigError
from disagg.model import weights
from disagg.model.config import read_spec
from disagg.model.device_loading import Fitted, fit
from disagg.model.kv_cache import KVCache, layout
from disagg.model.parallel import RankGroup, join_store, serve_store
from disagg.model.rank_link import decode_step, encode_step
from disagg.model.shard import Shard, Span, check_size
from disagg.model.step import StepInput
from disagg.model.transformer import Transformer

BLOCK = 4
NUM_BLOCKS = 16
CPU = torch.device("cpu")


def whole_step(tokens: list[int], context: int, blocks: np.ndarray) -> StepInput:
    """Return a step of one sequence whose every row's logits are asked for."""
    count = len(tokens)
    return StepInput(
        token_ids=np.array(tokens),
        positions=np.arange(context, context + count),
        query_start=np.array([0, count], dtype=np.int32),
        block_tables=np.array(blocks),
        table_start=np.array([0, len(blocks)]),
        sample_rows=np.arange(count),
    )


class Ranks:
    """All ranks of one model, each on a thread, over one KV buffer (shared) or each over its own."""

    def __init__(self, folder: Path, size: int, *, shared: bool, dtype: str = "float32") -> None:
        self.spec = read_spec(folder)
        self.layout = layout(self.spec, model="m", dtype=dtype, block_size=BLOCK)
        self.buffer = np.zeros(NUM_BLOCKS * self.layout.block_bytes, np.uint8) if shared else None
        self._threads = ThreadPoolExecutor(size)
        self._stores = [serve_store(size, timeout_s=20)]
        port = self._stores[0].port
        self._stores += [join_store(port, size, timeout_s=20) for _ in range(1, size)]
        self.groups: list[RankGroup] = []
        self.models: list[Transformer] = []
        self.caches: list[KVCache] = []
        made = list(self._threads.map(self._make, range(size)))
        for group, model, cache in made:
            self.groups.append(group)
            self.models.append(model)
            self.caches.append(cache)

    def _make(self, rank: int) -> tuple[RankGroup, Transformer, KVCache]:
        shard = Shard(rank, len(self._stores))
        group = RankGroup(shard, self._stores[rank], device=CPU, timeout_s=20)
        cache = KVCache(self.layout, NUM_BLOCKS, buffer=self.buffer, heads=shard.kv_heads(self.spec))
        with torch.inference_mode():
            model = Transformer(self.spec, dtype=cache.dtype, device=CPU, group=group)
            model.load()
            model.pack()
        return group, model, cache

    def forward(self, step: StepInput) -> torch.Tensor:
        def compute(rank: int) -> torch.Tensor:
            with torch.inference_mode():
                return self.models[rank].forward(step, self.caches[rank])

        logits = list(self._threads.map(compute, range(len(self.models))))
        assert all(part.shape == (0, VOCAB) for part in logits[1:])
        return logits[0]

    def close(self) -> None:
        self._threads.shutdown()


CASES = [
    # 4 key heads, also tied; 2 with biases and normalised heads; 1 for all.
    ("llama_mha", 2),
    ("llama_mha", 4),
    ("llama_gqa_tied", 2),
    ("llama_gqa_tied", 4),
    ("llama_mqa_biases", 2),
    ("llama_mqa_biases", 4),
    ("qwen3_biases_window", 4),
    ("qwen2", 2),
]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_shards_compute_what_the_whole_model_does(name, size, shared, checkpoint):
    reference, folder = checkpoint(name)
    ranks = Ranks(folder, size, shared=shared)
    tokens = random_tokens(30)
    expected = reference_logits(reference, tokens)
    blocks = np.random.default_rng(0).permutation(np.arange(1, NUM_BLOCKS))[:8]
    # A prompt in two chunks, then token by token.
    for start, end in [(0, 13), (13, 22), *((i, i + 1) for i in range(22, 30))]:
        logits = ranks.forward(whole_step(tokens[start:end], start, blocks))
        torch.testing.assert_close(logits, expected[start:end], atol=1e-4, rtol=1e-4)
    ranks.close()


@pytest.mark.parametrize(("name", "size"), [("llama_mha", 2), ("llama_gqa_tied", 4), ("llama_mqa_biases", 2)])
def test_kv_lies_where_it_would_without_parallelism(name, size, checkpoint):
    _, folder = checkpoint(name)
    tokens, blocks = random_tokens(19), np.arange(1, 6)
    step = whole_step(tokens, 0, blocks)
    runner = runner_for(folder, num_blocks=NUM_BLOCKS, block_size=BLOCK, kernels="torch")
    with torch.inference_mode():
        runner.model.forward(step, runner.kv_cache)
    shared = Ranks(folder, size, shared=True)
    shared.forward(step)
    whole = KVCache(shared.layout, NUM_BLOCKS, buffer=shared.buffer).blocks
    torch.testing.assert_close(whole, runner.kv_cache.blocks, atol=1e-4, rtol=1e-4)
    # Each rank's own memory holds its heads of that, bit by bit.
    own = Ranks(folder, size, shared=False)
    own.forward(step)
    for rank, cache in enumerate(own.caches):
        heads = Shard(rank, size).kv_heads(own.spec)
        assert torch.equal(cache.blocks, whole[:, :, :, heads.start : heads.end])
    shared.close()
    own.close()


def test_a_step_without_samples_still_writes_all_kv(checkpoint):
    _, folder = checkpoint("llama_mha")
    ranks = Ranks(folder, 2, shared=True)
    step = whole_step(random_tokens(9), 0, np.arange(1, 4))
    silent = StepInput(
        step.token_ids,
        step.positions,
        step.query_start,
        step.block_tables,
        step.table_start,
        step.sample_rows[:0],
    )
    assert ranks.forward(silent).shape == (0, VOCAB)
    written = np.array(ranks.buffer)
    ranks.forward(step)
    assert np.array_equal(written, ranks.buffer)
    ranks.close()


def test_bfloat16(checkpoint):
    _, folder = checkpoint("llama_mha")
    step = whole_step(random_tokens(9), 0, np.arange(1, 4))
    one = runner_for(folder, num_blocks=NUM_BLOCKS, kernels="torch", dtype="bfloat16")
    with torch.inference_mode():
        expected = one.model.forward(step, one.kv_cache)
    ranks = Ranks(folder, 2, shared=True, dtype="bfloat16")
    torch.testing.assert_close(ranks.forward(step), expected, atol=0.1, rtol=0.1)
    ranks.close()


def test_a_rank_reads_no_more_than_its_part(checkpoint, monkeypatch):
    """Whole tensors are read only where all ranks need them: norms, and here biases."""
    _, folder = checkpoint("llama_mqa_biases")
    read: dict[str, int] = {}

    def counted(tensors, name, cut):
        part = original(tensors, name, cut)
        read[name] = read.get(name, 0) + part.numel()
        return part

    original = weights._read
    monkeypatch.setattr(weights, "_read", counted)
    ranks = Ranks(folder, 4, shared=False)
    sizes = {name: int(np.prod(entry.shape)) for name, entry in weights.read_headers(folder).items()}
    for name, size in sizes.items():
        replicated = "norm" in name or ".k_proj" in name or ".v_proj" in name
        assert read[name] == (4 * size if replicated else size), name
    ranks.close()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "features", "size", "problem"),
    [
        (4, 2, 64, 3, "4 attention heads"),
        (12, 4, 64, 6, "4 key heads"),
        (6, 3, 64, 2, "3 key heads"),
        (4, 2, 66, 4, "66 MLP features"),
    ],
)
def test_what_does_not_divide_is_refused(heads, kv_heads, features, size, problem, checkpoint):
    spec = replace(
        read_spec(checkpoint("llama_mha")[1]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=features,
    )
    with pytest.raises(ConfigError, match=problem) as error:
        check_size(spec, size)
    assert error.value.param == "tensor_parallel_size"
    check_size(spec, 1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shards_cover_everything_once(size, checkpoint):
    base = read_spec(checkpoint("llama_mha")[1])
    spec = replace(base, num_heads=16, num_kv_heads=4, intermediate_size=64, vocab_size=5)
    shards = [Shard(rank, size) for rank in range(size)]
    for spans in (
        [shard.heads(spec) for shard in shards],
        [shard.features(spec) for shard in shards],
        [shard.vocabulary(spec) for shard in shards],
    ):
        covered = [index for span in spans for index in range(span.start, span.end)]
        assert covered == list(range(spans[0].total))
    group = spec.num_queries_per_kv
    for shard in shards:
        heads, kv = shard.heads(spec), shard.kv_heads(spec)
        assert {head // group for head in range(heads.start, heads.end)} == set(range(kv.start, kv.end))
    assert Span(1, 2, 4).times(8) == Span(8, 16, 32)


def test_steps_travel_unchanged(checkpoint):
    runner = runner_for(checkpoint("llama_mha")[1], num_blocks=NUM_BLOCKS)
    seen: list[StepInput] = []
    forward = runner.model.forward
    runner.model.forward = lambda step, cache: seen.append(step) or forward(step, cache)
    driver = Driver(runner)
    seqs = [driver.add(random_tokens(count, seed=count)) for count in (3, 9, 1)]
    driver.step((seqs[0], 3), (seqs[1], 5), (seqs[2], 1))
    driver.step((seqs[1], 4))
    for step in seen:
        again = decode_step(encode_step(step))
        for name in StepInput.__slots__:
            one, other = getattr(step, name), getattr(again, name)
            assert one.dtype == other.dtype and np.array_equal(one, other), name
    with pytest.raises(ValueError, match="says that it has"):
        decode_step(encode_step(seen[0])[:-8])


class RoomFor:
    """A device with room for so many blocks beside what steps need."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._free = blocks * block_bytes + 1

    def free(self) -> int:
        return self._free

    def peak(self, action: Callable[[], object]) -> int:
        action()
        return 0


@pytest.mark.parametrize("rooms", [(9, 7), (6, 1), (1, 6)])
def test_all_ranks_have_as_many_blocks_as_the_one_with_the_least_room(rooms, checkpoint):
    """A rank that can hold no cache takes the others with it: they don't wait for it."""
    ranks = Ranks(checkpoint("llama_mha")[1], 2, shared=False)
    config = EngineConfig(block_size=BLOCK, max_num_batched_tokens=8, max_num_seqs=2, kv_cache_memory=1.0)

    def fitted(rank: int) -> object:
        # Half of the heads are here.
        memory = RoomFor(rooms[rank], ranks.layout.block_bytes // 2)
        try:
            return fit(ranks.models[rank], config, ranks.layout, memory=memory)
        except ConfigError as error:
            return error

    made = list(ranks._threads.map(fitted, range(2)))
    ranks.close()
    if min(rooms) < 2:
        assert all(isinstance(error, ConfigError) and error.param == "kv_cache_memory" for error in made)
        return
    for rank, one in enumerate(made):
        assert isinstance(one, Fitted)
        assert one.kv_cache.num_blocks == min(rooms)
        assert one.kv_cache.num_kv_heads == ranks.models[rank].spec.num_kv_heads
        assert one.max_model_len == (min(rooms) - 1) * BLOCK


def test_a_broadcast_brings_everyone_rank_0s(checkpoint):
    ranks = Ranks(checkpoint("llama_mha")[1], 2, shared=False)
    values = [torch.tensor([4, 5]), torch.tensor([0, 0])]
    list(ranks._threads.map(lambda rank: ranks.groups[rank].broadcast(values[rank]), range(2)))
    assert values[1].tolist() == values[0].tolist() == [4, 5]
    ranks.close()
