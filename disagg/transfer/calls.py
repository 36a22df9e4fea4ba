"""What a call to a peer can end with, as this project's errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from typing import TypeVar

import grpc
import grpc.aio

from disagg.errors import KVLostError, LayoutMismatchError
from disagg.rpc import reason_of

Response = TypeVar("Response")


class DamagedKVError(KVLostError):
    """Blocks came that are not those that were sent. The lease still lives: pulling again may help."""


class PeerUnreachableError(KVLostError):
    """The peer could not be asked at all. Its lease may live: asking again may help."""


async def answered(call: Awaitable[Response]) -> Response:
    """Await a unary call. Raises KVLostError where its answer can't be parsed, which gRPC gives as None."""
    response: Response | None = await call
    if response is None:
        raise KVLostError("the peer's answer can't be read")
    return response


@contextlib.contextmanager
def peer_errors(worker_id: str) -> Iterator[None]:
    """Raise KVLostError or LayoutMismatchError for whatever a call to `worker_id` may fail with.

    A cancellation of the running task passes through. gRPC also ends the calls of a channel that is closed
    under them with CancelledError, which nobody meant for the task: a peer that left must not look like a
    caller who did.
    """
    task = asyncio.current_task()
    cancelled_before = task.cancelling() if task is not None else 0
    try:
        yield
    except TimeoutError:
        raise KVLostError(f"{worker_id} did not answer in time") from None
    except grpc.aio.AioRpcError as error:
        raise _lost(worker_id, error) from None
    except grpc.aio.BaseError:
        raise KVLostError(f"{worker_id} left while its KV was wanted") from None
    except asyncio.CancelledError:
        if task is None or task.cancelling() > cancelled_before:
            raise
        raise KVLostError(f"{worker_id} left while its KV was wanted") from None


def _lost(worker_id: str, error: grpc.aio.AioRpcError) -> KVLostError | LayoutMismatchError:
    message = f"{worker_id}: {reason_of(error)}"
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return LayoutMismatchError(message)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return PeerUnreachableError(message)
    return KVLostError(message)
