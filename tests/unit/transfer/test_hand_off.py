"""Pulls that succeed, over both transports: the right bytes in the right places, each lease ended once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from disagg.errors import ConfigError, InvalidRequestError, KVLostError
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import SharedSegment
from tests.unit.transfer.transfer_support import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    Directory,
    Node,
    running_client,
    running_node,
)

TRANSPORTS = ["shm", "grpc", "messages"]


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
async def node(directory: Directory) -> AsyncIterator[Node]:
    async with running_node(directory) as running:
        yield running


@pytest.fixture(params=TRANSPORTS)
async def pulling(
    request: pytest.FixtureRequest, directory: Directory
) -> AsyncIterator[tuple[KVTransferClient, SharedSegment, str]]:
    async with running_client(directory, transport=request.param) as (client, segment):
        yield client, segment, "shm" if request.param == "shm" else "grpc"


Pulling = tuple[KVTransferClient, SharedSegment, str]


async def test_bytes_are_exact_for_random_block_sets(node: Node, pulling: Pulling) -> None:
    client, segment, transport = pulling
    rng = random.Random(7)
    for attempt in range(40):
        count = rng.randint(1, NUM_BLOCKS - 1)
        remote = rng.sample(range(1, NUM_BLOCKS), count)
        if attempt % 2:
            remote = sorted(remote)
        first = rng.randint(0, count)
        local = rng.sample(range(1, NUM_BLOCKS), count - first)
        segment.blocks[:] = 0xEE
        request_id = f"r{attempt}"
        result = await client.pull(node.publish(request_id, remote), first, local)
        expected = np.full_like(segment.blocks, 0xEE)
        for source, target in zip(remote[first:], local, strict=True):
            expected[target] = node.segment.blocks[source]
        assert np.array_equal(segment.blocks, expected)
        assert result.transport == transport
        assert result.num_bytes == (count - first) * BLOCK_BYTES
        assert node.released[-1] == request_id
    assert len(node.released) == 40


async def test_nothing_to_copy_still_ends_the_lease(node: Node, pulling: Pulling) -> None:
    client, segment, _ = pulling
    result = await client.pull(node.publish("cached", [1, 2]), 2, [])
    assert result.num_bytes == 0
    assert (segment.blocks == 0xEE).all()
    assert node.released == ["cached"]


async def test_a_lease_serves_one_pull(node: Node, pulling: Pulling) -> None:
    client, _, _ = pulling
    handle = node.publish("once", [1, 2])
    await client.pull(handle, 0, [1, 2])
    with pytest.raises(KVLostError):
        await client.pull(handle, 0, [1, 2])
    assert node.released == ["once"]


async def test_auto_takes_shared_memory_on_one_host(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (client, _):
        assert (await client.pull(node.publish("r", [1]), 0, [1])).transport == "shm"


async def test_auto_takes_grpc_between_hosts(
    directory: Directory, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.transfer.connections.host_id", lambda: "elsewhere")
    async with running_client(directory) as (client, segment):
        assert (await client.pull(node.publish("r", [5]), 0, [1])).transport == "grpc"
        assert np.array_equal(segment.blocks[1], node.segment.blocks[5])
    async with running_client(directory, transport="shm") as (client, _):
        with pytest.raises(KVLostError, match="another host"):
            await client.pull(node.publish("s", [5]), 0, [1])


async def test_auto_takes_grpc_where_the_segment_cannot_be_mapped(
    directory: Directory, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same host by its word, but not the same /proc: two containers with one kernel."""
    description = node.segment.describe()
    description.pid = 2**31 - 1
    monkeypatch.setattr(node.segment, "describe", lambda: description)
    async with running_client(directory) as (client, segment):
        assert (await client.pull(node.publish("r", [5]), 0, [1])).transport == "grpc"
        assert np.array_equal(segment.blocks[1], node.segment.blocks[5])


