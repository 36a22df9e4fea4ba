"""What the autoscaler asks for, given what it saw."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.config import AutoscalerConfig
from disagg.routing.autoscaler import Bounds, Demand, Plan, Snapshot, WorkerSample, plan, predict
from disagg.types import Role

CONFIG = AutoscalerConfig(
    enabled=True, max_workers=10, slo_ttft_s=1.0, slo_tpot_s=0.1, look_back_s=60, look_ahead_s=30
)
BOUNDS = {Role.PREFILL: Bounds(1, 8), Role.DECODE: Bounds(1, 8)}
OLD = 1000.0


def prefill(index: int, queued_s: float = 0.0, *, age_s: float = OLD, draining: bool = False) -> WorkerSample:
    return WorkerSample(f"p{index}", Role.PREFILL, age_s, draining, queued_s, prompt_s=0.3)


def decode(index: int, sequences: float = 0.0, kv: float = 0.1, *, age_s: float = OLD) -> WorkerSample:
    return WorkerSample(
        f"d{index}", Role.DECODE, age_s, sequences=sequences, max_sequences=32,
        step_base_s=0.02, step_sequence_s=0.004, kv_usage=kv,
    )  # fmt: skip


def watch(
    workers: Callable[[float], list[WorkerSample]], seconds: int = 61, **more: object
) -> list[Snapshot]:
    return [Snapshot(float(at), tuple(workers(float(at))), **more) for at in range(seconds)]  # type: ignore[arg-type]


def decide(history: list[Snapshot], config: AutoscalerConfig = CONFIG, last_change: float = -1e9) -> Plan:
    return plan(history, BOUNDS, config, last_change)


def test_what_suffices_stays() -> None:
    decided = decide(watch(lambda at: [prefill(0, 0.3 * (at % 2)), decode(0, 6)]))
    assert decided.sizes == {Role.PREFILL: 1, Role.DECODE: 1}


def test_time_in_the_queue_makes_prefill_grow_though_each_prompt_alone_is_quick() -> None:
    decided = decide(watch(lambda at: [prefill(0, 6.0), decode(0, 2)]))
    assert decided.sizes[Role.PREFILL] > 4
    assert decided.sizes[Role.DECODE] == 1


def test_a_batch_that_is_too_large_makes_decode_grow_to_the_size_that_meets_the_objective() -> None:
    decided = decide(watch(lambda at: [prefill(0), decode(0, 30)]))
    # 0.02 + 0.004 * 30 is 0.14; with two workers 0.08.
    assert decided.sizes == {Role.PREFILL: 1, Role.DECODE: 2}


def test_a_full_kv_cache_makes_decode_grow() -> None:
    assert decide(watch(lambda at: [prefill(0), decode(0, 10, kv=1.2)])).sizes[Role.DECODE] == 2


def test_a_pool_shrinks_by_one_when_less_would_have_done_all_the_time() -> None:
    decided = decide(watch(lambda at: [prefill(0), *(decode(index, 1) for index in range(4))]))
    assert decided.sizes == {Role.PREFILL: 1, Role.DECODE: 3}


def test_it_does_not_shrink_if_a_moment_of_the_look_back_needed_all() -> None:
    def workers(at: float) -> list[WorkerSample]:
        return [prefill(0), *(decode(index, 15 if at == 20 else 1) for index in range(2))]

    assert decide(watch(workers)).sizes[Role.DECODE] == 2


def test_it_does_not_shrink_before_it_has_looked_long_enough() -> None:
    history = watch(lambda at: [prefill(0), decode(0), decode(1)], seconds=20)
    assert decide(history).sizes[Role.DECODE] == 2


def test_it_looks_ahead_before_it_shrinks() -> None:
    def steady(at: float) -> list[WorkerSample]:
        return [prefill(0), decode(0, 5), decode(1, 5)]

    def rising(at: float) -> list[WorkerSample]:
        return [prefill(0), decode(0, at / 60 * 5), decode(1, at / 60 * 5)]

    assert decide(watch(steady)).sizes[Role.DECODE] == 1
    far = CONFIG.model_copy(update={"look_ahead_s": 120.0})
    assert decide(watch(rising), far).sizes[Role.DECODE] == 2


def test_samples_of_a_cold_worker_are_ignored_but_it_counts() -> None:
    def workers(at: float) -> list[WorkerSample]:
        # Its first steps look as if one sequence took for ever.
        cold = WorkerSample("d1", Role.DECODE, 2.0, sequences=60, step_base_s=9.0, max_sequences=32)
        return [prefill(0), decode(0, 18), cold]

    assert decide(watch(workers)).sizes == {Role.PREFILL: 1, Role.DECODE: 2}


def test_what_was_ordered_is_not_ordered_again() -> None:
    history = watch(lambda at: [prefill(0), decode(0, 30)], starting=(Role.DECODE,))
    assert decide(history).sizes[Role.DECODE] == 2


def test_after_a_change_it_waits() -> None:
    history = watch(lambda at: [prefill(0, 6.0), decode(0)])
    assert decide(history, last_change=history[-1].at - 1).sizes == {Role.PREFILL: 1, Role.DECODE: 1}


def test_where_nobody_can_be_added_an_idle_pool_lends_a_worker() -> None:
    config = CONFIG.model_copy(update={"max_workers": 4})
    history = watch(lambda at: [prefill(0), prefill(1), prefill(2), decode(0, 30)])
    decided = decide(history, config)
    assert decided.flip == (Role.PREFILL, Role.DECODE)
    assert decided.sizes == {Role.PREFILL: 2, Role.DECODE: 2}


def test_nobody_lends_what_it_needs() -> None:
    config = CONFIG.model_copy(update={"max_workers": 3})
    history = watch(lambda at: [prefill(0, 3.0), prefill(1, 3.0), decode(0, 30)])
    assert decide(history, config).flip is None


def test_a_dead_worker_is_replaced_at_once() -> None:
    history = watch(lambda at: [prefill(0)])
    decided = decide(history, last_change=history[-1].at)
    assert decided.sizes[Role.DECODE] == 1


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@given(
    busy=st.floats(0, 20), backlog=st.floats(0, 100), prompt=st.floats(0.001, 5),
    sequences=st.floats(0, 500), kv=st.floats(0, 5), places=st.integers(1, 64),
)  # fmt: skip
def test_more_workers_never_make_it_slower(role, busy, backlog, prompt, sequences, kv, places) -> None:  # type: ignore[no-untyped-def]
    demand = Demand(0.0, 1, busy, backlog, prompt, sequences, kv, places, 0.01, 0.002)
    times = [predict(role, demand, size) for size in range(1, 30)]
    assert all(later <= before * (1 + 1e-9) for before, later in pairwise(times))


@settings(max_examples=150, deadline=None)
@given(
    queues=st.lists(st.floats(0, 30), min_size=0, max_size=6),
    batches=st.lists(st.floats(0, 80), min_size=0, max_size=6),
    limits=st.tuples(st.integers(1, 4), st.integers(1, 8)),
    total=st.integers(2, 12),
    age=st.sampled_from([0.0, OLD]),
)
def test_plans_keep_to_the_bounds_and_change_one_thing(queues, batches, limits, total, age) -> None:  # type: ignore[no-untyped-def]
    low, high = min(limits), max(limits)
    bounds = {Role.PREFILL: Bounds(low, high), Role.DECODE: Bounds(low, high)}
    workers = [prefill(index, queued, age_s=age) for index, queued in enumerate(queues)]
    workers += [decode(index, batch, age_s=age) for index, batch in enumerate(batches)]
    config = CONFIG.model_copy(update={"max_workers": max(total, 2 * low)})
    history = watch(lambda at: workers)
    decided = plan(history, bounds, config, -1e9)
    before = {Role.PREFILL: len(queues), Role.DECODE: len(batches)}
    assert decided == plan(history, bounds, config, -1e9)
    if decided.flip is not None:
        giver, receiver = decided.flip
        assert decided.sizes == {giver: before[giver] - 1, receiver: before[receiver] + 1}
        assert decided.sizes[giver] >= low
    for role, size in decided.sizes.items():
        assert min(low, before[role]) <= size <= max(high, before[role])
    grown = sum(decided.sizes.values()) > sum(before.values())
    assert not grown or sum(decided.sizes.values()) <= config.max_workers
