"""Hand-offs over process groups (Gloo, as on CPUs): exact, in turns, and whole again after a peer's death."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch

from disagg.errors import KVLostError
from disagg.rpc import cluster_channel, secret_metadata
from disagg.transfer import group_server
from disagg.transfer.calls import DamagedKVError
from disagg.transfer.process_group import PART_BYTES
from disagg.transfer.staging import DeviceStaging, HostStaging
from disagg.v1 import reads_pb2, reads_pb2_grpc
from tests.unit.transfer.transfer_support import SECRET, Directory
from tests.unit.transfer.whole_halves import LARGE, Half, contents, owner_process, running_half

NUM_BLOCKS = 160
# Several parts of a read.
assert NUM_BLOCKS * LARGE.block_bytes > 4 * PART_BYTES
EMPTY = 0xEE


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
async def owner(directory: Directory) -> AsyncIterator[Half]:
    async with running_half(directory, "prefill-0", "nccl", num_blocks=NUM_BLOCKS) as half:
        half.segment.blocks[:] = contents(NUM_BLOCKS, LARGE.block_bytes)
        yield half


@pytest.fixture
async def puller(directory: Directory) -> AsyncIterator[Half]:
    async with running_half(directory, "decode-0", "nccl", num_blocks=NUM_BLOCKS, timeout_s=5) as half:
        half.segment.blocks[:] = EMPTY
        yield half


def group_ids(owner: Half) -> list[bytes]:
    (server, _), *_ = owner.extras._servers
    return [joined.group.group_id for joined in server._groups.values()]


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
        assert result.transport == "gloo"
        assert owner.released[-1] == f"r{attempt}"
    assert len(group_ids(owner)) == 1


async def test_a_store_that_could_not_be_opened_is_tried_again(
    owner: Half, puller: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = group_server.serve_store, iter([True, True, True])

    def serve(*arguments: Any) -> Any:
        if next(failures, False):
            raise OSError("no descriptors left")
        return original(*arguments)

    monkeypatch.setattr(group_server, "serve_store", serve)
    with pytest.raises(KVLostError, match="no descriptors left"):
        await puller.client.pull(owner.publish("r0", [1]), 0, [1])
    # The second attempt of this one finds it.
    await puller.client.pull(owner.publish("r1", [2]), 0, [2])
    assert np.array_equal(puller.segment.blocks[2], owner.segment.blocks[2])


async def test_a_part_that_nobody_takes_is_not_logged_as_forgotten(
    owner: Half, puller: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: forgotten.append(context))
    begun, ended = [], []
    original = group_server.PairGroup.send

    async def send(*arguments: Any) -> None:
        begun.append(arguments)
        try:
            await original(*arguments)
        finally:
            ended.append(arguments)

    async def damaged(*_: object) -> None:
        raise DamagedKVError("injected")

    monkeypatch.setattr(group_server.PairGroup, "send", send)
    monkeypatch.setattr(group_server.PairGroup, "receive", damaged)
    blocks = list(range(1, NUM_BLOCKS))
    with pytest.raises(KVLostError, match="injected"):
        await puller.client.pull(owner.publish("r", blocks), 0, blocks)
    async with asyncio.timeout(60):
        # Nobody is left to ask for more; what was on its way fails, or was cancelled with the call.
        while group_ids(owner) or len(ended) < len(begun):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    gc.collect()
    assert forgotten == []


async def test_of_two_groups_of_one_peer_the_earlier_is_ended(
    owner: Half, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where both were asked for before the store was there."""
    made: list[group_server.PairGroup] = []
    original = group_server.PairGroup

    def make(*arguments: Any, **options: Any) -> group_server.PairGroup:
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(group_server, "PairGroup", make)
    channel = cluster_channel(directory.known["prefill-0"][0])
    stub: reads_pb2_grpc.KVGroupsAsyncStub = reads_pb2_grpc.KVGroupsStub(channel)
    requests = [
        reads_pb2.JoinGroupRequest(worker_id="decode-0", incarnation="first", group_id=bytes([n] * 16))
        for n in (1, 2)
    ]
    await asyncio.gather(*(stub.Join(request, metadata=secret_metadata(SECRET)) for request in requests))
    await channel.close()
    assert len(made) == 2 and group_ids(owner) == [made[1].group_id]
    assert made[0]._aborted.is_set() and not made[1]._aborted.is_set()


