"""Hand-offs on virtual time: the real leases, service and puller; wire, clock and engines are models.

Owner: model of an engine's blocks ─► KVTransferService ◄─ Wire (delays, loses, doubles) ─ KVTransferClient
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import grpc.aio

from disagg.errors import KVLostError
from disagg.transfer.client import KVTransferClient
from disagg.transfer.connections import Connection
from disagg.transfer.leases import LeaseTable
from disagg.transfer.segment import Blocks, SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.transfer.wire import handle_to_proto
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2

LEASE_S = 5.0
# 64 bytes a block.
LAYOUT = KVLayout("m", "float32", block_size=1, num_layers=1, num_kv_heads=2, head_dim=4)
NUM_BLOCKS = 24
SECRET = "s"


class RecordedTable(LeaseTable):
    """The real table, and which end each lease came to, by key."""

    def __init__(self, lease_s: float) -> None:
        super().__init__(lease_s)
        self.opened: dict[bytes, str] = {}
        self.ends: dict[bytes, list[str]] = {}

    def _ended(self, keys: dict[str, bytes], end: str) -> None:
        for request_id, key in keys.items():
            if request_id not in self._leases or self._leases[request_id].key != key:
                self.ends.setdefault(key, []).append(end)

    def _keys(self) -> dict[str, bytes]:
        return {request_id: lease.key for request_id, lease in self._leases.items()}

    def open(self, request_id: str, key: bytes, num_tokens: int) -> None:
        super().open(request_id, key, num_tokens)
        self.opened[key] = request_id

    def drop(self, request_id: str) -> bool:
        before = self._keys()
        dropped = super().drop(request_id)
        self._ended(before, "DROPPED")
        return dropped

    def clear(self) -> list[str]:
        before = self._keys()
        cleared = super().clear()
        self._ended(before, "DROPPED")
        return cleared

    def sweep(self, now: float) -> list[str]:
        before = self._keys()
        swept = super().sweep(now)
        self._ended(before, "EXPIRED")
        return swept

    def release(self, handle: KVHandle, epoch: int, now: float) -> bool:
        before = self._keys()
        released = super().release(handle, epoch, now)
        self._ended(before, "RELEASED")
        return released


@dataclass
class Computing:
    """A request in a model of an engine. stamps: what each of its blocks holds, of this epoch."""

    handle: KVHandle
    num_blocks: int
    epoch: int = 0
    block_ids: list[int] = field(default_factory=list)
    stamps: list[bytes] = field(default_factory=list)
    complete: bool = False


class Stamps:
    """Contents of blocks, no two alike."""

    def __init__(self) -> None:
        self._count = 0

    def next(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(8, "little") * (LAYOUT.block_bytes // 8)


def write(blocks: Blocks, row: int, stamp: bytes) -> None:
    blocks[row].data[:] = stamp


class Owner:
    """A prefill worker: blocks that requests own, and the real publishing half. Make it on the loop."""

    def __init__(self, worker_id: str, incarnation: str, stamps: Stamps, clock: Any) -> None:
        self.worker_id, self.incarnation = worker_id, incarnation
        self._stamps = stamps
        self.segment = SharedSegment.create(NUM_BLOCKS, LAYOUT.block_bytes)
        self.free = list(range(NUM_BLOCKS))
        self.requests: dict[str, Computing] = {}
        self.final: dict[bytes, list[bytes]] = {}
        self.given_back: list[str] = []
        self.service = KVTransferService(
            LAYOUT,
            self.segment,
            worker_id=worker_id,
            incarnation=incarnation,
            secret=SECRET,
            lease_s=LEASE_S,
            chunk_bytes=2 * LAYOUT.block_bytes,
            on_released=self._on_released,
            clock=clock,
        )
        self.table = self.service._leases = RecordedTable(LEASE_S)

    def begin(self, request_id: str, key: bytes, num_blocks: int) -> Computing:
        handle = self.service.open(request_id, key, num_blocks)
        request = self.requests[request_id] = Computing(handle, num_blocks)
        return request

    def compute(self, request: Computing, count: int) -> None:
        """Compute up to `count` more blocks, as far as there is room, and publish them."""
        if request.complete or self.requests.get(request.handle.request_id) is not request:
            return
        for _ in range(min(count, request.num_blocks - len(request.block_ids), len(self.free))):
            row, stamp = self.free.pop(), self._stamps.next()
            write(self.segment.blocks, row, stamp)
            request.block_ids.append(row)
            request.stamps.append(stamp)
        request.complete = len(request.block_ids) == request.num_blocks
        if request.complete:
            self.final[request.handle.key] = list(request.stamps)
        self.service.progress(
            request.handle.request_id, request.epoch, request.block_ids, complete=request.complete
        )

    def preempt(self, request: Computing) -> None:
        if request.complete or self.requests.get(request.handle.request_id) is not request:
            return
        self.service.withdraw(request.handle.request_id)
        request.epoch += 1
        self._take_blocks(request)

    def _take_blocks(self, request: Computing) -> None:
        for row in request.block_ids:
            write(self.segment.blocks, row, self._stamps.next())
        self.free.extend(request.block_ids)
        # The next to be used are those that were just freed: what reads too late, reads another's.
        request.block_ids, request.stamps = [], []

    def _on_released(self, request_id: str) -> None:
        request = self.requests.pop(request_id)  # KeyError: given back twice
        self.given_back.append(request_id)
        self._take_blocks(request)

    def check(self) -> None:
        owned = [row for request in self.requests.values() for row in request.block_ids]
        assert sorted([*owned, *self.free]) == list(range(NUM_BLOCKS))
        assert set(self.requests) == set(self.table._leases)
        live = {lease.key for lease in self.table._leases.values()}
        for key in self.table.opened:
            assert len(self.table.ends.get(key, [])) == (0 if key in live else 1)
        assert len(self.given_back) == sum(map(len, self.table.ends.values()))


class _Aborted(Exception):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = code, details


class _Context:
    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise _Aborted(code, details)


def _failed(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty, details)


class Wire:
    """Carries calls to whoever lives at an address by then. renewals_lost: heartbeats don't arrive."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.at: dict[str, Owner] = {}
        self.renewals_lost = False
        self.loss = 0.0
        self.told: Counter[str] = Counter()
        self._late: set[asyncio.Future[None]] = set()

    async def _pass(self) -> None:
        await asyncio.sleep(self.rng.choice([0.0, 0.001, 0.01, 0.2]))

    async def call(self, address: str, name: str, request: Any) -> Any:
        await self._pass()
        if self.rng.random() < self.loss or (name == "Renew" and self.renewals_lost):
            self.told["lost"] += 1
            raise _failed(grpc.StatusCode.UNAVAILABLE, "lost")
        answer = await self._served(address, name, request)
        if name != "Locate" and self.rng.random() < 0.1:
            # The same message once more, some time later: overtaken by what was sent after it.
            self.told["doubled"] += 1
            asyncio.get_running_loop().call_later(
                self.rng.choice([0.0, 0.3, 4.0]), self._again, address, name, request
            )
        await self._pass()
        if self.rng.random() < self.loss:
            self.told["answer lost"] += 1
            raise _failed(grpc.StatusCode.UNAVAILABLE, "its answer was lost")
        return answer

    def _again(self, address: str, name: str, request: Any) -> None:
        late = asyncio.ensure_future(self._quietly(address, name, request))
        self._late.add(late)
        late.add_done_callback(self._late.discard)

    async def _quietly(self, address: str, name: str, request: Any) -> None:
        try:
            await self._served(address, name, request)
        except grpc.aio.AioRpcError:
            self.told["late and refused"] += 1

    async def _served(self, address: str, name: str, request: Any) -> Any:
        owner = self.at.get(address)
        if owner is None:
            raise _failed(grpc.StatusCode.UNAVAILABLE, "nobody listens")
        try:
            answer = await getattr(owner.service, name)(request, _Context())
        except _Aborted as aborted:
            raise _failed(aborted.code, aborted.details) from None
        if self.at.get(address) is not owner:
            raise _failed(grpc.StatusCode.UNAVAILABLE, "died before it answered")
        return answer


