"""Pulls that must fail: a typed error in time, nothing written afterwards, and the next pull works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from disagg.errors import KVLostError, LayoutMismatchError
from disagg.rpc import cluster_server
from disagg.transfer import copying
from disagg.transfer.segment import Blocks
from disagg.transfer.server import KVTransferService
from disagg.transfer.wire import layout_to_proto
from disagg.types import KVHandle
from disagg.v1 import worker_pb2, worker_pb2_grpc
from tests.unit.transfer.transfer_support import (
    BLOCK_BYTES,
    LAYOUT,
    SECRET,
    Directory,
    Node,
    local_segment,
    running_client,
    running_node,
    serving,
)

TRANSPORTS = ["shm", "grpc", "messages"]


@pytest.fixture
def directory() -> Directory:
    return Directory()


@pytest.fixture
async def node(directory: Directory) -> AsyncIterator[Node]:
    async with running_node(directory) as running:
        yield running


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# -- claims that are wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"key": bytes(16)},
        {"key": b"short"},
        {"key": b""},
        {"key": bytes(100)},
        {"request_id": "another"},
        {"request_id": ""},
        {"request_id": "x" * 257},
        {"incarnation": "second"},
        {"incarnation": ""},
        {"worker_id": "prefill-9"},
        {"num_tokens": 7},
        {"num_tokens": 9},
        {"num_tokens": -1},
    ],
    ids=str,
)
async def test_a_wrong_handle_gets_nothing(
    directory: Directory, node: Node, transport: str, wrong: dict[str, Any]
) -> None:
    handle = node.publish("r", [1, 2])
    async with running_client(directory, transport=transport) as (client, segment):
        with pytest.raises(KVLostError):
            await client.pull(replace(handle, **wrong), 0, [1, 2])
        assert (segment.blocks == 0xEE).all()
        # Nor does a wrong claim end the lease of who has the right one.
        await client.pull(handle, 0, [1, 2])
    assert node.released == ["r"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("first", "count"), [(0, 2), (0, 4), (1, 3), (3, 1), (4, 1), (-1, 4), (2**31 - 1, 1)]
)
async def test_more_or_fewer_blocks_than_published(
    directory: Directory, node: Node, transport: str, first: int, count: int
) -> None:
    async with running_client(directory, transport=transport) as (client, _):
        with pytest.raises(KVLostError):
            await client.pull(handle := node.publish("r", [1, 2, 3]), first, list(range(1, 1 + count)))
        # The lease is left to whoever asks for what there is.
        assert node.released == []
        await client.pull(handle, 0, [1, 2, 3])
        assert node.released == ["r"]


async def test_the_wrong_secret_is_refused(directory: Directory, node: Node) -> None:
    async with running_client(directory, secret="other") as (client, segment):
        with pytest.raises(KVLostError, match="UNAUTHENTICATED"):
            await client.pull(node.publish("r", [1]), 0, [1])
        with pytest.raises(KVLostError, match="UNAUTHENTICATED"):
            await client.probe("prefill-0")
        assert (segment.blocks == 0xEE).all()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"dtype": "bfloat16"},
        {"block_size": 8},
        {"num_layers": 3},
        {"num_kv_heads": 4},
        {"head_dim": 8},
        {"tp_size": 3},
        {"tp_size": 0},
    ],
    ids=str,
)
async def test_another_layout_is_refused_by_name(
    directory: Directory, node: Node, change: dict[str, Any]
) -> None:
    async with running_client(directory, layout=replace(LAYOUT, **change)) as (client, _):
        with pytest.raises(LayoutMismatchError) as caught:
            await client.pull(node.publish("r", [1]), 0, [1])
    (name, value), *_ = change.items()
    assert f"{name}: {getattr(LAYOUT, name)!r} here, {value!r} there" in caught.value.message


@pytest.mark.parametrize("tp_size", [2, 4])
async def test_another_degree_that_shares_the_heads_is_agreed_on(
    directory: Directory, node: Node, tp_size: int
) -> None:
    """Each of two ranks has a head, or two of four ranks hold each; a block has both heads in any case."""
    async with running_client(directory, layout=replace(LAYOUT, tp_size=tp_size)) as (client, segment):
        await client.pull(node.publish("r", [3]), 0, [1])
        assert np.array_equal(segment.blocks[1], node.segment.blocks[3])


async def test_who_answers_must_be_who_was_meant(directory: Directory, node: Node) -> None:
    """The address of a worker that died may be another's by now."""
    directory.known["prefill-1"] = (node.address, "first")
    async with running_client(directory) as (client, _):
        with pytest.raises(KVLostError, match="does not answer as prefill-1"):
            await client.pull(KVHandle("prefill-1", "first", "r", bytes(16), 4), 0, [1])


