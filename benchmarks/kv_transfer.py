"""How fast KV moves between two worker processes: each transport beside a plain memory copy.

    python benchmarks/kv_transfer.py --json out.json

The publishing side runs in a process of its own. Limit of every row: one numpy copy of the same bytes,
measured in the same run. Each figure is the median over --runs pulls after one that warms up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import secrets
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine
from disagg.rpc import cluster_server
from disagg.transfer.client import KVTransferClient
from disagg.transfer.segment import SharedSegment
from disagg.transfer.server import KVTransferService
from disagg.types import KVHandle, KVLayout
from disagg.v1 import worker_pb2_grpc

SECRET = secrets.token_hex(16)
TOKENS = (128, 512, 2048, 8192)
# An 81 M-parameter Llama in fp32: 24 KiB of KV a token.
LAYOUT = KVLayout("bench", "float32", block_size=16, num_layers=12, num_kv_heads=4, head_dim=64)


def owner(pipe: Connection, secret: str, num_blocks: int) -> None:
    """Run the publishing worker's half until the pipe closes; publish what the pipe asks for."""
    asyncio.run(_owner(pipe, secret, num_blocks))


async def _owner(pipe: Connection, secret: str, num_blocks: int) -> None:
    segment = SharedSegment.create(num_blocks, LAYOUT.block_bytes)
    segment.blocks[:] = np.random.default_rng(0).integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8)
    service = KVTransferService(
        LAYOUT,
        segment,
        worker_id="owner",
        incarnation="1",
        secret=secret,
        lease_s=60,
        chunk_bytes=2**21,
        on_released=lambda _request_id: None,
    )
    server = cluster_server(secret)
    worker_pb2_grpc.add_KVTransferServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    while (asked := await asyncio.to_thread(pipe.recv)) is not None:
        request_id, key, num_tokens = asked
        blocks = list(range(1, num_tokens // LAYOUT.block_size + 1))
        pipe.send(service.publish(request_id, key, blocks, num_tokens))
    await server.stop(None)


def copy_seconds(num_bytes: int, runs: int) -> float:
    """Return the median time of one memory copy of `num_bytes`."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    # Touch the target's pages first: the cache that a pull writes into is mapped already.
    np.copyto(target, source)
    return statistics.median(_timed(lambda: np.copyto(target, source)) for _ in range(runs))


def _timed(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


async def pull_seconds(pipe: Connection, address: str, transport: Any, num_tokens: int, runs: int) -> float:
    """Return the median time of a pull of `num_tokens` tokens, locating and releasing included."""
    num_blocks = num_tokens // LAYOUT.block_size
    segment = SharedSegment.create(num_blocks + 1, LAYOUT.block_bytes)
    segment.blocks[:] = 1
    client = KVTransferClient(
        LAYOUT,
        segment,
        worker_id="puller",
        incarnation="1",
        secret=SECRET,
        resolve=lambda _worker_id: (address, "1"),
        transport=transport,
        pull_timeout_s=60,
    )
    times = []
    for run in range(runs + 1):
        pipe.send((f"{transport}-{num_tokens}-{run}", secrets.token_bytes(16), num_tokens))
        handle: KVHandle = await asyncio.to_thread(pipe.recv)
        result = await client.pull(handle, 0, list(range(1, num_blocks + 1)))
        times.append(result.seconds)
    await client.close()
    return statistics.median(times[1:])


async def measure(runs: int, console: Console) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=owner, args=(theirs, SECRET, max(TOKENS) // LAYOUT.block_size + 1))
    process.start()
    address = await asyncio.to_thread(pipe.recv)
    rows = []
    for transport in ("shm", "grpc"):
        for num_tokens in TOKENS:
            num_bytes = num_tokens // LAYOUT.block_size * LAYOUT.block_bytes
            seconds = await pull_seconds(pipe, address, transport, num_tokens, runs)
            value, limit = num_bytes / seconds / 1e9, num_bytes / copy_seconds(num_bytes, runs) / 1e9
            rows.append(
                {
                    "name": f"kv_transfer/{transport}/{num_tokens}_tokens",
                    "value": round(value, 3),
                    "unit": "GB/s",
                    "runs": runs,
                    "limit": round(limit, 3),
                    "share": round(value / limit, 3),
                }
            )
            console.print(f"{rows[-1]['name']}: {value:.2f} GB/s", style="dim")
    pipe.send(None)
    process.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    machine = describe_machine()
    rows = asyncio.run(measure(arguments.runs, Console(stderr=True)))
    table = Table(
        "what", "GB/s", "one memory copy", "share", title=f"{machine['cpu']}, {machine['cores']} cores"
    )
    for row in rows:
        table.add_row(row["name"], f"{row['value']:.2f}", f"{row['limit']:.2f}", f"{row['share']:.0%}")
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
