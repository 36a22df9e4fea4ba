"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc

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


class Client:
    """Speaks to one server; safe to use from several threads. Errors are those of disagg.errors.

        with Client("127.0.0.1:9000") as client:
            print(client.generate("Once upon a time", max_tokens=32).text)

    timeout: seconds for a whole answer where a call names none.
    """

    def __init__(
        self, address: str = wire.DEFAULT_ADDRESS, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._metadata = wire.auth_metadata(api_key)
        self._channel = grpc.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Return the whole answer to exactly one of a text, token ids, or a conversation."""
        return wire.collect(self.stream(prompt, token_ids=token_ids, messages=messages, **options))

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generator[GenerationChunk, None, None]:
        """Yield the answer as it comes. Closing the iterator cancels the request."""
        request = wire.build_request(prompt, token_ids, messages, options)
        call = self._stub.Generate(
            request, timeout=options.get("timeout", self._timeout), metadata=self._metadata
        )
        try:
            for response in call:
                yield wire.parse_chunk(response)
        except grpc.RpcError as error:
            wire.raise_typed(error, self._address)
        finally:
            call.cancel()

    def abort(self, request_id: str) -> bool:
        """End a request, whose stream closes with FinishReason.ABORT; return whether it was running."""
        return self._call(self._stub.Abort, inference_pb2.AbortRequest(request_id=request_id)).aborted

    def model_info(self) -> ModelInfo:
        """Return what the server serves."""
        return wire.parse_model_info(self._call(self._stub.GetModelInfo, inference_pb2.GetModelInfoRequest()))

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., T], request: Any) -> T:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            wire.raise_typed(error, self._address)