# -- leases that end under a pull --------------------------------------------------------------------------


SCATTERED = [1, 3, 5, 7]


class Gate:
    """Holds the thread that copies SCATTERED after the first of its pieces, each of which is one block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.ended = threading.Event()
        self._num_copied = 0
        monkeypatch.setattr(copying, "COPY_PIECE_BYTES", 1)
        monkeypatch.setattr(copying, "copy_runs", self._copy)

    def _copy(self, source: Blocks, source_rows: list[int], target: Blocks, target_rows: list[int]) -> None:
        target[target_rows] = source[source_rows]
        self._num_copied += 1
        if self._num_copied == 1:
            self.reached.set()
            assert self.open.wait(30)
        if self._num_copied == len(SCATTERED):
            self.ended.set()


async def test_a_lease_dropped_during_a_shared_copy(
    directory: Directory, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    async with running_client(directory) as (client, _):
        pull = asyncio.create_task(client.pull(node.publish("r", SCATTERED), 0, SCATTERED))
        await until(gate.reached.is_set)
        node.service.drop("r")
        node.segment.blocks[:] = 0  # another request has them now
        gate.open.set()
        with pytest.raises(KVLostError, match="ended while"):
            await pull
    assert node.released == ["r"]


async def test_a_lease_that_expires_during_a_shared_copy(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    now = [0.0]
    async with (
        running_node(directory, lease_s=5.0, clock=lambda: now[0]) as node,
        running_client(directory) as (client, _),
    ):
        pull = asyncio.create_task(client.pull(node.publish("r", SCATTERED), 0, SCATTERED))
        await until(gate.reached.is_set)
        now[0] = 5.0
        gate.open.set()
        with pytest.raises(KVLostError, match="ended while"):
            await pull
        # Expired, not swept: the blocks go back with the sweep and only then.
        assert node.released == []
        node.service._sweep()
        assert node.released == ["r"]


@pytest.mark.parametrize("end", ["drop", "expire"])
async def test_a_lease_that_ends_between_two_chunks(
    directory: Directory, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream stops: no chunk is read from blocks that are somebody else's."""
    now = [0.0]
    async with (
        running_node(directory, chunk_bytes=BLOCK_BYTES, lease_s=5.0, clock=lambda: now[0]) as node,
        running_client(directory, transport="messages") as (client, segment),
    ):
        original = KVTransferService._chunk

        def chunk(self: KVTransferService, position: int, rows: Sequence[int]) -> worker_pb2.PullChunk:
            message = original(self, position, rows)
            if position == 2 and end == "drop":
                node.service.drop("r")
            elif position == 2:
                now[0] = 5.0
            if position > 2:
                message.data = bytes(len(message.data))
            return message

        monkeypatch.setattr(KVTransferService, "_chunk", chunk)
        with pytest.raises(KVLostError, match="NOT_FOUND"):
            await client.pull(node.publish("r", range(1, 9)), 0, range(1, 9))
        assert (segment.blocks[4:] == 0xEE).all()


