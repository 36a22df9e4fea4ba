"""Workers' transfer halves with any transport, in this process or in one that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from disagg.config import KVTransport
from disagg.rpc import cluster_server, listen
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import Blocks, SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.transfer.transports import ExtraTransports
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2_grpc
from tests.unit.transfer.transfer_support import SECRET, Directory

# 256 KiB a block: a part of a read has 32.
LARGE = KVLayout("large", "float32", block_size=16, num_layers=8, num_kv_heads=4, head_dim=64)


def contents(num_blocks: int, block_bytes: int, seed: int = 1) -> Blocks:
    """Return what an owner's cache is filled with, uint8 [num_blocks, block_bytes]."""
    words = np.random.default_rng(seed).integers(0, 2**63, (num_blocks, block_bytes // 8), dtype=np.uint64)
    return words.view(np.uint8)


@dataclass
class Half:
    """One worker's transfer half. released: request ids in the order in which blocks were given back."""

    layout: KVLayout
    segment: SharedSegment
    service: KVTransferService
    extras: ExtraTransports
    client: KVTransferClient
    released: list[str]

    def publish(self, request_id: str, block_ids: Collection[int]) -> KVHandle:
        num_tokens = len(block_ids) * self.layout.block_size
        return self.service.publish(request_id, secrets.token_bytes(16), list(block_ids), num_tokens)


@asynccontextmanager
async def running_half(
    directory: Directory,
    worker_id: str,
    transport: KVTransport,
    *,
    incarnation: str = "first",
    layout: KVLayout = LARGE,
    num_blocks: int = 64,
    timeout_s: float = 10.0,
    lease_s: float = 60.0,
) -> AsyncIterator[Half]:
    """Run one worker's half on loopback and enter it into the directory."""
    segment = SharedSegment.create(num_blocks, layout.block_bytes)
    released: list[str] = []
    service = KVTransferService(
        layout,
        segment,
        worker_id=worker_id,
        incarnation=incarnation,
        secret=SECRET,
        lease_s=lease_s,
        chunk_bytes=2**21,
        on_released=released.append,
    )
    extras = ExtraTransports(
        service,
        segment.rows,
        own=(worker_id, incarnation),
        secret=SECRET,
        host="127.0.0.1",
        wanted=transport,
        timeout_s=timeout_s,
    )
    client = KVTransferClient(
        layout,
        segment,
        worker_id=worker_id,
        incarnation=incarnation,
        secret=SECRET,
        resolve=directory.resolve,
        transport=transport,
        lease_s=lease_s,
        pull_timeout_s=timeout_s,
        openers=extras.openers,
    )
    server = cluster_server(SECRET)
    address = f"127.0.0.1:{listen(server, '127.0.0.1:0', None)}"
    worker_pb2_grpc.add_KVTransferServicer_to_server(service, server)
    extras.serve(server)
    await server.start()
    directory.known[worker_id] = (address, incarnation)
    try:
        yield Half(layout, segment, service, extras, client, released)
    finally:
        await server.stop(None)
        await client.close()
        await extras.close()
        await service.close()
        segment.close()


# -- owners that can be killed ---------------------------------------------------------------------------


@dataclass
class OwnerProcess:
    """A process that publishes blocks and is asked on its standard input."""

    process: asyncio.subprocess.Process
    worker_id: str
    incarnation: str
    address: str

    async def publish(self, request_id: str, block_ids: Sequence[int]) -> KVHandle:
        answer = await self._ask({"publish": request_id, "block_ids": list(block_ids)})
        return KVHandle(
            self.worker_id, self.incarnation, request_id, bytes.fromhex(answer["key"]), answer["num_tokens"]
        )

    async def cpu_seconds(self) -> float:
        return float((await self._ask({"cpu": True}))["cpu"])

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        return await _line(self.process)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


async def _line(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, "the owner's process has ended"
    answer: dict[str, Any] = json.loads(line)
    return answer


@asynccontextmanager
async def owner_process(
    directory: Directory, transport: KVTransport, *, incarnation: str = "first", num_blocks: int = 64
) -> AsyncIterator[OwnerProcess]:
    """Run worker prefill-0 with LARGE blocks in a process of its own, and enter it into the directory."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.transfer.whole_halves",
        json.dumps({"transport": transport, "incarnation": incarnation, "num_blocks": num_blocks}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        address = (await _line(process))["address"]
        directory.known["prefill-0"] = (address, incarnation)
        yield OwnerProcess(process, "prefill-0", incarnation, address)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _serve(transport: KVTransport, incarnation: str, num_blocks: int) -> None:
    directory = Directory()
    async with running_half(
        directory, "prefill-0", transport, incarnation=incarnation, num_blocks=num_blocks, timeout_s=5
    ) as half:
        half.segment.blocks[:] = contents(num_blocks, half.layout.block_bytes)
        print(json.dumps({"address": directory.known["prefill-0"][0]}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            if "cpu" in asked:
                times = os.times()
                print(json.dumps({"cpu": times.user + times.system}), flush=True)
                continue
            handle = half.publish(asked["publish"], asked["block_ids"])
            print(json.dumps({"key": handle.key.hex(), "num_tokens": handle.num_tokens}), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(**json.loads(sys.argv[1])))
