"""All that can be said of a GPU in under ten minutes: kernel tests, kernels, engine; one JSON and one plot.

    python benchmarks/gpu.py --json gpu.json --plot gpu.png

Needs torch, triton, numpy, pydantic, pyyaml, safetensors, tqdm and rich; pytest for the tests, matplotlib for
the plot; no Ray. Each part runs in a process of its own under a time limit, and one that fails does not take
the others along: what it printed is in the JSON, and this program ends with status 1.

--smoke: the same on a CPU, tiny and under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("llama-3.2-1b", "qwen3-8b", "llama-3.1-8b")
# Together below ten minutes. The tests come last: a kernel is compared with its peer before it is timed.
LIMITS_S = {**{f"engine/{shape}": 80 for shape in SHAPES}, "engine": 80, "kernels": 150, "tests": 180}


def commands(smoke: bool, folder: Path) -> dict[str, list[str]]:
    """Return what each part runs; it writes output_of(part, folder)."""
    device, python = "cpu" if smoke else "cuda", sys.executable
    # The interpreter runs the kernels' tests in `make test` already.
    tests = [] if smoke else [
        f"test_kernels_{name}.py"
        for name in ("elementwise", "sampling", "eligibility", "block_copy", "decode_attention",
                     "prefill_attention")
    ]  # fmt: skip
    engine = [python, "benchmarks/engine.py", "--device", device, "--runs", "1" if smoke else "5"]
    kernels = [python, "benchmarks/kernels.py", "--device", device]
    if smoke:
        kernels += ["--runs", "1", "--only", "block"]
    engines = {"engine": engine} if smoke else {
        f"engine/{shape}": [*engine, "--shape", shape] for shape in SHAPES
    }  # fmt: skip
    return {
        **{part: [*command, "--json", str(output_of(part, folder))] for part, command in engines.items()},
        "kernels": [*kernels, "--json", str(output_of("kernels", folder))],
        "tests": [
            *(python, "-m", "pytest", "-x", "tests/unit/transfer/test_cuda_ipc.py"),
            *(f"tests/unit/model/{name}" for name in tests),
        ],
    }


def output_of(part: str, folder: Path) -> Path:
    return folder / f"{part.replace('/', '-')}.json"


def run(command: list[str], limit_s: float) -> dict[str, Any]:
    """Run one part; return its status, seconds and the end of what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=limit_s, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        status, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        printed = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        status = 124
    seconds = round(time.monotonic() - started, 1)
    return {"status": status, "seconds": seconds, "output": printed[-4000:]}


def merged(folder: Path, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the parts' rows together; the machine is described once."""
    machine: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name in parts:
        path = output_of(name, folder)
        if path.exists():
            report = json.loads(path.read_text())
            machine, rows = machine | report["machine"], rows + report["rows"]
    return {"machine": machine, "rows": rows, "parts": parts}


def draw(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> str | None:
    """Plot every row's share of its limit; return why that is not possible, None if it is."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return "no plot: matplotlib is not installed"
    drawn = [row for row in rows if "limit" in row]
    places = range(len(drawn))
    figure = Figure(figsize=(10, 1 + 0.35 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.barh([place - 0.2 for place in places], [row["share"] for row in drawn], 0.4, label="disagg")
    peers = [row["peer"] / row["limit"] for row in drawn]
    axes.barh([place + 0.2 for place in places], peers, 0.4, label="torch; engine without overlap")
    axes.set_yticks(list(places), [row["name"] for row in drawn])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the limit measured in the same run")
    axes.set_title(f"{machine.get('gpu', machine.get('cpu'))}, torch {machine.get('torch')}")
    axes.legend()
    figure.savefig(path)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    arguments = parser.parse_args()
    parts = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, command in commands(arguments.smoke, folder).items():
            parts[part] = run(command, LIMITS_S[part])
            print(f"{part}: status {parts[part]['status']} after {parts[part]['seconds']} s", flush=True)
            if parts[part]["status"]:
                print(parts[part]["output"])
            # Written after each part, so that an end from outside leaves what is there.
            report = merged(folder, parts)
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for row in report["rows"]:
        share = f", {row['share']:.0%} of {row['limit']:.4g}" if "limit" in row else ""
        print(f"{row['name']}: {row['value']:.4g} {row['unit']}{share}")
    if arguments.plot and (problem := draw(report["rows"], report["machine"], arguments.plot)):
        print(problem)
    if any(part["status"] for part in parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