class _Stub:
    def __init__(self, wire: Wire, address: str) -> None:
        self._wire, self._address = wire, address

    def __getattr__(self, name: str) -> Any:
        return lambda request, metadata: self._wire.call(self._address, name, request)


class MappedReader:
    """Reads the memory that it found when it connected, block by block, whoever uses it by then."""

    transport = "shm"

    def __init__(self, owner: Owner, rng: random.Random) -> None:
        self._rows, self._rng = owner.segment.rows, rng

    async def read(
        self,
        handle: KVHandle,
        first: int,
        target: Blocks,
        rows: Sequence[int],
        *,
        source_rows: Any = (),
        epoch: int = 0,
    ) -> None:
        if len(source_rows) != len(rows):
            raise KVLostError("the peer located other blocks")
        for source, row in zip(source_rows, rows, strict=True):
            target[row] = self._rows[source]
            await asyncio.sleep(self._rng.choice([0.0, 0.005, 0.1]))

    async def close(self) -> None:
        pass


class SentReader:
    """Is sent blocks by whoever lives at the address, which looks its lease up before each two."""

    transport = "grpc"

    def __init__(self, wire: Wire, address: str) -> None:
        self._wire, self._address = wire, address

    async def read(
        self,
        handle: KVHandle,
        first: int,
        target: Blocks,
        rows: Sequence[int],
        *,
        source_rows: Any = (),
        epoch: int = 0,
    ) -> None:
        request = worker_pb2.PullRequest(
            handle=handle_to_proto(handle), first_block=first, num_blocks=len(rows), epoch=epoch
        )
        done = 0
        while done < len(rows):
            owner = self._wire.at.get(self._address)
            if owner is None:
                raise KVLostError("the stream broke")
            sent = owner.service.claim(request, first + done)[:2]
            # Out of the cache while it goes: the lease may end in between.
            await asyncio.sleep(self._wire.rng.choice([0.0, 0.005, 0.1]))
            data = owner.segment.rows[list(sent)]
            target[list(rows[done : done + len(sent)])] = data
            done += len(sent)

    async def close(self) -> None:
        pass


