"""The compiled core against its twin in Python: the same placements to the last bit, and the same blocks."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.config import RouterConfig
from disagg.routing.calibration import Calibration
from disagg.routing.charges import Account
from disagg.routing.core import COMPILED, CORE, PYTHON, Core
from disagg.routing.fit import Coefficients, Fit, followed
from disagg.routing.predictors import KindFits, Predictor
from disagg.routing.router import Router
from disagg.routing.types import BlockEvents, Prediction, StepSample, TransferSample
from disagg.types import Role, WorkerLoad, WorkerStatus
from tests.unit.routing.routing_fakes import report, request

needs_core = pytest.mark.skipif(COMPILED is None, reason="no C compiler was there when this was installed")


class Story:
    """A cluster's made-up life: reports, placements and ends, the same for every router of one seed."""

    def __init__(self, core: Core, policy: str, seed: int, num_workers: int, *, degraded: bool) -> None:
        config = RouterConfig.model_validate({"policy": policy})
        self.router = Router(config, random.Random(seed), core=core, max_index_entries=3000)
        self.rng = random.Random(seed)
        self.roles = [Role.DECODE if degraded else self.rng.choice(list(Role)) for _ in range(num_workers)]
        self.sequence = [0] * num_workers
        self.alive: list[str] = []
        self.told: list[Any] = []
        self.now = 0.0

    def chain(self) -> list[int]:
        path = [self.rng.randrange(2) for _ in range(self.rng.randrange(1, 9))]
        return [hash((17, *path[: end + 1])) % 2**64 for end in range(len(path))]

    def report(self) -> None:
        number, rng = self.rng.randrange(len(self.roles)), self.rng
        snapshot = self.sequence[number] == 0 or rng.random() < 0.05
        events = BlockEvents(self.sequence[number], self.chain(), self.chain()[-2:], snapshot=snapshot)
        self.sequence[number] += 1
        streams = rng.randrange(9)
        steps = [
            StepSample(0.02 * rng.uniform(0.9, 1.1), num_tokens=100, attended=5000),
            StepSample(0.01 + 1e-3 * streams, num_decodes=streams + 1, context=100 * streams),
        ]
        load = WorkerLoad(streams, 0, waiting_tokens=rng.randrange(900), kv_blocks_used=rng.randrange(999))
        status = WorkerStatus.DRAINING if rng.random() < 0.05 else WorkerStatus.READY
        item = report(f"w{number}", self.roles[number], status=status, load=load, blocks=events, steps=steps)
        self.told.append(self.router.worker_report(item, self.now))

    def place(self, number: int) -> None:
        rng, hashes = self.rng, self.chain()
        wanted = request(
            f"r{number}",
            num_tokens=16 * len(hashes) + rng.randrange(400),
            block_hashes=tuple(hashes),
            priority=rng.choice([0, 0, 0, 1, -1]),
            slo_ttft_s=rng.choice([None, 0.05, 1.0]),
            slo_tpot_s=rng.choice([None, 0.015, 0.1]),
        )
        if len(self.router.view.pools().ready):
            self.told.append(self.router.place(wanted, self.now))
            self.alive.append(wanted.request_id)

    def run(self, steps: int) -> None:
        for _ in range(2 * len(self.roles)):
            self.report()
        for number in range(steps):
            self.now += 0.01
            kind = self.rng.random()
            if kind < 0.25:
                self.report()
            elif kind < 0.7:
                self.place(number)
            elif self.alive and kind < 0.85:
                self.router.prefilled(self.rng.choice(self.alive), self.rng.random())
            elif self.alive and kind < 0.98:
                ended = self.alive.pop(self.rng.randrange(len(self.alive)))
                self.router.finished(ended, self.rng.randrange(40), 5 * self.rng.random())
            elif self.rng.random() < 0.5:
                gone = self.rng.randrange(len(self.roles))
                self.router.worker_left(f"w{gone}", "one")
                self.sequence[gone] = 0
        self.router.index.check_integrity()
        self.router.view.check_integrity()


@needs_core
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["slo", "slo", "prefix_aware"]),
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.booleans(),
)
def test_compiled_and_python_decide_the_same(policy: str, seed: int, workers: int, degraded: bool) -> None:
    stories = [Story(core, policy, seed, workers, degraded=degraded) for core in (CORE, PYTHON)]
    for story in stories:
        story.run(60)
    compiled, python = stories
    assert compiled.told == python.told
    assert np.array_equal(compiled.router.view.table, python.router.view.table)
    assert len(compiled.router.index) == len(python.router.index)
    assert compiled.router.index.num_blocks == python.router.index.num_blocks


