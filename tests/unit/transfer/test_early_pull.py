"""Pulls that follow a peer's computing: chunk by chunk, and through preemptions."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import numpy as np
import pytest

from disagg.errors import KVLostError, KVWithdrawnError
from disagg.types import KVHandle
from tests.unit.transfer.transfer_support import LAYOUT, Directory, Node, fill, running_client, running_node

TRANSPORTS = ["shm", "grpc", "messages"]
BLOCKS = [3, 4, 5, 9, 8, 7]


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
async def node(directory: Directory) -> AsyncIterator[Node]:
    async with running_node(directory) as running:
        yield running


def opened(node: Node, num_blocks: int = len(BLOCKS)) -> KVHandle:
    return node.service.open("r", secrets.token_bytes(16), num_blocks * LAYOUT.block_size)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_come_as_they_are_computed(directory: Directory, node: Node, transport: str) -> None:
    async with running_client(directory, transport=transport) as (client, segment):
        handle = opened(node)
        pulling = asyncio.create_task(client.pull(handle, 1, [20, 21, 22, 23, 24]))
        for count in range(1, len(BLOCKS)):
            node.service.progress("r", 0, BLOCKS[:count], complete=False)
            async with asyncio.timeout(5):
                while not (segment.blocks[20 : 19 + count] == node.segment.blocks[BLOCKS[1:count]]).all():
                    await asyncio.sleep(0.002)
            assert not pulling.done()
        assert node.released == []
        node.service.progress("r", 0, BLOCKS, complete=True)
        result = await pulling
        assert result.num_bytes == 5 * segment.block_bytes
        assert np.array_equal(segment.blocks[20:25], node.segment.blocks[BLOCKS[1:]])
        assert node.released == ["r"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_withdrawal_ends_a_pull_and_leaves_the_lease(
    directory: Directory, node: Node, transport: str
) -> None:
    async with running_client(directory, transport=transport) as (client, segment):
        handle = opened(node)
        pulling = asyncio.create_task(client.pull(handle, 0, [*range(20, 26)]))
        node.service.progress("r", 0, BLOCKS[:3], complete=False)
        async with asyncio.timeout(10):
            while not np.array_equal(segment.blocks[20:23], node.segment.blocks[BLOCKS[:3]]):
                await asyncio.sleep(0.002)
        node.service.withdraw("r")
        with pytest.raises(KVWithdrawnError):
            await asyncio.wait_for(pulling, 5)
        # News of the blocks that were taken back comes late, and counts for nothing.
        node.service.progress("r", 0, BLOCKS, complete=True)
        started = asyncio.create_task(client.started(handle))
        await asyncio.sleep(0.05)
        assert not started.done()
        fill(node.segment, seed=7)
        node.service.progress("r", 1, BLOCKS[::-1], complete=True)
        await asyncio.wait_for(started, 5)
        await client.pull(handle, 0, [*range(20, 26)])
        assert np.array_equal(segment.blocks[20:26], node.segment.blocks[BLOCKS[::-1]])
        assert node.released == ["r"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_that_are_taken_back_under_a_copy_do_not_count(
    directory: Directory, node: Node, transport: str
) -> None:
    """Withdrawn, overwritten and computed anew while they were copied: what counts is copied after that."""
    async with running_client(directory, transport=transport) as (client, segment):
        handle = opened(node)
        node.service.progress("r", 0, BLOCKS[:4], complete=False)
        original, copies = client._copy, 0

        async def copy(connection: object, pull: object, located: object) -> None:
            nonlocal copies
            copies += 1
            await original(connection, pull, located)  # type: ignore[arg-type]
            if copies == 1:
                node.service.withdraw("r")
                fill(node.segment, seed=8)
                node.service.progress("r", 1, BLOCKS, complete=True)

        client._copy = copy  # type: ignore[method-assign]
        await client.pull(handle, 0, [*range(20, 26)])
        assert np.array_equal(segment.blocks[20:26], node.segment.blocks[BLOCKS])
        assert node.released == ["r"]


async def test_a_handle_may_come_before_its_lease(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (client, segment):
        key = secrets.token_bytes(16)
        handle = KVHandle("prefill-0", "first", "r", key, 4)
        pulling = asyncio.create_task(client.pull(handle, 0, [9]))
        await asyncio.sleep(0.05)
        node.service.publish("r", key, [3], 4)
        await asyncio.wait_for(pulling, 5)
        assert np.array_equal(segment.blocks[9], node.segment.blocks[3])


async def test_a_lease_that_nobody_opens_is_lost_within_the_wait(directory: Directory, node: Node) -> None:
    async with running_client(directory, pull_timeout_s=0.5) as (client, _):
        handle = KVHandle("prefill-0", "first", "r", secrets.token_bytes(16), 4)
        with pytest.raises(KVLostError, match="no such lease"):
            await asyncio.wait_for(client.started(handle), 5)


@pytest.mark.parametrize("end", ["drop", "close", "forget"])
async def test_an_open_lease_that_ends_ends_its_pull(directory: Directory, end: str) -> None:
    async with (
        running_node(directory) as node,
        running_client(directory, pull_timeout_s=5.0) as (client, _),
    ):
        handle = opened(node)
        node.service.progress("r", 0, BLOCKS[:2], complete=False)
        pulling = asyncio.create_task(client.pull(handle, 0, [*range(20, 26)]))
        await asyncio.sleep(0.05)
        if end == "drop":
            node.service.drop("r")
        elif end == "close":
            await node.service.close()
        else:
            directory.known.clear()
            client.retain(())
        with pytest.raises(KVLostError):
            await asyncio.wait_for(pulling, 5)


async def test_many_wait_for_the_same_news(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (client, _):
        handle = opened(node)
        waiting = [asyncio.create_task(client.started(handle)) for _ in range(50)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        node.service.progress("r", 0, BLOCKS[:1], complete=False)
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        # Nobody is remembered who waits no more.
        assert not node.service._news


async def test_a_puller_that_left_is_not_remembered(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (client, _):
        handles = [KVHandle("prefill-0", "first", f"r{each}", bytes(16), 4) for each in range(20)]
        waiting = [asyncio.create_task(client.started(handle)) for handle in handles]
        async with asyncio.timeout(5):
            while len(node.service._news) < 20:
                await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        async with asyncio.timeout(1):
            while node.service._news:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("transport", ["grpc", "messages"])
async def test_a_withdrawal_before_a_read_is_no_loss(
    directory: Directory, node: Node, transport: str
) -> None:
    """The owner refuses to send blocks of an epoch that has passed; the pull hears which one it is now."""
    async with running_client(directory, transport=transport) as (client, _):
        handle = opened(node)
        node.service.progress("r", 0, BLOCKS[:3], complete=False)
        original = client._copy

        async def copy(connection: object, pull: object, located: object) -> None:
            node.service.withdraw("r")
            await original(connection, pull, located)  # type: ignore[arg-type]

        client._copy = copy  # type: ignore[method-assign]
        with pytest.raises(KVWithdrawnError):
            await asyncio.wait_for(client.pull(handle, 0, [*range(20, 26)]), 10)
        assert node.released == []


async def test_a_puller_hears_that_blocks_are_begun_and_can_wait_for_them(
    directory: Directory, node: Node
) -> None:
    """So that it has reserved blocks of its own by the time that the first of the owner's is computed."""
    async with running_client(directory) as (client, segment):
        handle = opened(node)
        started = asyncio.create_task(client.started(handle))
        await asyncio.sleep(0.05)
        assert not started.done()
        node.service.progress("r", 0, [], complete=False)
        await asyncio.wait_for(started, 5)
        pulling = asyncio.create_task(client.pull(handle, 0, [*range(20, 26)]))
        await asyncio.sleep(0.05)
        assert not pulling.done()
        node.service.progress("r", 0, BLOCKS, complete=True)
        await asyncio.wait_for(pulling, 5)
        assert np.array_equal(segment.blocks[20:26], node.segment.blocks[BLOCKS])
