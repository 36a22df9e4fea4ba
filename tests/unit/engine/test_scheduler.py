"""What is scheduled, in which order and how much of it, seen by the runner."""

from __future__ import annotations

from engine_fakes import (
    last_of,
    make_engine,
    make_request,
    prompt_of,
    reference,
    run_until_idle,
    tokens_of,
)

from disagg.config import EngineConfig
from disagg.engine.block_pool import BlockPool
from disagg.engine.scheduler import Scheduler
from disagg.engine.sequence import Sequence
from disagg.engine.waiting_queue import WaitingQueue
from disagg.types import FinishReason


def test_a_long_prompt_is_cut_to_the_budget():
    engine, runner = make_engine(budget=16)
    engine.add(make_request("a", prompt_of(40), max_tokens=2), now=0.0)
    run_until_idle(engine)
    assert runner.shapes == [[("a", 16)], [("a", 16)], [("a", 8)], [("a", 1)]]


def test_decodes_come_first_and_prompts_fill_the_rest():
    engine, runner = make_engine(budget=10)
    engine.add(make_request("a", prompt_of(4, 1), max_tokens=9), now=0.0)
    engine.step(0.0)
    engine.add(make_request("b", prompt_of(12, 2), max_tokens=5), now=0.0)
    engine.add(make_request("c", prompt_of(9, 3), max_tokens=5), now=0.0)
    for _ in range(3):
        engine.step(0.0)
    assert runner.shapes[1:] == [
        # A quarter to the one that is due first, the rest to the shortest.
        [("a", 1), ("b", 2), ("c", 7)],
        [("a", 1), ("b", 7), ("c", 2)],
        [("a", 1), ("c", 1), ("b", 3)],
    ]


def test_prompts_share_a_step_in_order_of_arrival():
    engine, runner = make_engine(budget=20)
    for name in "abcd":
        engine.add(make_request(name, prompt_of(8, ord(name))), now=0.0)
    engine.step(0.0)
    assert runner.shapes == [[("a", 8), ("b", 8), ("c", 4)]]


def test_priority_goes_before_arrival_also_among_half_computed_prompts():
    engine, runner = make_engine(budget=8)
    engine.add(make_request("late", prompt_of(20, 1), priority=5), now=0.0)
    engine.step(0.0)
    engine.add(make_request("b", prompt_of(6, 2), priority=1), now=0.0)
    engine.add(make_request("a", prompt_of(6, 3), priority=0), now=0.0)
    engine.add(make_request("a2", prompt_of(6, 4), priority=0), now=0.0)
    engine.step(0.0)
    assert runner.shapes[1] == [("a", 6), ("a2", 2)]
    engine.step(0.0)
    assert runner.shapes[2] == [("a", 1), ("a2", 4), ("b", 3)]
    engine.step(0.0)
    assert runner.shapes[3] == [("a", 1), ("a2", 1), ("b", 3), ("late", 3)]


def test_a_newcomer_of_better_priority_gets_the_budget_once_admitted():
    engine, runner = make_engine(budget=8)
    engine.add(make_request("low", prompt_of(4, 1), priority=5, max_tokens=9), now=0.0)
    engine.step(0.0)
    engine.add(make_request("mid", prompt_of(30, 2), priority=3), now=0.0)
    engine.step(0.0)
    assert runner.shapes[1] == [("low", 1), ("mid", 7)]
    engine.abort("low")
    # Remote requests are admitted without budget, so they can get ahead of a running prompt.
    engine.add(make_request("high", prompt_of(9, 3), priority=0), now=0.0, remote_kv=4)
    engine.step(0.0)
    assert runner.shapes[2] == [("mid", 8)]
    engine.activate("high", 0, 0.0)
    engine.step(0.0)
    assert runner.shapes[3] == [("high", 8)]


def test_no_more_than_max_num_seqs_run():
    engine, runner = make_engine(max_num_seqs=2, budget=100)
    for name in "abc":
        engine.add(make_request(name, prompt_of(3, ord(name)), max_tokens=3), now=0.0)
    run_until_idle(engine)
    assert [name for name, _ in runner.shapes[0]] == ["a", "b"]
    assert max(len(shape) for shape in runner.shapes) == 2
    assert [name for name, _ in runner.shapes[-1]] == ["c"]