async def test_pulls_at_once_on_one_pair_do_not_mix(owner: Half, puller: Half) -> None:
    sets = [list(range(1 + 15 * i, 1 + 15 * i + 15)) for i in range(10)]
    handles = [owner.publish(f"r{i}", blocks) for i, blocks in enumerate(sets)]
    await asyncio.gather(
        *(puller.client.pull(handle, 0, blocks[::-1]) for handle, blocks in zip(handles, sets, strict=True))
    )
    for blocks in sets:
        assert np.array_equal(puller.segment.blocks[blocks[::-1]], owner.segment.blocks[blocks])
    assert len(owner.released) == 10 and len(group_ids(owner)) == 1


async def test_both_directions_at_once(owner: Half, puller: Half) -> None:
    there, back = owner.publish("there", range(1, 60)), puller.publish("back", range(80, 139))
    puller.segment.blocks[80:139] = 7
    await asyncio.gather(
        puller.client.pull(there, 0, list(range(1, 60))), owner.client.pull(back, 0, list(range(80, 139)))
    )
    assert np.array_equal(puller.segment.blocks[1:60], owner.segment.blocks[1:60])
    assert (owner.segment.blocks[80:139] == 7).all()


async def test_a_probe_moves_the_canary(owner: Half, puller: Half) -> None:
    assert await puller.client.probe("prefill-0") == "gloo"
    owner.segment.canary[5] ^= 1
    with pytest.raises(KVLostError, match="other bytes"):
        await puller.client.probe("prefill-0")


async def test_a_lease_that_is_gone_leaves_the_group_as_it_is(owner: Half, puller: Half) -> None:
    await puller.client.probe("prefill-0")
    before = group_ids(owner)
    handle = owner.publish("gone", range(1, 100))
    owner.service.drop("gone")
    with pytest.raises(KVLostError, match="no such lease"):
        await puller.client.pull(handle, 0, list(range(1, 100)))
    await puller.client.pull(owner.publish("r", [3]), 0, [9])
    assert np.array_equal(puller.segment.blocks[9], owner.segment.blocks[3])
    assert group_ids(owner) == before


