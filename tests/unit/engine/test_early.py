"""Requests whose KV a peer still computes: what they may reserve, what they cost nobody, how they end."""

from __future__ import annotations

import pytest
from engine_fakes import BLOCK_SIZE, make_engine, make_request, prompt_of, run_until_idle, tokens_of

from disagg.engine.engine import DEADLINE_EXCEEDED, Engine
from disagg.types import FinishReason, Request


def drained(engine: Engine) -> bool:
    engine.check_integrity()
    load = engine.load()
    return (load.num_running, load.num_waiting, load.num_held, load.kv_blocks_used) == (0, 0, 0, 0)


def add_early(engine: Engine, request_id: str, num_tokens: int, seed: int = 1) -> Request:
    """Add a request of which a peer computes all tokens but a stand-in."""
    request = make_request(request_id, [*prompt_of(num_tokens, seed), 0])
    engine.add(request, now=0.0, remote_kv=num_tokens, awaits_token=True)
    return request


def reserved(engine: Engine) -> dict[str, int]:
    engine.step(0.0)
    return {item.request_id: len(item.block_ids) for item in engine.take_reservations()}


def test_it_reserves_before_its_token_is_known_and_runs_after():
    engine, runner = make_engine()
    source, source_runner = make_engine()
    prompt = prompt_of(9, 2)
    source.add(make_request("r", prompt), now=0.0, hold=True)
    (output,) = source.step(0.0)
    engine.add(make_request("r", [*prompt, 0], max_tokens=5), now=0.0, remote_kv=9, awaits_token=True)
    assert engine.has_work()
    assert engine.step(0.0) == []
    (reservation,) = engine.take_reservations()
    assert len(reservation.block_ids) == 3
    runner.copy_from(source_runner, source.held_blocks("r"), reservation.block_ids, 0, 9)
    # Nothing starts it without its token.
    engine.activate("r", 9, 0.0)
    assert not engine.has_work()
    engine.token_came("r", output.token_ids[0])
    engine.token_came("r", 7)
    assert not engine.has_work()
    engine.activate("r", 9, 0.0)
    expected, _ = make_engine()
    expected.add(make_request("r", [*prompt, output.token_ids[0]], max_tokens=5), now=0.0)
    assert tokens_of(run_until_idle(engine), "r") == tokens_of(run_until_idle(expected), "r")
    assert drained(engine)


def test_they_hold_a_quarter_of_the_pool_at_most():
    engine, _ = make_engine(num_blocks=65, max_num_seqs=64, budget=64)
    for index in range(10):
        add_early(engine, f"r{index}", 15, seed=index)
    assert reserved(engine) == {f"r{index}": 4 for index in range(4)}
    assert not engine.has_work()
    # One that ends makes room for the next.
    engine.abort("r1")
    assert engine.has_work()
    assert reserved(engine) == {"r4": 4}


def test_they_hold_a_quarter_of_the_places_at_most():
    engine, _ = make_engine(num_blocks=200, max_num_seqs=8)
    for index in range(5):
        add_early(engine, f"r{index}", 4, seed=index)
    assert set(reserved(engine)) == {"r0", "r1"}


def test_nobody_waits_for_one():
    engine, _ = make_engine(num_blocks=33, max_num_seqs=8)
    engine.add(make_request("large", prompt_of(56), max_tokens=2), now=0.0)
    engine.add(make_request("next", prompt_of(59, 3), max_tokens=2), now=0.0)
    engine.add(make_request("third", prompt_of(59, 4), max_tokens=2), now=0.0)
    add_early(engine, "early", 8)
    engine.step(0.0)
    assert engine.load().num_waiting == 3
    assert engine.take_reservations() == []
    outputs = run_until_idle(engine)
    assert {each.request_id for each in outputs} == {"large", "next", "third"}
    assert [item.request_id for item in engine.take_reservations()] == ["early"]


def test_without_a_reservation_it_waits_with_the_others_once_its_token_came():
    engine, _ = make_engine(num_blocks=33, max_num_seqs=8)
    add_early(engine, "too large", 40)
    assert not engine.has_work()
    assert reserved(engine) == {}
    engine.token_came("too large", 3)
    assert engine.has_work()
    assert reserved(engine) == {"too large": 10}
    engine.activate("too large", 0, 0.0)
    assert run_until_idle(engine)[-1].finish_reason is FinishReason.LENGTH
    assert drained(engine)


