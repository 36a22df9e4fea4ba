"""How fast KV moves between two worker processes, beside what bounds it, and what a request waits for it.

    python benchmarks/kv_transfer.py --json out.json

--only rates: each transport alone. The publishing side runs in a process of its own. Limits are measured in
the same run, each just before the pull that it is compared with: for shared memory one numpy copy of the same
bytes; for the others a bare TCP stream of them between the same two processes, `sendall` from the one cache
and `recv_into` the other, over a connection that is kept. Figures are medians over --runs, shares medians of
the runs' own shares; a first round of each warms up.

Rows: kv_transfer/TRANSPORT/N_tokens for the KV of an 81 M model in fp32, kv_transfer/TRANSPORT/8b/N_tokens
for that of an 8 B model in bf16, and latency_ms in each. `grpc` is the bulk stream that a pull between hosts
takes; `grpc_messages` what is left of it where only the gRPC port can be reached; `gloo` what
--kv-transport nccl is on CPUs; `nixl` UCX by whatever it chooses between processes of one host, `nixl_tcp`
over TCP alone (neither where NIXL is not installed). Sizes that would need more than a quarter of the free
memory are left out.

--only requests: `disagg serve` with a prefill and a decode worker of the 81 M model, a core each, per
transport; unlike prompts one after the other. TTFT is the client's; a pull's seconds in all, and those of
them after the last chunk was computed, are what the request added to disagg_kv_transfer_seconds and
disagg_kv_transfer_exposed_seconds. Rows: kv_transfer/TRANSPORT/request/N_tokens/WHAT, medians over --rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kv_requests
import numpy as np
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine
from disagg.config import KVTransport
from disagg.rpc import cluster_server
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.transfer.transports import ExtraTransports
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2_grpc

TOKENS = (16, 128, 512, 2048, 8192)
# Segments of both sides and the arrays of the memory copy, each as large as the largest pull.
COPIES_IN_MEMORY = 4


@dataclass(frozen=True)
class Shape:
    """A model's cache. prefix: of its rows' names, after the transport."""

    prefix: str
    layout: KVLayout

    def num_bytes(self, num_tokens: int) -> int:
        return num_tokens // self.layout.block_size * self.layout.block_bytes


SHAPES = (
    # 81 M parameters: 24 KiB a token.
    Shape("", KVLayout("81m", "float32", block_size=16, num_layers=12, num_kv_heads=4, head_dim=64)),
    # 8 B parameters: 128 KiB a token.
    Shape("8b/", KVLayout("8b", "bfloat16", block_size=16, num_layers=32, num_kv_heads=8, head_dim=128)),
)


@dataclass(frozen=True)
class Case:
    """One transport: how both sides are told to use it, and whether the owner listens for bulk streams."""

    name: str
    transport: KVTransport
    bulk: bool = True
    environment: dict[str, str] = field(default_factory=dict)


CASES = (
    Case("shm", "shm"),
    Case("grpc", "grpc"),
    Case("grpc_messages", "grpc", bulk=False),
    Case("gloo", "nccl"),
)
# Not there on every machine.
NIXL_CASES = (Case("nixl", "nixl"), Case("nixl_tcp", "nixl", environment={"UCX_TLS": "tcp"}))
ALL_CASES = (*CASES, *(NIXL_CASES if find_spec("nixl") else ()))
_TRANSPORT_NAMES = tuple(case.name for case in ALL_CASES)


# -- the publishing process ------------------------------------------------------------------------------


def owner(pipe: Connection, secret: str, layout: KVLayout, num_blocks: int, case: Case) -> None:
    """Run the publishing worker's half until the pipe says None; publish what the pipe asks for."""
    os.environ.update(case.environment)
    asyncio.run(_owner(pipe, secret, layout, num_blocks, case))


def published_by(
    worker_id: str, layout: KVLayout, segment: SharedSegment, secret: str, case: Case
) -> tuple[KVTransferService, ExtraTransports]:
    """Return a worker's publishing half, with what the case needs for its transport."""
    service = KVTransferService(
        layout,
        segment,
        worker_id=worker_id,
        incarnation="1",
        secret=secret,
        lease_s=60,
        chunk_bytes=2**21,
        on_released=lambda _request_id: None,
    )
    extras = ExtraTransports(
        service,
        segment.rows,
        own=(worker_id, "1"),
        secret=secret,
        host="127.0.0.1",
        wanted=case.transport,
        timeout_s=60,
    )
    return service, extras


