"""DeviceRunner: steps made before the tokens they go on from are known, and a cache that fits the device.

Triton's interpreter computes, and a repeated computation stands where a GPU replays a graph.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from model_support import Driver, make_model, random_tokens, reference_logits, runner_for, save

from disagg.config import EngineConfig
from disagg.engine.engine import Engine
from disagg.engine.overlap import OverlappedEngine, engine_for
from disagg.engine.runner import PLACEHOLDER, AsyncRunner, Batch, ScheduledSequence
from disagg.errors import ConfigError, DeviceLostError, RankLostError
from disagg.model import device_runner
from disagg.model.config import read_spec
from disagg.model.decode_graphs import rerun
from disagg.model.device_loading import affordable_blocks, fit, trial_step
from disagg.model.device_runner import DeviceRunner
from disagg.model.kv_cache import layout
from disagg.model.runner import ModelRunner, load_runner, runner_over
from disagg.model.transformer import Transformer
from disagg.types import Request, SamplingParams, StepOutput

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = make_model("llama_gqa_tied", **SMALL)
    return model, save(model, tmp_path_factory.mktemp("small"))


def with_graphs(folder, **options) -> DeviceRunner:
    runner = runner_for(folder, kernels="triton", **options)
    assert isinstance(runner, DeviceRunner) and isinstance(runner, AsyncRunner)
    runner.model.capture(runner.kv_cache, runner.max_model_len, rerun)
    return runner


def test_decode_steps_through_graph_buffers(small):
    """Batches that fill a graph up, grow and shrink: each row's logits are those of transformers."""
    model, folder = small
    driver = Driver(with_graphs(folder))
    texts = [random_tokens(count + 6, seed=count) for count in (3, 5, 9)]
    seqs = [driver.add(text[:-6]) for text in texts]
    driver.step(*((seq, seq.num_tokens) for seq in seqs))
    for rows in ([0, 1, 2], [0, 2], [2], [0, 1, 2]):
        for row in rows:
            driver.forced(seqs[row], texts[row][seqs[row].num_tokens - 1])
        driver.step(*((seqs[row], 1) for row in rows))
        expected = [reference_logits(model, seqs[row].token_ids[:-1])[-1] for row in rows]
        torch.testing.assert_close(driver.logits, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_rows_that_fill_a_graph_up_write_nothing(small):
    driver = Driver(with_graphs(small[1]))
    seqs = [driver.add(random_tokens(count)) for count in (5, 6, 7)]
    driver.step(*((seq, seq.num_tokens) for seq in seqs))
    driver.step(*((seq, 1) for seq in seqs))
    written = driver.runner.kv_cache.blocks.flatten(1).abs().sum(1).nonzero()[:, 0].tolist()
    assert written == sorted(block for seq in seqs for block in seq.block_table)


def test_a_step_goes_on_from_tokens_that_only_the_device_knows(small):
    folder = small[1]
    known = Driver(runner_for(folder, kernels="triton"))
    first, second = known.add(random_tokens(5)), known.add(random_tokens(7, seed=1))
    known.step((first, 5), (second, 7))
    known.step((second, 1), (first, 1))
    runner = with_graphs(folder)
    ahead = Driver(runner)
    one, two = ahead.add(random_tokens(5)), ahead.add(random_tokens(7, seed=1))
    for seq in (one, two):
        seq.block_table = [ahead.free.pop() for _ in range(3)]
    begun = runner.submit(Batch((ScheduledSequence(one, 5), ScheduledSequence(two, 7))))
    one.num_computed_tokens, two.num_computed_tokens = 5, 7
    one.token_ids.append(PLACEHOLDER)
    two.token_ids.append(PLACEHOLDER)
    # In the other order, so that a row must be looked up.
    later = runner.submit(Batch((ScheduledSequence(two, 1), ScheduledSequence(one, 1))))
    assert [token.token_id for token in begun.result()] == [first.token_ids[5], second.token_ids[7]]
    assert [token.token_id for token in later.result()] == [second.token_ids[8], first.token_ids[6]]


def requests() -> list[Request]:
    kinds = [
        {"temperature": 0.0, "max_tokens": 7},
        {"temperature": 1.0, "seed": 3, "max_tokens": 5},
        {"temperature": 0.8, "seed": 4, "top_k": 4, "max_tokens": 6, "repetition_penalty": 1.3},
        {"temperature": 0.0, "max_tokens": 4, "logprobs": 2, "frequency_penalty": 0.8},
        {
            "temperature": 1.2,
            "seed": 5,
            "top_p": 0.7,
            "max_tokens": 30,
            "stop_token_ids": tuple(range(3, 40)),
        },
    ]
    prompts = [random_tokens(count, seed=count) for count in (4, 9, 1, 6, 12)]
    return [
        Request(f"r{index}", tuple(prompt), len(prompt), SamplingParams(ignore_eos=True, **kind))
        for index, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


def run(runner: ModelRunner, make: Callable[..., Engine]) -> tuple[Engine, dict[str, list[StepOutput]]]:
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=10)
    engine = make(
        config,
        runner,
        num_blocks=runner.num_blocks,
        max_model_len=runner.max_model_len,
        hash_model=runner.fingerprint,
        eos_token_ids=runner.eos_token_ids,
    )
    for request in requests():
        engine.add(request, now=0.0)
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work():
        for output in engine.step(0.0):
            outputs.setdefault(output.request_id, []).append(output)
    engine.check_integrity()
    return engine, outputs


def test_an_overlapped_engine_gives_the_tokens_of_the_torch_decoder(small):
    """Chunked prompts, a batch that changes, penalties and filters, over both ways to compute."""
    folder = small[1]
    engine, ours = run(with_graphs(folder), engine_for)
    assert isinstance(engine, OverlappedEngine)
    plain, theirs = run(runner_for(folder, kernels="torch"), engine_for)
    assert type(plain) is Engine
    assert ours.keys() == theirs.keys() == {request.request_id for request in requests()}
    for name, outputs in theirs.items():
        own = ours[name]
        assert [output.token_ids for output in own] == [output.token_ids for output in outputs]
        assert own[-1].finish_reason == outputs[-1].finish_reason
        for mine, other in zip(own, outputs, strict=True):
            for left, right in zip(mine.logprobs, other.logprobs, strict=True):
                assert [pair[0] for pair in left.top] == [pair[0] for pair in right.top]
                assert left.logprob == pytest.approx(right.logprob, abs=1e-4)


@pytest.mark.slow
def test_ranks_go_on_from_tokens_that_only_rank_0_knows(small):
    """The token that rank 0's device drew reaches the others' without its host, or theirs, knowing it."""
    folder = small[1]
    _, theirs = run(runner_for(folder, kernels="torch"), engine_for)
    runner = runner_for(folder, kernels="triton", tensor_parallel_size=2)
    try:
        assert isinstance(runner, DeviceRunner)
        engine, ours = run(runner, engine_for)
        assert isinstance(engine, OverlappedEngine)
    finally:
        runner.close()
    for name, outputs in theirs.items():
        assert [output.token_ids for output in ours[name]] == [output.token_ids for output in outputs]


def test_a_rank_that_dies_while_a_step_is_on_its_way_ends_the_engine(small):
    """What a step gives after its collectives were given up is no token."""
    runner = runner_for(small[1], kernels="triton", tensor_parallel_size=2, rank_timeout_s=5.0)
    try:
        driver = Driver(runner)
        seq = driver.add(random_tokens(5))
        seq.block_table = [driver.free.pop() for _ in range(2)]
        step = runner.submit(Batch((ScheduledSequence(seq, 5),)))
        noticed = threading.Event()
        runner.ranks.on_lost(lambda _: noticed.set())
        os.kill(runner.ranks.pids[0], signal.SIGKILL)
        assert noticed.wait(20)
        with pytest.raises(RankLostError, match="rank 1 died"):
            step.result()
        engine = OverlappedEngine(
            EngineConfig(block_size=4),
            runner,
            num_blocks=runner.num_blocks,
            max_model_len=runner.max_model_len,
            hash_model="m",
            eos_token_ids=(),
        )
        engine.add(requests()[0], now=0.0)
        with pytest.raises(RankLostError, match="rank 1 died"):
            engine.step(0.0)
    finally:
        runner.close()


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["submitted", "collected"])
def test_a_device_that_is_lost_ends_the_engine_and_a_failed_step_does_not(small, monkeypatch, lost, late):
    runner = with_graphs(small[1])
    engine = OverlappedEngine(
        EngineConfig(block_size=4),
        runner,
        num_blocks=runner.num_blocks,
        max_model_len=runner.max_model_len,
        hash_model="m",
        eos_token_ids=(),
    )
    engine.add(requests()[0], now=0.0)

    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def check(_device: torch.device) -> None:
        if lost:
            fault()

    monkeypatch.setattr(device_runner, "check_device", check)
    owner = device_runner.PendingTokens if late else runner.model
    monkeypatch.setattr(owner, "result" if late else "forward", fault)
    if lost:
        with pytest.raises(DeviceLostError, match="cpu is lost: an illegal memory access"):
            while engine.has_work():
                engine.step(0.0)
        return
    outputs = []
    while engine.has_work():
        outputs += engine.step(0.0)
    assert [output.error for output in outputs] == ["RuntimeError: an illegal memory access was encountered"]


