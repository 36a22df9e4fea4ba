"""/metrics of a whole cluster: every front end's counts once, and parts that add up to what a client saw."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from disagg.frontend.http import create_app
from tests.cluster.harness import ask, running_cluster, second_gateway
from tests.unit.frontend.frontend_fakes import serve_app

PROMPT = list(range(10, 90))


def total(exposition: bytes, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def test_either_front_end_tells_what_both_served() -> None:
    async with running_cluster() as cluster, second_gateway(cluster) as second:
        first = cluster.gateway
        assert first is not None
        for _ in range(2):
            await ask(cluster, PROMPT, max_tokens=4)
        cluster.gateway = second
        await ask(cluster, PROMPT, max_tokens=4)
        cluster.gateway = first
        for gateway in (first, second):
            exposition = await gateway.metrics()
            assert total(exposition, "disagg_requests_total", outcome="length") == 3
            assert total(exposition, "disagg_time_to_first_token_seconds_count") == 3
            assert total(exposition, "disagg_router_frontends") == 2
            processes = set(re.findall(r'process="(frontend-[0-9a-f]+)"', exposition.decode()))
            assert len(processes) == 2


async def test_without_the_router_a_front_end_still_tells_what_it_can_reach() -> None:
    async with running_cluster() as cluster:
        assert cluster.gateway is not None
        await ask(cluster, PROMPT, max_tokens=4)
        assert total(await cluster.gateway.metrics(), "disagg_router_connected") == 1
        await cluster.router.stop()
        exposition = await cluster.gateway.metrics()
        assert total(exposition, "disagg_router_connected") == 0
        assert total(exposition, "disagg_requests_total", outcome="length") == 1
        assert total(exposition, "disagg_num_requests_waiting", role="decode") == 0
        assert b'worker="decode-0"' in exposition


async def test_parts_add_up_to_what_the_client_saw() -> None:
    """Over HTTP, tokenising included; a prompt long enough that the loopback's own time is below 2 %."""
    settings = {"slo": {"ttft_s": 60.0, "tpot_s": 1e-9}, "metrics": {"vllm_aliases": True}}
    async with running_cluster(settings) as cluster:
        assert cluster.gateway is not None
        async with serve_app(create_app(cluster.gateway)) as url, httpx.AsyncClient(base_url=url) as client:
            await stream(client, 1)
            before = await cluster.gateway.metrics()
            seen = [await stream(client, number) for number in range(2, 6)]
            after = await cluster.gateway.metrics()

    def counted(part: str) -> float:
        name = f"disagg_{part}_seconds_sum"
        return total(after, name) - total(before, name)

    ttft, second, whole = (sum(times) for times in zip(*seen, strict=True))
    to_first = counted("request_queue") + counted("request_prefill")
    assert 0 < counted("request_frontend") < counted("request_queue")
    to_second = to_first + counted("request_kv_transfer") + counted("request_first_decode")
    to_end = to_first + counted("request_kv_transfer") + counted("request_decode")
    assert to_first == pytest.approx(counted("time_to_first_token"), rel=1e-6)
    assert to_end == pytest.approx(counted("e2e_request_latency"), rel=1e-6)
    # What a part lacks of the client's time is the loopback's; a part too long is a defect.
    for parts, client_saw in ((to_first, ttft), (to_second, second), (to_end, whole)):
        assert 0.9 * client_saw < parts < 1.001 * client_saw
    assert total(after, "disagg_slo_attained_total", slo="ttft", met="true") == 5
    assert total(after, "disagg_slo_attained_total", slo="tpot", met="false") == 5
    assert total(after, "vllm:e2e_request_latency_seconds_count", model_name="disagg-tiny") == 5


async def stream(client: httpx.AsyncClient, number: int) -> tuple[float, float, float]:
    """Return seconds to the first token, the second, and the end."""
    body: dict[str, Any] = {
        "prompt": " ".join(str(number * 1000 + i) for i in range(250)),
        "max_tokens": 16,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
    }
    started, times = time.perf_counter(), []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            event = line.removeprefix("data: ")
            if event.startswith("{") and json.loads(event)["choices"][0].get("token_ids"):
                times.append(time.perf_counter() - started)
    return times[0], times[1], time.perf_counter() - started


async def test_a_client_can_not_put_a_word_of_its_own_into_a_label() -> None:
    word = "xq-chosen-by-a-client"
    async with running_cluster() as cluster:
        assert cluster.gateway is not None
        async with serve_app(create_app(cluster.gateway)) as url, httpx.AsyncClient(base_url=url) as client:
            answer = await client.post(
                "/v1/completions",
                json={"prompt": word, "max_tokens": 2, "cache_salt": word, "user": word, "seed": 7},
                headers={"x-request-id": word, "traceparent": word, "user-agent": word},
            )
            assert answer.status_code == 200
            assert answer.headers["x-request-id"] == word
            await client.post("/v1/completions", json={"model": word, "prompt": "x"})
            await client.get(f"/{word}")
            exposition = (await client.get("/metrics")).text
    assert "disagg_requests_total" in exposition
    assert word not in exposition


async def test_a_hand_off_that_fails_and_a_lease_that_ends_are_counted() -> None:
    """The lease is so short that it runs out before the pull, which then recomputes."""
    async with running_cluster({"transfer": {"lease_s": 0.001}}) as cluster:
        assert cluster.gateway is not None
        for number in range(3):
            await ask(cluster, [number, *PROMPT], max_tokens=4)
        exposition = await cluster.gateway.metrics()
        expired = total(exposition, "disagg_kv_lease_expiries_total", role="prefill")
        failed = total(exposition, "disagg_kv_transfer_failures_total", reason="kv_lost")
        assert expired >= 1
        assert failed == total(exposition, "disagg_request_resumes_total", cause="kv_lost") >= 1
