"""Admission in front of a whole cluster: 429 with Retry-After, 504, gRPC, what resumes, what is counted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import grpc
import httpx
import pytest

from disagg.client import AsyncClient
from disagg.errors import DeadlineExceededError, OverloadedError
from disagg.frontend.grpc_service import build_grpc_server
from disagg.frontend.http import create_app
from disagg.routing import admission
from disagg.routing.admission import Admission, Reason, _Refusal
from disagg.routing.types import Placement
from disagg.routing.view import ClusterView
from disagg.service.generation import GenerationRequest
from disagg.types import Role, SamplingParams
from disagg.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster.harness import Cluster, ask, running_cluster
from tests.cluster.test_metrics_in_process import total

PROMPT = list(range(10, 90))
BODY = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}


def fitted(view: ClusterView, worker_id: str) -> bool:
    slot = view.slot(worker_id)
    assert slot is not None
    costs, role = view.costs(slot), view.workers[worker_id].info.role
    return costs.prefill_fitted if role is Role.PREFILL else costs.decode_fitted


async def until_fitted(cluster: Cluster) -> None:
    """Wait until the router's predictions rest on steps that the workers measured of themselves."""
    view = cluster.router.router.view
    number = 0
    async with asyncio.timeout(30):
        while not all(fitted(view, worker_id) for worker_id in view.workers):
            # A machine that is busy with other things may have cut the measurement short.
            number += 1
            await ask(cluster, [number % 200 + 10, *PROMPT[number % 60 :]], max_tokens=8)


def refuse(monkeypatch: pytest.MonkeyPatch, excess_s: float = 2.5) -> None:
    """Make every prediction a miss by so much."""
    monkeypatch.setattr(Admission, "_refusal", lambda *_: _Refusal(Reason.WAIT, excess_s))


def hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no room on any worker, so that whoever comes waits."""
    monkeypatch.setattr(Admission, "_has_room", lambda *_: False)


def request(name: str, **more: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens=more.pop("max_tokens", 4), temperature=0, ignore_eos=True, seed=1)
    return GenerationRequest(request_id=name, prompt_token_ids=PROMPT, params=params, **more)


async def drain(cluster: Cluster, wanted: GenerationRequest) -> int:
    assert cluster.gateway is not None
    return sum([len(output.token_ids) async for output in cluster.gateway.generator.generate(wanted)])


async def test_too_many_at_once_are_refused_at_once_and_the_rest_is_served() -> None:
    """Real predictions: what waits longer than a tenth of a second is told so within milliseconds."""
    async with running_cluster({"admission": {"max_wait_s": 0.1, "backlog_s": 0.05}}) as cluster:
        await until_fitted(cluster)
        assert cluster.gateway is not None
        transport = httpx.ASGITransport(create_app(cluster.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:

            async def one(number: int) -> httpx.Response:
                ids = [(number * 7 + at) % 200 + 10 for at in range(500)]
                body = {"prompt": ids, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
                return await client.post("/v1/completions", json=body)

            assert (await one(0)).status_code == 200
            answers = await asyncio.gather(*(one(number) for number in range(60)))
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["code"] == "overloaded"
            else:
                assert answer.json()["usage"]["completion_tokens"] == 24
        metrics = await cluster.gateway.metrics()
        assert total(metrics, "disagg_requests_total", outcome="shed") == statuses[429]
        assert 0 < total(metrics, "disagg_router_refusals_total") <= statuses[429]
        await cluster.wait_idle()
        assert len(cluster.router.admission.queue) == cluster.router.router.view.num_charges == 0


async def test_a_light_load_without_objectives_is_never_refused() -> None:
    async with running_cluster() as cluster:
        await until_fitted(cluster)
        answers = await asyncio.gather(*(ask(cluster, PROMPT, max_tokens=8) for _ in range(24)))
        assert all(len(answer.token_ids) == 8 for answer in answers)
        assert not cluster.router.admission.refused


async def test_a_flood_is_refused_without_asking_the_router_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster() as cluster:
        await until_fitted(cluster)
        refuse(monkeypatch)
        monkeypatch.setattr(admission, "MAX_HOLD_S", 1.0)
        assert cluster.gateway is not None
        transport = httpx.ASGITransport(create_app(cluster.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(50):
                answer = await client.post("/v1/completions", json=BODY)
                assert answer.status_code == 429
                assert 2 <= int(answer.headers["retry-after"]) <= 3
            asked = cluster.router.admission.refused.total()
            assert 1 <= asked < 5
            metrics = await cluster.gateway.metrics()
            assert total(metrics, "disagg_requests_total", outcome="shed") == 50
            assert total(metrics, "disagg_requests_braked_total") == 50 - asked
            monkeypatch.undo()
            # Another tier's are not held to it, and these are served again after the second.
            for more, pause_s in (({"service_tier": "flex"}, 0.0), ({}, 1.0)):
                await asyncio.sleep(pause_s)
                answer = await client.post("/v1/completions", json={**BODY, **more})
                assert answer.status_code == 200
        await cluster.wait_idle()


async def test_refusals_speak_each_protocols_language(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster() as cluster:
        await until_fitted(cluster)
        refuse(monkeypatch)
        monkeypatch.setattr(admission, "MAX_HOLD_S", 0.0)
        assert cluster.gateway is not None
        transport = httpx.ASGITransport(create_app(cluster.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for more in ({}, {"stream": True}):
                answer = await client.post("/v1/completions", json={**BODY, **more})
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "3"
        server = build_grpc_server(cluster.gateway, None)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                wanted = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(wanted):
                        pass
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailers = {key: value for key, value in caught.value.trailing_metadata() or ()}
            assert trailers["disagg-retry-after"] == "2.5"
            assert trailers["grpc-retry-pushback-ms"] == "2500"
            async with AsyncClient(f"127.0.0.1:{port}") as typed:
                with pytest.raises(OverloadedError) as error:
                    await typed.generate(token_ids=PROMPT, max_tokens=4)
            assert error.value.retry_after == 2.5
        finally:
            await server.stop(0)


async def test_the_expired_are_answered_504_and_never_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster() as cluster:
        await until_fitted(cluster)
        assert cluster.gateway is not None
        before = [w.worker._engine.counters.prefix_queries for w in cluster.workers.values()]
        hold(monkeypatch)
        with pytest.raises(DeadlineExceededError):
            await drain(cluster, request("late", timeout_s=0.7))
        transport = httpx.ASGITransport(create_app(cluster.gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/completions", json=BODY, headers={"x-request-timeout-ms": "300"})
        assert answer.status_code == 504
        async with asyncio.timeout(5):
            while len(cluster.router.admission.queue):
                await asyncio.sleep(0.01)
        monkeypatch.undo()
        after = [w.worker._engine.counters.prefix_queries for w in cluster.workers.values()]
        assert after == before
        assert total(await cluster.gateway.metrics(), "disagg_requests_total", outcome="deadline") == 2
        assert await drain(cluster, request("next")) == 4


async def test_whoever_waits_is_served_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than one call to the router may take; and whoever leaves meanwhile is forgotten."""
    async with running_cluster() as cluster:
        await until_fitted(cluster)
        hold(monkeypatch)
        queue = cluster.router.admission.queue
        tasks = [asyncio.create_task(drain(cluster, request(f"w{n}", timeout_s=30.0))) for n in range(6)]
        async with asyncio.timeout(5):
            while len(queue) < 6:
                await asyncio.sleep(0.01)
        began = time.monotonic()
        tasks[0].cancel()
        async with asyncio.timeout(5):
            while len(queue) > 5:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1.5 - (time.monotonic() - began))
        assert len(queue) == 5
        monkeypatch.undo()
        assert await asyncio.gather(*tasks[1:]) == [4] * 5
        assert len(queue) == 0


