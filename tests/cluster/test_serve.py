"""A real `disagg serve`: HTTP, the openai client, gRPC, metrics, faults, and the end of it all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from safetensors.torch import load_file, save_file

from disagg.client import Client
from disagg.config import BUNDLED_MODEL
from tests.cluster.served import Served, serving

MODEL = "disagg-tiny"
COUNT = " ".join(str(number) for number in range(1, 60))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    # Bursts here are to be answered however long that takes on a busy machine, and every prompt handed over.
    patient = folder / "patient.yaml"
    patient.write_text("admission: {max_wait_s: 600}\nrouter: {local_prefill: false}\n")
    arguments = ("--prefill", "2", "--decode", "2", "--max-num-batched-tokens", "128")
    with serving(folder, "--config", str(patient), *arguments) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_hello_streams_a_sentence(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello, what can you do?"}],
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text.split()) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 5


def test_http_and_grpc_agree_and_so_do_streaming_and_not(client: openai.OpenAI, served: Served) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": COUNT, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    with Client(served.grpc_address) as grpc_client:
        by_grpc = grpc_client.generate(prompt=COUNT, max_tokens=40, temperature=0).text
    assert whole == streamed == by_grpc
    assert whole.split()[:5] == ["60", "61", "62", "63", "64"]


def test_prefill_and_decode_happen_in_different_processes(client: openai.OpenAI, served: Served) -> None:
    before = served.metric("disagg_kv_transfer_bytes_total", role="decode")
    client.completions.create(model=MODEL, prompt="7 8 9 " + COUNT, max_tokens=5, temperature=0)
    pids = {worker["role"]: worker["pid"] for worker in served.status()["workers"]}
    assert pids["prefill"] != pids["decode"]
    served.wait_for(
        lambda: served.metric("disagg_kv_transfer_bytes_total", role="decode") > before, 5, "bytes moved"
    )
    assert served.metric("disagg_kv_transfer_bytes_total", role="prefill") == 0


def test_the_parts_of_a_request_add_up_to_the_whole(client: openai.OpenAI, served: Served) -> None:
    for _ in range(5):
        client.completions.create(model=MODEL, prompt=COUNT, max_tokens=8, temperature=0)
    whole = served.metric("disagg_e2e_request_latency_seconds_sum")
    parts = sum(
        served.metric(f"disagg_request_{part}_seconds_sum")
        for part in ("queue", "prefill", "kv_transfer", "decode")
    )
    assert parts == pytest.approx(whole, rel=1e-6)


def test_ready_exercises_a_hand_off(served: Served) -> None:
    response = served.get("/ready")
    assert response.status_code == 200, response.text


def test_a_client_that_leaves_frees_both_sides(served: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=COUNT,
        max_tokens=1500,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    served.wait_no_blocks(5.0)


TOKENS = 150


async def _burst(served: Served, num_requests: int, victims: dict[int, int]) -> list[str]:
    """Run streaming requests at once. victims: {chunks received by all of them: pid to kill just then}."""
    received = 0

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        nonlocal received
        stream = await client.completions.create(
            model=MODEL,
            # The first words differ, so that prefixes are not shared and prefill has work to do.
            prompt=" ".join(str(index + offset) for offset in range(40)),
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
            timeout=120,
        )
        text, reasons = "", []
        async for chunk in stream:
            text += chunk.choices[0].text
            reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
            received += 1
            if received in victims:
                os.kill(victims[received], signal.SIGKILL)
        assert reasons == ["length"]
        return text

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        return list(await asyncio.gather(*(one(client, index) for index in range(num_requests))))


async def _fault_free_and_faulty(served: Served, num_requests: int) -> None:
    expected = await _burst(served, num_requests, {})
    before = await asyncio.to_thread(served.metric, "disagg_request_resumes_total")
    old = {victim: await asyncio.to_thread(served.pid_of, victim) for victim in ("prefill-0", "decode-0")}
    # Prefill dies while most prompts are still waiting for it, decode in the middle of everything.
    total = num_requests * TOKENS
    answers = await _burst(served, num_requests, {10: old["prefill-0"], total // 3: old["decode-0"]})
    assert answers == expected
    await asyncio.to_thread(served.wait_no_blocks)
    assert await asyncio.to_thread(served.metric, "disagg_request_resumes_total") > before

    def replaced() -> bool:
        return all(served.pid_of(victim) != pid for victim, pid in old.items())

    await asyncio.to_thread(served.wait_for, replaced, 60.0, "dead workers are replaced")
    await asyncio.to_thread(served.wait_for, lambda: served.get("/ready").status_code == 200, 10.0, "ready")


async def test_killed_workers_cost_no_token(served: Served) -> None:
    await _fault_free_and_faulty(served, 60)


@pytest.mark.slow
async def test_killed_workers_cost_no_token_in_200_streams(served: Served) -> None:
    await _fault_free_and_faulty(served, 200)


def test_killed_router_is_replaced(served: Served, client: openai.OpenAI) -> None:
    old = served.status()["router"]["pid"]
    os.kill(old, signal.SIGKILL)
    answer = client.completions.create(model=MODEL, prompt=COUNT, max_tokens=5, temperature=0)
    assert answer.choices[0].text.split()[0] == "60"

    def back() -> bool:
        router = served.status()["router"]
        return bool(router["connected"]) and router["pid"] != old

    served.wait_for(back, 30.0, "the router is replaced")


def test_killed_controller_comes_back_and_goes_on_replacing(served: Served) -> None:
    def controllers() -> list[int]:
        found = []
        for process in served.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                # Ray names a process after the actor in it.
                if process.name().startswith("ray::Controller"):
                    found.append(process.pid)
        return found

    (old,) = controllers()
    os.kill(old, signal.SIGKILL)
    served.wait_for(lambda: controllers() not in ([], [old]), 30.0, "the controller is restarted")
    victim = served.pid_of("prefill-1")
    os.kill(victim, signal.SIGKILL)
    served.wait_for(lambda: served.pid_of("prefill-1") != victim, 60.0, "the dead worker is replaced")


def test_api_key_guards_every_route_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    memory_before = set(os.listdir("/dev/shm"))
    with serving(tmp_path, "--api-key", "sesame") as served:
        for path in ("/v1/models", "/health", "/ready", "/metrics", "/version", "/status", "/docs", "/nope"):
            assert served.get(path).status_code == 401, path
        assert served.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        with Client(served.grpc_address, api_key="sesame") as client:
            assert client.model_info().model == MODEL
        family = served.descendants()
        # As a terminal does it: Ctrl-C reaches the whole foreground process group.
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.process.wait(20) == 0, served.log.read_text()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    # Ray's own session folder may hold a lock file for a moment; ours would be a segment.
    assert not {name for name in set(os.listdir("/dev/shm")) - memory_before if "disagg" in name}


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_tensor_is_told_by_its_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(BUNDLED_MODEL, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    command = [
        sys.executable,
        "-m",
        "disagg.cli.main",
        "serve",
        str(broken),
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "lacks model.norm.weight" in result.stderr and "Traceback" not in result.stderr


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"architectures": ["FooForCausalLM"]}')
    base = [sys.executable, "-m", "disagg.cli.main", "serve"]
    for arguments, word in (
        (["/no/such/model"], "no checkpoint"),
        ([str(unknown)], "FooForCausalLM"),
        (["--prefill", "0"], "prefill"),
        (["--port", "99999"], "port"),
        (["--kv-transport", "pigeon"], "kv_transport"),
    ):
        result = subprocess.run([*base, *arguments], capture_output=True, text=True, timeout=60)
        assert result.returncode == 2, result.stderr
        assert word in result.stderr and "Traceback" not in result.stderr
