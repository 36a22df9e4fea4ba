"""`disagg serve` as a user runs it: a process group with Ray, Serve, router and workers in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from disagg.cluster.launch import free_port

START_TIMEOUT_S = 120.0


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    url: str
    grpc_address: str
    log: Path

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=20, trust_env=False, **more)

    def status(self) -> dict[str, Any]:
        report: dict[str, Any] = self.get("/status").json()
        return report

    def pid_of(self, worker_id: str) -> int:
        """KeyError: the worker is away, as a dead one is until its replacement has joined."""
        pids: dict[str, int] = {worker["id"]: int(worker["pid"]) for worker in self.status()["workers"]}
        return pids[worker_id]

    def wait_for(self, condition: Any, timeout_s: float, what: str) -> None:
        """Wait until condition() holds; states change by events, so short sleeps are enough."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, KeyError, json.JSONDecodeError):
                if condition():
                    return
            time.sleep(0.1)
        raise AssertionError(f"not within {timeout_s} s: {what}\n{self.log.read_text()[-3000:]}")

    def wait_no_blocks(self, timeout_s: float = 20.0) -> None:
        self.wait_for(
            lambda: all(worker["kv_blocks_used"] == 0 for worker in self.status()["workers"]),
            timeout_s,
            "blocks in use return to 0",
        )

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples whose labels include the given ones."""
        from prometheus_client.parser import text_string_to_metric_families

        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """Run `disagg serve` until the block ends; then check that nothing of it is left."""
    http, grpc = free_port(), free_port()
    log = folder / "serve.log"
    command = [
        *(sys.executable, "-m", "disagg.cli.main", "serve"),
        *("--port", str(http), "--grpc-port", str(grpc)),
        *arguments,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    served = Served(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    try:
        served.wait_for(
            lambda: re.search(r"^ready in \d", log.read_text(), re.M) or process.poll() is not None,
            START_TIMEOUT_S,
            "up",
        )
        assert process.poll() is None, log.read_text()
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
