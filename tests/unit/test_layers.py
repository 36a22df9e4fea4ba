"""The imports, read from the source, run only to the left; see ARCHITECTURE.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "disagg"

# Left to right. Names in one group are siblings and do not import each other.
LAYERS: list[set[str]] = [
    {"types", "errors", "config", "hashing", "v1", "rpc", "tls", "pages"},
    {"engine", "routing", "workload"},
    {"model", "transfer", "service", "tinymodel"},
    {"cluster", "offline", "sim"},
    {"frontend", "bench", "client"},
    {"cli"},
]
# The leaves are one layer of small modules that do build on each other.
LEAVES = LAYERS[0]
# Who may import these third-party packages.
CONFINED = {
    "ray": {"cluster", "frontend", "cli"},
    "torch": {"model", "transfer", "cluster", "tinymodel", "cli"},
    "starlette": {"frontend"},
    "transformers": {"tinymodel"},
}
RAY_FILES_OUTSIDE_CLUSTER = {"disagg/frontend/app.py", "disagg/cli/serve.py"}


def _layer(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            if node.module == "disagg":
                yield from (f"disagg.{alias.name}" for alias in node.names)


def _sources() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "v1" not in path.parts and path.parent != PACKAGE]


def _package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_to_the_left(path: Path) -> None:
    own = _package_of(path)
    for module in _imports(path):
        if not module.startswith("disagg."):
            continue
        other = module.split(".")[1]
        if other in (own, "__version__"):
            continue
        assert _layer(other) < _layer(own), f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    own, name = _package_of(path), str(path.relative_to(ROOT))
    for module in _imports(path):
        top = module.split(".")[0]
        if top in CONFINED:
            assert own in CONFINED[top], f"{name} imports {module}"
        if top == "ray" and own != "cluster":
            assert name in RAY_FILES_OUTSIDE_CLUSTER, f"{name} imports {module}"


def test_leaves_import_only_leaves() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.name == "__init__.py":
            continue
        for module in _imports(path):
            if module.startswith("disagg."):
                assert module.split(".")[1] in LEAVES, f"{path.name} imports {module}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("disagg", {"torch", "ray", "grpc", "pydantic", "numpy"}),
        ("disagg.engine.engine", {"torch", "ray", "grpc", "numpy"}),
        ("disagg.routing.router", {"torch", "ray", "grpc"}),
        ("disagg.workload", {"torch", "ray", "grpc"}),
        ("disagg.sim.simulation", {"torch", "ray", "grpc", "asyncio"}),
        ("disagg.service.orchestrator", {"torch", "ray"}),
        ("disagg.transfer.client", {"torch", "ray"}),
        ("disagg.client", {"torch", "ray"}),
        ("disagg.cli.main", {"torch", "ray", "transformers"}),
    ],
)
def test_importing_stays_light(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(m for m in sys.modules if '.' not in m))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not forbidden & set(result.stdout.split())