def test_with_fewer_tokens_than_seqs_every_running_sequence_gets_one_each_step():
    engine, runner = make_engine(max_num_seqs=8, budget=3)
    for number in range(6):
        engine.add(make_request(f"r{number}", [1 + number], max_tokens=4), now=0.0)
    outputs = run_until_idle(engine)
    assert all(sum(count for _, count in shape) <= 3 for shape in runner.shapes)
    # The first three finish together before the others start.
    assert [{name for name, _ in shape} for shape in runner.shapes] == [
        *[{"r0", "r1", "r2"}] * 4,
        *[{"r3", "r4", "r5"}] * 4,
    ]
    assert all(last_of(outputs, f"r{number}").finish_reason for number in range(6))


def test_the_head_of_the_line_is_not_overtaken():
    engine, runner = make_engine(num_blocks=9, budget=64)
    engine.add(make_request("a", prompt_of(16, 1), max_tokens=3), now=0.0)
    engine.step(0.0)
    engine.add(make_request("large", prompt_of(20, 2), max_tokens=2), now=0.0)
    engine.add(make_request("small", prompt_of(4, 3), max_tokens=2), now=0.0)
    engine.step(0.0)
    assert runner.shapes[-1] == [("a", 1)]
    outputs = run_until_idle(engine)
    assert runner.shapes[2] == [("a", 1)]
    assert runner.shapes[3] == [("large", 20), ("small", 4)]
    assert last_of(outputs, "small").finish_reason is FinishReason.LENGTH


def test_the_sequence_served_last_is_preempted_and_finishes_with_the_same_tokens():
    engine, runner = make_engine(num_blocks=8, budget=64)
    first = make_request("first", prompt_of(8, 1), max_tokens=17)
    second = make_request("second", prompt_of(8, 2), max_tokens=9)
    engine.add(first, now=0.0)
    engine.add(second, now=0.0)
    outputs = run_until_idle(engine)
    assert engine.counters.preemptions == 1
    for request in (first, second):
        assert tokens_of(outputs, request.request_id) == reference(request, max_model_len=64)[0]
    # `first` was in every step until it was done; what `second` recomputes is what was evicted.
    steps_of_first = [index for index, shape in enumerate(runner.shapes) if shape[0][0] == "first"]
    assert steps_of_first == list(range(17))
    recomputed = [count for shape in runner.shapes for name, count in shape[0:2] if name == "second"][1:]
    assert max(recomputed) > 1
    assert sum(recomputed) < 8 + 8 + 8


def test_low_priority_is_preempted_before_the_young():
    engine, _ = make_engine(num_blocks=10, budget=64)
    engine.add(make_request("low", prompt_of(8, 1), max_tokens=20, priority=9), now=0.0)
    engine.add(make_request("high", prompt_of(8, 2), max_tokens=20, priority=0), now=0.0)
    while not engine.counters.preemptions:
        engine.step(0.0)
    assert engine.load().num_waiting == 1
    engine.abort("low")
    assert engine.load().num_waiting == 0
    assert last_of(run_until_idle(engine), "high").finish_reason is FinishReason.LENGTH


def test_a_newcomer_leaves_a_block_for_each_that_runs():
    engine, runner = make_engine(num_blocks=6, budget=64)
    engine.add(make_request("a", prompt_of(4, 1), max_tokens=9), now=0.0)
    engine.step(0.0)
    engine.add(make_request("b", prompt_of(11, 2), max_tokens=10), now=0.0)
    engine.step(0.0)  # two blocks of a, three for b: nothing would be left for a's next
    assert runner.shapes[-1] == [("a", 1)]
    run_until_idle(engine)
    assert engine.counters.preemptions == 0


def test_one_that_will_be_held_needs_no_block_beyond_its_own():
    engine, runner = make_engine(num_blocks=6, budget=8)
    engine.add(make_request("a", prompt_of(8, 1)), now=0.0, hold=True)
    engine.add(make_request("b", prompt_of(12, 2)), now=0.0, hold=True)
    outputs = run_until_idle(engine)
    assert runner.shapes == [[("a", 8)], [("b", 8)], [("b", 4)]]
    assert all(output.held for output in outputs)


