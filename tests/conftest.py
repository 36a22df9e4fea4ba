"""What all tests share: thread counts that fit a small machine, and a summary by folder."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

# Several processes share the cores in these tests; a thread pool in each would only make them wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A proxy in the environment must not get between a test and loopback.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# Without a GPU, Triton kernels run in its interpreter. Triton reads this once, when it is first imported, and
# transformers imports it, so it is set before any test module is collected.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_ROOT = Path(__file__).parent
_OUTCOMES = ("passed", "failed", "error", "skipped")


def _folder(nodeid: str) -> str:
    parts = Path(nodeid.split("::")[0]).parts
    return "/".join(parts[:3] if parts[1:2] == ("unit",) and len(parts) > 3 else parts[:2])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests each folder has and how they ended."""
    counts: dict[str, Counter[str]] = {}
    for outcome in _OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            if isinstance(report, pytest.TestReport):
                counts.setdefault(_folder(report.nodeid), Counter())[outcome] += 1
    terminalreporter.section("by folder")
    for folder, count in sorted(counts.items()):
        ended = ", ".join(f"{count[outcome]} {outcome}" for outcome in _OUTCOMES if count[outcome])
        terminalreporter.write_line(f"{folder:28} {ended}")
