"""OverlappedEngine: the same tokens as Engine, with a step always on its way to the device.

The fake device computes a step as late as it can, when its result is asked for. So whatever was freed or
given away too early while the step was on its way is overwritten by it, and is noticed by whoever reads it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest
from engine_fakes import BLOCK_SIZE, EOS, FakeRunner, make_engine, make_request, reference
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from test_engine_properties import MAX_LEN, MAX_WAITING, ClusterMachine, Node

from disagg.config import EngineConfig
from disagg.engine.engine import Engine
from disagg.engine.overlap import OverlappedEngine, engine_for
from disagg.engine.runner import PLACEHOLDER, Batch, ScheduledSequence
from disagg.engine.sequence import Sequence
from disagg.types import FinishReason, SampledToken, StepOutput


class FakeStep:
    def __init__(self, runner: FakeAsyncRunner, batch: Batch, originals: list[Sequence]) -> None:
        self.runner = runner
        self.batch = batch
        self.originals = originals
        self.collected = False

    def result(self) -> list[SampledToken | None]:
        assert not self.collected and self.runner.steps.pop(0) is self, "steps end in their order"
        self.collected = True
        drawn, self.runner.drawn = self.runner.drawn, {}
        for original, item in zip(self.originals, self.batch.items, strict=True):
            if item.seq.token_ids[-1] == PLACEHOLDER:
                item.seq.token_ids[-1] = drawn[original]
        sampled = self.runner.execute(self.batch)
        self.runner.drawn = {
            seq: token.token_id for seq, token in zip(self.originals, sampled, strict=True) if token
        }
        return sampled


class FakeAsyncRunner(FakeRunner):
    """Takes what a step needs when it is submitted, and does nothing until its result is wanted."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        super().__init__(num_blocks, block_size)
        self.steps: list[FakeStep] = []
        self.drawn: dict[Sequence, int] = {}
        self.most_ahead = 0
        self.refuse_next = False

    def submit(self, batch: Batch) -> FakeStep:
        if self.refuse_next:
            self.refuse_next = False
            raise OSError("device lost")
        items = tuple(ScheduledSequence(copied(item.seq), item.num_tokens) for item in batch.items)
        for item in items:
            assert PLACEHOLDER not in item.seq.token_ids[:-1], "at most the last token is on its way"
        self.steps.append(FakeStep(self, Batch(items), [item.seq for item in batch.items]))
        self.most_ahead = max(self.most_ahead, len(self.steps))
        assert len(self.steps) <= 2
        return self.steps[-1]


def copied(seq: Sequence) -> Sequence:
    copy = Sequence(seq.request, now=0.0)
    copy.token_ids = list(seq.token_ids)
    copy.block_table = list(seq.block_table)
    copy.num_computed_tokens = seq.num_computed_tokens
    return copy


class CheckedOverlappedEngine(OverlappedEngine):
    def fail(self, batch: Batch, error: str) -> list[StepOutput]:
        if error.startswith(("AssertionError", "KeyError")):
            raise AssertionError(error)
        return super().fail(batch, error)


def overlapped(
    *,
    num_blocks: int = 64,
    budget: int = 16,
    max_num_seqs: int = 8,
    max_model_len: int = 64,
    waiting: int = 99,
) -> tuple[CheckedOverlappedEngine, FakeAsyncRunner]:
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_waiting=waiting,
    )
    runner = FakeAsyncRunner(num_blocks)
    engine = CheckedOverlappedEngine(
        config,
        runner,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        hash_model="fake",
        eos_token_ids=(EOS,),
    )
    return engine, runner


def drain(engine: Engine) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    for now in range(1000):
        if not engine.has_work():
            return outputs
        for output in engine.step(float(now)):
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    raise AssertionError("it did not end")