@needs_core
@given(
    *(st.floats(least, most) for least, most in ((0.05, 20), (0.01, 0.5))),
    st.tuples(*[st.floats(0, 1)] * 3),
    *[st.floats(0, 1e6)] * 2,
    st.floats(-1, 1e9) | st.just(float("inf")),
)
def test_a_level_follows_the_same_way_in_both(
    level: float, spread: float, coefficients: Coefficients, x1: float, x2: float, seconds: float
) -> None:
    assert CORE.follow is not None
    arguments = level, spread, coefficients, x1, x2, seconds
    assert CORE.follow(*arguments) == followed(*arguments)


SAMPLES = st.tuples(st.integers(0, 4096), st.integers(0, 10**7), st.floats(0, 1e3))


@needs_core
@settings(max_examples=100, deadline=None)
@given(st.lists(SAMPLES, max_size=60), st.integers(1, 20), st.sampled_from([(0.0, math.inf), (0.1, 0.3)]))
def test_a_fit_finds_the_same_in_both(
    samples: list[tuple[int, int, float]], every: int, slopes: tuple[float, float]
) -> None:
    assert CORE.make_fit is not None
    fits = [make((256.0, 1e5), coefficients=(0.1, 0.2, 0.0), slopes=slopes) for make in (Fit, CORE.make_fit)]
    for number, sample in enumerate(samples):
        for fit in fits:
            fit.add(*sample)
            if number % every == 0:
                fit.solve()
        python, compiled = fits
        assert compiled.coefficients == python.coefficients
        assert compiled.predict(3, 70) == python.predict(3, 70)
        found = compiled.num_samples, compiled.spread, compiled.fitted
        assert found == (python.num_samples, python.spread, python.fitted)


STEPS = st.builds(StepSample, st.floats(0, 9), *[st.integers(0, n) for n in (512, 10**6, 64, 10**5)])


@needs_core
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(STEPS, max_size=9), st.floats(0, 9), st.booleans()), max_size=9))
def test_predictors_learn_the_same_in_both(reports: list[tuple[list[StepSample], float, bool]]) -> None:
    assert CORE.make_fit is not None and CORE.make_predictor is not None
    python, compiled = Predictor(KindFits(Fit)), CORE.make_predictor(KindFits(CORE.make_fit))
    for steps, pull_s, tell_kind in reports:
        for each in (python, compiled):
            each.learn(steps, [TransferSample(pull_s, 100, len(steps))], tell_kind)
        assert compiled.fitted is python.fitted
        for name in ("prefill", "decode", "pull"):
            mine, other = getattr(compiled, name), getattr(python, name)
            assert (mine.coefficients, mine.fitted) == (other.coefficients, other.fitted)


@needs_core
def test_the_compiled_charges_and_fits_refuse_what_does_not_fit() -> None:
    assert CORE.make_fit and CORE.make_predictor and CORE.set_prices and CORE.observe
    assert CORE.open_charge and CORE.move_charge and CORE.close_charge
    fit, account, accounts = CORE.make_fit((1.0, 1.0)), Account(), [Account()]
    inside: list[Any] = [accounts, request("r"), 0, 0, 0, 0, 1, 0.0, 256.0, None]
    charge = CORE.open_charge(*inside)
    with pytest.raises(AttributeError):
        CORE.make_predictor(object())  # type: ignore[arg-type]
    for wrong in (
        lambda: CORE.make_fit and CORE.make_fit((1.0, 1.0, 1.0)),  # type: ignore[arg-type]
        lambda: CORE.make_predictor and CORE.make_predictor(SimpleNamespace(prefill=1)),  # type: ignore[arg-type]
        lambda: fit.add(1, 2, "soon"),  # type: ignore[arg-type]
        lambda: fit.predict(1),  # type: ignore[call-arg]
        lambda: CORE.set_prices and CORE.set_prices(account.costs, fit),
        lambda: CORE.observe and CORE.observe(account, (1, 2), 3),
        lambda: CORE.move_charge and CORE.move_charge(accounts, None),
        lambda: CORE.close_charge and CORE.close_charge(accounts, type(charge)()),
        lambda: CORE.open_charge and CORE.open_charge(*inside[:9]),
        lambda: CORE.open_charge and CORE.open_charge(*inside[:9], (None,)),
        lambda: setattr(account, "shorter", [0]),
        lambda: setattr(account.costs, "pull", (1.0, 2.0)),
    ):
        with pytest.raises(TypeError):
            wrong()
    for at, value in ((2, 1), (3, -1), (0, [None])):
        with pytest.raises(IndexError):
            CORE.open_charge(*inside[:at], value, *inside[at + 1 :])
    with pytest.raises(AttributeError):
        CORE.open_charge(accounts, object(), *inside[2:])
    with pytest.raises(IndexError):
        CORE.close_charge([], charge)
    assert accounts[0].own()[:2] == (0, 160)
    CORE.close_charge(accounts, charge)
    assert not any(accounts[0].own())
    charge.tpot_s = 0.5
    with pytest.raises(KeyError):
        CORE.close_charge(accounts, charge)


