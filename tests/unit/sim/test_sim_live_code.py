"""The simulator runs the live Router, Scheduler, BlockPool and Engine, and has none of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sim_support import pool, requests, spec_of

import disagg.sim
from disagg.engine.block_pool import BlockPool
from disagg.engine.engine import Engine
from disagg.engine.scheduler import Scheduler
from disagg.routing.policies import POLICIES, Policy
from disagg.routing.router import Router
from disagg.sim.simulation import Simulation

FOLDER = Path(next(iter(disagg.sim.__path__)))
# Methods by which one of these is recognised, whatever it is called.
DECIDING = {"choose", "place", "schedule", "allocate", "free", "lookup", "admit", "preempt"}


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(FOLDER.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def _definitions() -> Iterator[tuple[Path, str, list[str]]]:
    """Yield what the package defines: (file, name, base classes)."""
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield path, node.name, [ast.unparse(base) for base in node.bases]
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, f"{node.name}()", []


def test_no_policy_scheduler_or_pool_is_defined_here() -> None:
    live = {"Router", "Scheduler", "BlockPool", "Engine", "ClusterView", "PrefixIndex", "Policy"}
    live |= {policy.__name__ for policy in POLICIES.values()}
    found = list(_definitions())
    assert len(found) > 50
    for path, name, bases in found:
        assert name.strip("_()") not in DECIDING, f"{path}: {name}"
        assert name not in live, f"{path}: {name}"
        assert not live.intersection(bases), f"{path}: {name} is derived from live code"
        words = ("policy", "scheduler", "router", "blockpool", "admission")
        is_class = not name.endswith("()")
        assert not (is_class and any(word in name.lower() for word in words)), f"{path}: {name}"


def test_live_code_is_not_patched() -> None:
    """Nothing is assigned to live objects besides what the progress of a sequence consists of."""
    for path, tree in _sources():
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target).startswith(("seq.", "engine.")):
                    assert path.name == "decode_run.py", f"{path}: {ast.unparse(target)}"
                    assert target.attr in ("token_ids", "block_table"), f"{path}: {ast.unparse(target)}"


def test_what_runs_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(spec_of({"p": pool("prefill"), "d": pool("decode")}), requests((0.0, 100, 9)))
    router = simulation.frontend.router
    assert type(router) is Router
    assert isinstance(router.policy, tuple(POLICIES.values()))
    for worker in simulation.workers.values():
        assert type(worker.engine) is Engine
        assert type(worker.engine._scheduler) is Scheduler
        assert type(worker.engine._pool) is BlockPool
    simulation.run()


def test_another_policy_of_the_live_router_decides() -> None:
    class Last:
        name = "last"

        def choose(self, request, view, index, rng):  # type: ignore[no-untyped-def]
            from disagg.routing.policies import Choice

            slot = int(view.pools().ready[-1])
            return Choice(slot, slot)

    policy: Policy = Last()
    simulation = Simulation(spec_of({"m": pool("mixed", 3)}), requests((0.0, 100, 9)), policy=policy)
    simulation.run()
    assert [worker.usage.prompt_tokens for worker in simulation.workers.values()] == [0, 0, 100]


def test_importing_loads_neither_torch_nor_ray_nor_a_loop() -> None:
    code = "import sys, disagg.sim.simulation; print(*(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "grpc", "asyncio", "matplotlib"} & set(result.stdout.split())
