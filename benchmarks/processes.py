"""What each process of a cluster on this machine takes: processor time and memory of its own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

CLIENT, OTHERS = "client", "others"


@dataclass(frozen=True)
class Usage:
    """By what a process is. cpu_s: since its start. memory_mib: anonymous, so without the KV cache's segment,
    which has its size from the start but gets its pages when they are first written."""

    cpu_s: Counter[str] = field(default_factory=Counter)
    memory_mib: Counter[str] = field(default_factory=Counter)

    def since(self, before: Usage) -> Usage:
        """Return the differences; those of processes that ended meanwhile are left out."""
        return Usage(
            Counter({name: value - before.cpu_s[name] for name, value in self.cpu_s.items()}),
            Counter({name: value - before.memory_mib[name] for name, value in self.memory_mib.items()}),
        )


def usage(root: int, known: Mapping[int, str]) -> Usage:
    """Return what the process `root`, all that it started, and this one take.

    known: names of processes of interest; HAProxy is told by its program, the rest are OTHERS.
    """
    total = Usage()
    _add(total, CLIENT, psutil.Process())
    for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
        try:
            proxy = "haproxy" in process.name() and process.pid not in known
            _add(total, "proxy" if proxy else known.get(process.pid, OTHERS), process)
        except psutil.NoSuchProcess:
            continue
    return total


def _add(total: Usage, name: str, process: psutil.Process) -> None:
    memory = _anonymous_mib(process.pid)
    times = process.cpu_times()
    total.cpu_s[name] += times.user + times.system
    total.memory_mib[name] += memory


def _anonymous_mib(pid: int) -> float:
    """Raises psutil.NoSuchProcess."""
    path = f"/proc/{pid}/status"
    if not os.path.exists("/proc/self/status"):
        return float(psutil.Process(pid).memory_full_info().uss) / 2**20
    try:
        with open(path) as lines:
            found = [line for line in lines if line.startswith("RssAnon:")]
    except OSError:
        raise psutil.NoSuchProcess(pid) from None
    return int(found[0].split()[1]) / 1024 if found else 0.0