def test_one_whose_prefix_is_here_waits_for_its_token_all_the_same():
    engine, _ = make_engine()
    prompt = prompt_of(16)
    engine.add(make_request("before", [*prompt, 5]), now=0.0)
    run_until_idle(engine)
    engine.add(make_request("r", [*prompt, 0]), now=0.0, remote_kv=16, awaits_token=True)
    engine.step(0.0)
    (reservation,) = engine.take_reservations()
    assert reservation.num_cached_tokens == 16
    assert not engine.has_work()
    engine.token_came("r", 4)
    engine.activate("r", 16, 0.0)
    assert run_until_idle(engine)[-1].finish_reason is FinishReason.LENGTH
    assert drained(engine)


@pytest.mark.parametrize("stage", ["added", "reserved", "token"])
def test_it_can_be_aborted_at_every_stage(stage):
    engine, _ = make_engine()
    add_early(engine, "r", 8)
    if stage != "added":
        assert reserved(engine) == {"r": 2}
    if stage == "token":
        engine.token_came("r", 2)
    engine.abort("r")
    engine.token_came("r", 2)
    engine.activate("r", 8, 0.0)
    assert not engine.has_work()
    assert drained(engine)


def test_its_deadline_ends_it_while_it_waits():
    engine, _ = make_engine(num_blocks=9)
    request = make_request("r", [*prompt_of(16), 0], deadline=5.0)
    engine.add(request, now=0.0, remote_kv=16, awaits_token=True)
    assert engine.step(1.0) == []
    (output,) = engine.step(5.0)
    assert output.error == DEADLINE_EXCEEDED
    assert drained(engine)


# -- the side that computes --------------------------------------------------------------------------------


def test_progress_tells_whole_blocks_and_at_last_all():
    engine, _ = make_engine(budget=6)
    engine.add(make_request("r", prompt_of(15)), now=0.0, hold=True)
    engine.add(make_request("other", prompt_of(3, 2), max_tokens=20), now=0.0)
    seen = []
    for _ in range(8):
        engine.step(0.0)
        seen += [(item.request_id, len(item.block_ids), item.complete) for item in engine.take_progress()]
    assert {name for name, _, _ in seen} == {"r"}
    counts = [count for _, count, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert [complete for _, _, complete in seen] == [False] * (len(seen) - 1) + [True]
    assert engine.take_progress() == []


def test_a_held_requests_loss_is_told_before_its_blocks_are_free():
    engine, _ = make_engine(budget=6)
    lost: list[tuple[str, int]] = []
    engine.on_hold_lost(lambda name: lost.append((name, engine.load().kv_blocks_used)))
    engine.add(make_request("r", prompt_of(15)), now=0.0, hold=True)
    engine.step(0.0)
    engine._scheduler._preempt(engine._scheduler.running[0])
    assert lost == [("r", 4)]
    run_until_idle(engine)
    (progress,) = engine.take_progress()
    assert (progress.epoch, progress.complete) == (1, True)
    engine.release("r")
    assert lost == [("r", 4), ("r", 4)]
    assert drained(engine)


def test_a_step_tells_what_it_reserved_and_began_before_it_is_computed(monkeypatch: pytest.MonkeyPatch):
    engine, runner = make_engine(budget=8)
    prompt = prompt_of(20, 3)
    engine.add(make_request("before", prompt), now=0.0, hold=True)
    run_until_idle(engine)
    engine.release("before")
    engine.take_progress()
    told: list[object] = []
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda batch: [told.append("computed"), execute(batch)][1])

    def scheduled() -> None:
        told.append(
            [(item.request_id, len(item.block_ids), item.complete) for item in engine.take_progress()]
        )
        told.append([item.request_id for item in engine.take_reservations()])

    engine.on_scheduled(scheduled)
    # Its first 16 tokens are cached, and can be had at once.
    engine.add(make_request("r", [*prompt[:16], *prompt_of(15, 4)]), now=0.0, hold=True)
    add_early(engine, "early", 8, seed=9)
    engine.step(0.0)
    engine.step(0.0)
    cached, computed = 16 // BLOCK_SIZE, 8 // BLOCK_SIZE
    assert told[:3] == [[("r", cached, False)], ["early"], "computed"]
    # With the second step it tells how far the first one came, and of no further beginning.
    assert told[3:] == [[("r", cached + computed, False)], [], "computed"]
