"""A real Prometheus scrapes `disagg serve` under load: every query answers, every alert fires once.

Minutes long (-m slow). Prometheus is Debian's package `prometheus`, or PROMETHEUS names the program. The
rules are the chart's, except that alerts are not held back and groups are evaluated each second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from disagg.cluster.launch import free_port
from tests.cluster.served import Served, serving

CHART = Path(__file__).resolve().parents[2] / "helm" / "disagg"
PROGRAM = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROGRAM is None, reason="no prometheus on PATH or in PROMETHEUS (Debian package)"),
]
# A small cache fills, few waiting requests are too many (admission's queue is the first to be full), no
# objective can be met, leases are short.
SETTINGS: dict[str, Any] = {
    "engine": {"num_kv_blocks": 200, "max_waiting": 6, "max_num_seqs": 8},
    "admission": {"max_queue": 16},
    "transfer": {"lease_s": 0.6},
    "router": {"dead_after_s": 3.0, "heartbeat_s": 0.3},
    "slo": {"ttft_s": 1e-4, "tpot_s": 1e-6},
    "frontend": {"replicas": 2},
}


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}{path}", params=params, timeout=10, trust_env=False).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        result: list[Any] = self.get("/api/v1/query", query=expression)["result"]
        return result

    def firing(self) -> set[str]:
        alerts = self.get("/api/v1/alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def has_fired(self) -> set[str]:
        found = self.query('count by (alertname) (max_over_time(ALERTS{alertstate="firing"}[1h]))')
        return {sample["metric"]["alertname"] for sample in found}


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Run Prometheus until the block ends."""
    assert PROGRAM is not None
    rules = yaml.safe_load((CHART / "rules" / "disagg.yaml").read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule.pop("for", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [{"job_name": "disagg", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROGRAM,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: _answers(f"http://127.0.0.1:{port}/-/ready"), 30, "Prometheus is up")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    return False


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.5)


class Load:
    """Requests on a thread, a few at a time, until told to stop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.concurrency = 2
        self.max_tokens = 20
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    async def _run(self) -> None:
        number = 0
        running: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(base_url=self._url, timeout=30, trust_env=False) as client:
            while not self._stop.is_set():
                while len(running) < self.concurrency:
                    number += 1
                    running.add(asyncio.create_task(self._ask(client, number)))
                _, running = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                task.cancel()

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        prompt = " ".join(str(number * 7 + i) for i in range(60))
        body = {"prompt": prompt, "max_tokens": self.max_tokens, "ignore_eos": True}
        with contextlib.suppress(httpx.HTTPError):
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code == 429:
                await asyncio.sleep(0.2)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process without a word to anyone, and let it go on."""
    process = psutil.Process(pid)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def panel_queries() -> list[tuple[str, str]]:
    queries = []
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                expression = target["expr"].replace("$__rate_interval", "30s")
                expression = expression.replace("$job", "disagg").replace("$worker", ".*")
                queries.append((f"{path.stem}: {panel['title']}", expression))
    return queries


def test_every_query_answers_and_every_alert_fires(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    rules = yaml.safe_load((CHART / "rules" / "disagg.yaml").read_text())
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    with prometheus(tmp_path, "127.0.0.1:1") as idle:
        wait_for(lambda: "DisaggMetricsAbsent" in idle.firing(), 20, "nothing to scrape is told of")
    with serving(tmp_path, "--config", str(config)) as served:
        (tmp_path / "live").mkdir()
        with (
            prometheus(tmp_path / "live", served.url.removeprefix("http://")) as watch,
            Load(served.url) as load,
        ):
            fired = {"DisaggMetricsAbsent"}
            check_queries(watch)
            fired |= provoke(served, watch, load)
    assert fired == names


def check_queries(watch: Prometheus) -> None:
    """Wait until every query of every panel and rule answers with data."""
    groups = yaml.safe_load((CHART / "rules" / "disagg.yaml").read_text())["groups"]
    records = [
        (rule["record"], rule["expr"]) for group in groups for rule in group["rules"] if "record" in rule
    ]
    empty: list[tuple[str, str]] = []

    def answered() -> bool:
        empty[:] = [each for each in (*panel_queries(), *records) if not watch.query(each[1])]
        return not empty

    try:
        wait_for(answered, 60, "every query answers")
    except AssertionError:
        raise AssertionError(f"no data: {empty}") from None
    print(f"{len(panel_queries())} panel queries and {len(records)} recording rules answer with data")


def provoke(served: Served, watch: Prometheus, load: Load) -> set[str]:
    """Bring about each kind of trouble in turn; return the alerts that fired, each when it was due."""
    seen: set[str] = set()

    def expect(*names: str, within: float = 45) -> None:
        wait_for(lambda: set(names) <= watch.firing(), within, f"{names} fire")
        seen.update(names)
        print(f"fired: {', '.join(names)}")

    expect("DisaggSLOBurnRate")

    load.concurrency, load.max_tokens = 10, 200
    expect("DisaggKVCacheNearFull")
    load.concurrency, load.max_tokens = 60, 50
    expect("DisaggRequestsShed")
    assert watch.query('disagg_router_refusals_total{reason="queue_full"} > 0'), "admission says why"
    load.concurrency, load.max_tokens = 4, 20

    decode = served.pid_of("decode-0")
    for _ in range(6):
        # Longer than a lease, shorter than it takes to be given up: KV expires before it is fetched.
        with stopped(decode):
            time.sleep(1.6)
        time.sleep(2)
    expect("DisaggKVLeaseExpiries", "DisaggKVTransferFailures")

    with stopped(served.pid_of("decode-0")):
        expect("DisaggPoolWithoutCapacity", "DisaggWorkersMissing")
    wait_for(lambda: "DisaggPoolWithoutCapacity" not in watch.firing(), 60, "the pool is back")

    with stopped(int(served.status()["router"]["pid"])):
        expect("DisaggRouterAway")
    wait_for(lambda: "DisaggRouterAway" not in watch.firing(), 60, "the router is back")
    assert seen <= watch.has_fired()
    return seen