async def _owner(pipe: Connection, secret: str, layout: KVLayout, num_blocks: int, case: Case) -> None:
    segment = SharedSegment.create(num_blocks, layout.block_bytes)
    segment.blocks[:] = np.random.default_rng(0).integers(0, 256, layout.block_bytes, dtype=np.uint8)
    service, extras = published_by("owner", layout, segment, secret, case)
    server = cluster_server(secret)
    worker_pb2_grpc.add_KVTransferServicer_to_server(service, server)
    extras.serve(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    if case.bulk:
        await service.listen("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send((port, listener.getsockname()[1]))
        stream, _ = await asyncio.to_thread(listener.accept)
    with stream:
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            if isinstance(asked, int):
                await asyncio.to_thread(stream.sendall, segment.blocks.reshape(-1)[:asked].data)
                continue
            request_id, key, num_tokens = asked
            blocks = list(range(num_tokens // layout.block_size))
            pipe.send(service.publish(request_id, key, blocks, num_tokens))
    await server.stop(None)
    await extras.close()
    await service.close()


# -- the pulling process ---------------------------------------------------------------------------------


@dataclass
class Peers:
    """Both sides, ready: what measures a pull and what measures its limits."""

    shape: Shape
    pipe: Connection
    stream: socket.socket
    segment: SharedSegment
    client: KVTransferClient
    source: np.ndarray[Any, np.dtype[np.uint8]]
    target: np.ndarray[Any, np.dtype[np.uint8]]

    async def pull(self, num_tokens: int) -> float:
        """Return the seconds of a pull of `num_tokens` tokens, locating and releasing included."""
        self.pipe.send((secrets.token_hex(8), secrets.token_bytes(16), num_tokens))
        handle: KVHandle = await asyncio.to_thread(self.pipe.recv)
        num_blocks = num_tokens // self.shape.layout.block_size
        return (await self.client.pull(handle, 0, list(range(num_blocks)))).seconds

    def copy(self, num_tokens: int) -> float:
        num_bytes = self.shape.num_bytes(num_tokens)
        return _timed(lambda: np.copyto(self.target[:num_bytes], self.source[:num_bytes]))

    def bare_stream(self, num_tokens: int) -> float:
        num_bytes = self.shape.num_bytes(num_tokens)
        view = self.segment.blocks.reshape(-1)[:num_bytes].data
        return _timed(lambda: self._receive(num_bytes, view))

    def _receive(self, num_bytes: int, view: memoryview) -> None:
        self.pipe.send(num_bytes)
        while view:
            view = view[self.stream.recv_into(view) :]


def _timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@contextlib.asynccontextmanager
async def running(shape: Shape, case: Case, num_blocks: int) -> AsyncIterator[Peers]:
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    secret = secrets.token_hex(16)
    process = spawn.Process(target=owner, args=(theirs, secret, shape.layout, num_blocks, case))
    process.start()
    port, stream_port = await asyncio.to_thread(pipe.recv)
    stream = socket.create_connection(("127.0.0.1", stream_port))
    segment = SharedSegment.create(num_blocks, shape.layout.block_bytes)
    # Pages are there before anything is timed, as those of a cache in use are.
    segment.blocks[:] = 1
    service, extras = published_by("puller", shape.layout, segment, secret, case)
    client = KVTransferClient(
        shape.layout,
        segment,
        worker_id="puller",
        incarnation="1",
        secret=secret,
        resolve=lambda _worker_id: (f"127.0.0.1:{port}", "1"),
        transport=case.transport,
        pull_timeout_s=60,
        openers=extras.openers,
    )
    num_bytes = num_blocks * shape.layout.block_bytes
    try:
        yield Peers(
            shape, pipe, stream, segment, client, np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        )
    finally:
        await client.close()
        await extras.close()
        await service.close()
        pipe.send(None)
        await asyncio.to_thread(process.join)
        stream.close()
        segment.close()


async def measure_case(shape: Shape, case: Case, sizes: list[int], runs: int) -> list[dict[str, Any]]:
    rows = []
    os.environ.update(case.environment)
    async with running(shape, case, max(sizes) // shape.layout.block_size) as peers:
        limit = peers.copy if case.transport == "shm" else peers.bare_stream
        for num_tokens in sizes:
            pairs = [(limit(num_tokens), await peers.pull(num_tokens)) for _ in range(runs + 1)][1:]
            gigabytes = shape.num_bytes(num_tokens) / 1e9
            seconds = statistics.median(pull for _, pull in pairs)
            rows.append(
                {
                    "name": f"kv_transfer/{case.name}/{shape.prefix}{num_tokens}_tokens",
                    "value": round(gigabytes / seconds, 3),
                    "unit": "GB/s",
                    "runs": runs,
                    "latency_ms": round(seconds * 1e3, 3),
                    "limit": round(gigabytes / statistics.median(bound for bound, _ in pairs), 3),
                    "share": round(statistics.median(bound / pull for bound, pull in pairs), 3),
                }
            )
    return rows


def sizes_that_fit(shape: Shape) -> list[int]:
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return [tokens for tokens in TOKENS if COPIES_IN_MEMORY * shape.num_bytes(tokens) < available // 4]


async def measure(cases: Sequence[Case], runs: int, progress: Console) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for case in cases:
            measured = await measure_case(shape, case, sizes_that_fit(shape), runs)
            for row in measured:
                progress.print(f"{row['name']}: {row['value']:.2f} GB/s, {row['share']:.0%}", style="dim")
            rows.extend(measured)
    return rows


def print_rates(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table("what", "ms", "GB/s", "limit", "share", title=title)
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("latency_ms", "value", "limit")]
        table.add_row(row["name"], *figures, f"{row['share']:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("rates", "requests"))
    parser.add_argument("--transports", nargs="+", choices=_TRANSPORT_NAMES, default=_TRANSPORT_NAMES)
    parser.add_argument("--runs", type=int, default=9, help="pulls of each size")
    parser.add_argument("--rounds", type=int, default=3, help="requests of each length")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine, rows = describe_machine(), []
    machine_name = f"{machine['cpu']}, {machine['cores']} cores, medians of"
    if arguments.only != "requests":
        cases = [case for case in ALL_CASES if case.name in arguments.transports]
        rates = asyncio.run(measure(cases, arguments.runs, Console(stderr=True)))
        print_rates(rates, f"{machine_name} {arguments.runs}", Console())
        rows += rates
    if arguments.only != "rates":
        transports = [name for name in kv_requests.TRANSPORTS if name in arguments.transports]
        requests = kv_requests.measure(transports, arguments.rounds, Console(stderr=True))
        kv_requests.print_table(requests, f"{machine_name} {arguments.rounds}", Console())
        rows += requests
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
