from __future__ import annotations

import pytest
from engine_fakes import (
    EOS,
    VOCAB,
    FakeRunner,
    last_of,
    make_engine,
    make_request,
    prompt_of,
    reference,
    run_until_idle,
    tokens_of,
)

from disagg.engine.engine import DEADLINE_EXCEEDED, Engine
from disagg.engine.runner import Batch
from disagg.errors import InvalidRequestError, OverloadedError
from disagg.hashing import block_hashes, chain_root
from disagg.types import FinishReason, Request, SampledToken, StepOutput

MAX_LEN = 64


class Scripted(FakeRunner):
    """Draws given tokens, whatever the sequence."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(64)
        self.tokens = tokens

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        super().execute(batch)
        return [SampledToken(self.tokens.pop(0)) if item.samples else None for item in batch.items]


def scripted(tokens: list[int], **limits: int) -> Engine:
    engine, _ = make_engine(**limits)
    engine._runner = Scripted(tokens)
    return engine


def run_one(engine: Engine, request: Request, **options: int) -> list[StepOutput]:
    engine.add(request, now=0.0, **options)
    return run_until_idle(engine)


def drained(engine: Engine) -> bool:
    engine.check_integrity()
    load = engine.load()
    return (load.num_running, load.num_waiting, load.num_held, load.kv_blocks_used) == (0, 0, 0, 0)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "remote_kv", "param"),
    [
        (make_request(prompt=[]), 0, "prompt"),
        (make_request(prompt=[1] * MAX_LEN), 0, "prompt"),
        (make_request(prompt=[1] * 60, outputs=[1] * 4, max_tokens=9), 0, "prompt"),
        (make_request(prompt=[VOCAB]), 0, "prompt"),
        (make_request(prompt=[1], outputs=[2, 3], max_tokens=2), 0, "max_tokens"),
        (Request("r", [1, 2], 3, make_request().params), 0, "num_prompt_tokens"),
        (Request("r", [1, 2], 0, make_request().params), 0, "num_prompt_tokens"),
        (make_request(prompt=[1, 2]), 2, "remote_kv"),
        (make_request(prompt=[1, 2]), -1, "remote_kv"),
    ],
)
def test_a_bad_request_is_refused_by_field_and_leaves_nothing(request_, remote_kv, param):
    engine, _ = make_engine(max_model_len=MAX_LEN)
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(request_, now=0.0, remote_kv=remote_kv)
    assert caught.value.param == param
    assert not engine.has_work()
    assert drained(engine)


def test_a_prompt_of_the_longest_length_gets_one_token():
    engine, _ = make_engine(max_model_len=MAX_LEN)
    outputs = run_one(engine, make_request(prompt=prompt_of(MAX_LEN - 1), max_tokens=None))
    assert len(tokens_of(outputs, "r")) == 1
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_what_can_never_fit_the_pool_is_refused_and_the_rest_ends_with_it():
    engine, _ = make_engine(num_blocks=4, max_model_len=MAX_LEN)  # room for 12 computed tokens
    assert engine.max_model_len == 13
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(make_request(prompt=prompt_of(13)), now=0.0)
    assert caught.value.param == "prompt"
    outputs = run_one(engine, make_request(prompt=prompt_of(5), max_tokens=None))
    assert len(tokens_of(outputs, "r")) == 8
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_an_id_is_used_once_at_a_time():
    engine, _ = make_engine()
    engine.add(make_request("r"), now=0.0)
    with pytest.raises(InvalidRequestError) as caught:
        engine.add(make_request("r"), now=0.0)
    assert caught.value.param == "request_id"
    run_until_idle(engine)
    engine.add(make_request("r"), now=0.0)
    run_until_idle(engine)


def test_the_queue_is_bounded():
    engine, _ = make_engine(max_waiting=2)
    engine.add(make_request("a"), now=0.0)
    engine.add(make_request("b"), now=0.0)
    with pytest.raises(OverloadedError) as caught:
        engine.add(make_request("c"), now=0.0)
    assert caught.value.retry_after > 0
    engine.abort("a")
    engine.add(make_request("c"), now=0.0)


# -- how sequences end -----------------------------------------------------------------------------------


def test_eos_ends_a_sequence_unless_ignored():
    outputs = run_one(scripted([3, EOS]), make_request(ignore_eos=False, max_tokens=9))
    assert tokens_of(outputs, "r") == [3, EOS]
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == (FinishReason.STOP, EOS)
    outputs = run_one(scripted([3, EOS, 4]), make_request(ignore_eos=True, max_tokens=3))
    assert tokens_of(outputs, "r") == [3, EOS, 4]
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == (FinishReason.LENGTH, None)


def test_stop_token_ids_end_a_sequence_also_with_ignore_eos():
    request = make_request(ignore_eos=True, stop_token_ids=(7, EOS), max_tokens=9)
    outputs = run_one(scripted([3, 7]), request)
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == (FinishReason.STOP, 7)
    outputs = run_one(scripted([3, EOS]), request)
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == (FinishReason.STOP, EOS)


def test_nothing_stops_a_sequence_before_min_tokens():
    request = make_request(ignore_eos=False, stop_token_ids=(7,), min_tokens=3, max_tokens=9)
    outputs = run_one(scripted([7, EOS, 4, 7]), request)
    assert tokens_of(outputs, "r") == [7, EOS, 4, 7]
    assert outputs[-1].matched_stop == 7


def test_a_stop_token_in_the_last_place_is_a_stop():
    outputs = run_one(scripted([3, EOS]), make_request(ignore_eos=False, max_tokens=2))
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_outputs_of_an_earlier_worker_count():
    request = make_request(outputs=[5, 6], max_tokens=4, min_tokens=3, ignore_eos=False)
    outputs = run_one(scripted([EOS]), request)
    assert (tokens_of(outputs, "r"), outputs[-1].finish_reason) == ([EOS], FinishReason.STOP)
    outputs = run_one(scripted([3, 4]), request)
    assert (tokens_of(outputs, "r"), outputs[-1].finish_reason) == ([3, 4], FinishReason.LENGTH)


def test_a_continued_request_goes_on_as_if_it_had_never_moved():
    request = make_request(prompt=prompt_of(9), max_tokens=12)
    expected, _ = reference(request, max_model_len=MAX_LEN)
    for split in range(1, 12):
        engine, _ = make_engine()
        moved = make_request(prompt=prompt_of(9), outputs=expected[:split], max_tokens=12)
        assert tokens_of(run_one(engine, moved), "r") == expected[split:]


def test_exactly_one_terminal_output_and_all_blocks_free():
    engine, _ = make_engine()
    for number in range(5):
        engine.add(make_request(f"r{number}", prompt_of(5, number), max_tokens=1 + number), now=0.0)
    outputs = run_until_idle(engine)
    ended = [output.request_id for output in outputs if output.finish_reason]
    assert sorted(ended) == [f"r{number}" for number in range(5)]
    assert drained(engine)


# -- times -----------------------------------------------------------------------------------------------


def test_the_first_output_says_how_long_it_took():
    engine, _ = make_engine(budget=4)
    engine.add(make_request(prompt=prompt_of(8)), now=1.0)
    assert engine.step(3.0) == []
    first, second = engine.step(6.0)[0], engine.step(7.0)[0]
    assert (first.queued_s, first.prefill_s) == (2.0, 3.0)
    assert (second.queued_s, second.prefill_s) == (None, None)


def test_time_spent_receiving_is_not_prefill():
    engine, _ = make_engine()
    engine.add(make_request(prompt=prompt_of(9)), now=1.0, remote_kv=8)
    engine.step(2.0)
    engine.activate("r", 0, 5.0)
    output = engine.step(6.0)[0]
    assert (output.queued_s, output.prefill_s) == (5.0, 0.0)


def test_waiting_and_running_requests_end_at_their_deadline():
    engine, _ = make_engine(max_num_seqs=1)
    engine.add(make_request("runs", deadline=5.0, max_tokens=20), now=0.0)
    engine.add(make_request("waits", deadline=3.0), now=0.0)
    engine.add(make_request("patient"), now=0.0)
    assert [output.request_id for output in engine.step(2.9)] == ["runs"]
    late, running = engine.step(3.0)
    assert (late.request_id, late.finish_reason, late.error) == (
        "waits",
        FinishReason.ERROR,
        DEADLINE_EXCEEDED,
    )
    assert (late.token_ids, running.request_id) == ((), "runs")
    outputs = engine.step(5.0)
    assert (outputs[0].request_id, outputs[0].error) == ("runs", DEADLINE_EXCEEDED)
    assert outputs[1].request_id == "patient"
    run_until_idle(engine)
    assert drained(engine)


def test_a_finished_requests_deadline_does_not_hit_its_successor():
    engine, _ = make_engine()
    run_one(engine, make_request("r", deadline=5.0))
    engine.add(make_request("r", deadline=50.0, max_tokens=2), now=4.0)
    outputs = [*engine.step(6.0), *engine.step(6.0)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_deadlines_of_finished_requests_do_not_pile_up():
    engine, _ = make_engine()
    for _ in range(500):
        run_one(engine, make_request("r", deadline=1e9, max_tokens=1))
    assert len(engine._deadlines) < 100


# -- prefix cache ------------------------------------------------------------------------------------------


def test_a_prefix_is_found_and_the_last_token_is_computed():
    engine, runner = make_engine()
    prompt = prompt_of(12)
    run_one(engine, make_request("a", prompt, max_tokens=1))
    outputs = run_one(engine, make_request("b", prompt, max_tokens=1))
    assert runner.shapes[-1] == [("b", 4)], "12 cached tokens, of which the last block is computed again"
    assert outputs[0].num_cached_tokens == 8
    assert (engine.counters.prefix_queries, engine.counters.prefix_hits) == (24, 8)
    run_one(engine, make_request("c", [*prompt, 1], max_tokens=1))
    assert runner.shapes[-1] == [("c", 1)]


def test_what_decode_produced_is_found_by_the_next_turn():
    engine, runner = make_engine()
    request = make_request("a", prompt_of(6), max_tokens=11)
    answer = tokens_of(run_one(engine, request), "a")
    # 17 tokens, 16 of them computed.
    turn = make_request("b", [*request.token_ids, *answer, 5, 6], max_tokens=1)
    assert run_one(engine, turn)[0].num_cached_tokens == 16
    assert runner.shapes[-1] == [("b", 3)]


def test_salts_do_not_share():
    engine, runner = make_engine()
    prompt = prompt_of(12)
    run_one(engine, make_request("a", prompt, max_tokens=1, salt="x"))
    run_one(engine, make_request("b", prompt, max_tokens=1, salt="y"))
    assert runner.shapes[-1] == [("b", 12)]
    run_one(engine, make_request("c", [*prompt, 1], max_tokens=1, salt="x"))
    assert runner.shapes[-1] == [("c", 1)]


def test_only_computed_tokens_are_cached_and_reported():
    engine, runner = make_engine(budget=6)
    prompt = prompt_of(13)
    hashes = block_hashes(prompt, 4, chain_root("fake"))
    engine.add(make_request(prompt=prompt, max_tokens=4), now=0.0)
    batch = engine.schedule(0.0)
    assert engine.cached_hashes() == [], "nothing is findable before its step is done"
    engine.update(batch, runner.execute(batch), 0.0)
    assert engine.block_events().stored == hashes[:1]
    engine.step(0.0)
    engine.step(0.0)
    assert engine.block_events().stored == hashes[1:3]
    run_until_idle(engine)
    assert engine.cached_hashes()[:3] == hashes
    assert len(engine.cached_hashes()) == 4, "13 + 4 tokens, the last one is not computed"


def test_two_equal_prompts_at_once_are_both_right():
    engine, _ = make_engine(budget=64)
    requests = [make_request(f"r{number}", prompt_of(12), max_tokens=9) for number in range(3)]
    for request in requests:
        engine.add(request, now=0.0)
    outputs = run_until_idle(engine)
    for request in requests:
        assert tokens_of(outputs, request.request_id) == reference(request, max_model_len=MAX_LEN)[0]
    assert drained(engine)


def test_without_prefix_caching_everything_is_computed():
    engine, runner = make_engine(prefix_caching=False)
    for name in "ab":
        run_one(engine, make_request(name, prompt_of(12), max_tokens=1))
    assert runner.shapes == [[("a", 12)], [("b", 12)]]
    assert engine.cached_hashes() == []


def test_reset_cache_forgets():
    engine, runner = make_engine()
    run_one(engine, make_request("a", prompt_of(12), max_tokens=1))
    engine.reset_cache()
    run_one(engine, make_request("b", prompt_of(12), max_tokens=1))
    assert runner.shapes[-1] == [("b", 12)]


# -- hold --------------------------------------------------------------------------------------------------


def test_a_held_sequence_keeps_its_blocks_until_released():
    engine, _ = make_engine()
    outputs = run_one(engine, make_request(prompt=prompt_of(9)), hold=True)
    assert [(output.held, output.finish_reason) for output in outputs] == [(True, None)]
    assert not engine.has_work()
    assert engine.num_computed_tokens("r") == 9
    assert len(engine.held_blocks("r")) == 3
    assert (engine.load().num_held, engine.load().kv_blocks_used) == (1, 3)
    assert engine.release("r")
    assert not engine.release("r")
    assert drained(engine)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 33])
def test_held_blocks_cover_the_computed_tokens(num_tokens):
    engine, _ = make_engine(budget=8)
    outputs = run_one(engine, make_request(prompt=prompt_of(num_tokens)), hold=True)
    assert outputs[-1].held
    assert len(engine.held_blocks("r")) == -(-num_tokens // 4)
    assert engine.num_computed_tokens("r") == num_tokens


def test_a_sequence_that_ends_with_its_first_token_is_not_held():
    engine, _ = make_engine()
    outputs = run_one(engine, make_request(max_tokens=1), hold=True)
    assert (outputs[-1].held, outputs[-1].finish_reason) == (False, FinishReason.LENGTH)
    assert drained(engine)
    engine = scripted([EOS])
    outputs = run_one(engine, make_request(ignore_eos=False), hold=True)
    assert (outputs[-1].held, outputs[-1].finish_reason) == (False, FinishReason.STOP)
    assert drained(engine)


def test_hold_counts_new_tokens_only():
    engine, _ = make_engine()
    outputs = run_one(engine, make_request(outputs=[4, 5], max_tokens=9), hold=True)
    assert (len(outputs), outputs[0].held) == (1, True)


def test_a_held_sequence_can_be_aborted_and_outlives_its_deadline():
    engine, _ = make_engine()
    run_one(engine, make_request(deadline=1.0), hold=True)
    assert engine.step(2.0) == []
    assert engine.load().num_held == 1
    assert engine.abort("r")
    assert drained(engine)


def test_held_blocks_stop_admission_without_spinning():
    engine, _ = make_engine(num_blocks=5)
    run_one(engine, make_request("held", prompt_of(12, 1)), hold=True)
    engine.add(make_request("waits", prompt_of(8, 2)), now=0.0)
    assert not engine.has_work()
    assert engine.step(0.0) == []
    assert not engine.has_work()
    engine.release("held")
    assert engine.has_work()
    assert last_of(run_until_idle(engine), "waits").finish_reason


def test_a_running_sequence_that_finds_no_block_waits_and_lets_a_better_one_in():
    engine, _ = make_engine(num_blocks=6)
    run_one(engine, make_request("held", prompt_of(8, 1)), hold=True)
    engine.add(make_request("long", prompt_of(12, 2), max_tokens=4, priority=1), now=0.0)
    engine.step(0.0)
    engine.add(make_request("short", prompt_of(3, 3), max_tokens=2, priority=0), now=0.0)
    # `long` needs a fourth block, which is not there; it makes room for `short`, which goes first.
    outputs = run_until_idle(engine)
    assert last_of(outputs, "short").finish_reason is FinishReason.LENGTH
    assert engine.load().num_waiting == 1
    assert not engine.has_work()
    engine.release("held")
    assert last_of(run_until_idle(engine), "long").finish_reason is FinishReason.LENGTH
    assert drained(engine)


# -- hand-off ------------------------------------------------------------------------------------------------


def hand_off(source: Engine, target: Engine, request: Request) -> Request:
    """Run `request` to its first token, held, and give the target what the orchestrator would."""
    outputs = run_one(source, request, hold=True)
    assert outputs[-1].held
    tokens = [*request.token_ids, *tokens_of(outputs, request.request_id)]
    moved = Request(request.request_id, tokens, request.num_prompt_tokens, request.params)
    target.add(moved, now=0.0, remote_kv=source.num_computed_tokens(request.request_id))
    return moved


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("part", ["all", "some", "none"])
def test_a_hand_off_changes_no_token(num_tokens, part):
    source, source_runner = make_engine(budget=8)
    target, target_runner = make_engine(budget=8)
    request = make_request(prompt=prompt_of(num_tokens), max_tokens=9)
    hand_off(source, target, request)
    assert target.step(0.0) == []
    (reservation,) = target.take_reservations()
    assert target.take_reservations() == []
    assert len(reservation.block_ids) == -(-num_tokens // 4)
    received = {"all": num_tokens, "some": num_tokens // 2, "none": 0}[part]
    target_runner.scribble(reservation.block_ids)
    target_runner.copy_from(source_runner, source.held_blocks("r"), reservation.block_ids, 0, received)
    assert not target.has_work()
    target.activate("r", received, 0.0)
    source.release("r")
    outputs = run_until_idle(target)
    assert target_runner.shapes[0] == [("r", min(8, num_tokens + 1 - received))]
    assert tokens_of(outputs, "r") == reference(request, max_model_len=MAX_LEN)[0][1:]
    assert drained(source)
    assert drained(target)


def test_received_blocks_are_found_by_others():
    source, source_runner = make_engine()
    target, target_runner = make_engine()
    prompt = prompt_of(10)
    hand_off(source, target, make_request(prompt=prompt, max_tokens=2))
    target.step(0.0)
    (reservation,) = target.take_reservations()
    assert target.cached_hashes() == []
    target_runner.copy_from(source_runner, source.held_blocks("r"), reservation.block_ids, 0, 10)
    target.activate("r", 10, 0.0)
    assert target.cached_hashes() == block_hashes(prompt, 4, chain_root("fake"))
    run_until_idle(target)
    assert run_one(target, make_request("b", prompt))[0].num_cached_tokens == 8


def test_local_hits_are_not_pulled_again():
    source, source_runner = make_engine()
    target, target_runner = make_engine()
    prompt = prompt_of(18)
    run_one(target, make_request("earlier", prompt[:9], max_tokens=1))
    hand_off(source, target, make_request(prompt=prompt, max_tokens=3))
    target.step(0.0)
    (reservation,) = target.take_reservations()
    assert reservation.num_cached_tokens == 8
    target_runner.scribble(reservation.block_ids[2:])
    target_runner.copy_from(source_runner, source.held_blocks("r"), reservation.block_ids, 8, 18)
    target.activate("r", 18, 0.0)
    run_until_idle(target)
    assert target_runner.shapes[-2:] == [[("r", 1)], [("r", 1)]]


def test_a_request_whose_kv_is_all_here_runs_at_once_and_says_so():
    source, _ = make_engine()
    target, target_runner = make_engine()
    prompt = prompt_of(8)
    run_one(target, make_request("earlier", [*prompt, 1, 2], max_tokens=1))
    request = make_request(prompt=prompt, max_tokens=3)
    hand_off(source, target, request)
    outputs = target.step(0.0)
    assert target_runner.shapes[-1] == [("r", 1)]
    (reservation,) = target.take_reservations()
    assert reservation.block_ids[reservation.num_cached_tokens // 4 :] == []
    target.activate("r", 8, 0.0)  # the worker can't know; it changes nothing
    outputs += run_until_idle(target)
    assert tokens_of(outputs, "r") == reference(request, max_model_len=MAX_LEN)[0][1:]


def test_activating_too_much_still_computes_the_last_token():
    engine, runner = make_engine()
    engine.add(make_request(prompt=[*prompt_of(8), 1], max_tokens=1), now=0.0, remote_kv=8)
    engine.step(0.0)
    (reservation,) = engine.take_reservations()
    peer, peer_runner = make_engine()
    run_one(peer, make_request(prompt=prompt_of(8)), hold=True)
    runner.copy_from(peer_runner, peer.held_blocks("r"), reservation.block_ids, 0, 8)
    engine.activate("r", 1000, 0.0)
    engine.step(0.0)
    assert runner.shapes == [[("r", 1)]]


def test_activate_means_nothing_to_others():
    engine, _ = make_engine()
    engine.activate("unknown", 4, 0.0)
    engine.add(make_request("r"), now=0.0)
    engine.activate("r", 2, 0.0)
    assert engine.num_computed_tokens("r") == 0


def test_an_aborted_reservation_is_not_reported():
    engine, _ = make_engine()
    engine.add(make_request(prompt=prompt_of(9)), now=0.0, remote_kv=8)
    engine.step(0.0)
    assert engine.load().kv_blocks_used == 3
    assert engine.abort("r")
    assert engine.take_reservations() == []
    assert drained(engine)


def test_a_receiving_sequence_is_not_preempted():
    engine, _ = make_engine(num_blocks=11, budget=64)
    engine.add(make_request("runs", prompt_of(16, 1), max_tokens=20), now=0.0)
    engine.step(0.0)
    engine.add(make_request("receives", prompt_of(15, 2), priority=9), now=0.0, remote_kv=14)
    engine.step(0.0)
    (reservation,) = engine.take_reservations()
    before = list(engine._sequences["receives"].block_table)
    run_until_idle(engine)  # `runs` can't grow past the receiving blocks, and has nobody else to preempt
    assert engine.counters.preemptions == 1
    assert engine._sequences["receives"].block_table == before == reservation.block_ids
    engine.activate("receives", 0, 0.0)
    outputs = run_until_idle(engine)
    assert last_of(outputs, "runs").finish_reason is FinishReason.LENGTH
    assert last_of(outputs, "receives").finish_reason is FinishReason.LENGTH
    assert drained(engine)


def test_receiving_sequences_leave_half_of_the_pool_to_the_others():
    engine, _ = make_engine(num_blocks=17, budget=64, max_num_seqs=8)
    engine.add(make_request("runs", prompt_of(4, 1), max_tokens=28), now=0.0)
    outputs = engine.step(0.0)
    for number in range(4):
        request = make_request(f"remote{number}", prompt_of(12, 2 + number), max_tokens=20)
        engine.add(request, now=0.0, remote_kv=11)
    # Nothing is ever delivered, yet the running one gets its 8 blocks without losing them once.
    outputs += run_until_idle(engine)
    assert last_of(outputs, "runs").finish_reason is FinishReason.LENGTH
    assert engine.counters.preemptions == 0
    assert len(engine.take_reservations()) == 2
    assert engine.load().kv_blocks_used == 6
    # Pulls end, if only by failing: everything gets done.
    for _ in range(4):
        for number in range(4):
            engine.activate(f"remote{number}", 0, 0.0)
        outputs += run_until_idle(engine)
    assert sum(output.finish_reason is FinishReason.LENGTH for output in outputs) == 5
    assert drained(engine)


def test_a_request_larger_than_half_the_pool_is_received_once_it_is_alone():
    engine, _ = make_engine(num_blocks=9, budget=64)
    engine.add(make_request("runs", prompt_of(4, 1), max_tokens=3), now=0.0)
    engine.step(0.0)
    engine.add(make_request("large", prompt_of(24, 2)), now=0.0, remote_kv=23)
    engine.step(0.0)
    assert engine.take_reservations() == []
    run_until_idle(engine)
    assert [item.request_id for item in engine.take_reservations()] == ["large"]


def test_reservations_do_not_wait_for_budget():
    engine, runner = make_engine(budget=8)
    engine.add(make_request("long", prompt_of(30, 1)), now=0.0)
    engine.add(make_request("remote", prompt_of(9, 2)), now=0.0, remote_kv=8)
    engine.step(0.0)
    assert runner.shapes == [[("long", 8)]]
    assert [item.request_id for item in engine.take_reservations()] == ["remote"]


def test_a_receiving_request_meets_its_deadline_when_it_is_activated():
    engine, _ = make_engine()
    engine.add(make_request(prompt=prompt_of(9), deadline=2.0), now=0.0, remote_kv=8)
    engine.step(0.0)
    assert engine.step(3.0) == [], "a peer still writes into its blocks"
    assert engine.load().kv_blocks_used == 3
    engine.activate("r", 0, 3.5)
    (output,) = engine.step(3.5)
    assert output.error == DEADLINE_EXCEEDED
    assert drained(engine)


# -- abort and failure ---------------------------------------------------------------------------------------


def test_abort_in_every_state():
    engine, _ = make_engine(max_num_seqs=3, budget=64)
    engine.add(make_request("held", prompt_of(5, 1)), now=0.0, hold=True)
    engine.add(make_request("receiving", prompt_of(5, 2)), now=0.0, remote_kv=4)
    engine.add(make_request("running", prompt_of(5, 3), max_tokens=9), now=0.0)
    engine.step(0.0)
    engine.add(make_request("prefilling", prompt_of(40, 4)), now=0.0)
    engine.add(make_request("waiting", prompt_of(5, 5)), now=0.0)
    engine.step(0.0)
    for name in ("waiting", "running", "held", "receiving", "prefilling"):
        assert engine.abort(name)
        engine.check_integrity()
        assert not engine.abort(name)
    assert not engine.abort("unknown")
    assert not engine.has_work()
    assert drained(engine)


def test_the_result_of_a_sequence_aborted_during_its_step_is_dropped():
    engine, runner = make_engine()
    engine.add(make_request("a", prompt_of(9, 1)), now=0.0)
    engine.add(make_request("b", prompt_of(6, 2)), now=0.0)
    batch = engine.schedule(0.0)
    sampled = runner.execute(batch)
    engine.abort("a")
    engine.add(make_request("a", prompt_of(3, 3)), now=0.0)  # the id is free again
    outputs = engine.update(batch, sampled, 0.0)
    assert [output.request_id for output in outputs] == ["b"]
    assert engine.num_computed_tokens("a") == 0
    engine.check_integrity()
    run_until_idle(engine)
    assert drained(engine)


def test_a_step_that_fails_ends_its_batch_and_nothing_else(caplog):
    engine, runner = make_engine(max_num_seqs=2)
    engine.add(make_request("a", prompt_of(9, 1)), now=0.0)
    engine.add(make_request("b", prompt_of(5, 2)), now=0.0)
    engine.add(make_request("c", prompt_of(5, 3)), now=0.0)
    runner.fail_next = True
    outputs = engine.step(0.0)
    assert [(output.request_id, output.finish_reason) for output in outputs] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    assert outputs[0].error == "OSError: device lost"
    assert engine.cached_hashes() == [], "what a failed step wrote is never found"
    assert "a step of 2 sequences failed" in caplog.text
    again = make_request("a", prompt_of(9, 1))
    engine.add(again, now=0.0)
    outputs = run_until_idle(engine)
    assert tokens_of(outputs, "a") == reference(again, max_model_len=MAX_LEN)[0]
    assert last_of(outputs, "c").finish_reason is FinishReason.LENGTH
    assert drained(engine)


@pytest.mark.parametrize("answer", [[], [None], [SampledToken(1)] * 2])
def test_a_runner_that_answers_nonsense_fails_the_batch(answer, monkeypatch, caplog):
    engine, runner = make_engine()
    monkeypatch.setattr(runner, "execute", lambda batch: answer)
    engine.add(make_request(), now=0.0)
    (output,) = engine.step(0.0)
    assert output.finish_reason is FinishReason.ERROR
    assert drained(engine)


def test_integrity_notices_a_stolen_block():
    engine, _ = make_engine()
    engine.add(make_request("a", prompt_of(9, 1), max_tokens=9), now=0.0)
    engine.add(make_request("b", prompt_of(9, 2), max_tokens=9), now=0.0)
    engine.step(0.0)
    engine.check_integrity()
    tables = [engine._sequences[name].block_table for name in "ab"]
    tables[0][0], tables[1][0] = tables[1][0], tables[0][0]
    with pytest.raises(AssertionError, match="cached with other content"):
        engine.check_integrity()
