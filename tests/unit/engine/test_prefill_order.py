"""Whose prompt is computed first: short ones don't stand behind long ones, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

from engine_fakes import make_engine, make_request, prompt_of, run_until_idle
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.config import ClusterConfig, EngineConfig, PoolConfig
from disagg.engine.engine import Engine
from disagg.engine.scheduler import DUE_SHARE
from disagg.types import Role, StepOutput

BUDGET = 32
ROOMY = {"num_blocks": 2048, "budget": BUDGET, "max_num_seqs": 64, "max_model_len": 2048}


def first_tokens(outputs: list[StepOutput]) -> set[str]:
    return {output.request_id for output in outputs if output.token_ids}


def steps_until(engine: Engine, request_id: str, limit: int, *, before_step=lambda step: None) -> int:
    """Return the number of steps after which a request has its first token."""
    for step in range(1, limit + 1):
        before_step(step)
        if request_id in first_tokens(engine.step(float(step))):
            return step
    raise AssertionError(f"{request_id} has no token after {limit} steps")


@settings(deadline=None, max_examples=60)
@given(
    longs=st.lists(st.integers(40, 400), min_size=1, max_size=12),
    steps_before=st.integers(0, 10),
    short=st.integers(1, BUDGET - BUDGET // DUE_SHARE),
)
def test_a_short_prompt_waits_for_no_more_than_the_step_that_runs(longs, steps_before, short):
    engine, _ = make_engine(**ROOMY)
    for index, length in enumerate(longs):
        engine.add(make_request(f"long{index}", prompt_of(length, index)), now=0.0, hold=True)
    for _ in range(steps_before):
        engine.step(0.0)
    # One that is half computed may have no more left than the short one: then that is done first.
    left = min(
        (seq.num_uncomputed_tokens for seq in engine._sequences.values() if seq.num_new_tokens == 0),
        default=BUDGET,
    )
    engine.add(make_request("short", prompt_of(short, 99)), now=0.0, hold=True)
    limit = 1 if left > short else 2
    assert steps_until(engine, "short", limit) <= limit


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(40, 600),
    shorts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    per_step=st.integers(1, 8),
    slo=st.sampled_from([None, 0.001, 1.0]),
)
def test_a_long_prompt_is_not_starved_by_a_flood_of_short_ones(length, shorts, per_step, slo):
    engine, _ = make_engine(**ROOMY, max_waiting=100_000)
    engine.add(make_request("long", prompt_of(length, 7)), now=0.0, hold=True)
    flood = 0

    def more(step: int) -> None:
        nonlocal flood
        for _ in range(per_step):
            request = make_request(f"s{flood}", prompt_of(shorts[flood % len(shorts)], flood))
            request = replace(request, slo_ttft_s=slo)
            engine.add(request, now=float(step), hold=True)
            flood += 1

    def step(number: int) -> None:
        more(number)
        for name in [key for key, seq in engine._sequences.items() if seq.status.name == "HELD"]:
            engine.release(name)

    # Its due date passes after ten steps; from then on a quarter of each step is its own.
    own = BUDGET // DUE_SHARE
    overdue = 12 + -(-length // own)
    backlog = 12 * per_step * (sum(shorts) // len(shorts) + 41)
    limit = overdue + backlog // own
    assert steps_until(engine, "long", limit, before_step=step) <= limit


def test_what_is_due_first_gets_its_share_in_every_step():
    engine, runner = make_engine(**ROOMY)
    engine.add(make_request("long", prompt_of(200, 1)), now=0.0)
    engine.step(0.0)
    relaxed = replace(make_request("relaxed", prompt_of(120, 2)), slo_ttft_s=60.0)
    urgent = replace(make_request("urgent", prompt_of(150, 3)), slo_ttft_s=0.5)
    engine.add(relaxed, now=1.0)
    engine.add(urgent, now=1.0)
    engine.step(1.0)
    # Due at 1.5, 10 and 61; the most tokens go to the shortest.
    assert runner.shapes[-1] == [("urgent", 8), ("relaxed", 24)]


def test_an_objective_changes_only_the_order():
    engine, _ = make_engine(num_blocks=64, budget=16)
    for name, slo in (("a", None), ("b", 2.0), ("c", 1.0)):
        engine.add(replace(make_request(name, prompt_of(16, ord(name))), slo_ttft_s=slo), now=0.0)
    outputs = run_until_idle(engine)
    firsts = [output.request_id for output in outputs if output.queued_s is not None]
    assert firsts == ["c", "b", "a"]


def test_the_large_request_that_is_due_first_keeps_the_blocks_from_smaller_ones():
    engine, runner = make_engine(num_blocks=9, budget=64)
    engine.add(make_request("a", prompt_of(16, 1)), now=0.0, hold=True)
    engine.step(0.0)
    engine.add(make_request("large", prompt_of(20, 2)), now=0.0, hold=True)
    engine.add(make_request("small", prompt_of(4, 3)), now=0.0, hold=True)
    assert engine.schedule(0.0).items == ()
    engine.release("a")
    engine.step(0.0)
    assert {name for name, _ in runner.shapes[-1]} == {"large", "small"}


def test_prompts_beside_streams_get_the_small_budget_and_alone_the_whole():
    engine, runner = make_engine(num_blocks=256, budget=64, max_prefill_tokens=8)
    engine.add(make_request("stream", prompt_of(4, 1), max_tokens=3), now=0.0)
    engine.step(0.0)
    engine.add(make_request("long", prompt_of(50, 2)), now=0.0)
    for _ in range(3):
        engine.step(0.0)
    assert runner.shapes == [
        [("stream", 4)],
        [("stream", 1), ("long", 8)],
        [("stream", 1), ("long", 8)],
        [("long", 34)],
    ]


def test_a_decode_pool_computes_prompts_in_small_chunks_unless_told_otherwise():
    config = ClusterConfig()
    assert config.engine_for(Role.PREFILL).max_prefill_tokens is None
    assert config.engine_for(Role.MIXED).max_prefill_tokens is None
    assert config.engine_for(Role.DECODE).max_prefill_tokens == 32
    told = ClusterConfig(decode=PoolConfig(max_prefill_tokens=128))
    assert told.engine_for(Role.DECODE).max_prefill_tokens == 128
    common = ClusterConfig(engine=EngineConfig(max_prefill_tokens=64))
    assert {common.engine_for(role).max_prefill_tokens for role in Role} == {64}
