"""The owner's side: blocks given back once whatever ends a lease, and messages that no peer of ours sends."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from disagg.errors import InvalidRequestError
from disagg.rpc import cluster_channel, secret_metadata
from disagg.transfer.server import MAX_RENEWALS
from disagg.transfer.wire import handle_to_proto, layout_to_proto, probe_handle
from disagg.v1 import worker_pb2, worker_pb2_grpc
from tests.unit.transfer.transfer_support import (
    BLOCK_BYTES,
    LAYOUT,
    SECRET,
    Directory,
    Node,
    running_client,
    running_node,
)

METADATA = secret_metadata(SECRET)


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
async def node(directory: Directory) -> AsyncIterator[Node]:
    async with running_node(directory) as running:
        yield running


@pytest.fixture
async def channel(node: Node) -> AsyncIterator[grpc.aio.Channel]:
    opened = cluster_channel(node.address)
    yield opened
    await opened.close()


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return worker_pb2_grpc.KVTransferStub(channel)


# -- leases ------------------------------------------------------------------------------------------------


async def test_leases_end_by_themselves_in_order(directory: Directory) -> None:
    async with running_node(directory, lease_s=0.2) as node:
        for index in range(5):
            node.publish(f"r{index}", [1])
            await asyncio.sleep(0.02)
        async with asyncio.timeout(10):
            while len(node.released) < 5:
                await asyncio.sleep(0.01)
        assert node.released == [f"r{index}" for index in range(5)]
        # Nothing is armed while nothing is published, and a later lease is swept as well.
        assert node.service._timer is None
        node.publish("later", [1])
        async with asyncio.timeout(10):
            while node.released[-1] != "later":
                await asyncio.sleep(0.01)


async def test_drop_and_close_give_back_once(directory: Directory) -> None:
    async with running_node(directory) as node:
        for name in "abc":
            node.publish(name, [1])
        node.service.drop("b")
        node.service.drop("b")
        node.service.drop("unknown")
        assert node.released == ["b"]
    assert node.released == ["b", "a", "c"]


async def test_release_gives_back_once(node: Node, stub: Any) -> None:
    request = worker_pb2.ReleaseRequest(handle=handle_to_proto(node.publish("r", [1])))
    answers = await asyncio.gather(*(stub.Release(request, metadata=METADATA) for _ in range(10)))
    assert [answer.valid for answer in answers].count(True) == 1
    assert node.released == ["r"]


async def test_one_callback_that_fails_does_not_keep_the_blocks_of_others(
    directory: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_node(directory) as node:

        def released(request_id: str) -> None:
            node.released.append(request_id)
            if request_id == "a":
                raise RuntimeError("defect")

        node.service._on_released = released
        for name in "abc":
            node.publish(name, [1])
        await node.service.close()
        assert node.released == ["a", "b", "c"]
    assert "could not be given back" in caplog.text


@pytest.mark.parametrize(
    ("request_id", "key", "param"),
    [
        ("r", b"", "hold_key"),
        ("r", bytes(15), "hold_key"),
        ("r", bytes(17), "hold_key"),
        ("", bytes(16), "request_id"),
        ("x" * 257, bytes(16), "request_id"),
    ],
)
async def test_what_nobody_could_claim_is_not_published(
    node: Node, request_id: str, key: bytes, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        node.service.publish(request_id, key, [1], 4)
    assert caught.value.param == param
    assert len(node.service._leases) == 0


async def test_publishing_twice_is_refused(node: Node) -> None:
    node.publish("r", [1])
    with pytest.raises(ValueError, match="published already"):
        node.publish("r", [2])
    assert node.released == []


# -- messages ----------------------------------------------------------------------------------------------


async def test_chunks_hold_whole_blocks_up_to_their_size(node: Node, stub: Any) -> None:
    handle = handle_to_proto(node.publish("r", range(1, 11)))
    request = worker_pb2.PullRequest(handle=handle, first_block=1)
    chunks = [chunk async for chunk in stub.Pull(request, metadata=METADATA)]
    assert [chunk.first_block for chunk in chunks] == [1, 5, 9]
    assert [len(chunk.data) // BLOCK_BYTES for chunk in chunks] == [4, 4, 1]
    assert b"".join(chunk.data for chunk in chunks) == node.segment.blocks[2:11].tobytes()


@pytest.mark.parametrize("first_block", [-1, -(2**31), 3, 2**31 - 1])
async def test_blocks_that_were_not_published_are_not_served(node: Node, stub: Any, first_block: int) -> None:
    handle = handle_to_proto(node.publish("r", [1, 2]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Locate(worker_pb2.LocateRequest(handle=handle, first_block=first_block), metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "first_block" in (caught.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Pull(
            worker_pb2.PullRequest(handle=handle, first_block=first_block), metadata=METADATA
        ):
            pass
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_block_larger_than_a_chunk_still_travels(directory: Directory) -> None:
    async with (
        running_node(directory, chunk_bytes=1) as node,
        running_client(directory, transport="grpc") as (client, segment),
    ):
        await client.pull(node.publish("r", [1, 2, 3]), 0, [1, 2, 3])
        assert (segment.blocks[1:4] == node.segment.blocks[1:4]).all()


async def test_renewals_answer_one_by_one(node: Node, stub: Any) -> None:
    good = handle_to_proto(node.publish("r", [1]))
    unknown, malformed, elsewhere = (worker_pb2.KVHandle() for _ in range(3))
    unknown.CopyFrom(good)
    unknown.request_id = "unknown"
    elsewhere.CopyFrom(good)
    elsewhere.incarnation = "second"
    request = worker_pb2.RenewRequest(handles=[good, unknown, malformed, elsewhere, good])
    response = await stub.Renew(request, metadata=METADATA)
    assert list(response.valid) == [True, False, False, False, True]


async def test_too_many_renewals_are_refused(node: Node, stub: Any) -> None:
    request = worker_pb2.RenewRequest(handles=[worker_pb2.KVHandle()] * (MAX_RENEWALS + 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Renew(request, metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "handles" in (caught.value.details() or "")


async def test_shared_memory_is_offered_on_one_host_only(node: Node, stub: Any) -> None:
    for host, transports in ((node.service._host_id, ["grpc", "shm"]), ("", ["grpc"]), ("x", ["grpc"])):
        request = worker_pb2.ConnectRequest(host_id=host, layout=layout_to_proto(LAYOUT))
        response = await stub.Connect(request, metadata=METADATA)
        assert list(response.transports) == transports
        assert response.HasField("segment") == ("shm" in transports)


async def test_a_layout_of_any_length_gets_a_short_answer(node: Node, stub: Any) -> None:
    layout = worker_pb2.KVLayout(model="\u20ac\n" * 1_000_000, dtype="\0" * 100_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Connect(worker_pb2.ConnectRequest(layout=layout), metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert len(caught.value.details() or "") < 2000


async def test_the_probe_is_not_derived_without_the_secret(node: Node, stub: Any) -> None:
    request = worker_pb2.LocateRequest(handle=handle_to_proto(probe_handle("prefill-0", "first", "guess")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Locate(request, metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


FUZZED = 10_000


class Fuzz:
    """Messages between right and random: valid ones with fields changed, cut ones, and noise."""

    def __init__(self, seed: int, handle: worker_pb2.KVHandle) -> None:
        self.rng = random.Random(seed)
        self.handle = handle

    def message(self) -> tuple[str, bytes]:
        method = self.rng.choice(["Connect", "Locate", "Pull", "Renew", "Release"])
        if self.rng.random() < 0.2:
            return method, self.rng.randbytes(self.rng.randint(0, 200))
        data = getattr(self, f"_{method.lower()}")().SerializeToString()
        if self.rng.random() < 0.2:
            data = bytearray(data)
            for _ in range(self.rng.randint(1, 4)):
                if data:
                    data[self.rng.randrange(len(data))] = self.rng.randrange(256)
            data = bytes(data[: self.rng.randint(0, len(data))])
        return method, data

    def _text(self) -> str:
        return self.rng.choice(["", "r", "prefill-0", "first", "probe", "x" * 257, "é" * 300, "\0", "../.."])

    def _int(self) -> int:
        return self.rng.choice([0, 1, 2, 3, -1, 4, 63, 64, 2**31 - 1, -(2**31), self.rng.randint(-99, 99)])

    def _handle(self) -> worker_pb2.KVHandle:
        handle = worker_pb2.KVHandle()
        handle.CopyFrom(self.handle)
        # One field at least is wrong, so that the lease outlives the test.
        wrong = self.rng.sample(["worker_id", "incarnation", "request_id", "key", "num_tokens"], 2)
        for name in wrong:
            if name == "key":
                handle.key = self.rng.randbytes(self.rng.choice([0, 1, 15, 16, 16, 17, 500]))
            elif name == "num_tokens":
                handle.num_tokens = self.rng.choice([-1, 0, 7, 9, 2**31 - 1])
            else:
                setattr(handle, name, self.rng.choice(["", "other", "probe", "x" * 257, "é" * 300, "\0"]))
        return handle

    def _connect(self) -> worker_pb2.ConnectRequest:
        layout = layout_to_proto(LAYOUT)
        if self.rng.random() < 0.8:
            layout.block_size = self._int()
            layout.model = self._text()
        return worker_pb2.ConnectRequest(
            worker_id=self._text(), incarnation=self._text(), layout=layout, host_id=self._text()
        )

    def _locate(self) -> worker_pb2.LocateRequest:
        return worker_pb2.LocateRequest(handle=self._handle(), first_block=self._int())

    def _pull(self) -> worker_pb2.PullRequest:
        return worker_pb2.PullRequest(handle=self._handle(), first_block=self._int())

    def _renew(self) -> worker_pb2.RenewRequest:
        return worker_pb2.RenewRequest(handles=[self._handle() for _ in range(self.rng.randint(0, 5))])

    def _release(self) -> worker_pb2.ReleaseRequest:
        return worker_pb2.ReleaseRequest(handle=self._handle())


async def test_ten_thousand_fuzzed_messages_leave_it_serving(
    directory: Directory, node: Node, channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    # gRPC logs a stack for each message that does not parse.
    caplog.set_level(logging.CRITICAL, logger="grpc._cython.cygrpc")
    handle = node.publish("r", [1, 2])
    fuzz = Fuzz(11, handle_to_proto(handle))
    allowed = {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        # What gRPC itself answers to bytes that are no such message.
        grpc.StatusCode.UNKNOWN,
    }
    refused: dict[grpc.StatusCode, int] = {}

    async def send(method: str, data: bytes) -> None:
        path = f"/disagg.v1.KVTransfer/{method}"
        try:
            if method == "Pull":
                async for chunk in channel.unary_stream(path)(data, metadata=METADATA, timeout=30):
                    raise AssertionError(f"a forged handle was served: {chunk!r}")
            else:
                await channel.unary_unary(path)(data, metadata=METADATA, timeout=30)
        except grpc.aio.AioRpcError as error:
            refused[error.code()] = refused.get(error.code(), 0) + 1

    for _ in range(FUZZED // 100):
        await asyncio.gather(*(send(*fuzz.message()) for _ in range(100)))
    assert set(refused) <= allowed, refused
    assert refused[grpc.StatusCode.NOT_FOUND] > 1000
    # No lease was ended by any of it, and a right pull is served.
    assert node.released == []
    async with running_client(directory) as (client, segment):
        await client.pull(handle, 0, [1, 2])
        assert (segment.blocks[1:3] == node.segment.blocks[1:3]).all()
