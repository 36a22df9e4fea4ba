"""Hand-offs while prefill still runs, and the ways on from one that failed, without Ray."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from disagg.cluster import worker_process
from disagg.config import BUNDLED_MODEL
from disagg.errors import KVLostError, KVWithdrawnError, NoCapacityError, OverloadedError
from disagg.service.generation import GenerationRequest
from disagg.service.tokenizer import Tokenizer
from disagg.transfer.calls import DamagedKVError
from disagg.transfer.staged import StagedPublisher, StagedPuller
from disagg.types import KVHandle, SamplingParams
from tests.cluster.harness import Cluster, ask, running_cluster

# The default policy may well leave a worker aside that has nothing to add.
EVERY_WORKER_IN_TURN = {"router": {"policy": "round_robin"}}


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    text = " ".join(str(number) for number in range(1, 200))
    tokens: list[int] = Tokenizer(BUNDLED_MODEL).encode(text)
    # Prefilled in five steps.
    return tokens[:300]


def slow_down(cluster: Cluster, worker_id: str, seconds: float) -> None:
    """Let each step of a worker take that much longer, so that nothing here is a matter of luck."""
    engine = cluster.workers[worker_id].worker._engine
    runner = engine._runner
    execute = runner.execute

    def slowly(batch: Any) -> Any:
        time.sleep(seconds)
        return execute(batch)

    runner.execute = slowly  # type: ignore[method-assign]


@pytest.fixture(params=["readable", "staged"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether peers read the cache itself, or what a worker on a GPU lets pass through host memory."""
    monkeypatch.setattr(worker_process, "stages", lambda _device: request.param == "staged")


def client_of(cluster: Cluster, worker_id: str) -> Any:
    puller = cluster.workers[worker_id]._puller
    return puller._client if isinstance(puller, StagedPuller) else puller


def all_rows_are_back(cluster: Cluster) -> bool:
    """Whether no worker has a row of its staging memory out."""
    ends = [end for process in cluster.workers.values() for end in (process._staged, process._puller)]
    staged = [end for end in ends if isinstance(end, StagedPublisher | StagedPuller)]
    return all(end._rows.num_free == end._rows.capacity for end in staged)


def watch_copies(cluster: Cluster, worker_id: str) -> list[tuple[int, int, bool]]:
    """Return a list to which (first block, blocks, all computed) of each copy is added."""
    client, copies = client_of(cluster, worker_id), []
    original = client._copy

    async def copy(connection: Any, pull: Any, located: Any) -> None:
        if located.block_ids:
            copies.append((pull.position, len(located.block_ids), located.complete))
        await original(connection, pull, located)

    client._copy = copy
    return copies


def fail_where_pulled_first(cluster: Cluster, *worker_ids: str) -> list[str]:
    """Let that one of these workers pull nothing that is asked to first; return a list to which its name is
    added with each pull that failed.
    """
    failed: list[str] = []

    def wrapped(worker_id: str) -> Callable[..., Any]:
        original = client_of(cluster, worker_id).pull

        async def pull(*arguments: Any) -> object:
            if (failed or [worker_id])[0] == worker_id:
                failed.append(worker_id)
                raise KVLostError("injected")
            return await original(*arguments)

        return pull

    for worker_id in worker_ids:
        client_of(cluster, worker_id).pull = wrapped(worker_id)
    return failed


def replace_pull(cluster: Cluster, worker_id: str, raised: Callable[[], Exception]) -> None:
    async def pull(*_: object) -> object:
        raise raised()

    client_of(cluster, worker_id).pull = pull


