"""`helm test`: ask the cluster as a client would, over HTTP and gRPC; exit 1 at the first thing that fails.

check.py --http http://HOST:PORT --grpc HOST:PORT [--key-file FILE]
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0


class Http:
    """One front end's HTTP API."""

    def __init__(self, base: str, key: str | None) -> None:
        self._base = base.rstrip("/")
        self._key = key
        # Without proxies: services are inside of the cluster.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, with_key: bool = True
    ) -> tuple[int, bytes]:
        """Return status and body. Raises OSError where there is no answer."""
        headers = {"Content-Type": "application/json"}
        if with_key and self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


class CheckFailedError(Exception):
    """The cluster answered other than it should."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise CheckFailedError(what)
    print(f"ok: {what}", flush=True)


def check_http(http: Http, *, keyed: bool) -> None:
    for path in ("/health", "/ready", "/version"):
        status, body = http.ask(path)
        expect(status == 200, f"GET {path} is 200 (got {status} {body[:200]!r})")
    if keyed:
        status, _ = http.ask("/v1/models", with_key=False)
        expect(status == 401, f"without the API key it is 401 (got {status})")
    status, body = http.ask("/v1/models")
    expect(status == 200 and bool(json.loads(body)["data"]), "GET /v1/models names a model")
    status, body = http.ask("/v1/completions", {"prompt": "1 2 3 4 5", "max_tokens": 8, "temperature": 0})
    expect(status == 200, f"a completion is 200 (got {status} {body[:200]!r})")
    expect(json.loads(body)["usage"]["completion_tokens"] >= 1, "the completion has tokens")
    streamed = {"prompt": "1 2 3 4 5", "max_tokens": 8, "temperature": 0, "stream": True}
    status, body = http.ask("/v1/completions", streamed)
    expect(status == 200 and body.rstrip().endswith(b"data: [DONE]"), "a stream ends with [DONE]")
    status, body = http.ask("/metrics")
    running = [line for line in body.decode().splitlines() if line.startswith("disagg_num_requests_running{")]
    for role in ("prefill", "decode"):
        expect(any(f'role="{role}"' in line for line in running), f"/metrics shows {role} workers")


def check_grpc(address: str, key: str | None) -> None:
    from disagg.client import Client
    from disagg.errors import DisaggError

    try:
        with Client(address, api_key=key, timeout=TIMEOUT_S) as client:
            result = client.generate("1 2 3 4 5", max_tokens=8, temperature=0)
    except DisaggError as error:
        raise CheckFailedError(f"gRPC Generate: {error}") from None
    expect(len(result.token_ids) >= 1, "gRPC Generate has tokens")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--http", required=True)
    parser.add_argument("--grpc")
    parser.add_argument("--key-file", type=Path)
    options = parser.parse_args(arguments)
    try:
        key = options.key_file.read_text().strip() if options.key_file else None
        check_http(Http(options.http, key), keyed=key is not None)
        if options.grpc:
            check_grpc(options.grpc, key)
    except (CheckFailedError, OSError, ValueError, KeyError) as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
