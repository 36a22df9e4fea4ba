"""Charges, liveness, restarts and assumptions; and random histories in which nothing may be left over."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from routing_fakes import DECODE, MIXED, PREFILL, report, request, router

from disagg.errors import NoCapacityError
from disagg.routing.router import CHARGE_TTL_S, Router
from disagg.routing.types import BlockEvents
from disagg.types import Role, WorkerLoad, WorkerStatus

ZERO = {"tokens": 0, "sequences": 0, "blocks": 0}


def queued(made: Router, worker_id: str) -> float:
    slot = made.view.slot(worker_id)
    assert slot is not None
    return float(made.view.queued_tokens[slot])


def sequences(made: Router, worker_id: str) -> float:
    slot = made.view.slot(worker_id)
    assert slot is not None
    return float(made.view.sequences[slot])


def test_a_request_is_charged_at_once_moves_and_ends() -> None:
    made = router(prefill=1, decode=1)
    made.place(request("r", 160, max_new_tokens=32), 0.0)
    assert made.view.charges_of("prefill-0") == {"tokens": 160, "sequences": 0, "blocks": 10}
    assert made.view.charges_of("decode-0") == {"tokens": 0, "sequences": 1, "blocks": 12}
    made.prefilled("r")
    made.prefilled("r")
    assert made.view.charges_of("prefill-0") == ZERO
    assert made.view.charges_of("decode-0") == {"tokens": 0, "sequences": 1, "blocks": 12}
    made.finished("r")
    made.finished("r")
    assert made.view.charges_of("decode-0") == ZERO
    assert made.view.num_charges == 0


def test_cached_tokens_are_not_charged() -> None:
    made = router(prefill=1, decode=1)
    made.worker_report(report("prefill-0", PREFILL, blocks=BlockEvents(0, [1, 2, 3], snapshot=True)), 0.0)
    made.place(request("r", 160, block_hashes=(1, 2, 3, 4)), 0.0)
    assert made.view.charges_of("prefill-0")["tokens"] == 160 - 48


def test_what_is_charged_and_reported_counts_once() -> None:
    made = router(prefill=1, decode=1)
    made.place(request("r", 1000), 0.0)
    made.worker_report(report("prefill-0", PREFILL, load=WorkerLoad(1, 0, waiting_tokens=400)), 0.1)
    assert queued(made, "prefill-0") == 400
    made.place(request("s", 500), 0.2)
    assert queued(made, "prefill-0") == 900
    made.prefilled("r")
    assert queued(made, "prefill-0") == 500
    made.worker_report(report("decode-0", DECODE, load=WorkerLoad(1, 0)), 0.3)
    assert sequences(made, "decode-0") == 2


def test_a_request_still_on_its_way_is_not_taken_for_progress() -> None:
    made = router(prefill=1, decode=1)
    made.place(request("r", 1000), 0.0)
    made.worker_report(report("prefill-0", PREFILL, load=WorkerLoad()), 0.1)
    assert queued(made, "prefill-0") == 1000


def test_load_that_others_caused_is_added_to_own_charges() -> None:
    made = router(prefill=1, decode=1)
    made.worker_report(report("decode-0", DECODE, load=WorkerLoad(7, 2)), 0.1)
    made.place(request("r"), 0.2)
    assert sequences(made, "decode-0") == 10
    made.worker_report(report("prefill-0", PREFILL, load=WorkerLoad(3, 1, waiting_tokens=700)), 0.3)
    assert queued(made, "prefill-0") == 700


def test_a_retry_replaces_its_earlier_charge() -> None:
    made = router(prefill=2, decode=2)
    first = made.place(request("r"), 0.0)
    second = made.place(request("r", excluded=(first.prefill_worker,)), 0.0)
    assert second.prefill_worker != first.prefill_worker
    assert made.view.charges_of(first.prefill_worker) == ZERO
    assert made.view.num_charges == 1
    made.finished("r")
    assert made.view.charges_of(second.prefill_worker) == ZERO


def test_a_front_end_takes_its_charges_along() -> None:
    made = router(prefill=1, decode=1)
    for index in range(6):
        made.place(request(f"r{index}", frontend_id="ab"[index % 2]), 0.0)
        if index > 2:
            made.prefilled(f"r{index}")
    made.frontend_left("a")
    made.frontend_left("a")
    assert made.view.frontends == ["b"]
    assert made.view.charges_of("decode-0")["sequences"] == 3
    made.frontend_left("b")
    assert made.view.charges_of("prefill-0") == made.view.charges_of("decode-0") == ZERO


def test_a_dead_worker_takes_its_side_of_a_charge_along() -> None:
    made = router(prefill=1, decode=1)
    made.place(request("r"), 0.0)
    made.worker_left("prefill-0", "one")
    assert made.view.charges_of("decode-0")["sequences"] == 1
    made.worker_report(report("prefill-0", PREFILL, incarnation="two"), 0.1)
    assert made.view.charges_of("prefill-0") == ZERO
    made.prefilled("r")
    made.worker_left("decode-0", "one")
    assert made.view.num_charges == 0
    made.finished("r")
    made.view.check_integrity()


def test_charges_are_bounded_and_expire() -> None:
    made = Router(router().config, router()._rng, max_charges=10)
    made.worker_report(report("p", PREFILL), 0.0)
    made.worker_report(report("d", DECODE), 0.0)
    for index in range(50):
        made.place(request(f"r{index}", block_hashes=(index,)), float(index))
    assert made.view.num_charges == 10
    assert made.view.charges_of("d")["sequences"] == 10
    for worker_id, role in (("p", PREFILL), ("d", DECODE)):
        made.worker_report(report(worker_id, role), CHARGE_TTL_S + 100)
    made.sweep(CHARGE_TTL_S + 100)
    assert made.view.num_charges == 0
    assert made.view.charges_of("d") == ZERO


def test_silent_workers_are_forgotten_with_their_blocks() -> None:
    made = router(prefill=1, decode=1)
    made.worker_report(report("prefill-0", PREFILL, blocks=BlockEvents(0, [1, 2], snapshot=True)), 1.0)
    version = made.view.version
    assert made.sweep(3.0) == []
    assert made.view.version == version
    assert made.sweep(3.5) == ["decode-0"]
    assert made.view.version > version
    assert made.sweep(4.5) == ["prefill-0"]
    assert made.view.workers == {}
    assert len(made.index) == 0
    with pytest.raises(NoCapacityError):
        made.place(request("r"), 5.0)


def test_another_incarnation_is_another_worker() -> None:
    made = router(prefill=1, decode=1)
    made.worker_report(report("prefill-0", PREFILL, blocks=BlockEvents(0, [1], snapshot=True)), 0.0)
    made.worker_report(report("prefill-0", PREFILL, incarnation="two"), 0.1)
    assert made.index.match([1]) == {}
    made.worker_left("prefill-0", "one")
    assert made.view.workers["prefill-0"].info.incarnation == "two"
    assert made.worker_report(
        report("prefill-0", PREFILL, incarnation="two", blocks=BlockEvents(1, [1])), 0.2
    ), "the new one must send a snapshot first"


def test_version_changes_with_membership_and_not_with_load() -> None:
    made = router(prefill=1)
    seen = [made.view.version]

    def changed() -> bool:
        seen.append(made.view.version)
        return seen[-1] != seen[-2]

    made.worker_report(report("prefill-0", PREFILL, load=WorkerLoad(3)), 0.1)
    assert not changed()
    made.worker_report(report("prefill-0", PREFILL, status=WorkerStatus.DRAINING), 0.2)
    assert changed()
    made.worker_report(report("prefill-0", DECODE), 0.2)
    assert changed()
    made.worker_left("prefill-0", "one")
    assert changed()


def test_assumptions_end_two_reports_after_their_request() -> None:
    made = router(prefill=1, decode=1)
    hashes = (11, 12)
    made.place(request("r", 40, block_hashes=hashes), 0.0)
    prefill, decode = made.view.slot("prefill-0"), made.view.slot("decode-0")
    assert made.index.match(hashes) == {prefill: 2, decode: 2}
    made.prefilled("r")
    made.worker_report(report("prefill-0", PREFILL), 0.1)
    assert prefill in made.index.match(hashes)
    made.worker_report(report("prefill-0", PREFILL), 0.2)
    assert made.index.match(hashes) == {decode: 2}
    made.finished("r")
    made.worker_report(report("decode-0", DECODE, blocks=BlockEvents(0, [11], snapshot=True)), 0.3)
    made.worker_report(report("decode-0", DECODE), 0.4)
    assert made.index.match(hashes) == {decode: 1}, "what the worker reported stays"


def test_slots_are_used_again_and_arrays_grow() -> None:
    made = router(prefill=40, decode=40)
    slots = made.view.num_slots
    for round_number in range(5):
        for index in range(40):
            made.worker_left(f"prefill-{index}", "one" if not round_number else str(round_number))
            made.worker_report(report(f"prefill-{index}", PREFILL, incarnation=str(round_number + 1)), 0.0)
    assert made.view.num_slots == slots
    placed = [made.place(request(f"r{i}"), 0.0) for i in range(80)]
    assert set(Counter(p.prefill_worker for p in placed).values()) == {2}


WORKERS: dict[str, Role] = {"p0": PREFILL, "p1": PREFILL, "d0": DECODE, "d1": DECODE, "m0": MIXED}
REQUESTS = [f"r{index}" for index in range(12)]


class RouterHistory(RuleBasedStateMachine):
    """Any order of reports, deaths, placements and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router()
        self.now = 0.0
        self.alive: dict[str, str] = {}
        self.statuses: dict[str, WorkerStatus] = {}

    @rule(
        worker=st.sampled_from(sorted(WORKERS)),
        status=st.sampled_from([WorkerStatus.READY, WorkerStatus.READY, WorkerStatus.DRAINING]),
        running=st.integers(0, 5),
        tokens=st.integers(0, 3000),
        blocks=st.lists(st.integers(0, 8), max_size=4),
        incarnation=st.sampled_from(["one", "two"]),
    )
    def reports(
        self,
        worker: str,
        status: WorkerStatus,
        running: int,
        tokens: int,
        blocks: list[int],
        incarnation: str,
    ) -> None:
        load = WorkerLoad(running, 1, waiting_tokens=tokens, kv_blocks_used=running * 10)
        events = BlockEvents(0, blocks, snapshot=True)
        self.router.worker_report(
            report(worker, WORKERS[worker], status=status, load=load, blocks=events, incarnation=incarnation),
            self.now,
        )
        self.alive[worker], self.statuses[worker] = incarnation, status

    @rule(worker=st.sampled_from(sorted(WORKERS)), incarnation=st.sampled_from(["one", "two"]))
    def leaves(self, worker: str, incarnation: str) -> None:
        self.router.worker_left(worker, incarnation)
        if self.alive.get(worker) == incarnation:
            del self.alive[worker]

    @rule(seconds=st.floats(0.1, 2.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.router.sweep(self.now):
            del self.alive[worker]

    @rule(
        request_id=st.sampled_from(REQUESTS),
        tokens=st.integers(1, 600),
        hashes=st.lists(st.integers(0, 8), max_size=4),
        excluded=st.lists(st.sampled_from(sorted(WORKERS)), max_size=3),
        frontend=st.sampled_from(["a", "b"]),
    )
    def places(
        self, request_id: str, tokens: int, hashes: list[int], excluded: list[str], frontend: str
    ) -> None:
        ready = {worker for worker in self.alive if self.statuses[worker] is WorkerStatus.READY}
        wanted = request(
            request_id,
            tokens,
            # Chained, as real ones are.
            block_hashes=tuple(hash(tuple(hashes[: end + 1])) for end in range(len(hashes))),
            excluded=tuple(excluded),
            frontend_id=frontend,
        )
        try:
            placement = self.router.place(wanted, self.now)
        except NoCapacityError:
            assert not ready
            return
        chosen = {placement.prefill_worker, placement.decode_worker}
        assert chosen <= ready
        if ready - set(excluded):
            assert not chosen & set(excluded)
        assert 0 <= placement.cached_tokens < tokens

    @rule(request_id=st.sampled_from(REQUESTS))
    def prefills(self, request_id: str) -> None:
        self.router.prefilled(request_id)

    @rule(request_id=st.sampled_from(REQUESTS))
    def finishes(self, request_id: str) -> None:
        self.router.finished(request_id)

    @rule(frontend=st.sampled_from(["a", "b"]))
    def frontend_leaves(self, frontend: str) -> None:
        self.router.frontend_left(frontend)

    @invariant()
    def books_agree(self) -> None:
        assert self.router.view.workers.keys() == self.alive.keys()
        self.router.view.check_integrity()
        self.router.index.check_integrity()

    def teardown(self) -> None:
        for request_id in REQUESTS:
            self.router.finished(request_id)
        assert self.router.view.num_charges == 0
        assert self.router.view.frontends == []
        for worker in self.alive:
            assert self.router.view.charges_of(worker) == ZERO
        for worker, incarnation in self.alive.items():
            for _ in range(2):
                empty = BlockEvents(0, snapshot=True)
                self.router.worker_report(
                    report(worker, WORKERS[worker], blocks=empty, incarnation=incarnation), self.now
                )
        # Every assumption has ended, and the workers say that they hold nothing.
        assert len(self.router.index) == 0


TestRouterHistory = RouterHistory.TestCase
TestRouterHistory.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