async def recoveries(cluster: Cluster) -> dict[str, int]:
    assert cluster.gateway is not None
    text = (await cluster.gateway.metrics()).decode()
    counts = {"pull_again": 0, "other_worker": 0, "recompute": 0}
    for line in text.splitlines():
        found = re.match(r'disagg_kv_transfer_recoveries_total\{.*rung="(\w+)".*\} (\S+)$', line)
        if found:
            counts[found[1]] += int(float(found[2]))
    return counts


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_chunks_are_pulled_while_later_ones_are_computed(prompt: list[int], transport: str) -> None:
    async with running_cluster({"transfer": {"kv_transport": transport}}) as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        copies = watch_copies(cluster, "decode-0")
        answer = await ask(cluster, prompt, cache_salt="early")
        assert answer.token_ids == expected.token_ids
        # Every block once, in order, and most of them before the last step had ended.
        assert [first for first, _, _ in copies] == [
            sum(count for _, count, _ in copies[:index]) for index in range(len(copies))
        ]
        assert sum(count for _, count, _ in copies) == -(-len(prompt) // 16)
        assert sum(count for _, count, complete in copies if not complete) >= 3 * 64 // 16
        assert not copies[0][2]
        await cluster.wait_idle(5.0)


async def test_chunks_are_on_the_device_while_later_ones_are_computed(
    prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "stages", lambda _device: True)
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        puller = cluster.workers["decode-0"]._puller
        assert isinstance(puller, StagedPuller)
        moved, released = [], []
        to_device, release = puller._mover.to_device, puller._client._release

        def watched(source: Any, rows: list[int], block_ids: list[int]) -> None:
            moved.append((len(block_ids), bool(released)))
            to_device(source, rows, block_ids)

        async def releasing(*arguments: Any) -> bool:
            released.append(True)
            return await release(*arguments)

        puller._mover.to_device = watched  # type: ignore[method-assign]
        puller._client._release = releasing  # type: ignore[method-assign]
        answer = await ask(cluster, prompt, cache_salt="early")
        assert answer.token_ids == expected.token_ids
        assert sum(count for count, _ in moved) == -(-len(prompt) // 16)
        assert sum(count for count, late in moved if not late) >= 3 * 64 // 16
        await cluster.wait_idle(5.0)
        assert all_rows_are_back(cluster)


@pytest.mark.parametrize("which", ["first", "last"])
async def test_a_copy_from_the_device_that_fails_costs_a_computation(
    prompt: list[int], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr(worker_process, "stages", lambda _device: True)
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        publisher = cluster.workers["prefill-0"]._staged
        assert publisher is not None
        to_host, failures, num_copied = publisher._mover.to_host, [], 0

        def broken(block_ids: list[int], target: Any, rows: list[int]) -> None:
            nonlocal num_copied
            num_copied += len(block_ids)
            if not failures and (which == "first" or num_copied == -(-len(prompt) // 16)):
                failures.append(True)
                raise RuntimeError("injected")
            to_host(block_ids, target, rows)

        publisher._mover.to_host = broken  # type: ignore[method-assign]
        answer = await ask(cluster, prompt, cache_salt="broken")
        assert answer.token_ids == expected.token_ids
        assert failures
        assert (await recoveries(cluster))["recompute"] == 1
        await cluster.wait_idle(5.0)
        assert all_rows_are_back(cluster)


@pytest.mark.parametrize("side", ["prefill-0", "decode-0"])
async def test_where_rows_are_few_blocks_pass_once_all_are_computed(
    prompt: list[int], monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(worker_process, "stages", lambda _device: True)
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        process = cluster.workers[side]
        end = process._staged if side == "prefill-0" else process._puller
        assert isinstance(end, StagedPublisher | StagedPuller)
        held = end._rows.take(end._rows.num_free - -(-len(prompt) // 16))
        assert held is not None
        copies = watch_copies(cluster, "decode-0")
        assert (await ask(cluster, prompt, cache_salt="few")).token_ids == expected.token_ids
        assert [(first, complete) for first, _, complete in copies] == [(0, True)]
        end._rows.give_back(held)
        await cluster.wait_idle(5.0)
        assert all_rows_are_back(cluster)


async def test_blocks_that_decode_has_are_not_sent(prompt: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        copies = watch_copies(cluster, "decode-0")
        assert (await ask(cluster, prompt)).token_ids == expected.token_ids
        assert [(first, complete) for first, _, complete in copies] == [(18, True)]


@pytest.mark.usefixtures("memory")
async def test_a_prompt_that_is_preempted_meanwhile_is_pulled_anew(prompt: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        copies = watch_copies(cluster, "decode-0")
        worker = cluster.workers["prefill-0"].worker
        asking = asyncio.create_task(ask(cluster, prompt, cache_salt="preempted"))
        while len(copies) < 2:
            await asyncio.sleep(0.005)

        def preempt() -> None:
            scheduler = worker._engine._scheduler
            scheduler._preempt(scheduler.running[-1])

        worker._commands.put(preempt)
        assert (await asking).token_ids == expected.token_ids
        assert sum(1 for first, _, _ in copies if first == 0) == 2
        assert (await recoveries(cluster))["recompute"] == 0
        await cluster.wait_idle(5.0)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("after_copies", [0, 1, 3])
async def test_a_client_that_leaves_during_an_early_pull(prompt: list[int], after_copies: int) -> None:
    async with running_cluster() as cluster:
        slow_down(cluster, "prefill-0", 0.05)
        copies = watch_copies(cluster, "decode-0")
        request = GenerationRequest(
            request_id="left",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=50, temperature=0, ignore_eos=True, seed=1),
            timeout_s=60,
        )
        assert cluster.gateway is not None
        stream = cluster.gateway.generator.generate(request)
        waiting = asyncio.create_task(anext(stream))
        async with asyncio.timeout(10):
            while len(copies) < after_copies:
                await asyncio.sleep(0.002)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        await cluster.wait_idle(1.0)
        assert len(cluster.workers["prefill-0"]._publisher._leases) == 0
        assert all_rows_are_back(cluster)


@pytest.mark.usefixtures("memory")
async def test_a_decode_worker_lost_while_prefill_runs(prompt: list[int]) -> None:
    """The KV is computed once; another decode worker pulls it."""
    async with running_cluster(decode=2) as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.1)
        copies = {name: watch_copies(cluster, name) for name in ("decode-0", "decode-1")}
        asking = asyncio.create_task(ask(cluster, prompt, cache_salt="lost"))
        async with asyncio.timeout(10):
            while not any(copies.values()):
                await asyncio.sleep(0.002)
        victim = next(name for name, seen in copies.items() if seen)
        other = next(name for name in copies if name != victim)
        await cluster.workers.pop(victim).stop()
        assert (await asking).token_ids == expected.token_ids
        assert sum(count for _, count, _ in copies[other]) == -(-len(prompt) // 16)
        assert (await recoveries(cluster)) == {"pull_again": 0, "other_worker": 1, "recompute": 0}
        await cluster.wait_idle(5.0)


# -- the ladder --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
async def test_damage_is_pulled_again_from_the_same_peer(prompt: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        client = client_of(cluster, "decode-0")
        original, damages = client._copy, iter([True])

        async def copy(*arguments: Any) -> None:
            if next(damages, False):
                raise DamagedKVError("injected")
            await original(*arguments)

        client._copy = copy
        assert (await ask(cluster, prompt, cache_salt="damage")).token_ids == expected.token_ids
        assert (await recoveries(cluster)) == {"pull_again": 1, "other_worker": 0, "recompute": 0}
        await cluster.wait_idle(5.0)


async def test_another_decode_worker_pulls_what_one_cannot(prompt: list[int]) -> None:
    async with running_cluster(EVERY_WORKER_IN_TURN, decode=2) as cluster:
        expected = await ask(cluster, prompt)
        copies = {name: watch_copies(cluster, name) for name in ("decode-0", "decode-1")}
        failed = fail_where_pulled_first(cluster, *copies)
        prompts = [[*prompt[:120], index + 5] for index in range(6)]
        for index, each in enumerate(prompts):
            await ask(cluster, each, cache_salt=f"other{index}")
        again = await ask(cluster, prompt, cache_salt="other")
        assert again.token_ids == expected.token_ids
        counts = await recoveries(cluster)
        # One that failed early is tried again on the same worker first.
        assert 1 <= counts["other_worker"] <= len(failed)
        assert counts["recompute"] == 0
        other = next(name for name in copies if name != failed[0])
        assert sum(1 for first, _, _ in copies[other] if first == 0) == 7
        await cluster.wait_idle(5.0)


async def test_without_the_kv_the_last_worker_computes_it(prompt: list[int]) -> None:
    async with running_cluster(decode=2) as cluster:
        expected = await ask(cluster, prompt)
        for name in ("decode-0", "decode-1"):
            replace_pull(cluster, name, lambda: KVLostError("injected"))
        assert (await ask(cluster, prompt, cache_salt="none")).token_ids == expected.token_ids
        counts = await recoveries(cluster)
        assert (counts["other_worker"], counts["recompute"]) == (1, 1)
        await cluster.wait_idle(5.0)


async def test_a_defect_in_a_transport_costs_time_and_not_the_request(prompt: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        replace_pull(cluster, "decode-0", lambda: ZeroDivisionError("injected"))
        assert (await ask(cluster, prompt, cache_salt="defect")).token_ids == expected.token_ids
        assert (await recoveries(cluster))["recompute"] == 1
        await cluster.wait_idle(5.0)


def refuse(cluster: Cluster, *worker_ids: str, early_only: bool) -> list[bool]:
    """Let the engine of that one of these workers be full that is asked first; return a list to which is
    added whether each refused request was early.
    """
    refused: list[bool] = []
    full: list[str] = []

    def wrapped(worker_id: str) -> Callable[..., None]:
        original = cluster.workers[worker_id].worker._engine.add

        def add(request: Any, **options: Any) -> None:
            early = options.get("awaits_token", False)
            if (early or not early_only) and (full or [worker_id])[0] == worker_id:
                full[:] = [worker_id]
                refused.append(early)
                raise OverloadedError("injected", retry_after=1.0)
            original(request, **options)

        return add

    for worker_id in worker_ids:
        cluster.workers[worker_id].worker._engine.add = wrapped(worker_id)  # type: ignore[method-assign]
    return refused


async def test_an_early_start_that_is_refused_is_no_refusal_of_the_request(prompt: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        refused = refuse(cluster, "decode-0", early_only=True)
        copies = watch_copies(cluster, "decode-0")
        assert (await ask(cluster, prompt, cache_salt="full")).token_ids == expected.token_ids
        assert refused == [True]
        assert [(first, complete) for first, _, complete in copies] == [(0, True)]
        assert (await recoveries(cluster)) == {"pull_again": 0, "other_worker": 0, "recompute": 0}
        await cluster.wait_idle(5.0)


async def test_a_full_decode_worker_leaves_the_kv_to_another(prompt: list[int]) -> None:
    async with running_cluster(EVERY_WORKER_IN_TURN, decode=2) as cluster:
        expected = await ask(cluster, prompt)
        refused = refuse(cluster, "decode-0", "decode-1", early_only=False)
        for index in range(6):
            answer = await ask(cluster, prompt, cache_salt=f"full{index}")
            assert answer.token_ids == expected.token_ids
        assert False in refused
        counts = await recoveries(cluster)
        assert counts["other_worker"] == refused.count(False)
        assert counts["recompute"] == 0
        await cluster.wait_idle(5.0)


async def test_a_full_decode_worker_is_waited_for_where_there_is_no_other(prompt: list[int]) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        engine = cluster.workers["decode-0"].worker._engine
        original, refusals = engine.add, iter([True])

        def add(request: Any, **options: Any) -> None:
            if not options.get("awaits_token", False) and next(refusals, False):
                raise OverloadedError("injected", retry_after=1.0)
            original(request, **options)

        engine.add = add  # type: ignore[method-assign]
        cluster.gateway.generator._reserve = lambda *_: None  # type: ignore[union-attr, attr-defined]
        assert (await ask(cluster, prompt, cache_salt="full")).token_ids == expected.token_ids
        assert next(refusals, None) is None
        await cluster.wait_idle(5.0)


async def test_a_view_behind_the_routers_does_not_end_a_request(prompt: list[int]) -> None:
    """The front end believes that another worker could have the KV; the router knows that none is left."""
    async with running_cluster(decode=2) as cluster:
        expected = await ask(cluster, prompt)
        for name in ("decode-0", "decode-1"):
            replace_pull(cluster, name, lambda: KVLostError("injected"))
        assert cluster.gateway is not None
        router = cluster.gateway.generator._router  # type: ignore[attr-defined]
        original = router.place

        async def place(request: Any) -> Any:
            if request.excluded:
                raise NoCapacityError("injected")
            return await original(request)

        router.place = place
        assert (await ask(cluster, prompt, cache_salt="behind")).token_ids == expected.token_ids
        counts = await recoveries(cluster)
        assert (counts["other_worker"], counts["recompute"]) == (0, 1)
        await cluster.wait_idle(5.0)


async def test_a_decode_worker_that_is_cut_off_leaves_the_kv_to_another(
    prompt: list[int], memory: str
) -> None:
    """Only its stream to the front end breaks: it lives, and gives the request up."""
    async with running_cluster(decode=2) as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.1)
        copies = {name: watch_copies(cluster, name) for name in ("decode-0", "decode-1")}
        asking = asyncio.create_task(ask(cluster, prompt, cache_salt="cut"))
        async with asyncio.timeout(10):
            while not any(copies.values()):
                await asyncio.sleep(0.002)
        victim = next(name for name, seen in copies.items() if seen)
        assert cluster.gateway is not None
        pool = cluster.gateway.generator._workers  # type: ignore[attr-defined]
        await pool.connect(victim).close()
        assert (await asking).token_ids == expected.token_ids
        assert (await recoveries(cluster)) == {"pull_again": 0, "other_worker": 1, "recompute": 0}
        await cluster.wait_idle(5.0)


async def test_a_withdrawal_that_is_heard_of_after_the_token_costs_another_pull(
    prompt: list[int], memory: str
) -> None:
    async with running_cluster() as cluster:
        expected = await ask(cluster, prompt)
        slow_down(cluster, "prefill-0", 0.05)
        client, pulls = client_of(cluster, "decode-0"), []
        original = client.pull

        async def pull(handle: KVHandle, *args: Any) -> object:
            pulls.append(handle)
            if len(pulls) > 1:
                return await original(handle, *args)
            incoming = cluster.workers["decode-0"].worker._tracked[handle.request_id].incoming
            assert incoming is not None
            await incoming.token
            raise KVWithdrawnError("injected")

        client.pull = pull
        assert (await ask(cluster, prompt, cache_salt="late")).token_ids == expected.token_ids
        assert len(pulls) == 2
        assert (await recoveries(cluster))["recompute"] == 0
        await cluster.wait_idle(5.0)