async def test_a_router_that_restarts_loses_nobody_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster() as cluster:
        await until_fitted(cluster)
        hold(monkeypatch)
        tasks = [asyncio.create_task(drain(cluster, request(f"w{n}", timeout_s=30.0))) for n in range(4)]
        async with asyncio.timeout(5):
            while len(cluster.router.admission.queue) < 4:
                await asyncio.sleep(0.01)
        await cluster.router.stop()
        assert await asyncio.gather(*tasks) == [4] * 4


async def test_the_resumed_are_never_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decode worker dies while everybody else is refused; the request goes on with the same tokens."""
    async with running_cluster(decode=2) as cluster:
        await until_fitted(cluster)
        assert cluster.gateway is not None
        expected = await ask(cluster, PROMPT, max_tokens=300)
        seen: list[str] = []
        commit = cluster.router.router.commit

        def note(*args: Any) -> Placement:
            placement = commit(*args)
            seen.append(placement.decode_worker)
            return placement

        monkeypatch.setattr(cluster.router.router, "commit", note)
        running = asyncio.create_task(ask(cluster, PROMPT, max_tokens=300, cache_salt="r"))
        async with asyncio.timeout(5):
            while not seen:
                await asyncio.sleep(0.005)
        refuse(monkeypatch)
        await cluster.workers.pop(seen[0]).stop()
        assert (await running).token_ids == expected.token_ids
        assert len(seen) == 2
        with pytest.raises(OverloadedError):
            await ask(cluster, PROMPT, max_tokens=4)


async def test_tiers_have_objectives_and_priorities_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = {"flex": {"priority": 5, "ttft_s": 9.0}}
    async with running_cluster({"slo": {"ttft_s": 2.0, "tpot_s": 0.5, "tiers": tiers}}) as cluster:
        asked: list[Any] = []
        original = Admission.ask

        def note(self: Admission, wanted: Any, now: float) -> Placement | None:
            asked.append(wanted)
            return original(self, wanted, now)

        monkeypatch.setattr(Admission, "ask", note)
        await drain(cluster, request("one", service_tier="flex", priority=1, cache_salt="acme"))
        await drain(cluster, request("two"))
        flex, usual = asked
        assert (flex.priority, flex.tenant, flex.service_tier) == (6, "acme", "flex")
        assert 8.0 < flex.slo_ttft_s <= 9.0
        assert flex.slo_tpot_s == usual.slo_tpot_s == 0.5
        assert 1.0 < usual.slo_ttft_s <= 2.0
        assert 590 < usual.timeout_s <= 600
