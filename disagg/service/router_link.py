"""RouterLink: one stream to the router, opened again whenever it breaks, wherever the router is by then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc.aio

from disagg.rpc import cluster_channel, reason_of
from disagg.tls import ClusterTLS
from disagg.v1 import router_pb2_grpc

logger = logging.getLogger(__name__)

GetAddress = Callable[[], Awaitable[str]]
# A router that lives answers a new stream at once.
CONNECT_TIMEOUT_S = 2.0
ADDRESS_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5


class RouterLink:
    """Asks for the address anew each time, since a restarted router has another one.

    converse: opens a stream on the stub and returns or raises when that has ended, for any reason.
    """

    def __init__(
        self,
        get_address: GetAddress,
        converse: Callable[[router_pb2_grpc.RouterAsyncStub], Awaitable[None]],
        tls: ClusterTLS | None = None,
    ) -> None:
        self._tls = tls
        self._get_address = get_address
        self._converse = converse
        self._task: asyncio.Task[None] | None = None
        # Set by `converse` when the router has answered: then the next pause is short again.
        self.answered = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            self.answered = False
            reason = await self._talk_once()
            pause = _FIRST_PAUSE_S if self.answered else min(_LONGEST_PAUSE_S, 2 * pause)
            logger.warning("no stream to the router (%s); trying again", reason)
            await asyncio.sleep(pause)

    async def _talk_once(self) -> str:
        """Return why the stream ended. Whatever goes wrong, the only answer to it is another try."""
        try:
            async with asyncio.timeout(ADDRESS_TIMEOUT_S):
                address = await self._get_address()
            async with cluster_channel(address, self._tls) as channel:
                await self._converse(router_pb2_grpc.RouterStub(channel))
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            return "the stream was cancelled"
        except grpc.aio.AioRpcError as error:
            return reason_of(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "the router closed it"


def cancelled_from_outside() -> bool:
    """Whether this task is being cancelled, rather than a gRPC call in it whose channel was closed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
