from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# The fake backend and its servers are those of the front end's tests.
sys.path.append(str(Path(__file__).parents[1] / "frontend"))

from frontend_fakes import FakeBackend, serve_grpc


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@contextmanager
def grpc_in_thread(backend: FakeBackend, api_key: str | None = None) -> Iterator[str]:
    """Serve on an event loop of its own thread, as a blocking client needs; yields the address."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()
    address: list[str] = []

    async def run() -> None:
        async with serve_grpc(backend, api_key) as found:
            address.append(found)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert started.wait(10)
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@pytest.fixture
def serve() -> Callable[..., object]:
    return grpc_in_thread
