"""A front end's streams to workers: one per worker, shared by all of its requests there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from disagg.errors import WorkerLostError
from disagg.rpc import cluster_channel, reason_of, secret_metadata
from disagg.tls import ClusterTLS
from disagg.types import WorkerInfo
from disagg.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

# A live worker accepts a stream within milliseconds; one that can't be reached must not hold a request up.
CONNECT_TIMEOUT_S = 5.0


class RequestStream:
    """What one worker sends of one request."""

    def __init__(self, request_id: str, connection: WorkerConnection) -> None:
        self.request_id = request_id
        self._connection = connection
        self._queue: asyncio.Queue[worker_pb2.SequenceOutput | WorkerLostError] = asyncio.Queue()
        self._ended = False

    def push(self, item: worker_pb2.SequenceOutput | WorkerLostError) -> None:
        self._queue.put_nowait(item)

    async def next(self) -> worker_pb2.SequenceOutput:
        """Wait for the next output. Raises WorkerLostError when the worker is gone."""
        item = await self._queue.get()
        if isinstance(item, WorkerLostError):
            self._ended = True
            raise item
        self._ended = item.finish_reason != 0
        return item

    def proceed(self, token_id: int) -> None:
        """Give the worker the token that the request awaits."""
        self._connection.proceed(self.request_id, token_id)

    def close(self) -> None:
        """Cancel the request on the worker unless it has ended there."""
        self._connection.detach(self.request_id, cancel=not self._ended)


class WorkerConnection:
    """The Session stream to one incarnation of a worker. Once broken it stays broken."""

    def __init__(self, info: WorkerInfo, secret: str, tls: ClusterTLS | None = None) -> None:
        self.info = info
        self._channel = cluster_channel(info.address, tls)
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._metadata = secret_metadata(secret)
        self._streams: dict[str, RequestStream] = {}
        self._outbox: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._broken = False
        self._task = asyncio.create_task(self._run())

    @property
    def broken(self) -> bool:
        return self._broken

    def submit(self, message: worker_pb2.Submit) -> RequestStream:
        """Send a request. Raises WorkerLostError where the stream is already broken."""
        if self._broken:
            raise self._lost("its stream is closed")
        stream = RequestStream(message.request_id, self)
        self._streams[message.request_id] = stream
        self._outbox.put_nowait(worker_pb2.SessionRequest(submit=message))
        return stream

    def proceed(self, request_id: str, token_id: int) -> None:
        message = worker_pb2.Proceed(request_id=request_id, token_id=token_id)
        self._outbox.put_nowait(worker_pb2.SessionRequest(proceed=message))

    def detach(self, request_id: str, *, cancel: bool) -> None:
        self._streams.pop(request_id, None)
        if cancel and not self._broken:
            message = worker_pb2.Cancel(request_id=request_id)
            self._outbox.put_nowait(worker_pb2.SessionRequest(cancel=message))

    async def probe(self, peer_id: str, timeout_s: float) -> worker_pb2.ProbeResponse:
        """Ask the worker to exercise a hand-off from `peer_id`. Raises grpc.RpcError."""
        request = worker_pb2.ProbeRequest(worker_id=peer_id)
        response: worker_pb2.ProbeResponse = await self._stub.Probe(
            request, timeout=timeout_s, metadata=self._metadata
        )
        return response

    async def scrape(self, timeout_s: float) -> bytes:
        """Return the worker's Prometheus exposition. Raises grpc.RpcError."""
        response = await self._stub.Scrape(
            worker_pb2.ScrapeRequest(), timeout=timeout_s, metadata=self._metadata
        )
        return bytes(response.exposition)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    async def _run(self) -> None:
        reason = "the front end closed its stream"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._channel.channel_ready()
            call = self._stub.Session(self._outgoing(), metadata=self._metadata)
            async for response in call:
                self._dispatch(response)
            reason = "it closed the stream"
        except TimeoutError:
            reason = f"no connection within {CONNECT_TIMEOUT_S:g} s"
        except grpc.aio.AioRpcError as error:
            reason = reason_of(error)
        finally:
            self._break(reason)

    async def _outgoing(self) -> AsyncIterator[worker_pb2.SessionRequest]:
        while True:
            yield await self._outbox.get()

    def _dispatch(self, response: worker_pb2.SessionResponse) -> None:
        for output in response.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.push(output)

    def _break(self, reason: str) -> None:
        self._broken = True
        for stream in self._streams.values():
            stream.push(self._lost(reason))
        self._streams.clear()

    def _lost(self, reason: str) -> WorkerLostError:
        return WorkerLostError(
            f"worker {self.info.worker_id} was lost: {reason}", worker_id=self.info.worker_id
        )


class WorkerPool:
    """Connections by worker, following the cluster view."""

    def __init__(
        self, secret: str, lookup: Callable[[str], WorkerInfo | None], tls: ClusterTLS | None = None
    ) -> None:
        self._secret = secret
        self._tls = tls
        self._lookup = lookup
        self._connections: dict[str, WorkerConnection] = {}
        self._closing: set[asyncio.Task[Any]] = set()

    def connect(self, worker_id: str) -> WorkerConnection:
        """Return a live connection. Raises WorkerLostError where the view does not know the worker."""
        info = self._lookup(worker_id)
        if info is None:
            raise WorkerLostError(f"worker {worker_id} has left", worker_id=worker_id)
        connection = self._connections.get(worker_id)
        if connection is None or connection.broken or connection.info.incarnation != info.incarnation:
            if connection is not None:
                self._discard(connection)
            connection = self._connections[worker_id] = WorkerConnection(info, self._secret, self._tls)
        return connection

    @contextlib.contextmanager
    def open(self, worker_id: str, message: worker_pb2.Submit) -> Any:
        """Submit a request and, on the way out, cancel it there unless it ended."""
        stream = self.connect(worker_id).submit(message)
        try:
            yield stream
        finally:
            stream.close()

    def prune(self, alive: dict[str, str]) -> None:
        """Drop connections to workers that are not in {worker_id: incarnation}."""
        for worker_id, connection in list(self._connections.items()):
            if alive.get(worker_id) != connection.info.incarnation:
                del self._connections[worker_id]
                self._discard(connection)

    def _discard(self, connection: WorkerConnection) -> None:
        task = asyncio.create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for connection in self._connections.values():
            self._discard(connection)
        self._connections.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)
