"""The API key stands in front of everything, known or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import httpx
import pytest
from frontend_fakes import FakeBackend, serve_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from starlette.routing import Route

from disagg.config import FrontendConfig
from disagg.frontend.http import create_app
from disagg.v1 import inference_pb2, inference_pb2_grpc

KEY = "s3cret-ключ"
WRONG = [
    [],
    [(b"authorization", b"")],
    [(b"authorization", b"Bearer")],
    [(b"authorization", b"Bearer ")],
    [(b"authorization", b"Bearer s3cret")],
    [(b"authorization", b"Basic " + KEY.encode())],
    [(b"authorization", KEY.encode())],
    [(b"authorization", b"Bearer \xff\xfe")],
    [(b"x-api-key", KEY.encode())],
    [(b"authorization", b"Bearer x"), (b"authorization", b"Bearer " + KEY.encode())],
]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(config=FrontendConfig(api_key=KEY))


def paths(backend: FakeBackend) -> list[tuple[str, str]]:
    routes = [route for route in create_app(backend).routes if isinstance(route, Route)]
    assert len(routes) >= 11
    known = [(method, route.path) for route in routes for method in route.methods or ()]
    unknown = ["/", "/docs", "/openapi.json", "/invocations", "//health", "/v1/../health", "/%2e/metrics"]
    return [*known, *[("GET", path) for path in unknown], ("OPTIONS", "/health"), ("TRACE", "/")]


@pytest.mark.parametrize("headers", WRONG)
async def test_every_route_needs_the_key(
    http: httpx.AsyncClient, backend: FakeBackend, headers: list[tuple[bytes, bytes]]
) -> None:
    for method, path in paths(backend):
        answer = await http.request(method, path, headers=headers, json={"prompt": "x"})
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.json()["error"]["type"] == "authentication_error"
    assert not backend.generator.requests


async def test_the_key_opens_every_route(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    headers = {"authorization": b"Bearer " + KEY.encode()}
    for method, path in paths(backend):
        answer = await http.request(method, path, headers=headers, json={"prompt": "x"})
        assert answer.status_code != 401, path
    headers = {"authorization": b"bearer " + KEY.encode()}
    assert (await http.get("/health", headers=headers)).status_code == 200


async def test_websockets_are_refused(backend: FakeBackend) -> None:
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("nothing is read")

    await create_app(backend)({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_without_a_key_everyone_is_served() -> None:
    transport = httpx.ASGITransport(create_app(FakeBackend()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/health")).status_code == 200


# -- gRPC ------------------------------------------------------------------------------------------


async def calls(address: str, metadata: tuple[tuple[str, str], ...]) -> dict[str, grpc.StatusCode]:
    """Return the status of each method of each service, and of ones that don't exist."""
    generate = inference_pb2.GenerateRequest(text="hello")
    refused = not any(value == "Bearer secret" for _, value in metadata) or len(metadata) > 1
    async with grpc.aio.insecure_channel(address) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        unknown = channel.unary_unary("/disagg.v1.Inference/Nope")
        streaming = channel.stream_stream("/no.Service/Nope")
        attempts = {
            "Generate": inference.Generate(generate, metadata=metadata),
            "Abort": inference.Abort(inference_pb2.AbortRequest(request_id="x"), metadata=metadata),
            "GetModelInfo": inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), metadata=metadata),
            "Check": health.Check(health_pb2.HealthCheckRequest(), metadata=metadata),
            "Watch": health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata),
            "Reflection": reflection.ServerReflectionInfo(
                say(*([] if refused else [listing])), metadata=metadata
            ),
            "Unknown": unknown(b"", metadata=metadata),
            "UnknownStream": streaming(say(), metadata=metadata),
        }
        return {name: await status(call) for name, call in attempts.items()}


async def say(*messages: object) -> AsyncIterator[object]:
    """Send and keep the stream open: a client that still sends on a refused one may report that instead."""
    for message in messages:
        yield message
    await asyncio.Event().wait()


async def status(call) -> grpc.StatusCode:
    try:
        if hasattr(call, "read"):
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer x"),),
        (("authorization", "secret"),),
        (("authorization", "Bearer secret"), ("authorization", "Bearer secret")),
        (("x-api-key", "secret"),),
    ],
)
async def test_every_method_needs_the_key(backend: FakeBackend, metadata) -> None:
    async with serve_grpc(backend, "secret") as address:
        statuses = await calls(address, metadata)
    assert statuses == dict.fromkeys(statuses, grpc.StatusCode.UNAUTHENTICATED)
    assert not backend.generator.requests


async def test_the_key_opens_every_method(backend: FakeBackend) -> None:
    async with serve_grpc(backend, "secret") as address:
        statuses = await calls(address, (("authorization", "Bearer secret"),))
    unknown = {statuses.pop("Unknown"), statuses.pop("UnknownStream")}
    assert unknown == {grpc.StatusCode.UNIMPLEMENTED}
    assert statuses == dict.fromkeys(statuses, grpc.StatusCode.OK)