async def test_a_lease_that_ends_between_two_parts(
    owner: Half, puller: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was announced is sent, the rest refused, and the two ranks are still in step."""
    await puller.client.probe("prefill-0")
    before = group_ids(owner)
    handle = owner.publish("short", range(1, 150))
    gather = HostStaging.gather

    def gather_and_drop(self: HostStaging, cache: Any, rows: Any) -> int:
        owner.service._leases.drop("short")
        return gather(self, cache, rows)

    monkeypatch.setattr(HostStaging, "gather", gather_and_drop)
    with pytest.raises(KVLostError, match="no such lease"):
        await puller.client.pull(handle, 0, list(range(1, 150)))
    monkeypatch.undo()
    await puller.client.pull(owner.publish("r", [3]), 0, [9])
    assert np.array_equal(puller.segment.blocks[9], owner.segment.blocks[3])
    assert group_ids(owner) == before


async def test_damage_on_the_way_is_noticed_and_pulled_again(
    owner: Half, puller: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, damaged = HostStaging.gather, []

    def flip(self: HostStaging, cache: Any, rows: Any) -> int:
        checksum = gather(self, cache, rows)
        if not damaged:
            damaged.append(True)
            self._blocks[0, 100] ^= 4
        return checksum

    monkeypatch.setattr(HostStaging, "gather", flip)
    await puller.client.pull(owner.publish("r", [3, 4]), 0, [1, 2])
    assert damaged and np.array_equal(puller.segment.blocks[[1, 2]], owner.segment.blocks[[3, 4]])


async def test_a_cancelled_pull_writes_nothing_more_and_the_next_works(owner: Half, puller: Half) -> None:
    await puller.client.probe("prefill-0")
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


async def test_a_group_that_the_owner_lost_is_made_again(owner: Half, puller: Half) -> None:
    await puller.client.probe("prefill-0")
    before = group_ids(owner)
    owner.extras.retain(())
    await puller.client.pull(owner.publish("r", [3]), 0, [9])
    assert np.array_equal(puller.segment.blocks[9], owner.segment.blocks[3])
    assert group_ids(owner) != before


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
async def test_a_peer_that_dies_in_the_middle_and_comes_back(
    directory: Directory, number: signal.Signals
) -> None:
    blocks = list(range(1, 500))
    async with running_half(directory, "decode-0", "nccl", num_blocks=500, timeout_s=6) as puller:
        target = puller.segment.blocks
        async with owner_process(directory, "nccl", num_blocks=500) as owner:
            await puller.client.pull(await owner.publish("whole", blocks), 0, blocks)
            expected = contents(500, LARGE.block_bytes)
            assert np.array_equal(target[1:], expected[1:])
            target[:] = EMPTY
            pull = asyncio.create_task(puller.client.pull(await owner.publish("cut", blocks), 0, blocks))
            while (target[33] == EMPTY).all() and not pull.done():
                await asyncio.sleep(0)
            owner.signal(number)
            began = time.monotonic()
            with pytest.raises(KVLostError):
                await pull
            assert time.monotonic() - began < 14
            assert (target[-1] == EMPTY).all(), "it was over before the signal"
            puller.client.retain({("prefill-0", "second")})
        async with owner_process(directory, "nccl", incarnation="second", num_blocks=500) as owner:
            await puller.client.pull(await owner.publish("again", blocks), 0, blocks)
            assert np.array_equal(target[1:], expected[1:])


async def test_a_puller_that_dies_costs_the_owner_nothing(directory: Directory, owner: Half) -> None:
    """The other way round: an owner whose puller goes in the middle serves the next one."""
    for round_ in range(2):
        async with running_half(
            directory, "decode-0", "nccl", incarnation=f"i{round_}", num_blocks=NUM_BLOCKS
        ) as puller:
            handle = owner.publish(f"r{round_}", range(1, NUM_BLOCKS))
            pull = asyncio.create_task(puller.client.pull(handle, 0, list(range(1, NUM_BLOCKS))))
            await asyncio.sleep(0.03)
        await asyncio.wait({pull})
    async with running_half(
        directory, "decode-0", "nccl", incarnation="last", num_blocks=NUM_BLOCKS
    ) as puller:
        await puller.client.pull(owner.publish("r", [3]), 0, [9])
        assert np.array_equal(puller.segment.blocks[9], owner.segment.blocks[3])


def test_staging_for_devices_moves_what_staging_for_hosts_moves() -> None:
    """The same indices through torch, as on a GPU; here on a CPU's tensors."""
    cache = contents(20, 4096)
    rows = [7, 3, 19, 4]
    host, device = HostStaging(4, 4096), DeviceStaging(4, 4096, torch.device("cpu"))
    checksum = host.gather(cache, rows)
    device.gather(torch.from_numpy(cache), rows)
    assert torch.equal(host.first(4), device.first(4))
    by_host, by_device = np.zeros_like(cache), torch.zeros((20, 4096), dtype=torch.uint8)
    stop = threading.Event()
    assert host.scatter(by_host, [1, 0, 5, 6], checksum, stop)
    assert device.scatter(by_device, [1, 0, 5, 6], 0, stop)
    assert np.array_equal(by_host, by_device.numpy()) and np.array_equal(by_host[5], cache[19])
    stop.set()
    host.scatter(by_host, [10, 11, 12, 13], checksum, stop)
    device.scatter(by_device, [10, 11, 12, 13], 0, stop)
    assert not by_host[10:14].any() and not by_device[10:14].any()