class FakeMemory:
    """A device of `size` bytes on which the largest step takes the first of `peaks`, and so on."""

    def __init__(self, size: int, peaks: list[int]) -> None:
        self.size = size
        self.peaks = peaks
        self.tokens: list[int] = []

    def free(self) -> int:
        return self.size

    def peak(self, action: Callable[[], object]) -> int:
        logits = action()
        assert isinstance(logits, torch.Tensor) and bool(torch.isfinite(logits).all())
        self.tokens.append(len(logits))
        return self.peaks.pop(0)


def on_device(folder, memory: FakeMemory, **options) -> ModelRunner:
    spec = read_spec(folder)
    with torch.inference_mode():
        model = Transformer(spec, dtype=torch.float32, device=torch.device("cpu"))
        model.load()
    config = EngineConfig(block_size=4, max_num_seqs=3, max_num_batched_tokens=8, kernels="triton", **options)
    cache_layout = layout(spec, model="m", dtype="float32", block_size=4)
    return runner_over(fit(model, config, cache_layout, memory=memory), capture=rerun)


def test_the_cache_takes_what_steps_leave(small):
    model, folder = small
    block_bytes = layout(read_spec(folder), model="m", dtype="float32", block_size=4).block_bytes
    memory = FakeMemory(100 * block_bytes, [10 * block_bytes, 5 * block_bytes])
    runner = on_device(folder, memory, kv_cache_memory=0.5)
    assert memory.tokens == [3, 3] and not memory.peaks
    assert runner.num_blocks == 50 - 15
    driver = Driver(runner)
    tokens = random_tokens(9)
    seq = driver.add(tokens)
    driver.prefill(seq)
    driver.prefill(seq)
    expected = reference_logits(model, seq.token_ids[:-1])[-1]
    torch.testing.assert_close(driver.logits[0], expected, atol=1e-4, rtol=1e-4)


