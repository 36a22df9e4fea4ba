"""Generate disagg/v1 from the .proto files, or with --check fail where the committed code is not current."""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "proto" / "disagg" / "v1").glob("*.proto"))


def generate(out: Path) -> None:
    """Write *_pb2.py, their stubs and the gRPC modules below `out`. Raises SystemExit if protoc fails."""
    # protoc looks its plugins up on PATH; they are installed beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--grpc_python_out={out}",
        f"--mypy_grpc_out=quiet:{out}",
        *(str(source) for source in SOURCES),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")


def stale_files(fresh: Path, committed: Path) -> list[str]:
    """Return names that are missing, surplus or different in `committed`."""
    names = {path.name for path in fresh.iterdir()} | {path.name for path in committed.glob("*_pb2*")}
    return sorted(
        name
        for name in names
        if not (fresh / name).exists()
        or not (committed / name).exists()
        or not filecmp.cmp(fresh / name, committed / name, shallow=False)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = stale_files(Path(folder) / "disagg" / "v1", ROOT / "disagg" / "v1")
    if stale:
        sys.exit(f"generated code is not current, run `make proto`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