@needs_core
def test_the_compiled_core_refuses_what_does_not_fit() -> None:
    assert CORE.follow is not None
    with pytest.raises(TypeError):
        CORE.follow(1.0, 0.1, (1.0, 2.0, 3.0), 1.0, 2.0)
    with pytest.raises(TypeError):
        CORE.follow(1.0, 0.1, (1.0, 2.0), 1.0, 2.0, 3.0)
    with pytest.raises(TypeError):
        CORE.follow(1.0, 0.1, (1.0, 2.0, 3.0), 1.0, 2.0, "late")
    assert CORE.price is not None
    table, chains = CORE.make_table(), CORE.make_chains()
    slots = np.zeros(4, dtype=np.int64)
    for call in (
        lambda: table.store([1], -1),
        lambda: table.store([1], 2**30),
        lambda: table.held([1], chains, slots, -1),
        lambda: table.held([1], chains, np.zeros(4, dtype=np.int32), 4),
    ):
        with pytest.raises(ValueError):
            call()
    for call in (lambda: table.strip(8192, [1]), lambda: table.items(-1), lambda: table.size_of(8192)):
        with pytest.raises(IndexError):
            call()
    for call in (
        lambda: table.store(["a"], 1),  # type: ignore[list-item]
        lambda: table.held([1], [(1, 2)], slots, 4),
        lambda: chains.add([1], ["a"]),  # type: ignore[list-item]
        lambda: CORE.price and CORE.price(object(), 1.0, 0.0),
    ):
        with pytest.raises(TypeError):
            call()
    leaf = chains.add([1, 2], [0])
    for wrong in ((leaf + 1, 0), (0, 0), (leaf, 1)):
        with pytest.raises(KeyError):
            chains.drop(*wrong)
    chains.drop(leaf, 0)
    assert chains.num_blocks == chains.num_expected == 0
    table.store([1], 3)
    with pytest.raises(ValueError):
        table.held([1], chains, np.full(4, 9, dtype=np.int64), 4)
    assert table.held([1], chains, np.arange(4, dtype=np.int64), 4) is not None


@needs_core
def test_the_compiled_board_refuses_what_does_not_fit() -> None:
    make = CORE.make_board
    assert make is not None and CORE.predict is not None
    size, accounts = 4, [Account()]
    arrays = [np.zeros((24, size)), np.ones(size), np.zeros((3, size))]
    board = make(accounts, size, *arrays)
    for at, wrong in ((0, 5), (0, 0), (1, np.zeros((23, size))), (3, np.zeros((3, size), dtype=np.int64))):
        given: list[Any] = [size, *arrays]
        given[at] = wrong
        with pytest.raises(ValueError):
            make(accounts, *given)
    with pytest.raises(TypeError):
        make((), size, *arrays)
    pool = np.zeros(size).data
    inside: list[Any] = [set(), 1.0, 0.0, 10.0, 1.0, 0.5, 0.5, 1, None, None, pool, pool, b"", b""]
    assert board.best(*inside) == (2, 2, 0, 0, 0)
    out_of_range = ((7, 11), (7, -1), (5, 1.0), (6, -0.1), (10, np.zeros(3)), (12, bytes(8)))
    for kind, cases in (
        (ValueError, out_of_range),
        (TypeError, ((0, [1]), (3, "a"), (9, "a"), (11, 3), (12, None))),
        (IndexError, ((0, {3}), (0, {4}), (0, {-1}))),
    ):
        for at, value in cases:
            with pytest.raises(kind):
                board.best(*inside[:at], value, *inside[at + 1 :])
    with pytest.raises(IndexError):
        board.best(*inside[:12], np.array([size]), np.array([1]))
    with pytest.raises(IndexError):
        board.write({3}, 1.0, 0.0)
    lines = Calibration(CORE).lines
    asked: list[Any] = [Prediction, accounts, {0}, 0, 0, 0, 0, 10, 10, 0, 256.0, 0.0, lines]
    assert CORE.predict(*asked).ttft > 0
    for at, value in ((0, int), (0, 3), (2, [0]), (12, lines[:2]), (12, (1, 2, 3))):
        with pytest.raises(TypeError):
            CORE.predict(*asked[:at], value, *asked[at + 1 :])
    with pytest.raises(IndexError):
        CORE.predict(*asked[:3], 1, *asked[4:])


def test_python_alone_serves_too() -> None:
    code = "from disagg.routing.core import CORE; from disagg.routing.router import Router; print(CORE.name)"
    environment = {**os.environ, "DISAGG_ROUTER_CORE": "python"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.strip() == b"python"