class Puller:
    """A decode worker: the real pulling half over a wire of ours. Make it on the loop."""

    def __init__(self, name: str, wire: Wire, known: dict[str, tuple[str, str]]) -> None:
        self.segment = SharedSegment.create(NUM_BLOCKS, LAYOUT.block_bytes)
        self.free = list(range(NUM_BLOCKS))
        self._wire = wire
        self.client = KVTransferClient(
            LAYOUT,
            self.segment,
            worker_id=name,
            incarnation="1",
            secret=SECRET,
            resolve=known.get,
            lease_s=LEASE_S,
            pull_timeout_s=5.0,
        )
        self.client._connections._agree = self._agree  # type: ignore[method-assign]

    async def _agree(self, peer: tuple[str, str], address: str) -> Connection:
        await asyncio.sleep(0.001)
        owner = self._wire.at.get(address)
        if owner is None or (owner.worker_id, owner.incarnation) != peer:
            raise KVLostError(f"{address} does not answer as {peer[0]}")
        mapped = self._wire.rng.random() < 0.6
        reader: Any = MappedReader(owner, self._wire.rng) if mapped else SentReader(self._wire, address)
        return Connection(_Channel(), _Stub(self._wire, address), reader)  # type: ignore[arg-type]


class _Channel:
    async def close(self) -> None:
        pass
