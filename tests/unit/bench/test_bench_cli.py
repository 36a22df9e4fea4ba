"""`disagg bench serve` from its flags to its exit code, against the fake server."""

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import bench_fake_server as fake
import pytest
from bench_fake_server import FakeServer, well_behaved
from click.testing import Result
from typer.testing import CliRunner

from disagg.bench.cli import bench_app
from disagg.bench.serve import DEFAULTS
from disagg.workload import ArrivalKind, WorkloadOptions, build_workload


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISAGG_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def bench(server: FakeServer, *args: str) -> Result:
    return CliRunner().invoke(bench_app, ["serve", "--url", server.url, *args])


def flags(**values: object) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_closed_loop_with_json(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    args = flags(
        num_requests=12,
        concurrency=3,
        input_len="8-16",
        output_len=4,
        warmup=2,
        slo_ttft_ms=5000,
        slo_tpot_ms=5000,
        json=out,
        prefix_len=8,
        prefix_groups=2,
    )
    result = bench(server, *args)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["requests"]["ok"] == 12
    assert content["requests"]["output_tokens"] == 48
    assert content["requests"]["slo"]["met"] == 12
    assert content["requests"]["settings"]["concurrency"] == 3
    assert "api_key" not in out.read_text()
    found = rows(out)
    assert found["bench_serve/ttft/p99"]["samples"] == 12
    assert found["bench_serve/itl/p50"]["samples"] == 36
    assert found["bench_serve/slo_attainment"]["value"] == 1
    assert len(server.bodies) == 14, "two warm-up requests, not measured"
    assert server.most_in_flight <= 3
    prefixes = {tuple(body["prompt"][:8]) for body in server.bodies[2:]}
    assert len(prefixes) == 2


def test_open_loop_sends_at_the_rate(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    args = flags(num_requests=11, request_rate=50, burstiness="inf", input_len=8, output_len=2, json=out)
    assert bench(server, *args).exit_code == 0
    duration = json.loads(out.read_text())["requests"]["duration_s"]
    assert duration >= 0.2


def test_a_made_up_workload_is_simulated_and_sent_alike(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = {"request_rate": 40, "duration": 0.5, "arrivals": "diurnal", "period": 0.5, "amplitude": 1}
    assert bench(server, *flags(**shape, input_len="4-9", output_len=2, warmup=0, json=out)).exit_code == 0
    assert json.loads(out.read_text())["requests"]["ok"] == 20
    lengths = {"input_len": "4-9", "output_len": "2"}
    options = WorkloadOptions(**(shape | lengths | {"arrivals": ArrivalKind.DIURNAL}))
    workload = build_workload(options, DEFAULTS, seed=0)
    assert sorted(len(body["prompt"]) for body in server.bodies) == sorted(
        request.prompt_tokens for request in workload
    )


def test_trace_is_replayed(server: FakeServer, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.jsonl", tmp_path / "out.json"
    lines = [
        {"timestamp": 1000 * i, "input_length": 600, "output_length": 9, "hash_ids": [0, i + 1]}
        for i in range(5)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    args = flags(
        trace=trace, trace_format="mooncake", rate_scale=100, duration=4, max_output_len=2, json=out, warmup=0
    )
    result = bench(server, *args)
    assert result.exit_code == 0, result.output
    assert len(server.bodies) == 4
    assert {body["max_tokens"] for body in server.bodies} == {2}
    first, second = server.bodies[0]["prompt"], server.bodies[1]["prompt"]
    assert len(first) == 600 and first[:512] == second[:512] and first[512:] != second[512:]


def test_chat(server: FakeServer) -> None:
    result = bench(server, *flags(endpoint="chat", num_requests=2, output_len=2, input_len=8))
    assert result.exit_code == 0, result.output
    assert "messages" in server.bodies[0]


def test_failed_request_gives_exit_code_1_and_the_reason(server: FakeServer, tmp_path: Path) -> None:
    calls = 0

    async def every_second(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            await well_behaved(writer, body)
        else:
            error = fake.event({"error": {"message": "kv lost", "code": 500}})
            writer.write(fake.head() + fake.http_chunk(fake.token() + error) + fake.LAST_CHUNK)

    server.behaviour = every_second
    out = tmp_path / "out.json"
    result = bench(server, *flags(num_requests=4, concurrency=1, output_len=2, warmup=0, json=out))
    assert result.exit_code == 1
    assert "error_event" in result.output and "kv lost" in result.output
    assert json.loads(out.read_text())["requests"]["failures"] == {"error_event": 2}


def test_failing_warm_up_sends_no_load(server: FakeServer) -> None:
    server.behaviour = fake.raw(fake.plain("503 Service Unavailable", b"{}"))
    result = bench(server, *flags(num_requests=50, warmup=1))
    assert result.exit_code == 1 and "warm-up" in result.output and "503" in result.output
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (flags(trace="/no/such/file", trace_format="azure"), "/no/such/file"),
        (flags(trace="/no/such/file"), "--trace-format"),
        (flags(trace="x", trace_format="azure", request_rate=3), "--request-rate"),
        (flags(rate_scale=2), "--rate-scale"),
        (flags(num_requests=0), "--num-requests"),
        (flags(input_len="many"), "--input-len"),
        (flags(input_len=0), "--input-len"),
        (flags(input_len=5000), "--max-input-len"),
        (flags(request_rate=-1), "--request-rate"),
        (flags(request_rate="nan"), "--request-rate"),
        (flags(burstiness=2), "--burstiness"),
        (flags(burstiness=2, request_rate=1, arrivals="constant"), "--burstiness"),
        (flags(arrivals="bursts"), "--arrivals"),
        (flags(period=2, request_rate=1), "--period"),
        (flags(duration=3), "--duration"),
        (flags(duration=3, request_rate=1, num_requests=3), "--duration"),
        (flags(prefix_groups=2), "--prefix-groups"),
        (flags(concurrency=0), "--concurrency"),
        (flags(model="other"), "--model"),
        (flags(vocab_size=4), "--vocab-size"),
        (flags(json="/no/such/folder/out.json"), "--json"),
        (flags(timeout=0), "--timeout"),
        (flags(seed=-1), "--seed"),
    ],
)
def test_wrong_flag_is_named_before_any_load(server: FakeServer, args: list[str], named: str) -> None:
    result = bench(server, *args)
    assert result.exit_code == 2, result.output
    assert named in result.output.replace("\n", "")
    assert server.bodies == []


def test_token_ids_need_a_source(server: FakeServer) -> None:
    server.tokenizer = False
    assert "--vocab-size" in bench(server, *flags(num_requests=1)).output
    assert bench(server, *flags(num_requests=1, vocab_size=500, output_len=1)).exit_code == 0


def test_model_is_found_or_asked_for(server: FakeServer) -> None:
    assert bench(server, *flags(num_requests=1, output_len=1)).exit_code == 0
    assert server.bodies[0]["model"] == "fake"
    server.models = ["a", "b"]
    result = bench(server, *flags(num_requests=1))
    assert result.exit_code == 2 and "--model" in result.output and "a, b" in result.output


def test_unreachable_server_is_named() -> None:
    result = CliRunner().invoke(bench_app, ["serve", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 2 and "cannot reach" in result.output


def test_interrupt_reports_what_was_measured(server: FakeServer, tmp_path: Path) -> None:
    async def later_ones_hang(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if len(server.bodies) > 5:
            await asyncio.sleep(60)
        await well_behaved(writer, body)

    def interrupt_when_hanging() -> None:
        while server.in_flight < 2 or len(server.bodies) < 7:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    server.behaviour = later_ones_hang
    threading.Thread(target=interrupt_when_hanging, daemon=True).start()
    out = tmp_path / "out.json"
    result = bench(server, *flags(num_requests=50, concurrency=2, output_len=2, warmup=0, json=out))
    assert result.exit_code == 130, result.output
    requests = json.loads(out.read_text())["requests"]
    assert requests["interrupted"] and requests["ok"] == 5 and requests["unfinished"] == 2
    assert requests["failed"] == 0


def test_concurrency_bounds_an_open_loop_too(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    args = flags(num_requests=12, request_rate=1000, concurrency=2, input_len=8, output_len=10, json=out)
    result = bench(server, *args)
    assert result.exit_code == 0, result.output
    assert server.most_in_flight == 2
    assert "sent late by" in result.output
    assert rows(out)["bench_serve/send_lag/p99"]["value"] > 10, "waiting for a place is told, not hidden"
