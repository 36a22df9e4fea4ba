"""gRPC between the cluster's own processes: one place for channel options and the shared secret.

Every internal server refuses calls whose metadata does not carry the cluster's secret, so a process that
merely reaches the port can neither submit work nor read KV.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from disagg.tls import ClusterTLS

SECRET_HEADER = "x-disagg-secret"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer whose host vanished sends no FIN; without these an idle stream would hang until TCP gives up.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]
_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    *_OPTIONS,
    # A restarted worker has a new address; a lost one is reported dead by the router, so dial briskly.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Addresses are the cluster's own: an http_proxy in the environment must not get between.
    ("grpc.enable_http_proxy", 0),
    # Channels of one process to one peer don't share a connection, so that KV does not delay tokens.
    ("grpc.use_local_subchannel_pool", 1),
]


class _RequireSecret(grpc.aio.ServerInterceptor):
    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        given = next((value for key, value in details.invocation_metadata or () if key == SECRET_HEADER), "")
        given = given.encode() if isinstance(given, str) else given
        if hmac.compare_digest(given, self._secret):
            return handler
        return refuse(handler, grpc.StatusCode.UNAUTHENTICATED, "wrong or missing cluster secret")


def refuse(handler: Any, status: grpc.StatusCode, message: str) -> Any:
    """Return a handler of the same kind as `handler` that answers `status` to every call."""

    async def abort(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(status, message)

    async def abort_stream(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        # A streaming method must be a generator; this one ends before its first item.
        yield await context.abort(status, message)

    if handler is None:
        return None
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(abort_stream)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(abort_stream)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(abort)
    return grpc.unary_unary_rpc_method_handler(abort)


def cluster_server(secret: str) -> grpc.aio.Server:
    """Return a server, not started, that serves only who knows `secret`."""
    # Two servers on one port would split a worker's calls between processes.
    options = [*_OPTIONS, ("grpc.so_reuseport", 0)]
    return grpc.aio.server(interceptors=[_RequireSecret(secret)], options=options)


def listen(server: grpc.aio.Server, address: str, tls: ClusterTLS | None = None) -> int:
    """Let a server listen on host:port, with TLS where that is on; return the port. Raises RuntimeError."""
    if tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls.server_credentials)


def cluster_channel(address: str, tls: ClusterTLS | None = None) -> grpc.aio.Channel:
    """Return a channel to a cluster process; calls need `metadata=secret_metadata(secret)`."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    name = tls.name_of(address.rpartition(":")[0].strip("[]"))
    options = [*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, tls.channel_credentials, options=options)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return what a call failed with, for logs; where it looks like TLS settings that differ, it says so."""
    details = error.details() or ""
    reason = f"{error.code().name}: {details}"
    # Who shows no certificate learns so only after the handshake, which TLS 1.3 has finished by then.
    differ = "failed to connect" in details and any(
        sign in details for sign in ("Socket closed", "handshake", "erification")
    )
    return f"{reason} (is `tls` the same on both sides, the certificate of its `ca`?)" if differ else reason


def secret_metadata(secret: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata with which a call proves that it comes from this cluster."""
    return ((SECRET_HEADER, secret),)