def test_a_short_cache_shortens_the_longest_sequence(small):
    block_bytes = layout(read_spec(small[1]), model="m", dtype="float32", block_size=4).block_bytes
    runner = on_device(small[1], FakeMemory(10**9, [0, 0]), kv_cache_memory=6 * block_bytes)
    assert (runner.num_blocks, runner.max_model_len) == (6, 20)


def test_memory_that_is_not_there_is_refused():
    assert affordable_blocks(1000, 100, 2000, 900) == 10
    assert affordable_blocks(0.9, 100, 2000, 300) == 15
    for asked in (1200, 0.4, 100):
        with pytest.raises(ConfigError) as error:
            affordable_blocks(asked, 100, 2000, 900)
        assert error.value.param == "kv_cache_memory"


def test_the_trial_is_the_largest_step():
    step = trial_step(11, 3, 4)
    assert step.query_start.tolist() == [0, 4, 8, 11]
    assert step.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert step.sample_rows.tolist() == [3, 7, 10]
    assert step.block_ids(4).tolist() == [0] * 11
    assert trial_step(3, 3, 4).num_chunks == 3


def test_a_cpu_without_triton_computes_as_before(small):
    runner = load_runner(small[1], EngineConfig(num_kv_blocks=8, kernels="torch"))
    assert type(runner) is ModelRunner and not isinstance(runner, AsyncRunner)