def test_a_half_computed_prompt_is_preempted_for_a_decode_and_nobody_enters_meanwhile():
    engine, runner = make_engine(num_blocks=13, budget=8)
    engine.add(make_request("a", prompt_of(3, 1), max_tokens=30), now=0.0)
    engine.step(0.0)
    large = make_request("large", prompt_of(40, 2), max_tokens=2)
    engine.add(large, now=0.0)
    engine.step(0.0)
    engine.add(make_request("urgent", prompt_of(4, 3), max_tokens=2, priority=-1), now=0.0)
    while not engine.counters.preemptions:
        assert ("large", 7) in runner.shapes[-1]
        engine.step(0.0)
    # The block that `a` needed was one of `large`, which had come far; then the line moves up.
    assert runner.shapes[-1] == [("a", 1)]
    engine.step(0.0)
    assert runner.shapes[-1] == [("a", 1), ("urgent", 4)]
    outputs = run_until_idle(engine)
    assert tokens_of(outputs, "large") == reference(large, max_model_len=64)[0]


def test_receiving_sequences_count_as_running():
    engine, runner = make_engine(max_num_seqs=2, budget=64)
    for name in "abc":
        engine.add(make_request(name, prompt_of(5, ord(name))), now=0.0, remote_kv=4)
    engine.step(0.0)
    assert [item.request_id for item in engine.take_reservations()] == ["a", "b"]
    engine.add(make_request("urgent", prompt_of(5, 9), priority=-1), now=0.0)
    assert not engine.has_work()
    engine.abort("a")
    engine.step(0.0)
    assert runner.shapes == [[("urgent", 5)]]


def test_no_more_are_received_than_can_get_a_token_in_each_step():
    engine, _ = make_engine(max_num_seqs=8, budget=2)
    for name in "abcd":
        engine.add(make_request(name, prompt_of(5, ord(name)), max_tokens=3), now=0.0, remote_kv=4)
    engine.step(0.0)
    assert len(engine.take_reservations()) == 2


def test_an_idle_engine_has_no_work_and_an_empty_step_is_harmless():
    engine, runner = make_engine()
    assert not engine.has_work()
    assert engine.step(0.0) == []
    assert engine.schedule(0.0).items == ()
    assert runner.shapes == []


def test_what_is_left_to_compute_is_known_without_counting():
    engine, _ = make_engine(budget=8, max_num_seqs=1)
    engine.add(make_request("a", prompt_of(20, 1), max_tokens=2), now=0.0)
    engine.add(make_request("b", prompt_of(11, 2)), now=0.0, remote_kv=10)
    engine.add(make_request("c", prompt_of(7, 3)), now=0.0)
    assert engine.load().waiting_tokens == 20 + 1 + 7
    engine.step(0.0)
    assert engine.load().waiting_tokens == 12 + 1 + 7
    engine.abort("c")
    assert engine.load().waiting_tokens == 12 + 1
    run_until_idle(engine)
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.waiting_tokens) == (0, 1, 1)


def test_hashes_are_computed_once_each():
    pool = BlockPool(32, 4)
    scheduler = Scheduler(EngineConfig(block_size=4, max_num_batched_tokens=64), pool)
    seq = Sequence(make_request("a", prompt_of(18)), now=0.0, hash_root=b"root")
    scheduler.add(seq)
    scheduler.schedule(0.0)
    first = list(seq.block_hashes)
    assert len(first) == 4
    scheduler.advance(seq, 18)
    seq.token_ids += [1, 2]
    scheduler.advance(seq, 2)
    assert seq.block_hashes[:4] == first
    assert len(seq.block_hashes) == 5
    assert all(new is old for new, old in zip(seq.block_hashes, first, strict=False))
    assert pool.lookup(seq.block_hashes) == seq.block_table


def test_the_queue_forgets_what_is_removed():
    queue = WaitingQueue()
    seqs = [Sequence(make_request(str(number), [1] * (number + 1)), now=0.0) for number in range(100)]
    for number, seq in enumerate(seqs):
        seq.arrival_order = number
        queue.push(seq)
    for seq in seqs[:99:2]:
        queue.remove(seq)
    assert len(queue) == 50
    assert queue.num_tokens == sum(seq.num_tokens for seq in seqs[1::2])
    for seq in seqs[51::2]:
        queue.remove(seq)
    for heap in (queue._by_rank, queue._by_size):
        assert len(heap) <= 2 * len(queue), "tombstones are swept once they are the majority"
    assert queue.peek_shortest() is seqs[1]
    assert [queue.pop() for _ in range(len(queue))] == seqs[1:51:2]
    assert queue.num_tokens == 0
