"""A Ray of two hosts: prefill on one, decode on the other, and a link between them that is slowed and cut.

What crosses the link goes over gRPC, since the hosts differ; whatever happens to it, every request ends with
the tokens that one engine in one process gives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from disagg import LLM, SamplingParams
from tests.cluster.two_hosts import Host, can_make_hosts, two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not can_make_hosts(), reason="namespaces can't be made here"),
]

MAX_TOKENS = 24
PORT, GCS_PORT = 8000, 6379
PULL_TIMEOUT_S = 2.0


@dataclass
class Cluster:
    """submit: runs a function on a thread that sees the first host's network."""

    first: Host
    second: Host
    submit: Callable[..., Future[Any]]

    def get(self, path: str) -> httpx.Response:
        answer: httpx.Response = self.submit(
            httpx.get, f"http://127.0.0.1:{PORT}{path}", timeout=20, trust_env=False
        ).result()
        return answer

    def worker(self, role: str) -> dict[str, Any]:
        (found,) = [item for item in self.get("/status").json()["workers"] if item["role"] == role]
        return dict(found)

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def moved(self) -> float:
        return self.metric("disagg_kv_transfer_bytes_total", transport="grpc")

    def start(self, prompt: list[int], salt: str) -> Future[Any]:
        """Ask for a completion; `salt` keeps it from finding an earlier prompt's blocks."""
        body = {
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
        }
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        return self.submit(httpx.post, url, json=body, timeout=60, trust_env=False)

    def kv_ports(self) -> list[int]:
        """Return the ports of its host's address on which the prefill worker listens."""
        pid = self.worker("prefill")["pid"]
        lines = self.first.run("ss", "-Hltnp").splitlines()
        listening = [line.split()[3].rsplit(":", 1) for line in lines if f"pid={pid}," in line]
        return sorted(int(port) for address, port in listening if address == self.first.address)


def text(answer: Future[Any]) -> str:
    response: httpx.Response = answer.result()
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "length"
    return str(choice["text"])


@pytest.fixture(scope="module")
def expected() -> dict[int, tuple[list[int], str]]:
    """Prompts by length, each with what one engine says."""
    llm = LLM()
    tokens = llm.get_tokenizer().encode(" ".join(str(number) for number in range(1, 400)))
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    prompts = {length: tokens[:length] for length in (17, 200, 500)}
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts.values()], params, use_tqdm=False
    )
    return {
        length: (prompt, result.outputs[0].text)
        for (length, prompt), result in zip(prompts.items(), results, strict=True)
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("two")
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "network": {"host": "auto"},
                "prefill": {"resources": {"first": 0.01}, "threads": 1, "pin_threads": False},
                "decode": {"resources": {"second": 0.01}, "threads": 1, "pin_threads": False},
                "router": {"resources": {"first": 0.01}, "local_prefill": False},
                "frontend": {"resources": {"first": 0.01}, "port": PORT, "grpc_port": 9000},
                "transfer": {"pull_timeout_s": PULL_TIMEOUT_S, "lease_s": 10},
            }
        )
    )
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": f"10.77.0.1:{GCS_PORT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with two_hosts() as (first, second), contextlib.ExitStack() as stack:
        head = ("--head", f"--port={GCS_PORT}", "--include-dashboard=false")
        _ray_start(first, environment, "first", *head)
        _ray_start(second, environment, "second", f"--address=10.77.0.1:{GCS_PORT}")
        log = folder / "serve.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                first.command(sys.executable, "-m", "disagg.cli.main", "serve", "--config", str(config)),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        stack.callback(process.wait)
        stack.callback(process.kill)
        submit = stack.enter_context(first.threads(8))
        running = Cluster(first, second, submit)
        deadline = time.monotonic() + 180
        while not _ready(running):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield running


def _ray_start(host: Host, environment: dict[str, str], resource: str, *options: str) -> None:
    host.run(
        *("ray", "start", *options, f"--node-ip-address={host.address}", "--num-cpus=2"),
        *(f'--resources={{"{resource}": 1}}', f"--object-store-memory={80 * 2**20}"),
        env=environment,
    )


def _ready(cluster: Cluster) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return cluster.get("/ready").status_code == 200
    return False


def test_the_hand_off_crosses_by_grpc(cluster: Cluster, expected: dict[int, tuple[list[int], str]]) -> None:
    prefill, decode = cluster.worker("prefill"), cluster.worker("decode")
    assert cluster.kv_ports(), "the prefill worker listens on its host's address"
    before = cluster.moved()
    for length, (prompt, answer) in expected.items():
        assert text(cluster.start(prompt, f"whole{length}")) == answer
    assert cluster.moved() > before
    assert cluster.metric("disagg_kv_transfer_bytes_total") == cluster.moved()
    # By its name the machine is one, so names are not what is compared.
    assert prefill["host"] == decode["host"]


def test_a_slow_link_costs_time_and_no_token(
    cluster: Cluster, expected: dict[int, tuple[list[int], str]]
) -> None:
    prompt, answer = expected[500]
    before, failures = cluster.moved(), cluster.metric("disagg_kv_transfer_failures_total")
    cluster.first.slow("20mbit")
    try:
        began = time.monotonic()
        asked = [cluster.start(prompt, f"slow{index}") for index in range(3)]
        assert [text(item) for item in asked] == [answer] * 3
        seconds = time.monotonic() - began
    finally:
        cluster.first.full_speed()
    bytes_moved = cluster.moved() - before
    assert bytes_moved > 0
    if cluster.metric("disagg_kv_transfer_failures_total") == failures:
        assert seconds > 0.8 * bytes_moved / (20e6 / 8), "the link was not slow"


def test_a_cut_link_is_survived_by_computing_again(
    cluster: Cluster, expected: dict[int, tuple[list[int], str]]
) -> None:
    prompt, answer = expected[200]
    ports, before = cluster.kv_ports(), cluster.moved()
    cluster.first.cut(ports)
    try:
        asked = [cluster.start(prompt, f"cut{index}") for index in range(3)]
        assert [text(item) for item in asked] == [answer] * 3
        assert cluster.moved() == before
    finally:
        cluster.first.mend(ports)
    _pulls_again(cluster, expected)


def test_a_link_that_is_cut_in_the_middle_of_a_pull(
    cluster: Cluster, expected: dict[int, tuple[list[int], str]]
) -> None:
    prompt, answer = expected[500]
    ports = cluster.kv_ports()
    cluster.first.slow("10mbit")
    try:
        for round_, pause in enumerate((0.2, 0.5)):
            asked = [cluster.start(prompt, f"middle{round_}{index}") for index in range(3)]
            time.sleep(pause)
            cluster.first.cut(ports)
            time.sleep(0.5)
            cluster.first.mend(ports)
            assert [text(item) for item in asked] == [answer] * 3
    finally:
        cluster.first.full_speed()
    _pulls_again(cluster, expected)


def _pulls_again(cluster: Cluster, expected: dict[int, tuple[list[int], str]]) -> None:
    """The link is whole: hand-offs cross it soon, and no block is held for what came before."""
    prompt, answer = expected[200]
    before, deadline = cluster.moved(), time.monotonic() + 60
    while cluster.moved() == before:
        assert time.monotonic() < deadline, "nothing crosses a link that is whole again"
        assert text(cluster.start(prompt, secrets.token_hex(4))) == answer
    while any(item["kv_blocks_used"] for item in cluster.get("/status").json()["workers"]):
        assert time.monotonic() < deadline, "blocks are held"
        time.sleep(0.2)
