"""The chart's Serve config on a real Ray of several nodes, each offering what its pod would offer.

What KubeRay does is done here by hand: a raylet per pod with the group's parameters, token authentication on,
the config sent to the dashboard. Left out is what needs Kubernetes: images, volumes, policies, services.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagg.cluster.launch import PROXY_PORTS, REPLICA_PORTS, free_port, free_range
from tests.unit.helm.chart_support import CHART, render, serve_config, the

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef0123456789abcdef"
KEY = "sesame"
PROBE = CHART / "files" / "probe.py"
CHECK = CHART / "files" / "check.py"


@dataclass
class Nodes:
    """Raylets of one Ray cluster on this machine."""

    dashboard_port: int = field(default_factory=free_port)
    cluster: Any = None

    def start(self, parameters: dict[str, str], *, agent_port: int, head: bool = False) -> None:
        """Start a node with a group's rayStartParams; on free ports."""
        from ray.cluster_utils import Cluster

        options: dict[str, Any] = {
            # KubeRay pastes values into a shell command, which takes one level of quotes away.
            "resources": json.loads(json.loads(parameters["resources"])),
            "object_store_memory": int(parameters["object-store-memory"]),
            "num_cpus": int(parameters.get("num-cpus", 2)),
            "dashboard_agent_listen_port": agent_port,
        }
        if head:
            options |= {"include_dashboard": True, "dashboard_port": self.dashboard_port}
            self.cluster = Cluster(initialize_head=True, head_node_args=options)
        else:
            self.cluster.add_node(**options)

    def stop(self) -> None:
        if self.cluster is not None:
            self.cluster.shutdown()


def _environment(folder: Path) -> dict[str, str]:
    """Return the chart's environment, with ports of this test's own instead of a pod's."""
    first = free_range(REPLICA_PORTS + PROXY_PORTS)
    others = first + REPLICA_PORTS
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(others),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(others + 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(others + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(others + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS - 1),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def _wait(condition: Callable[[], bool], timeout_s: float, what: str, detail: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, KeyError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s} s: {what}\n{detail()}")


@dataclass
class Deployed:
    nodes: Nodes
    http_port: int
    grpc_port: int
    agent_port: int
    key_file: Path

    def dashboard(self, method: str, path: str, **more: Any) -> httpx.Response:
        url = f"http://127.0.0.1:{self.nodes.dashboard_port}{path}"
        return httpx.request(method, url, timeout=120, trust_env=False, **more)

    def run(self, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *arguments]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment, check=False
        )


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    # Ray's sockets have paths of at most 107 bytes, so not below pytest's long folder names.
    folder = tmp_path_factory.mktemp("k")
    key_file = folder / "api-key"
    key_file.write_text(KEY)
    http_port, grpc_port, agent_port = free_port(), free_port(), free_port()
    # Loopback instead of a pod's addresses, and a head-only proxy: nodes of one host would share the port.
    local = {"host": "127.0.0.1", "port": http_port, "grpc_port": grpc_port, "api_key_file": str(key_file)}
    objects = render({"frontend": {"replicas": 1}, "extraConfig": {"frontend": local}})
    config = serve_config(objects) | {"proxy_location": "HeadOnly"}
    config["http_options"] = {"host": "127.0.0.1", "port": http_port}
    cluster = the(objects, "RayService")["spec"]["rayClusterConfig"]

    with _short_folder() as short, pytest.MonkeyPatch.context() as patch:
        for name, value in _environment(short).items():
            patch.setenv(name, value)
        nodes = Nodes()
        running = Deployed(nodes, http_port, grpc_port, agent_port, key_file)
        try:
            nodes.start(cluster["headGroupSpec"]["rayStartParams"], agent_port=agent_port, head=True)
            bearer = {"Authorization": f"Bearer {TOKEN}"}
            _wait(
                lambda: running.dashboard("GET", "/api/gcs_healthz").status_code == 200,
                120,
                "the head is up",
                str,
            )
            for group in cluster["workerGroupSpecs"]:
                nodes.start(group["rayStartParams"], agent_port=free_port())
            answer = running.dashboard("PUT", "/api/serve/applications/", json=config, headers=bearer)
            assert answer.status_code == 200, answer.text
            health = f"http://127.0.0.1:{http_port}/health"
            key = {"Authorization": f"Bearer {KEY}"}
            _wait(
                lambda: httpx.get(health, headers=key, trust_env=False).status_code == 200,
                200,
                "a front end answers",
                lambda: running.dashboard("GET", "/api/serve/applications/", headers=bearer).text[-3000:],
            )
            yield running
        finally:
            nodes.stop()


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dsg", ignore_cleanup_errors=True) as name:
        yield Path(name)


def test_the_chart_s_own_check_passes(deployed: Deployed) -> None:
    done = deployed.run(
        CHECK,
        f"--http=http://127.0.0.1:{deployed.http_port}",
        f"--grpc=127.0.0.1:{deployed.grpc_port}",
        f"--key-file={deployed.key_file}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: gRPC Generate has tokens" in done.stdout
    assert "ok: without the API key it is 401" in done.stdout


def test_the_probes_are_content(deployed: Deployed) -> None:
    base = f"http://127.0.0.1:{deployed.http_port}"
    done = deployed.run(PROBE, f"--key-file={deployed.key_file}", f"{base}/ready", f"{base}/health")
    assert done.returncode == 0, done.stdout
    # Without the token: a kubelet has none.
    done = deployed.run(
        PROBE,
        "--contains=success",
        f"http://127.0.0.1:{deployed.agent_port}/api/local_raylet_healthz",
        f"http://127.0.0.1:{deployed.nodes.dashboard_port}/api/gcs_healthz",
    )
    assert done.returncode == 0, done.stdout


def test_each_actor_is_on_its_group_s_node(deployed: Deployed) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    query = "/api/v0/{}?detail=true&limit=1000"

    def listed(what: str) -> list[dict[str, Any]]:
        answer = deployed.dashboard("GET", query.format(what), headers=bearer).json()
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return rows

    groups = {
        node["node_id"]: resource.removeprefix("disagg_")
        for node in listed("nodes")
        for resource in node["resources_total"]
        if resource.startswith("disagg_")
    }
    placed = {
        actor["name"]: groups[actor["node_id"]] for actor in listed("actors") if actor["state"] == "ALIVE"
    }
    assert placed["disagg-worker-prefill-0"] == "prefill"
    assert placed["disagg-worker-decode-0"] == "decode"
    assert placed["disagg-router"] == placed["disagg-controller"] == "head"
    (front,) = [group for name, group in placed.items() if "Frontend" in name]
    assert front == "frontend"


def test_without_the_token_ray_s_dashboard_answers_nobody(deployed: Deployed) -> None:
    assert deployed.dashboard("GET", "/api/serve/applications/").status_code in (401, 403)
    assert deployed.dashboard("GET", "/api/jobs/").status_code in (401, 403)


def test_the_key_is_not_in_what_ray_shows(deployed: Deployed) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    shown = deployed.dashboard("GET", "/api/serve/applications/", headers=bearer).text
    assert "api_key_file" in shown and KEY not in shown
