"""A real `disagg serve` whose pools change under load: added workers, changed roles, a router that dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.cluster.served import Served, serving

MODEL = "disagg-tiny"
TOKENS = 120
USERS = 6

CALL_CONTROLLER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
controller = ray.get_actor("disagg-controller", namespace="disagg")
method, arguments = sys.argv[2], [int(a) if a.isdigit() else a for a in sys.argv[3:]]
ray.get(getattr(controller, method).remote(*arguments))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pools"), "--prefill", "1", "--decode", "1") as running:
        yield running


def ray_of(served: Served) -> tuple[str, dict[str, str]]:
    """Return the address of the cluster's Ray, and the environment that its token is in."""
    for process in served.descendants():
        found = re.search(r"--gcs-address=(\S+)", " ".join(process.cmdline()))
        if found:
            own = {key: value for key, value in process.environ().items() if key.startswith("RAY_AUTH")}
            return found[1], {**os.environ, **own}
    raise AssertionError("no Ray process names its head")


async def call_controller(served: Served, method: str, *arguments: str | int) -> None:
    address, env = ray_of(served)
    command = [sys.executable, "-c", CALL_CONTROLLER, address, method, *map(str, arguments)]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]


def workers(served: Served) -> dict[str, tuple[str, str, int]]:
    return {item["id"]: (item["role"], item["state"], item["pid"]) for item in served.status()["workers"]}


def wanted(served: Served) -> tuple[float, float]:
    """Return the sizes that the prefill and decode pools are to have, as alerts hear of them."""
    prefill, decode = (served.metric("disagg_pool_replicas", role=role) for role in ("prefill", "decode"))
    return prefill, decode


async def under_load(served: Served, change: Callable[[], Awaitable[None]]) -> None:
    """Run `change` while users ask without a pause; every answer must be whole and the same."""
    stop = asyncio.Event()
    answers: list[str] = []

    async def user(client: openai.AsyncOpenAI) -> None:
        while not stop.is_set():
            stream = await client.completions.create(
                model=MODEL,
                prompt=" ".join(str(number) for number in range(1, 40)),
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
                timeout=60,
            )
            chunks = [chunk async for chunk in stream]
            assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
            answers.append("".join(chunk.choices[0].text for chunk in chunks))

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        users = [asyncio.create_task(user(client)) for _ in range(USERS)]
        await asyncio.sleep(0.5)
        await change()
        before = len(answers)
        async with asyncio.timeout(60):
            while len(answers) < before + USERS and not any(task.done() for task in users):
                await asyncio.sleep(0.1)
        stop.set()
        await asyncio.gather(*users)
    assert len(set(answers)) == 1


@pytest.mark.slow
async def test_pools_grow_lend_and_shrink_under_load_without_a_failed_request(served: Served) -> None:
    first = await asyncio.to_thread(workers, served)

    async def change() -> None:
        await call_controller(served, "scale", "decode", 2)
        grown = await asyncio.to_thread(workers, served)
        assert grown["decode-1"][:2] == ("decode", "ready")
        await asyncio.to_thread(served.wait_for, lambda: wanted(served) == (1, 2), 10, "two are wanted")
        await call_controller(served, "change_role", "decode-1", "prefill")
        await asyncio.to_thread(
            served.wait_for, lambda: workers(served)["decode-1"][:2] == ("prefill", "ready"), 10, "relabelled"
        )
        moved = await asyncio.to_thread(workers, served)
        assert moved["decode-1"][2] == grown["decode-1"][2], "the process is the same"
        await call_controller(served, "change_role", "decode-1", "decode")
        await call_controller(served, "scale", "decode", 1)
        await asyncio.to_thread(served.wait_for, lambda: len(workers(served)) == 2, 10, "the worker is gone")

    await under_load(served, change)
    await asyncio.to_thread(served.wait_for, lambda: wanted(served) == (1, 1), 10, "one is wanted again")
    left = await asyncio.to_thread(workers, served)
    assert {role for role, _, _ in left.values()} == {"prefill", "decode"}
    assert left["prefill-0"] == first["prefill-0"]
    await asyncio.to_thread(served.wait_no_blocks)


async def test_a_router_that_dies_under_load_fails_no_request(served: Served) -> None:
    old = (await asyncio.to_thread(served.status))["router"]["pid"]

    async def change() -> None:
        os.kill(old, signal.SIGKILL)

        def back() -> bool:
            router = served.status()["router"]
            return bool(router["connected"]) and router["pid"] != old

        await asyncio.to_thread(served.wait_for, back, 30.0, "the router is replaced")

    await under_load(served, change)


def test_a_role_that_was_changed_survives_the_worker(served: Served, tmp_path: Path) -> None:
    asyncio.run(call_controller(served, "scale", "decode", 2))
    asyncio.run(call_controller(served, "change_role", "decode-0", "prefill"))
    old = served.pid_of("decode-0")
    os.kill(old, signal.SIGKILL)

    def replaced() -> bool:
        role, state, pid = workers(served)["decode-0"]
        return (role, state) == ("prefill", "ready") and pid != old

    served.wait_for(replaced, 60.0, "the dead worker is replaced in its new role")