async def test_a_copy_longer_than_a_lease_keeps_it_alive(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    async with (
        running_node(directory, lease_s=0.6) as node,
        running_client(directory, lease_s=0.6) as (client, segment),
    ):
        pull = asyncio.create_task(client.pull(node.publish("r", SCATTERED), 0, SCATTERED))
        await until(gate.reached.is_set)
        await asyncio.sleep(1.5)
        gate.open.set()
        await pull
        assert np.array_equal(segment.blocks[SCATTERED], node.segment.blocks[SCATTERED])
        assert node.released == ["r"]


# -- peers that fail under a pull --------------------------------------------------------------------------


async def test_nobody_at_the_address(directory: Directory) -> None:
    directory.known["prefill-0"] = ("127.0.0.1:1", "first")
    async with running_client(directory) as (client, _):
        with pytest.raises(KVLostError):
            await client.pull(KVHandle("prefill-0", "first", "r", bytes(16), 4), 0, [1])


class Scripted(worker_pb2_grpc.KVTransferServicer):
    """A peer that speaks the protocol and sends what it is told."""

    def __init__(self, chunks: Callable[[], Sequence[worker_pb2.PullChunk]]) -> None:
        self.chunks = chunks
        self.pulls = 0
        self.releases = 0
        self.stall = False
        self.located: list[int] | None = None
        self.segment: worker_pb2.SharedSegment | None = None
        self.host_id: str | None = None

    async def Connect(self, request: Any, context: Any) -> worker_pb2.ConnectResponse:
        return worker_pb2.ConnectResponse(
            worker_id="prefill-0",
            incarnation="first",
            layout=layout_to_proto(LAYOUT),
            host_id=self.host_id or request.host_id,
            transports=["grpc"] if self.segment is None else ["shm"],
            segment=self.segment,
            num_blocks=64,
        )

    async def Locate(self, request: Any, context: Any) -> worker_pb2.LocateResponse:
        blocks = range(4)[request.first_block :] if self.located is None else self.located
        return worker_pb2.LocateResponse(block_ids=blocks, complete=True)

    async def Pull(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.PullChunk]:
        self.pulls += 1
        for chunk in self.chunks():
            yield chunk
        if self.stall:
            await asyncio.Event().wait()

    async def Release(self, request: Any, context: Any) -> worker_pb2.ReleaseResponse:
        self.releases += 1
        return worker_pb2.ReleaseResponse(valid=True)


class Collected:
    """Takes a service's handlers as a server would."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, _handlers: object) -> None: ...

    def add_registered_method_handlers(self, _service: str, handlers: dict[str, Any]) -> None:
        self.handlers = handlers


DATA = np.random.default_rng(3).integers(0, 256, (4, BLOCK_BYTES), dtype=np.uint8)
HANDLE = KVHandle("prefill-0", "first", "r", bytes(16), 16)


def chunk_of(first: int, *blocks: int) -> worker_pb2.PullChunk:
    rows = [DATA[block].tobytes() for block in blocks]
    return worker_pb2.PullChunk(
        first_block=first, data=b"".join(rows), checksums=[zlib.crc32(row) for row in rows]
    )


def good() -> list[worker_pb2.PullChunk]:
    return [chunk_of(0, 0, 1), chunk_of(2, 2, 3)]


def flipped() -> list[worker_pb2.PullChunk]:
    chunks = good()
    data = bytearray(chunks[1].data)
    data[BLOCK_BYTES + 100] ^= 4
    chunks[1].data = bytes(data)
    return chunks


def wrong_checksum() -> list[worker_pb2.PullChunk]:
    chunks = good()
    chunks[0].checksums[1] ^= 1
    return chunks


def cut() -> list[worker_pb2.PullChunk]:
    chunks = good()
    chunks[1].data = chunks[1].data[:-1]
    return chunks


def oversized() -> list[worker_pb2.PullChunk]:
    chunks = good()
    chunks[1].data += b"\0"
    return chunks


def missing_checksum() -> list[worker_pb2.PullChunk]:
    chunks = good()
    del chunks[1].checksums[1]
    return chunks


MISBEHAVIOUR: dict[str, Callable[[], list[worker_pb2.PullChunk]]] = {
    "flipped bit": flipped,
    "wrong checksum": wrong_checksum,
    "truncated data": cut,
    "oversized data": oversized,
    "missing checksum": missing_checksum,
    "nothing": list,
    "short stream": lambda: good()[:1],
    "first missing": lambda: good()[1:],
    "repeated": lambda: [good()[0], good()[0], good()[1]],
    "reordered": lambda: good()[::-1],
    "too many": lambda: [*good(), chunk_of(4, 0)],
    "too many in one": lambda: [chunk_of(0, 0, 1, 2, 3, 0)],
    "empty chunk": lambda: [worker_pb2.PullChunk(), *good()],
    "negative position": lambda: [chunk_of(-1, 0, 1, 2, 3)],
    "overlapping": lambda: [chunk_of(0, 0, 1, 2), chunk_of(2, 2, 3)],
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
async def test_damage_is_noticed_and_the_next_pull_works(directory: Directory, name: str) -> None:
    peer = Scripted(MISBEHAVIOUR[name])
    async with (
        serving(peer) as (_, address),
        running_client(directory, transport="grpc") as (client, segment),
    ):
        directory.known["prefill-0"] = (address, "first")
        with pytest.raises(KVLostError):
            await client.pull(HANDLE, 0, [4, 3, 2, 1])
        assert peer.pulls == 2
        # Rows that were not asked for are never written, and the lease is left to whoever tries next.
        assert (segment.blocks[[0, *range(5, 64)]] == 0xEE).all()
        assert peer.releases == 0
        peer.chunks = good
        await client.pull(HANDLE, 0, [4, 3, 2, 1])
        assert np.array_equal(segment.blocks[[4, 3, 2, 1]], DATA)


async def test_damage_that_happens_once_is_pulled_again(directory: Directory) -> None:
    script = iter([flipped(), good()])
    peer = Scripted(lambda: next(script))
    async with (
        serving(peer) as (_, address),
        running_client(directory, transport="grpc") as (client, segment),
    ):
        directory.known["prefill-0"] = (address, "first")
        await client.pull(HANDLE, 0, [1, 2, 3, 4])
        assert np.array_equal(segment.blocks[1:5], DATA)


@pytest.mark.parametrize("located", [[], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -1], [1, 2, 3, 65]])
async def test_blocks_outside_the_peers_segment_are_not_read(
    directory: Directory, node: Node, located: list[int]
) -> None:
    peer = Scripted(good)
    peer.located, peer.segment = located, node.segment.describe()
    async with serving(peer) as (_, address), running_client(directory, transport="shm") as (client, segment):
        directory.known["prefill-0"] = (address, "first")
        with pytest.raises(KVLostError, match="other blocks"):
            await client.pull(HANDLE, 0, [1, 2, 3, 4])
        assert (segment.blocks == 0xEE).all()


async def test_shared_memory_offered_from_another_host_is_not_mapped(
    directory: Directory, node: Node
) -> None:
    """Its pid and descriptor would name something else here."""
    peer = Scripted(good)
    peer.host_id, peer.segment = "elsewhere", node.segment.describe()
    async with serving(peer) as (_, address), running_client(directory) as (client, segment):
        directory.known["prefill-0"] = (address, "first")
        result = await client.pull(HANDLE, 0, [1, 2, 3, 4])
        assert result.transport == "grpc"
        assert np.array_equal(segment.blocks[1:5], DATA)


async def stalled(directory: Directory, address: str, peer: Scripted) -> None:
    peer.chunks, peer.stall = (lambda: good()[:1]), True
    directory.known["prefill-0"] = (address, "first")


@pytest.mark.parametrize("garbled", ["Connect", "Locate", "Pull", "Release"])
async def test_answers_that_are_no_messages(
    directory: Directory, garbled: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="grpc")
    peer = Scripted(good)

    collected = Collected()
    worker_pb2_grpc.add_KVTransferServicer_to_server(peer, collected)
    handler = collected.handlers[garbled]
    collected.handlers[garbled] = handler._replace(response_serializer=lambda _message: b"\xff\xff")
    server = cluster_server(SECRET)
    server.add_registered_method_handlers("disagg.v1.KVTransfer", collected.handlers)
    directory.known["prefill-0"] = (f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", "first")
    await server.start()
    with local_segment() as segment:
        peer.located, peer.segment = [1, 2, 3, 4], segment.describe()
        transport = "shm" if garbled == "Locate" else "grpc"
        async with running_client(directory, transport=transport) as (client, _):
            with pytest.raises(KVLostError, match="can't be read"):
                await client.pull(HANDLE, 0, [1, 2, 3, 4])
    await server.stop(None)


async def test_a_peer_that_stalls_costs_the_time_limit_and_no_more(directory: Directory) -> None:
    peer = Scripted(good)
    async with (
        serving(peer) as (_, address),
        running_client(directory, transport="grpc", pull_timeout_s=0.3) as (client, _),
    ):
        await stalled(directory, address, peer)
        with pytest.raises(KVLostError, match="in time"):
            await client.pull(HANDLE, 0, [1, 2, 3, 4])


async def test_a_failure_that_nobody_waits_for_is_not_logged_as_forgotten(directory: Directory) -> None:
    """Whoever wanted the connection gave up before it failed."""
    peer, forgotten = Scripted(good), []
    asked, answer = asyncio.Event(), asyncio.Event()

    async def refuse(request: Any, context: Any) -> worker_pb2.ConnectResponse:
        asked.set()
        await answer.wait()
        return worker_pb2.ConnectResponse(worker_id="somebody")

    peer.Connect = refuse  # type: ignore[method-assign]
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: forgotten.append(context))
    async with serving(peer) as (_, address), running_client(directory, transport="grpc") as (client, _):
        directory.known["prefill-0"] = (address, "first")
        pull = asyncio.create_task(client.pull(HANDLE, 0, [1, 2, 3, 4]))
        await asked.wait()
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        (connecting,) = client._connections._agreed.values()
        answer.set()
        await until(connecting.done)
        client._connections._agreed.clear()
        del connecting, pull
        gc.collect()
    assert forgotten == []


async def test_a_peer_that_stops_answering_after_it_stalled(directory: Directory) -> None:
    """After a failed copy the peer is asked whether its blocks are still the request's; it may not say."""
    peer = Scripted(good)
    answer = peer.Locate

    async def once(request: Any, context: Any) -> worker_pb2.LocateResponse:
        if peer.pulls:
            await asyncio.Event().wait()
        return await answer(request, context)

    peer.Locate = once  # type: ignore[method-assign]
    async with (
        serving(peer) as (_, address),
        running_client(directory, transport="grpc", pull_timeout_s=0.3) as (client, _),
    ):
        await stalled(directory, address, peer)
        async with asyncio.timeout(10):
            with pytest.raises(KVLostError, match="in time"):
                await client.pull(HANDLE, 0, [1, 2, 3, 4])


async def test_a_peer_that_stops_under_a_pull(directory: Directory) -> None:
    peer = Scripted(good)
    async with (
        serving(peer) as (server, address),
        running_client(directory, transport="grpc", pull_timeout_s=30) as (client, segment),
    ):
        await stalled(directory, address, peer)
        pull = asyncio.create_task(client.pull(HANDLE, 0, [1, 2, 3, 4]))
        await until(lambda: bool((segment.blocks[2] != 0xEE).any()))
        await server.stop(None)
        async with asyncio.timeout(10):
            with pytest.raises(KVLostError):
                await pull


async def test_a_peer_that_is_declared_dead_under_a_pull(directory: Directory) -> None:
    """gRPC ends calls on a closed channel with CancelledError; the pull must not take it for its caller's."""
    peer = Scripted(good)
    async with (
        serving(peer) as (_, address),
        running_client(directory, transport="grpc", pull_timeout_s=30) as (client, segment),
    ):
        await stalled(directory, address, peer)
        pull = asyncio.create_task(client.pull(HANDLE, 0, [1, 2, 3, 4]))
        await until(lambda: bool((segment.blocks[2] != 0xEE).any()))
        client.retain(())
        async with asyncio.timeout(10):
            with pytest.raises(KVLostError, match="left"):
                await pull


async def test_a_peer_that_is_declared_dead_under_a_shared_copy(
    directory: Directory, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory stays mapped until the copy ends; what was copied counts for nothing."""
    gate = Gate(monkeypatch)
    async with running_client(directory) as (client, _):
        pull = asyncio.create_task(client.pull(node.publish("r", SCATTERED), 0, SCATTERED))
        await until(gate.reached.is_set)
        client.retain(())
        await until(lambda: not client._connections._closing)
        gate.open.set()
        with pytest.raises(KVLostError, match="left"):
            await pull


async def test_a_peer_that_is_declared_dead_while_it_is_dialled(directory: Directory) -> None:
    """Somebody listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        directory.known["prefill-0"] = (f"127.0.0.1:{silent.getsockname()[1]}", "first")
        async with running_client(directory, pull_timeout_s=30) as (client, _):
            pulls = [asyncio.create_task(client.pull(HANDLE, 0, [1, 2, 3, 4])) for _ in range(3)]
            await asyncio.sleep(0.1)
            directory.known.clear()
            client.retain(())
            async with asyncio.timeout(10):
                results = await asyncio.gather(*pulls, return_exceptions=True)
            assert [type(result) for result in results] == [KVLostError] * 3


async def test_one_pull_giving_up_does_not_end_the_dialling_of_others(
    directory: Directory, node: Node
) -> None:
    async with running_client(directory) as (client, segment):
        handles = [node.publish(f"r{index}", [1 + index]) for index in range(3)]
        pulls = [asyncio.create_task(client.pull(h, 0, [1 + i])) for i, h in enumerate(handles)]
        await asyncio.sleep(0)
        pulls[0].cancel()
        results = await asyncio.gather(*pulls, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert np.array_equal(segment.blocks[2:4], node.segment.blocks[2:4])
        assert not any(isinstance(result, BaseException) for result in results[1:])


async def test_after_a_failed_dial_the_next_one_is_tried(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (client, segment):
        address, incarnation = directory.known["prefill-0"]
        directory.known["prefill-0"] = ("127.0.0.1:1", incarnation)
        handle = node.publish("r", [3])
        with pytest.raises(KVLostError):
            await client.probe("prefill-0")
        directory.known["prefill-0"] = (address, incarnation)
        await client.pull(handle, 0, [1])
        assert np.array_equal(segment.blocks[1], node.segment.blocks[3])


# -- cancellation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancelled_shared_copy_has_stopped_when_the_cancellation_is_seen(
    directory: Directory, node: Node, monkeypatch: pytest.MonkeyPatch, cancels: int
) -> None:
    gate = Gate(monkeypatch)
    async with running_client(directory) as (client, segment):
        pull = asyncio.create_task(client.pull(node.publish("r", SCATTERED), 0, SCATTERED))
        await until(gate.reached.is_set)
        for _ in range(cancels):
            pull.cancel()
            await asyncio.sleep(0.02)
            # The thread is still in there, so whoever waits must not yet give the blocks to somebody else.
            assert not pull.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await pull
        segment.blocks[:] = 0x11
        assert not any(thread for thread in threading.enumerate() if is_copying(thread))
        # Another worker may pull it still.
        assert node.released == []
        # Stopped at the flag, not run to its end.
        assert not gate.ended.is_set()
        assert (segment.blocks == 0x11).all()


def is_copying(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "copy_rows":
            return True
        frame = frame.f_back
    return False


async def test_a_time_out_followed_by_a_cancellation_waits_for_the_copy(
    directory: Directory, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    async with running_client(directory, pull_timeout_s=0.1) as (client, _):
        pull = asyncio.create_task(client.pull(node.publish("r", SCATTERED), 0, SCATTERED))
        await until(gate.reached.is_set)
        await asyncio.sleep(0.3)
        assert not pull.done()
        pull.cancel()
        await asyncio.sleep(0.02)
        assert not pull.done()
        gate.open.set()
        with pytest.raises((asyncio.CancelledError, KVLostError)):
            await pull


async def test_a_cancelled_stream_writes_no_more_and_ends_no_lease(directory: Directory) -> None:
    peer = Scripted(good)
    async with (
        serving(peer) as (_, address),
        running_client(directory, transport="grpc") as (client, segment),
    ):
        await stalled(directory, address, peer)
        pull = asyncio.create_task(client.pull(HANDLE, 0, [1, 2, 3, 4]))
        await until(lambda: bool((segment.blocks[2] != 0xEE).any()))
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        assert peer.releases == 0


async def test_random_cancellations_leave_nothing_published(directory: Directory) -> None:
    rng = np.random.default_rng(5)
    async with running_node(directory, lease_s=0.5) as node:
        for transport in TRANSPORTS:
            async with running_client(directory, transport=transport, lease_s=0.5) as (client, _):
                for index in range(40):
                    handle = node.publish(f"{transport}-{index}", range(1, 33))
                    pull = asyncio.create_task(client.pull(handle, 0, range(1, 33)))
                    await asyncio.sleep(float(rng.uniform(0, 0.004)))
                    pull.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await pull
        await until(lambda: len(node.service._leases) == 0)
        assert len(node.released) == len(set(node.released)) == 120


async def test_who_gives_up_leaves_the_lease_to_another_worker(directory: Directory, node: Node) -> None:
    async with running_client(directory) as (first, _), running_client(directory) as (second, segment):
        handle = node.service.open("r", bytes(16), 2 * LAYOUT.block_size)
        node.service.progress("r", 0, [3], complete=False)
        pulls = [asyncio.create_task(client.pull(handle, 0, [7, 8])) for client in (first, second)]
        await until(lambda: bool((segment.blocks[7] == node.segment.blocks[3]).all()))
        pulls[0].cancel()
        await asyncio.gather(pulls[0], return_exceptions=True)
        node.service.progress("r", 0, [3, 4], complete=True)
        await pulls[1]
        assert np.array_equal(segment.blocks[7:9], node.segment.blocks[3:5])
        assert node.released == ["r"]


async def test_closing_ends_pulls_that_run(directory: Directory) -> None:
    peer = Scripted(good)
    started = time.monotonic()
    async with serving(peer) as (_, address):
        async with running_client(directory, transport="grpc", pull_timeout_s=60) as (client, segment):
            await stalled(directory, address, peer)
            pull = asyncio.create_task(client.pull(HANDLE, 0, [1, 2, 3, 4]))
            await until(lambda: bool((segment.blocks[2] != 0xEE).any()))
        with pytest.raises(KVLostError):
            await pull
    assert time.monotonic() - started < 30
