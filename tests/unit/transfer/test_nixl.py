"""Hand-offs over NIXL (UCX on CPU memory): exact, quiet while idle, and never writing what was given up."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from disagg.errors import KVLostError
from disagg.transfer.nixl_agent import MAX_BUFFERS, PART_BYTES, NixlAgent
from tests.unit.transfer.transfer_support import Directory
from tests.unit.transfer.whole_halves import LARGE, Half, contents, owner_process, running_half

pytest.importorskip("nixl", reason="NIXL is not installed")

NUM_BLOCKS = 160
assert NUM_BLOCKS * LARGE.block_bytes > 4 * PART_BYTES
EMPTY = 0xEE


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
async def owner(directory: Directory) -> AsyncIterator[Half]:
    async with running_half(directory, "prefill-0", "nixl", num_blocks=NUM_BLOCKS) as half:
        half.segment.blocks[:] = contents(NUM_BLOCKS, LARGE.block_bytes)
        yield half


@pytest.fixture
async def puller(directory: Directory) -> AsyncIterator[Half]:
    async with running_half(directory, "decode-0", "nixl", num_blocks=NUM_BLOCKS, timeout_s=5) as half:
        half.segment.blocks[:] = EMPTY
        yield half


def agent_of(half: Half) -> NixlAgent:
    assert half.extras._agent is not None
    return half.extras._agent


async def test_bytes_are_exact_for_random_block_sets(owner: Half, puller: Half) -> None:
    rng = random.Random(3)
    for attempt in range(12):
        count = rng.choice((1, 2, 31, 32, 33, 64, 100, NUM_BLOCKS - 1))
        remote = rng.sample(range(1, NUM_BLOCKS), count)
        first = rng.randint(0, count // 2)
        local = rng.sample(range(1, NUM_BLOCKS), count - first)
        puller.segment.blocks[:] = EMPTY
        result = await puller.client.pull(owner.publish(f"r{attempt}", remote), first, local)
        expected = np.full_like(puller.segment.blocks, EMPTY)
        expected[local] = owner.segment.blocks[remote[first:]]
        assert np.array_equal(puller.segment.blocks, expected)
        assert result.transport == "nixl"
        assert owner.released[-1] == f"r{attempt}"
    agent = agent_of(puller)
    assert len(agent._free) == agent._num_buffers and not agent._given_up


async def test_more_pulls_at_once_than_there_are_buffers(owner: Half, puller: Half) -> None:
    sets = [[1 + 3 * i, 2 + 3 * i, 3 + 3 * i] for i in range(2 * MAX_BUFFERS)]
    handles = [owner.publish(f"r{i}", blocks) for i, blocks in enumerate(sets)]
    await asyncio.gather(
        *(puller.client.pull(handle, 0, blocks[::-1]) for handle, blocks in zip(handles, sets, strict=True))
    )
    for blocks in sets:
        assert np.array_equal(puller.segment.blocks[blocks[::-1]], owner.segment.blocks[blocks])
    agent = agent_of(puller)
    assert len(agent._free) == agent._num_buffers <= MAX_BUFFERS


async def test_both_directions_at_once(owner: Half, puller: Half) -> None:
    there, back = owner.publish("there", range(1, 60)), puller.publish("back", range(80, 139))
    puller.segment.blocks[80:139] = 7
    await asyncio.gather(
        puller.client.pull(there, 0, list(range(1, 60))), owner.client.pull(back, 0, list(range(80, 139)))
    )
    assert np.array_equal(puller.segment.blocks[1:60], owner.segment.blocks[1:60])
    assert (owner.segment.blocks[80:139] == 7).all()


async def test_a_probe_moves_the_canary(owner: Half, puller: Half) -> None:
    assert await puller.client.probe("prefill-0") == "nixl"
    owner.segment.canary[5] ^= 1
    with pytest.raises(KVLostError, match="other bytes"):
        await puller.client.probe("prefill-0")


async def test_a_lease_that_is_gone(owner: Half, puller: Half) -> None:
    handle = owner.publish("gone", range(1, 100))
    owner.service.drop("gone")
    with pytest.raises(KVLostError, match="no such lease"):
        await puller.client.pull(handle, 0, list(range(1, 100)))
    assert (puller.segment.blocks == EMPTY).all()


async def test_a_cancelled_pull_writes_nothing_more_and_the_next_works(owner: Half, puller: Half) -> None:
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
        handle = owner.publish(f"cut{delay}", range(1, NUM_BLOCKS))
        pull = asyncio.create_task(puller.client.pull(handle, 0, list(range(1, NUM_BLOCKS))))
        await asyncio.sleep(delay)
        pull.cancel()
        await asyncio.wait({pull})
        puller.segment.blocks[:] = EMPTY
        await asyncio.sleep(0.05)
        assert (puller.segment.blocks == EMPTY).all()
    await puller.client.pull(owner.publish("r", [3]), 0, [9])
    assert np.array_equal(puller.segment.blocks[9], owner.segment.blocks[3])
    agent = agent_of(puller)
    assert len(agent._free) + len(agent._given_up) == agent._num_buffers


async def test_the_metadata_of_another_agent_is_refused(owner: Half, puller: Half) -> None:
    other = agent_of(puller).metadata()
    owner.service.offer("nixl", lambda response: setattr(response.nixl, "metadata", other))
    with pytest.raises(KVLostError, match=r"another agent's|NIXL"):
        await puller.client.probe("prefill-0")


@pytest.mark.parametrize("metadata", [b"", b"nonsense", b"\0" * 2_000_000])
async def test_metadata_that_is_none_is_refused(owner: Half, puller: Half, metadata: bytes) -> None:
    owner.service.offer("nixl", lambda response: setattr(response.nixl, "metadata", metadata))
    with pytest.raises(KVLostError, match="NIXL"):
        await puller.client.probe("prefill-0")


async def test_nixl_is_not_taken_by_itself(directory: Directory, owner: Half) -> None:
    async with running_half(directory, "decode-1", "auto") as puller:
        assert (await puller.client.pull(owner.publish("r", [3]), 0, [9])).transport == "shm"
    async with (
        running_half(directory, "prefill-1", "auto"),
        running_half(directory, "decode-2", "nixl") as asks,
    ):
        with pytest.raises(KVLostError, match="nixl: the peer does not offer it"):
            await asks.client.probe("prefill-1")


# -- processes -------------------------------------------------------------------------------------------


async def test_a_peer_that_dies_in_the_middle_and_comes_back(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    blocks = list(range(1, 500))
    async with running_half(directory, "decode-0", "nixl", num_blocks=500, timeout_s=6) as puller:
        target = puller.segment.blocks
        async with owner_process(directory, "nixl", num_blocks=500) as owner:
            await puller.client.pull(await owner.publish("whole", blocks), 0, blocks)
            expected = contents(500, LARGE.block_bytes)
            assert np.array_equal(target[1:], expected[1:])
            # Nothing runs, so nothing is polled.
            mine, before, began = time.process_time(), await owner.cpu_seconds(), time.monotonic()
            await asyncio.sleep(2)
            idle = time.monotonic() - began
            assert await owner.cpu_seconds() - before < 0.15 * idle
            assert time.process_time() - mine < 0.15 * idle
            target[:] = EMPTY
            pull = asyncio.create_task(puller.client.pull(await owner.publish("cut", blocks), 0, blocks))
            while (target[33] == EMPTY).all() and not pull.done():
                await asyncio.sleep(0)
            owner.signal(signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(KVLostError):
                await pull
            assert time.monotonic() - began < 14
            assert (target[-1] == EMPTY).all(), "it was over before the signal"
            puller.client.retain({("prefill-0", "second")})
        async with owner_process(directory, "nixl", incarnation="second", num_blocks=500) as owner:
            await puller.client.pull(await owner.publish("again", blocks), 0, blocks)
            assert np.array_equal(target[1:], expected[1:])


@pytest.mark.slow
async def test_a_peer_that_stops_and_goes_on_writes_into_nothing_of_ours(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of a read that was given up arrive in a buffer that waits for them and is used again."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    blocks = list(range(1, 500))
    async with running_half(directory, "decode-0", "nixl", num_blocks=500, timeout_s=3) as puller:
        target, agent = puller.segment.blocks, agent_of(puller)
        async with owner_process(directory, "nixl", num_blocks=500) as owner:
            await puller.client.probe("prefill-0")
            pull = asyncio.create_task(puller.client.pull(await owner.publish("cut", blocks), 0, blocks))
            while (target[33] == 0).all() and not pull.done():
                await asyncio.sleep(0)
            owner.signal(signal.SIGSTOP)
            with pytest.raises(KVLostError):
                await pull
            assert len(agent._given_up) == 1
            target[:] = EMPTY
            owner.signal(signal.SIGCONT)
            await asyncio.sleep(1)
            assert (target == EMPTY).all()
            await puller.client.pull(await owner.publish("again", blocks), 0, blocks)
            assert np.array_equal(target[1:], contents(500, LARGE.block_bytes)[1:])
