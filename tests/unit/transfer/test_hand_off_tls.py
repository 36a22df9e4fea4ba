"""Hand-offs under TLS and mutual TLS: who has the right certificate gets KV, and nobody else gets a byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from disagg.config import TLSConfig, parse_config
from disagg.errors import ConfigError, KVLostError
from disagg.rpc import reason_of
from disagg.tls import ClusterTLS, load_tls
from disagg.transfer import bulk_server
from disagg.transfer.bulk_reader import BulkReader
from disagg.transfer.readers import StreamReader
from tests.certificates import Authority
from tests.unit.transfer.transfer_support import (
    BLOCK_BYTES,
    LAYOUT,
    Directory,
    running_client,
    running_node,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def directory() -> Directory:
    return Directory()


def settings(authority: Authority, name: str = "worker", **changes: Any) -> TLSConfig:
    issued = {key: changes.pop(key) for key in ("hosts", "expired") if key in changes}
    certificate, key = authority.issue(name, **issued)
    return TLSConfig(**{"certificate": certificate, "key": key, "ca": authority.ca, **changes})


def tls_of(authority: Authority, name: str = "worker", **changes: Any) -> ClusterTLS:
    loaded = load_tls(settings(authority, name, **changes))
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("transport", ["shm", "grpc", "messages"])
async def test_right_certificates_move_the_right_bytes(
    directory: Directory, authority: Authority, transport: str, mutual: bool
) -> None:
    tls = tls_of(authority, mutual=mutual)
    async with (
        running_node(directory, tls=tls) as node,
        running_client(directory, transport=transport, tls=tls) as (client, segment),
    ):
        for turn in range(3):
            handle = node.publish(f"r{turn}", range(1, 33))
            await client.pull(handle, 0, range(32, 64))
            assert np.array_equal(segment.blocks[32:64], node.segment.blocks[1:33])
            segment.blocks[:] = 0xEE
        connection = await client._connections.connect(("prefill-0", "first"))
        if transport == "grpc":
            assert isinstance(connection.reader, BulkReader)
            # One stream for all three: nothing that TLS says by itself ends a kept one.
            streams = list(node.service._bulk._streams.values())
            assert [type(sock) for sock in streams] == [ssl.SSLSocket]
        if transport == "messages":
            assert isinstance(connection.reader, StreamReader)
        assert node.released == ["r0", "r1", "r2"]


async def test_frames_larger_than_a_tls_record(
    directory: Directory, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = type(LAYOUT)("tiny", "float32", block_size=16, num_layers=4, num_kv_heads=4, head_dim=32)
    monkeypatch.setattr(bulk_server, "FRAME_BYTES", 5 * layout.block_bytes)
    tls = tls_of(authority)
    async with (
        running_node(directory, tls=tls, layout=layout) as node,
        running_client(directory, transport="grpc", tls=tls, layout=layout) as (client, segment),
    ):
        blocks = list(range(63, 0, -2))
        handle = node.service.publish("r", bytes(16), blocks, 16 * len(blocks))
        await client.pull(handle, 0, range(1, 33))
        assert np.array_equal(segment.blocks[1:33], node.segment.blocks[blocks])


async def test_a_name_that_all_workers_share(directory: Directory, authority: Authority) -> None:
    """In a cluster whose addresses nobody knows beforehand, certificates carry a common name."""
    tls = tls_of(authority, hosts=("disagg.internal",), server_name="disagg.internal")
    async with (
        running_node(directory, tls=tls) as node,
        running_client(directory, transport="grpc", tls=tls) as (client, segment),
    ):
        await client.pull(node.publish("r", [7]), 0, [1])
        assert np.array_equal(segment.blocks[1], node.segment.blocks[7])
        connection = await client._connections.connect(("prefill-0", "first"))
        assert isinstance(connection.reader, BulkReader)


def strangers(authority: Authority, folder: Path) -> dict[str, ClusterTLS | None]:
    other = Authority(folder)
    certificate, key = other.issue("stranger")
    return {
        "no TLS": None,
        "no certificate": tls_of(authority, mutual=False),
        "another authority's": load_tls(TLSConfig(certificate=certificate, key=key, ca=authority.ca)),
        "an expired one": tls_of(authority, "late", expired=True),
        "expects another authority": load_tls(settings(authority).model_copy(update={"ca": other.ca})),
        "expects another name": tls_of(authority, server_name="somebody.else"),
    }


@pytest.mark.parametrize(
    "who",
    [
        "no TLS",
        "no certificate",
        "another authority's",
        "an expired one",
        "expects another authority",
        "expects another name",
    ],
)
async def test_wrong_certificates_get_nothing(
    directory: Directory, authority: Authority, tmp_path: Path, who: str
) -> None:
    async with running_node(directory, tls=tls_of(authority)) as node:
        handle = node.publish("r", [1, 2])
        tls = strangers(authority, tmp_path)[who]
        async with running_client(directory, transport="grpc", tls=tls, pull_timeout_s=2.0) as (client, mine):
            with pytest.raises(KVLostError, match="is `tls` the same on both sides"):
                await client.pull(handle, 0, [1, 2])
            assert (mine.blocks == 0xEE).all()
            # Nor on the bulk port, for who does not ask on the gRPC one first.
            reader = BulkReader(
                ("127.0.0.1", node.service._bulk_port),
                ("prefill-0", "first"),
                "test-secret",
                client._connections._receivers,
                2.0,
                tls,
            )
            with pytest.raises(KVLostError):
                await reader.read(handle, 0, mine.blocks, [1, 2])
            assert (mine.blocks == 0xEE).all()
            await reader.close()
        assert len(node.service._leases) == 1
        async with running_client(directory, transport="grpc", tls=tls_of(authority)) as (client, mine):
            await client.pull(handle, 0, [1, 2])
            assert np.array_equal(mine.blocks[1:3], node.segment.blocks[1:3])


async def test_a_handshake_that_never_ends_is_dropped(
    directory: Directory, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_server, "STEP_TIMEOUT_S", 0.2)
    async with running_node(directory, tls=tls_of(authority)) as node:
        with socket.socket() as silent:
            silent.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(silent, ("127.0.0.1", node.service._bulk_port))
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    assert await loop.sock_recv(silent, 1) == b""
        async with asyncio.timeout(5):
            while node.service._bulk._streams:
                await asyncio.sleep(0.01)


async def test_a_cancelled_pull_under_tls_writes_no_more(
    directory: Directory, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_server, "FRAME_BYTES", BLOCK_BYTES)
    tls = tls_of(authority)
    async with (
        running_node(directory, tls=tls) as node,
        running_client(directory, transport="grpc", tls=tls) as (client, segment),
    ):
        for turn in range(20):
            handle = node.publish(f"r{turn}", range(1, 64))
            pull = asyncio.create_task(client.pull(handle, 0, range(1, 64)))
            await asyncio.sleep(0.0005 * turn)
            pull.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pull
            segment.blocks[:] = 0xEE
            await asyncio.sleep(0.005)
            assert (segment.blocks == 0xEE).all()


# -- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["certificate", "key", "ca"])
def test_a_file_that_is_missing_is_named(authority: Authority, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tls(settings(authority).model_copy(update={name: "/nowhere/file.pem"}))
    assert caught.value.param == f"tls.{name}"


@pytest.mark.parametrize("name", ["key", "ca"])
def test_a_file_that_is_something_else_is_named(authority: Authority, tmp_path: Path, name: str) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not PEM")
    with pytest.raises(ConfigError) as caught:
        load_tls(settings(authority).model_copy(update={name: str(wrong)}))
    assert caught.value.param == f"tls.{name}"


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    _, other = authority.issue("other")
    with pytest.raises(ConfigError, match="key"):
        load_tls(settings(authority).model_copy(update={"key": other}))


def test_other_failures_are_not_taken_for_tls() -> None:
    def failed(details: str) -> str:
        nothing = grpc.aio.Metadata()
        return reason_of(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details))

    for details in ("Socket closed", "failed to connect to all addresses; last error: Connection refused"):
        assert failed(details) == f"UNAVAILABLE: {details}"


def test_off_by_default_and_incomplete_settings_are_refused() -> None:
    assert load_tls(parse_config({}).tls) is None
    with pytest.raises(ConfigError) as caught:
        parse_config({"tls": {"certificate": "c.pem", "key": "k.pem"}})
    assert caught.value.param == "tls.ca"
