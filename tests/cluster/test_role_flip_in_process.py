"""Draining and changing roles under load: one process, real engines, and no request that fails."""

from __future__ import annotations

import asyncio

from disagg.types import FinishReason, Role, WorkerStatus
from tests.cluster.harness import Cluster, ask, running_cluster

PROMPT = [10 + index % 90 for index in range(40)]


async def roles(cluster: Cluster) -> dict[str, tuple[Role, WorkerStatus]]:
    workers = cluster.router.router.view.workers
    return {key: (state.info.role, state.status) for key, state in workers.items()}


async def until(cluster: Cluster, worker_id: str, role: Role, status: WorkerStatus) -> None:
    async with asyncio.timeout(5):
        while (await roles(cluster))[worker_id] != (role, status):
            await asyncio.sleep(0.02)


async def test_a_worker_changes_its_role_under_load_and_no_request_notices() -> None:
    async with running_cluster(prefill=1, decode=2) as cluster:
        expected = (await ask(cluster, PROMPT, max_tokens=64)).token_ids
        stop = asyncio.Event()
        answers = []

        async def user() -> None:
            while not stop.is_set():
                answers.append(await ask(cluster, PROMPT, max_tokens=64))

        users = [asyncio.create_task(user()) for _ in range(6)]
        await asyncio.sleep(0.3)
        moving = cluster.workers["decode-1"]
        pid = moving.info.pid
        for role in (Role.PREFILL, Role.DECODE):
            await asyncio.wait_for(moving.drain(), 30)
            assert moving.worker.load.num_running == 0
            moving.enlist(role)
            await until(cluster, "decode-1", role, WorkerStatus.READY)
            before = len(answers)
            async with asyncio.timeout(20):
                while len(answers) < before + 6:
                    await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*users)
        assert {tuple(answer.token_ids) for answer in answers} == {tuple(expected)}
        assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
        assert cluster.workers["decode-1"].worker.info.pid == pid
        await cluster.wait_idle()


async def test_a_draining_worker_takes_nothing_new_and_finishes_what_it_has() -> None:
    async with running_cluster(prefill=1, decode=2) as cluster:
        running = [asyncio.create_task(ask(cluster, PROMPT, max_tokens=200)) for _ in range(4)]
        async with asyncio.timeout(10):
            while not cluster.workers["decode-0"].worker.load.num_running:
                await asyncio.sleep(0.02)
        drained = asyncio.create_task(cluster.workers["decode-0"].drain())
        await until(cluster, "decode-0", Role.DECODE, WorkerStatus.DRAINING)
        for _ in range(3):
            await ask(cluster, PROMPT[::-1], max_tokens=4)
        assert not drained.done() or all(task.done() for task in running)
        answers = await asyncio.gather(*running)
        await asyncio.wait_for(drained, 10)
        assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
        assert cluster.blocks_used()["decode-0"] == 0
