"""Faults, without Ray: a worker that vanishes, a client that leaves, a router that restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from disagg.config import BUNDLED_MODEL
from disagg.errors import DeadlineExceededError, InvalidRequestError
from disagg.service.generation import GenerationRequest
from disagg.service.router_server import RouterServer
from disagg.service.tokenizer import Tokenizer
from disagg.types import Role, SamplingParams
from tests.cluster.harness import SECRET, Cluster, ask, running_cluster


@pytest.fixture(scope="module")
def counting() -> list[int]:
    text = " ".join(str(number) for number in range(1, 120))
    tokens: list[int] = Tokenizer(BUNDLED_MODEL).encode(text)
    return tokens


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster(prefill=2, decode=2) as running:
        yield running


async def vanish(cluster: Cluster, worker_id: str) -> None:
    """End a worker as its death would: every stream breaks, its leases are gone."""
    process = cluster.workers.pop(worker_id)
    await process.stop()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_requests_survive_a_lost_worker(cluster: Cluster, counting: list[int], victim: str) -> None:
    prompts = [counting[start : start + 150] for start in range(16)]
    expected = [await ask(cluster, prompt, max_tokens=40) for prompt in prompts]

    async def interrupted() -> None:
        await asyncio.sleep(0.15)
        await vanish(cluster, victim)

    *answers, _ = await asyncio.gather(
        *(
            ask(cluster, prompt, max_tokens=40, cache_salt=f"fault{index}")
            for index, prompt in enumerate(prompts)
        ),
        interrupted(),
    )
    assert [a.token_ids for a in answers if a] == [a.token_ids for a in expected]
    await cluster.wait_idle()


async def test_a_pool_that_is_gone_is_replaced_by_what_lives(cluster: Cluster, counting: list[int]) -> None:
    expected = await ask(cluster, counting[:100], max_tokens=20)
    await vanish(cluster, "prefill-0")
    await vanish(cluster, "prefill-1")
    degraded = await ask(cluster, counting[:100], max_tokens=20, cache_salt="x")
    assert degraded.token_ids == expected.token_ids
    ready = await cluster.gateway.ready()
    assert not ready.ok
    await cluster.add_worker("prefill-0", Role.PREFILL)
    again = await ask(cluster, counting[:100], max_tokens=20, cache_salt="y")
    assert again.token_ids == expected.token_ids


async def test_a_request_waits_for_workers_to_be_replaced(counting: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, counting[:100], max_tokens=300)
        asking = asyncio.create_task(ask(cluster, counting[:100], max_tokens=300, cache_salt="x"))
        async with asyncio.timeout(10):
            while not cluster.workers["decode-0"].worker.load.num_running:
                await asyncio.sleep(0.002)
        await asyncio.gather(vanish(cluster, "prefill-0"), vanish(cluster, "decode-0"))
        await asyncio.sleep(0.5)
        assert not asking.done()
        for role in (Role.PREFILL, Role.DECODE):
            await cluster.add_worker(f"{role.value}-0", role)
        assert (await asking).token_ids == expected.token_ids
        await cluster.wait_idle()


async def test_closing_the_stream_frees_both_sides(cluster: Cluster, counting: list[int]) -> None:
    for stop_after in (0, 1, 2, 5):
        request = GenerationRequest(
            request_id=f"closed-{stop_after}",
            prompt_token_ids=counting[:200],
            params=SamplingParams(max_tokens=500, temperature=0, ignore_eos=True, seed=1),
            timeout_s=60,
            cache_salt=str(stop_after),
        )
        stream = cluster.gateway.generator.generate(request)
        if stop_after == 0:
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for _ in range(stop_after):
            await anext(stream)
        await stream.aclose()
        await cluster.wait_idle(5.0)


async def test_deadline_ends_a_request_with_a_typed_error(cluster: Cluster, counting: list[int]) -> None:
    request = GenerationRequest(
        request_id="late",
        prompt_token_ids=counting[:200],
        params=SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True, seed=1),
        timeout_s=0.2,
    )
    with pytest.raises(DeadlineExceededError):
        async for _ in cluster.gateway.generator.generate(request):
            pass
    await cluster.wait_idle(5.0)


async def test_a_prompt_that_no_worker_can_take_is_refused(cluster: Cluster, counting: list[int]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await ask(cluster, counting * 50)
    assert caught.value.param == "prompt"
    await cluster.wait_idle(5.0)


async def test_streams_do_not_notice_a_router_restart(cluster: Cluster, counting: list[int]) -> None:
    expected = await ask(cluster, counting[:100], max_tokens=60)
    running = asyncio.create_task(ask(cluster, counting[:100], max_tokens=60, cache_salt="r"))
    await asyncio.sleep(0.05)
    await cluster.router.stop()
    while_away = await ask(cluster, counting[:100], max_tokens=20, cache_salt="away")
    assert while_away.token_ids == expected.token_ids[:20]
    assert 'kind="stale_view"' in (await cluster.gateway.metrics()).decode()
    cluster.router = RouterServer(cluster.config.router, SECRET)
    cluster.address = await cluster.router.start("127.0.0.1")
    assert (await running).token_ids == expected.token_ids
    async with asyncio.timeout(10):
        while not (await cluster.gateway.status())["router"]["connected"]:
            await asyncio.sleep(0.05)
    after = await ask(cluster, counting[:100], max_tokens=20, cache_salt="after")
    assert after.token_ids == expected.token_ids[:20]


async def test_expired_lease_means_recomputation_not_wrong_tokens(counting: list[int]) -> None:
    """Decode is reachable but its pulls fail: KV is recomputed, counted, and the tokens are the same."""
    async with running_cluster() as cluster:
        expected = await ask(cluster, counting[:100], max_tokens=20)
        publisher = cluster.workers["prefill-0"]._publisher
        original = publisher.progress

        def progress_and_drop(request_id: str, *args: Any, complete: bool) -> None:
            original(request_id, *args, complete=complete)
            if complete:
                publisher.drop(request_id)

        publisher.progress = progress_and_drop  # type: ignore[method-assign]
        answer = await ask(cluster, counting[:100], max_tokens=20, cache_salt="lost")
        assert answer.token_ids == expected.token_ids
        exposition = (await cluster.gateway.metrics()).decode()
        assert 'disagg_request_resumes_total{cause="kv_lost"' in exposition
        await cluster.wait_idle()
