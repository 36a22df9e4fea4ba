"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
import grpc.aio

from disagg.client import wire
from disagg.client.types import (
    GenerationChunk,
    GenerationOptions,
    GenerationResult,
    Messages,
    ModelInfo,
)
from disagg.v1 import inference_pb2, inference_pb2_grpc

T = TypeVar("T")


class AsyncClient:
    """As Client, for asyncio; belongs to the event loop that it is made on.

    async with AsyncClient("127.0.0.1:9000") as client:
        async for chunk in client.stream("Once upon a time"):
            print(chunk.text, end="")
    """

    def __init__(
        self, address: str = wire.DEFAULT_ADDRESS, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._metadata = wire.auth_metadata(api_key)
        self._channel = grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Return the whole answer to exactly one of a text, token ids, or a conversation."""
        stream = self.stream(prompt, token_ids=token_ids, messages=messages, **options)
        return wire.collect([chunk async for chunk in stream])

    async def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Yield the answer as it comes. Closing the generator cancels the request."""
        request = wire.build_request(prompt, token_ids, messages, options)
        call = self._stub.Generate(
            request, timeout=options.get("timeout", self._timeout), metadata=self._metadata
        )
        try:
            async for response in call:
                yield wire.parse_chunk(response)
        except grpc.RpcError as error:
            wire.raise_typed(error, self._address)
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> bool:
        """End a request, whose stream closes with FinishReason.ABORT; return whether it was running."""
        response = await self._call(self._stub.Abort, inference_pb2.AbortRequest(request_id=request_id))
        return response.aborted

    async def model_info(self) -> ModelInfo:
        """Return what the server serves."""
        return wire.parse_model_info(
            await self._call(self._stub.GetModelInfo, inference_pb2.GetModelInfoRequest())
        )

    async def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Callable[..., Awaitable[T]], request: Any) -> T:
        try:
            return await method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            wire.raise_typed(error, self._address)
