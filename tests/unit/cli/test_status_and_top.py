"""What `disagg status` and `disagg top` print, and how they end."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from disagg.cli import cluster_report
from disagg.cli.cluster_report import Reading, parse, render
from disagg.cli.main import app
from disagg.cli.top import watch

METRICS = """\
# TYPE disagg_slo_attained counter
disagg_slo_attained_total{slo="ttft",met="true",process="a"} 90
disagg_slo_attained_total{slo="ttft",met="true",process="b"} 5
disagg_slo_attained_total{slo="ttft",met="false",process="a"} 5
# TYPE disagg_kv_transfer_bytes counter
disagg_kv_transfer_bytes_total{role="decode",worker="decode-0",transport="shm"} 3000000
# TYPE disagg_requests counter
disagg_requests_total{outcome="stop"} 99
disagg_requests_total{outcome="shed"} 2
# TYPE disagg_generation_tokens counter
disagg_generation_tokens_total 1000
"""


def worker(worker_id: str, **more: Any) -> dict[str, Any]:
    base = {
        "id": worker_id, "role": worker_id.split("-")[0], "state": "ready", "pid": 7, "host": "here",
        "kv_blocks_total": 100, "kv_blocks_used": 30, "kv_blocks_cached": 5,
        "num_running": 3, "num_waiting": 2, "num_held": 1,
    }  # fmt: skip
    return {**base, **more}


STATUS = {
    "model": "tiny",
    "workers": [
        worker("prefill-0"),
        worker("decode-0", kv_blocks_used=99),
        worker("decode-1", state="draining"),
    ],
    "router": {"pid": 5, "connected": True},
}


def shown(now: Reading, before: Reading | None = None, width: int = 130) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(now, before, width=width))
    return capture.get()


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_pools_workers_links_and_attainment_are_there() -> None:
    text = shown(Reading(0.0, STATUS, parse(METRICS)))
    assert "1 of 2" in line_of(text, "decode ") and "129 / 200" in line_of(text, "decode ")
    assert "draining" in line_of(text, "decode-1") and "3 MB shm" in line_of(text, "decode-0")
    assert "TTFT met by 95.0% of 100" in line_of(text, "objectives")
    assert "99 stop, 2 shed" in line_of(text, "requests")


def test_rates_are_between_two_readings_and_a_restart_is_no_negative_rate() -> None:
    before = Reading(10.0, STATUS, parse(METRICS))
    later = (
        METRICS.replace(" 3000000", " 5000000").replace("total 1000", "total 1500").replace("} 90", "} 100")
    )
    text = shown(Reading(12.0, STATUS, parse(later)), before)
    assert "1 MB/s shm" in line_of(text, "decode-0")
    assert "250 output/s" in line_of(text, "tokens")
    assert "TTFT met by 100.0% of 10" in line_of(text, "objectives")
    assert "0 output/s" in shown(Reading(11.0, STATUS, {}), before)


def test_a_router_that_is_away_is_told() -> None:
    away = {**STATUS, "router": {"pid": 5, "connected": False}}
    assert "placing by the last view" in shown(Reading(0.0, away))


def test_80_columns_lose_no_worker() -> None:
    text = shown(Reading(0.0, STATUS), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in ("prefill-0", "decode-0", "decode-1"))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(url: str, **_: Any) -> httpx.Response:
        request = httpx.Request("GET", url)
        if url.endswith("/status"):
            return httpx.Response(200, json=STATUS, request=request)
        return httpx.Response(200, text=METRICS, request=request)

    monkeypatch.setattr(cluster_report.httpx, "get", get)


def test_status_prints_json_as_it_came(served: None) -> None:
    result = CliRunner().invoke(app, ["status", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) == STATUS


@pytest.mark.parametrize("command", ["status", "top"])
def test_without_a_terminal_it_prints_once(served: None, command: str) -> None:
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0 and result.stdout.count("prefill-0") == 1


@pytest.mark.parametrize("command", ["status", "top"])
def test_a_cluster_that_is_not_there_is_one_line_and_1(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1 and "Traceback" not in result.output


def test_top_looks_again_until_q() -> None:
    looks = 0

    def look() -> Reading:
        nonlocal looks
        looks += 1
        return Reading(float(looks), STATUS, parse(METRICS))

    keys = iter(["", "x", "", "q"])
    console = Console(width=100, force_terminal=True, color_system=None, height=30)
    with console.capture() as capture:
        watch(look, console, 0.001, lambda timeout_s: next(keys) if looks > 2 else pause(timeout_s))
    assert looks > 2 and "decode-1" in capture.get()


def pause(timeout_s: float) -> str:
    time.sleep(timeout_s)
    return ""
