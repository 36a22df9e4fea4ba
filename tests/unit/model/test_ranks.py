"""A worker's ranks as processes: they compute together, and none is left behind however it ends."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import Driver, random_tokens, runner_for

from disagg.config import EngineConfig
from disagg.engine.engine import Engine
from disagg.errors import ConfigError, RankLostError
from disagg.model.config import read_spec
from disagg.model.rank_link import RankSetup
from disagg.model.ranks import RankProcesses
from disagg.model.runner import ModelRunner, plan_cache
from disagg.types import FinishReason, Request, SamplingParams

PROMPTS = [random_tokens(count, seed=count) for count in (1, 5, 23, 40)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pids: list[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def engine_for(runner: ModelRunner) -> Engine:
    config = EngineConfig(block_size=4, max_num_batched_tokens=16)
    return Engine(
        config,
        runner,
        num_blocks=runner.num_blocks,
        max_model_len=runner.max_model_len,
        hash_model=runner.fingerprint,
        eos_token_ids=(),
    )


def generate(runner: ModelRunner, params: SamplingParams, *, abort: str = "") -> dict[str, list[int]]:
    """Run all prompts at once in chunks of 16 tokens; abort one of them after its first output."""
    engine = engine_for(runner)
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(PROMPTS):
        tokens[str(index)] = []
        engine.add(Request(str(index), prompt, len(prompt), params), now=0.0)
    while engine.has_work():
        for output in engine.step(0.0):
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            tokens[output.request_id].extend(output.token_ids)
            if output.request_id == abort:
                engine.abort(abort)
    engine.check_integrity()
    assert engine.load().kv_blocks_used == 0
    return tokens


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama_gqa_tied", 2),
        pytest.param("llama_mha", 2, marks=pytest.mark.slow),
        pytest.param("llama_gqa_tied", 4, marks=pytest.mark.slow),
    ],
)
def test_tokens_do_not_depend_on_the_number_of_ranks(name, size, checkpoint):
    _, folder = checkpoint(name)
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    seeded = SamplingParams(
        temperature=1.5, top_p=0.9, presence_penalty=0.5, seed=7, logprobs=2, max_tokens=12
    )
    alone = runner_for(folder, kernels="torch")
    expected = [generate(alone, params) for params in (greedy, seeded)]
    assert expected[0] != expected[1]
    runner = runner_for(folder, tensor_parallel_size=size)
    try:
        assert len(runner.ranks.pids) == size - 1
        assert [generate(runner, params) for params in (greedy, seeded)] == expected
        aborted = generate(runner, greedy, abort="1")
        assert len(aborted["1"]) == 1
        assert all(aborted[name] == expected[0][name] for name in ("0", "2", "3"))
    finally:
        runner.close()
    assert not any(alive(pid) for pid in runner.ranks.pids)
    runner.close()  # again does nothing


def test_ranks_share_a_mapped_cache(checkpoint):
    _, folder = checkpoint("llama_mha")
    config = EngineConfig(block_size=4, num_kv_blocks=16)
    planned, num_blocks = plan_cache(read_spec(folder), config)
    size = num_blocks * planned.block_bytes
    fd = os.memfd_create("kv", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE + size)
    memory = np.frombuffer(mmap.mmap(fd, 0), np.uint8, offset=mmap.PAGESIZE)
    runner = runner_for(
        folder,
        num_blocks=num_blocks,
        tensor_parallel_size=2,
        buffer=memory.data,
        buffer_file=(fd, mmap.PAGESIZE),
    )
    os.close(fd)
    alone = runner_for(folder, num_blocks=num_blocks, kernels="torch")
    drivers = [Driver(one) for one in (runner, alone)]
    for driver in drivers:
        driver.prefill(driver.add(random_tokens(21)))
    runner.close()
    shape = alone.kv_cache.blocks.shape
    there = torch.frombuffer(memory.data, dtype=torch.float32).view(shape)
    # All heads, those of the other rank included.
    torch.testing.assert_close(there, alone.kv_cache.blocks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "source_size", "target_size"),
    [
        ("llama_mha", 2, 1),
        pytest.param("llama_mha", 1, 2, marks=pytest.mark.slow),
        # More ranks than key heads.
        pytest.param("llama_gqa_tied", 4, 2, marks=pytest.mark.slow),
        pytest.param("llama_gqa_tied", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_all_ranks_pass_through_rows_of_whole_blocks(name, source_size, target_size, checkpoint):
    """What one degree of parallelism copied out another copies in, and has the same logits from there."""
    folder = checkpoint(name)[1]
    runners = [
        runner_for(folder, kernels="torch", tensor_parallel_size=size) for size in (source_size, target_size)
    ]
    block_bytes = runners[0].layout.block_bytes
    fd = os.memfd_create("rows", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE + 8 * block_bytes)
    memory = np.frombuffer(mmap.mmap(fd, 0), np.uint8, offset=mmap.PAGESIZE).reshape(8, block_bytes)
    try:
        outgoing, _ = runners[0].block_movers((fd, mmap.PAGESIZE), memory.shape)
        _, incoming = runners[1].block_movers((fd, mmap.PAGESIZE), memory.shape)
        source, target = (Driver(runner, seed) for seed, runner in enumerate(runners))
        first = source.add(random_tokens(21))
        source.prefill(first)
        rows = [5, 1, 2, 7, 0, 6]
        outgoing.to_host(first.block_table, memory, rows)
        second = target.add(first.token_ids)
        second.block_table = [target.free.pop() for _ in rows]
        incoming.to_device(memory, rows, second.block_table)
        second.num_computed_tokens = 21
        source.step((first, 1))
        target.step((second, 1))
        torch.testing.assert_close(target.logits, source.logits, atol=1e-4, rtol=1e-4)
        assert not memory[[3, 4]].any()
        # A copy that fails is told of, and the next one works.
        mover = outgoing if source_size > 1 else incoming
        with pytest.raises((RuntimeError, IndexError)):
            mover.to_host([10**6], memory, [0])
        mover.to_host([1], memory, [3])
    finally:
        os.close(fd)
        for runner in runners:
            runner.close()


def test_a_rank_that_dies_while_blocks_move_is_told_of(checkpoint):
    runner = runner_for(checkpoint("llama_mha")[1], tensor_parallel_size=2)
    block_bytes = runner.layout.block_bytes
    fd = os.memfd_create("rows", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8 * block_bytes)
    memory = np.frombuffer(mmap.mmap(fd, 0), np.uint8).reshape(8, block_bytes)
    mover, _ = runner.block_movers((fd, 0), memory.shape)
    os.close(fd)
    os.kill(runner.ranks.pids[0], signal.SIGKILL)
    with pytest.raises(RankLostError, match=r"rank 1 died|copies no blocks"):
        mover.to_host([1], memory, [3])
    runner.close()


@pytest.fixture
def pair(checkpoint):
    runner = runner_for(checkpoint("llama_mha")[1], tensor_parallel_size=2, rank_timeout_s=1.0)
    yield runner
    runner.close()
    assert not any(alive(pid) for pid in runner.ranks.pids)


def test_an_idle_rank_that_dies_is_noticed_and_no_step_runs_on(pair):
    lost: list[RankLostError] = []
    noticed = threading.Event()
    pair.ranks.on_lost(lambda error: (lost.append(error), noticed.set()))
    os.kill(pair.ranks.pids[0], signal.SIGKILL)
    assert noticed.wait(20)
    assert "rank 1 died" in lost[0].message
    with pytest.raises(RankLostError, match="rank 1 died"):
        Driver(pair).prefill(Driver(pair).add(PROMPTS[1]))
    late: list[RankLostError] = []
    pair.ranks.on_lost(late.append)
    assert len(late) == 1 and len(lost) == 1


def test_a_rank_that_hangs_ends_the_engine_in_time(pair):
    driver = Driver(pair)
    seq = driver.add(PROMPTS[2])
    driver.prefill(seq)
    os.kill(pair.ranks.pids[0], signal.SIGSTOP)
    engine = engine_for(pair)
    engine.add(Request("r", PROMPTS[3], len(PROMPTS[3]), SamplingParams(temperature=0.0)), now=0.0)
    with pytest.raises(RankLostError, match="Timed out"):
        engine.step(0.0)
    wait_gone(pair.ranks.pids)


def test_a_rank_that_dies_within_a_step_ends_the_engine(pair):
    engine = engine_for(pair)
    params = SamplingParams(temperature=0.0, max_tokens=100)
    for index in range(8):
        engine.add(Request(str(index), PROMPTS[1], len(PROMPTS[1]), params), now=0.0)
    engine.step(0.0)
    killer = threading.Timer(0.05, os.kill, (pair.ranks.pids[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(RankLostError, match="rank 1 died"):
        while True:
            engine.step(0.0)
    killer.join()


def test_no_rank_outlives_a_killed_worker(checkpoint):
    program = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from disagg.config import EngineConfig\n"
        "from disagg.model.runner import load_runner\n"
        "config = EngineConfig(num_kv_blocks=16)\n"
        "runner = load_runner(Path(sys.argv[1]), config, num_threads=1, tensor_parallel_size=2)\n"
        "print(*runner.ranks.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    folder = str(checkpoint("llama_mha")[1])
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1 and all(alive(pid) for pid in pids)
        process.kill()
    wait_gone(pids)


def test_what_a_rank_can_not_load_is_told(tmp_path):
    setup = RankSetup(
        rank=0,
        size=2,
        port=0,
        timeout_s=5.0,
        folder=str(tmp_path),
        model="m",
        dtype="float32",
        engine=EngineConfig(),
        num_blocks=8,
        max_model_len=8,
        num_threads=1,
        device="cpu",
    )
    ranks = RankProcesses(setup)
    with pytest.raises(ConfigError, match=r"can't read .*config.json") as error:
        ranks.join(torch.device("cpu"))
    assert error.value.param == "model"
    ranks.close()
    assert not any(alive(pid) for pid in ranks.pids)


def test_what_several_ranks_can_not_do_is_refused_before_any_starts(checkpoint, monkeypatch):
    _, folder = checkpoint("llama_mha")

    def refused(*_args: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("disagg.model.ranks.RankProcesses._start", refused)
    for size, options, param in (
        (3, {}, "tensor_parallel_size"),
        (2, {"quantization": "int8"}, "quantization"),
        (2, {"kernels": "native"}, "kernels"),
    ):
        with pytest.raises(ConfigError) as error:
            runner_for(folder, tensor_parallel_size=size, **options)
        assert error.value.param == param