def tokens(outputs: SequenceOf[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_the_next_step_is_submitted_before_the_last_is_collected():
    engine, runner = overlapped()
    engine.add(make_request("a", max_tokens=5), now=0.0)
    assert engine.step(0.0) == [] and len(runner.steps) == 1, "submitted, not waited for"
    first = engine.step(1.0)
    assert [len(output.token_ids) for output in first] == [1]
    assert len(runner.steps) == 1 and runner.most_ahead == 2
    outputs = first + drain(engine)["a"]
    assert tokens(outputs) == reference(make_request("a", max_tokens=5), max_model_len=64)[0]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert [len(shape) for shape in runner.shapes] == [1] * 5, "nothing is computed past a known end"


def test_the_same_outputs_as_without_overlap():
    requests = [
        make_request(f"r{i}", prompt=range(1, 3 + i), max_tokens=3 + i % 5, ignore_eos=i % 2 == 0)
        for i in range(9)
    ]
    results = []
    for engine, _ in (overlapped(), make_engine()):
        for request in requests:
            engine.add(request, now=0.0)
        outputs = drain(engine)
        results.append({name: (tokens(got), got[-1].finish_reason) for name, got in outputs.items()})
        load = engine.load()
        assert (load.kv_blocks_used, load.num_running) == (0, 0)
    assert results[0] == results[1]


def test_an_end_that_nobody_foresaw_wastes_one_step():
    request = make_request("a", prompt=(1, 2), max_tokens=60, ignore_eos=False)
    expected, reason = reference(request, max_model_len=64)
    assert reason is FinishReason.STOP
    engine, runner = overlapped()
    engine.add(request, now=0.0)
    outputs = drain(engine)["a"]
    assert tokens(outputs) == expected
    assert len(runner.shapes) == len(expected) + 1


def test_a_held_request_is_not_run_further():
    engine, runner = overlapped()
    engine.add(make_request("a", prompt=range(1, 8)), now=0.0, hold=True)
    outputs = drain(engine)["a"]
    assert outputs[0].held and len(runner.shapes) == 1
    assert engine.num_computed_tokens("a") == 7 and len(engine.held_blocks("a")) == 2
    assert engine.release("a") and engine.load().kv_blocks_used == 0


def test_tokens_on_their_way_are_not_counted_as_computed():
    engine, _ = overlapped(budget=4)
    engine.add(make_request("a", prompt=range(1, 11)), now=0.0)
    engine.step(0.0)
    assert engine.num_computed_tokens("a") == 0
    engine.step(1.0)
    assert engine.num_computed_tokens("a") == 4 and engine.held_blocks("a") != []


def test_blocks_of_an_aborted_request_wait_for_its_step():
    engine, runner = overlapped(num_blocks=5)
    engine.add(make_request("a", prompt=range(1, 13), max_tokens=2), now=0.0)
    engine.step(0.0)
    assert engine.abort("a")
    assert engine.load().kv_blocks_used == 3, "the device may still write to them"
    engine.check_integrity()
    engine.add(make_request("b", prompt=range(2, 12), max_tokens=2), now=0.0)
    assert (
        tokens(drain(engine)["b"])
        == reference(make_request("b", prompt=range(2, 12), max_tokens=2), max_model_len=17)[0]
    )
    assert engine.load().kv_blocks_used == 0 and not runner.steps


def test_blocks_run_short_only_with_nothing_on_its_way():
    """Preemption takes blocks at once, so the step before is collected first."""
    engine, _ = overlapped(num_blocks=7, max_num_seqs=4)
    requests = [make_request(f"r{i}", prompt=(i + 1, 2, 3), max_tokens=14) for i in range(3)]
    for request in requests:
        engine.add(request, now=0.0)
    outputs = drain(engine)
    assert engine.counters.preemptions > 0
    for request in requests:
        assert tokens(outputs[request.request_id]) == reference(request, max_model_len=25)[0]


@pytest.mark.parametrize("where", ["submit", "result"])
def test_a_failed_step_costs_what_was_built_on_it_and_no_block(where):
    engine, runner = overlapped()
    engine.add(make_request("a"), now=0.0)
    engine.step(0.0)
    engine.add(make_request("b", prompt=(4, 5)), now=0.0)
    if where == "submit":
        runner.refuse_next = True
    else:
        runner.fail_next = True
    failed = engine.step(1.0)
    assert {output.request_id for output in failed} == {"a", "b"}
    assert all(output.error == "OSError: device lost" for output in failed)
    engine.add(make_request("c"), now=2.0)
    assert tokens(drain(engine)["c"]) == reference(make_request("c"), max_model_len=64)[0]
    assert engine.load().kv_blocks_used == 0


def test_only_a_runner_that_can_is_overlapped():
    arguments = dict(num_blocks=8, max_model_len=16, hash_model="fake", eos_token_ids=(EOS,))
    assert type(engine_for(EngineConfig(), FakeRunner(8), **arguments)) is Engine
    assert type(engine_for(EngineConfig(), FakeAsyncRunner(8), **arguments)) is OverlappedEngine


class OverlapNode(Node):
    def __init__(self, num_blocks: int, budget: int, max_num_seqs: int) -> None:
        super().__init__(num_blocks, budget, max_num_seqs)
        self.engine, self.runner = overlapped(
            num_blocks=num_blocks,
            budget=budget,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_LEN,
            waiting=MAX_WAITING,
        )

    def step(self, now: float) -> None:
        num_steps = len(self.runner.shapes)
        outputs = self.engine.step(now)
        for shape in self.runner.shapes[num_steps:]:
            assert sum(count for _, count in shape) <= self.budget
            assert len(shape) <= self.max_num_seqs
            assert len({name for name, _ in shape}) == len(shape)
        self.absorb(outputs, now)
        self.collect_reservations()


class OverlapMachine(ClusterMachine):
    @initialize(
        blocks=st.tuples(st.integers(5, 16), st.integers(5, 16)),
        budget=st.sampled_from([1, 3, 6, 9, 16, 24]),
        max_num_seqs=st.sampled_from([1, 3, 4, 6]),
    )
    def start(self, blocks: tuple[int, int], budget: int, max_num_seqs: int) -> None:
        self.nodes = [OverlapNode(num_blocks, budget, max_num_seqs) for num_blocks in blocks]

    @rule(node=st.integers(0, 1), data=st.data())
    def abort_during_a_step(self, node: int, data: st.DataObject) -> None:
        target = self.nodes[node]
        self.now += 1
        target.step(self.now)
        names = sorted(target.live)
        if names:
            self.abort_one(target, data.draw(st.sampled_from(names)))

    def teardown(self) -> None:
        """As without overlap, but a step may still be on its way when the last request has ended."""
        for node in getattr(self, "nodes", []):
            for _ in range(400):
                for name in list(node.pulls):
                    self.scribble(node.runner, node.pulls[name])
                    node.engine.activate(name, node.pulls.pop(name).num_cached_tokens, self.now)
                for name in node.held():
                    assert node.engine.release(name)
                    node.end(name, "released")
                if not node.engine.has_work():
                    break
                self.now += 1
                node.step(self.now)
                node.check()
            assert not node.live, "a request did not end"
            assert not node.runner.steps
            load = node.engine.load()
            assert (load.kv_blocks_used, load.num_running, load.num_waiting, load.num_held) == (0, 0, 0, 0)


TestOverlapMachine = OverlapMachine.TestCase
TestOverlapMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
