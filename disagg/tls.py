"""TLS between the cluster's own processes: gRPC and the bulk streams of KV beside it, from the same files.

A process shows its certificate to whoever connects and, with mutual TLS, to those it connects to. Peers are
checked against `ca` alone, never against the system's authorities.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from disagg.config import TLSConfig
from disagg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ClusterTLS:
    """What gRPC and the bulk streams need of one process's certificate. server_name: see TLSConfig."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    server_credentials: grpc.ServerCredentials
    channel_credentials: grpc.ChannelCredentials
    server_name: str | None

    def name_of(self, host: str) -> str:
        """Return the name that the certificate of the peer at `host` must have."""
        return self.server_name or host


def load_tls(config: TLSConfig | None) -> ClusterTLS | None:
    """Read the files; None where TLS is off. Raises ConfigError naming the key that is wrong."""
    if config is None:
        return None
    certificate = _read("tls.certificate", config.certificate)
    key = _read("tls.key", config.key)
    authority = _read("tls.ca", config.ca)
    return ClusterTLS(
        server=_context(config, ssl.PROTOCOL_TLS_SERVER, show=True, check=config.mutual),
        client=_context(config, ssl.PROTOCOL_TLS_CLIENT, show=config.mutual, check=True),
        server_credentials=grpc.ssl_server_credentials(
            [(key, certificate)],
            root_certificates=authority if config.mutual else None,
            require_client_auth=config.mutual,
        ),
        channel_credentials=grpc.ssl_channel_credentials(
            root_certificates=authority,
            private_key=key if config.mutual else None,
            certificate_chain=certificate if config.mutual else None,
        ),
        server_name=config.server_name,
    )


def _read(param: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{param}: can't read {path}: {error.strerror}", param=param) from None


def _context(config: TLSConfig, protocol: int, *, show: bool, check: bool) -> ssl.SSLContext:
    """Return a context that shows our certificate and checks the peer's, as told."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # A ticket would arrive on a stream on which nothing is due; streams are kept, not resumed.
        context.num_tickets = 0
    if show:
        try:
            context.load_cert_chain(config.certificate, config.key)
        except (ssl.SSLError, OSError) as error:
            message = f"tls.key: not the key of the certificate, or no PEM file: {error}"
            raise ConfigError(message, param="tls.key") from None
    if check:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(config.ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"tls.ca: no PEM file: {error}", param="tls.ca") from None
    return context
