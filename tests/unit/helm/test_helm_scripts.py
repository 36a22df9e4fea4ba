"""The scripts that the chart puts into pods, run as pods run them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chart_support import CHART

PROBE = CHART / "files" / "probe.py"
FETCH = CHART / "files" / "fetch_model.py"
CHECK = CHART / "files" / "check.py"

KEY = "sesame"


class _FrontEnd(BaseHTTPRequestHandler):
    """Answers like a front end with an API key; `server.broken` maps a path to (status, body)."""

    def _answer(self) -> None:
        asked = self.rfile.read(int(self.headers.get("content-length", 0)))
        broken: dict[str, tuple[int, bytes]] = self.server.broken  # type: ignore[attr-defined]
        if self.path in broken:
            self._send(*broken[self.path])
        elif self.headers.get("authorization") != f"Bearer {KEY}":
            self._send(401, b'{"error": {"message": "a valid API key is needed"}}')
        elif b'"stream": true' in asked:
            self._send(200, b"data: {}\n\ndata: [DONE]\n\n")
        else:
            self._send(200, _ANSWERS.get(self.path, b"ok"))

    do_GET = do_POST = _answer

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


_RUNNING = "".join(
    f'disagg_num_requests_running{{process="{role}-0",role="{role}",worker="{role}-0"}} 0.0\n'
    for role in ("prefill", "decode")
)
_ANSWERS = {
    "/v1/completions": b'{"usage": {"completion_tokens": 8}}',
    "/v1/models": b'{"data": [{"id": "disagg-tiny"}]}',
    "/metrics": _RUNNING.encode(),
    "/api/local_raylet_healthz": b"success",
}


@pytest.fixture
def front_end() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _FrontEnd)
    server.broken = {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    return path


def run(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def url(server: ThreadingHTTPServer, path: str = "") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_the_probe_is_content_with_200(front_end: ThreadingHTTPServer, key_file: Path) -> None:
    done = run(PROBE, f"--key-file={key_file}", url(front_end, "/health"), url(front_end, "/ready"))
    assert (done.returncode, done.stdout) == (0, "ok\n")


def test_the_probe_says_what_is_wrong(front_end: ThreadingHTTPServer, key_file: Path) -> None:
    front_end.broken["/ready"] = (503, b"no prefill worker is ready")  # type: ignore[attr-defined]
    done = run(PROBE, f"--key-file={key_file}", url(front_end, "/health"), url(front_end, "/ready"))
    assert done.returncode == 1
    assert "503 no prefill worker is ready" in done.stdout and "/health" not in done.stdout


def test_the_probe_fails_without_the_key(front_end: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert "401" in run(PROBE, url(front_end, "/health")).stdout
    done = run(PROBE, f"--key-file={tmp_path / 'none'}", url(front_end, "/health"))
    assert done.returncode == 1 and "can't read the API key" in done.stdout


def test_the_probe_looks_for_the_raylet_s_word(front_end: ThreadingHTTPServer, key_file: Path) -> None:
    common = ("--contains=success", f"--key-file={key_file}")
    assert run(PROBE, *common, url(front_end, "/api/local_raylet_healthz")).returncode == 0
    done = run(PROBE, *common, url(front_end, "/health"))
    assert done.returncode == 1 and "'success' is not in the answer" in done.stdout


def test_the_probe_fails_where_nothing_listens() -> None:
    done = run(PROBE, "http://127.0.0.1:1/health")
    assert done.returncode == 1 and "refused" in done.stdout


def test_the_check_asks_everything_over_http(front_end: ThreadingHTTPServer, key_file: Path) -> None:
    done = run(CHECK, f"--http={url(front_end)}", f"--key-file={key_file}")
    assert done.returncode == 0, done.stdout
    for said in ("GET /ready is 200", "without the API key it is 401", "a stream ends with [DONE]"):
        assert f"ok: {said}" in done.stdout


def test_the_check_fails_on_a_stream_that_breaks_off(front_end: ThreadingHTTPServer, key_file: Path) -> None:
    body = b'{"usage": {"completion_tokens": 8}}'
    front_end.broken["/v1/completions"] = (200, body)  # type: ignore[attr-defined]
    done = run(CHECK, f"--http={url(front_end)}", f"--key-file={key_file}")
    assert done.returncode == 1
    assert "FAILED: a stream ends with [DONE]" in done.stdout


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/completions"])
def test_the_check_names_what_fails(front_end: ThreadingHTTPServer, key_file: Path, path: str) -> None:
    front_end.broken[path] = (503, b"no capacity")  # type: ignore[attr-defined]
    done = run(CHECK, f"--http={url(front_end)}", f"--key-file={key_file}")
    assert done.returncode == 1 and "FAILED" in done.stdout


# -- download --------------------------------------------------------------------------------------

_HUB = """
import json, pathlib, sys
def snapshot_download(repository, *, revision, local_dir, allow_patterns):
    calls = pathlib.Path({calls!r})
    calls.write_text(calls.read_text() + json.dumps([repository, revision, allow_patterns]) + "\\n")
    for name in {files!r}:
        (pathlib.Path(local_dir) / name).write_text("{{}}")
"""


class Hub:
    """A stand-in for huggingface_hub on the script's path."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.calls = folder / "calls"
        self.calls.write_text("")
        self._library = folder / "library"
        self._library.mkdir()
        self._set(files)

    def _set(self, files: list[str]) -> None:
        (self._library / "huggingface_hub.py").write_text(_HUB.format(calls=str(self.calls), files=files))

    def fetch(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FETCH), *map(str, arguments)]
        environment = {"PYTHONPATH": str(self._library), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, check=False
        )

    @property
    def count(self) -> int:
        return len(self.calls.read_text().splitlines())


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path, ["config.json", "model.safetensors"])


def test_a_model_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "owner" / "name" / "main"
    first = hub.fetch("owner/name", "main", folder)
    assert first.returncode == 0 and "downloaded" in first.stdout
    assert (folder / "model.safetensors").exists()
    second = hub.fetch("owner/name", "main", folder)
    assert second.returncode == 0 and "already there" in second.stdout
    assert hub.count == 1


def test_only_formats_that_run_no_code_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.fetch("owner/name", "main", tmp_path / "m")
    (call,) = map(json.loads, hub.calls.read_text().splitlines())
    assert call[:2] == ["owner/name", "main"]
    assert "*.safetensors" in call[2]
    assert not any(name.endswith((".bin", ".pt", ".py", "*")) for name in call[2])


def test_another_revision_in_the_same_folder_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    for revision in ("a", "b"):
        assert hub.fetch("owner/name", revision, tmp_path / "m").returncode == 0
    assert hub.count == 2


def test_a_repository_without_safetensors_is_refused_and_tried_again(tmp_path: Path) -> None:
    hub = Hub(tmp_path, ["config.json"])
    for _ in range(2):
        done = hub.fetch("owner/name", "main", tmp_path / "m")
        assert done.returncode == 1 and "has no config.json or no safetensors" in done.stderr
    assert hub.count == 2


def test_pods_that_start_together_download_once(hub: Hub, tmp_path: Path) -> None:
    results: list[int] = []

    def fetch() -> None:
        results.append(hub.fetch("owner/name", "main", tmp_path / "m").returncode)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0] * 4
    assert hub.count == 1


def test_the_download_says_how_to_call_it(hub: Hub) -> None:
    assert hub.fetch("owner/name").returncode == 2
