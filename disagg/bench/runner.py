"""Sends a workload: open loop by arrival times, or closed loop with a fixed number in flight."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from disagg.bench.client import Client, RequestResult, StreamRequest
from disagg.bench.failures import BenchError, WarmUpError
from disagg.bench.http import Clock
from disagg.bench.prompts import RequestBuilder

PREBUILD_TOKENS = 20_000_000
"""Up to this many prompt tokens all requests are built before the first is sent (about 120 MB)."""


@dataclass
class Measurement:
    """What a run produced; grows while it runs."""

    planned: int
    started: int = 0
    results: list[RequestResult] = field(default_factory=list)
    """In order of completion, failed ones included."""
    duration_s: float = 0.0
    """From the first arrival to the last end, or to the interruption."""
    client_cpu_s: float = 0.0
    """Processor time of this process over the run."""
    interrupted: bool = False

    @property
    def unfinished(self) -> int:
        """Requests that were under way when the run was interrupted."""
        return self.started - len(self.results)

    @property
    def failed(self) -> int:
        return sum(not result.ok for result in self.results)


class Runner:
    """One run of a workload against one endpoint.

    `concurrency` and `open_loop` together choose the loop:

    - open loop: each request is sent at its arrival time, whatever the server does. With `concurrency`,
      at most so many are in flight and later ones wait; how long is in the results (`lag_s`).
    - closed loop: `concurrency` users, each of whom sends the next request when theirs is answered.
    """

    def __init__(
        self,
        client: Client,
        builder: RequestBuilder,
        concurrency: int | None,
        open_loop: bool,
        clock: Clock = time.perf_counter,
    ) -> None:
        if concurrency is not None and concurrency < 1:
            raise BenchError("--concurrency", f"must be at least 1, got {concurrency}")
        if not open_loop and concurrency is None:
            raise BenchError("--concurrency", "a closed loop needs one")
        self._client = client
        self._builder = builder
        self._concurrency = concurrency
        self._open_loop = open_loop
        self._clock = clock
        self._built: list[StreamRequest] = []
        self.measurement = Measurement(planned=len(builder))

    async def warm_up(self, count: int) -> None:
        """Send `count` requests that are not measured, a few at a time; the first failure ends the run."""
        width = min(count, self._concurrency or 4)
        numbers = iter(range(count))

        async def user() -> None:
            for number in numbers:
                result = await self._client.stream(number, self._builder.warm_up(number))
                if result.failure is not None:
                    raise WarmUpError(result.failure) from result.failure

        try:
            async with asyncio.TaskGroup() as users:
                for _ in range(width):
                    users.create_task(user())
        except* WarmUpError as errors:
            raise errors.exceptions[0] from None

    async def run(self) -> Measurement:
        """Send everything. On Ctrl-C what is in flight is dropped and what was measured is returned."""
        _allow_many_connections(self._concurrency or len(self._builder))
        if self._builder.workload.prompt_tokens <= PREBUILD_TOKENS:
            self._built = [self._builder.build(index) for index in range(len(self._builder))]
        gc.collect()
        # The prompts live to the end: no need for the collector to look at them in the middle of a run.
        gc.freeze()
        cpu = time.process_time()
        start = self._clock()
        try:
            work = self._send_open(start) if self._open_loop else self._send_closed()
            await self._until_interrupted(asyncio.ensure_future(work))
        finally:
            gc.unfreeze()
        measured = self.measurement
        measured.client_cpu_s = time.process_time() - cpu
        ends = [result.end_s for result in measured.results]
        measured.duration_s = (self._clock() if measured.interrupted else max(ends, default=start)) - start
        return measured

    async def _until_interrupted(self, work: asyncio.Future[None]) -> None:
        with _on_interrupt(work):
            try:
                await work
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                self.measurement.interrupted = True

    async def _send_open(self, start: float) -> None:
        gate = asyncio.Semaphore(self._concurrency) if self._concurrency else None
        async with asyncio.TaskGroup() as tasks:
            for index in range(len(self._builder)):
                # Built before the wait, so that building a long prompt does not delay its sending.
                request = self._request(index)
                scheduled = start + self._builder.arrival_s(index)
                # Also when late: tasks already made must get to run between two arrivals.
                await asyncio.sleep(max(scheduled - self._clock(), 0))
                tasks.create_task(self._send_one(index, request, scheduled, gate))

    async def _send_closed(self) -> None:
        indices = iter(range(len(self._builder)))

        async def user() -> None:
            for index in indices:
                await self._send_one(index, self._request(index), None, None)

        async with asyncio.TaskGroup() as users:
            for _ in range(min(self._concurrency or 1, len(self._builder))):
                users.create_task(user())

    async def _send_one(
        self, index: int, request: StreamRequest, scheduled: float | None, gate: asyncio.Semaphore | None
    ) -> None:
        async with _passing(gate):
            self.measurement.started += 1
            result = await self._client.stream(index, request, scheduled)
            self.measurement.results.append(result)

    def _request(self, index: int) -> StreamRequest:
        return self._built[index] if self._built else self._builder.build(index)


@contextlib.asynccontextmanager
async def _passing(gate: asyncio.Semaphore | None) -> AsyncIterator[None]:
    if gate is None:
        yield
    else:
        async with gate:
            yield


@contextlib.contextmanager
def _on_interrupt(work: asyncio.Future[None]) -> Iterator[None]:
    """Ctrl-C cancels `work` instead of the program."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, work.cancel)
    except (NotImplementedError, RuntimeError, ValueError):
        # Not the main thread, or no signals here: Ctrl-C then does what it always does.
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _allow_many_connections(wanted: int) -> None:
    """Raise the soft limit on open files as far as is needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + 256
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    most = need if hard == resource.RLIM_INFINITY else min(need, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