@pytest.mark.parametrize("transport", ["nccl", "nixl"])
async def test_a_transport_that_is_not_here_is_refused(directory: Directory, transport: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with running_client(directory, transport=transport):
            pass
    assert caught.value.param == "kv_transport"


@pytest.mark.parametrize("block", [-1, NUM_BLOCKS])
async def test_local_blocks_that_do_not_exist_are_refused(node: Node, pulling: Pulling, block: int) -> None:
    client, segment, _ = pulling
    with pytest.raises(InvalidRequestError) as caught:
        await client.pull(node.publish("r", [1, 2]), 0, [3, block])
    assert caught.value.param == "local_block_ids"
    assert (segment.blocks == 0xEE).all()


async def test_fifty_pulls_at_once(directory: Directory) -> None:
    """Each into its own blocks; one connection carries them."""
    async with running_node(directory, num_blocks=256) as node:
        for transport in TRANSPORTS:
            async with running_client(directory, transport=transport, num_blocks=256) as (client, segment):
                blocks = [list(range(1 + 5 * index, 6 + 5 * index)) for index in range(50)]
                handles = [node.publish(f"{transport}-{i}", rows) for i, rows in enumerate(blocks)]
                reverse = blocks[::-1]
                await asyncio.gather(
                    *(client.pull(handle, 0, rows) for handle, rows in zip(handles, reverse, strict=True))
                )
                for source, target in zip(blocks, reverse, strict=True):
                    assert np.array_equal(segment.blocks[target], node.segment.blocks[source])
        assert len(node.released) == len(set(node.released)) == 150


async def test_a_worker_pulls_from_itself(directory: Directory, node: Node) -> None:
    client = KVTransferClient(
        node.service._layout,
        node.segment,
        worker_id="prefill-0",
        incarnation="first",
        secret="test-secret",
        resolve=directory.resolve,
    )
    expected = node.segment.blocks[[1, 2]].copy()
    await client.pull(node.publish("r", [1, 2]), 0, [10, 11])
    assert np.array_equal(node.segment.blocks[[10, 11]], expected)
    await client.close()


# -- waiting ---------------------------------------------------------------------------------------------


async def test_waiting_leases_are_kept_alive_until_left(directory: Directory) -> None:
    async with (
        running_node(directory, lease_s=0.6) as node,
        running_client(directory, lease_s=0.6) as (client, segment),
    ):
        kept = [node.publish(f"kept-{index}", [1 + index]) for index in range(3)]
        for handle in kept:
            client.keep_alive(handle)
        node.publish("forgotten", [9])
        async with asyncio.timeout(10):
            while node.released != ["forgotten"]:
                await asyncio.sleep(0.02)
        # Three lives of a lease that nobody renews.
        await asyncio.sleep(1.8)
        assert node.released == ["forgotten"]
        await client.pull(kept[0], 0, [1])
        client.leave(kept[1])
        assert np.array_equal(segment.blocks[1], node.segment.blocks[1])
        # Left is not ended: another worker may pull it.
        assert node.released == ["forgotten", "kept-0"]
        async with asyncio.timeout(10):
            while node.released[2:] != ["kept-1"]:
                await asyncio.sleep(0.02)
        client.leave(kept[2])
        client.leave(kept[2])
        async with asyncio.timeout(10):
            while node.released[3:] != ["kept-2"]:
                await asyncio.sleep(0.02)
        # Nothing is left that could renew.
        async with asyncio.timeout(10):
            while client._keeper._renewers:
                await asyncio.sleep(0.02)


async def test_leaving_an_unknown_worker_is_nothing(directory: Directory) -> None:
    async with running_node(directory) as node, running_client(directory) as (client, _):
        handle = node.publish("r", [1])
        directory.known.clear()
        client.keep_alive(handle)
        client.leave(handle)


# -- probe -----------------------------------------------------------------------------------------------


async def test_probe_moves_the_canary_and_nothing_else(node: Node, pulling: Pulling) -> None:
    client, segment, transport = pulling
    before = node.segment.blocks.copy()
    for _ in range(3):
        assert await client.probe("prefill-0") == transport
    assert (segment.blocks == 0xEE).all()
    assert np.array_equal(node.segment.blocks, before)
    assert node.released == []


async def test_probe_notices_wrong_bytes(node: Node, pulling: Pulling) -> None:
    client, _, _ = pulling
    node.segment.canary[7] ^= 1
    with pytest.raises(KVLostError, match="other bytes"):
        await client.probe("prefill-0")


async def test_probe_of_an_unknown_worker(pulling: Pulling) -> None:
    client, _, _ = pulling
    with pytest.raises(KVLostError, match="not in the cluster"):
        await client.probe("nobody")


# -- peers that come and go --------------------------------------------------------------------------------


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:disagg-kv")


async def test_memory_of_a_peer_that_left_is_unmapped(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (client, _):
        before = mappings()
        await client.pull(node.publish("r", [1]), 0, [1])
        assert mappings() == before + 1
        client.retain({("prefill-0", "first")})
        await client.pull(node.publish("s", [1]), 0, [1])
        assert mappings() == before + 1
        client.retain({("prefill-0", "second")})
        async with asyncio.timeout(10):
            while mappings() != before:
                await asyncio.sleep(0.01)


async def test_a_restarted_worker_is_a_new_peer(directory: Directory) -> None:
    async with running_client(directory) as (client, segment):
        async with running_node(directory) as node:
            stale = node.publish("r", [1])
            await client.pull(node.publish("s", [1]), 0, [1])
        async with running_node(directory, incarnation="second") as node:
            with pytest.raises(KVLostError, match="restarted"):
                await client.pull(stale, 0, [1])
            client.retain({("prefill-0", "second")})
            node.segment.blocks[2] = 77
            await client.pull(node.publish("t", [2]), 0, [5])
            assert (segment.blocks[5] == 77).all()
