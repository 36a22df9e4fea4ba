"""Python clients of the gRPC API. Needs grpc and protobuf, neither torch nor ray."""

from disagg.client.aio import AsyncClient
from disagg.client.sync import Client
from disagg.client.types import (
    GenerationChunk,
    GenerationOptions,
    GenerationResult,
    Messages,
    ModelInfo,
    Usage,
)

__all__ = [
    "AsyncClient",
    "Client",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "Messages",
    "ModelInfo",
    "Usage",
]
