"""Sockets of bulk streams, plain or TLS: how they are set up, used on the event loop, and ended.

The loop's own sock_* functions refuse TLS sockets, and its streams copy what they carry; these few functions
serve both kinds of socket, and a thread can go on with the same socket afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# A peer whose host vanished sends no FIN: an idle stream finds out within about a minute.
_KEEPALIVE_S = 20
_KEEPALIVE_PROBES = 3


def tune(sock: socket.socket) -> None:
    """Make a connected socket ready for the loop, without delays of small messages."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


async def secured(
    sock: socket.socket, context: ssl.SSLContext, *, server_hostname: str | None = None
) -> ssl.SSLSocket:
    """Return a connected, tuned socket under TLS; server_hostname: on the client's side, who is expected.

    The given socket is no longer to be used, whether this succeeds or raises OSError.
    """
    secure = context.wrap_socket(
        sock,
        server_side=server_hostname is None,
        server_hostname=server_hostname,
        do_handshake_on_connect=False,
    )
    try:
        await _when_ready(secure, secure.do_handshake, for_write=False)
    except BaseException:
        secure.close()
        raise
    return secure


async def receive(sock: socket.socket, size: int) -> bytes:
    """Return what has come, 1 to `size` bytes; nothing where the peer has ended. Raises OSError."""
    return await _when_ready(sock, lambda: sock.recv(size), for_write=False)


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes. Raises ConnectionResetError where the peer ends before."""
    data = b""
    while len(data) < size:
        more = await receive(sock, size - len(data))
        if not more:
            raise ConnectionResetError("the peer closed the stream")
        data += more
    return data


async def send_all(sock: socket.socket, data: bytes) -> None:
    """Send a small message. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[await _send(sock, view) :]


async def _send(sock: socket.socket, view: memoryview) -> int:
    return await _when_ready(sock, lambda: sock.send(view), for_write=True)


async def _when_ready(sock: socket.socket, action: Callable[[], T], *, for_write: bool) -> T:
    """Run what would block once it doesn't."""
    while True:
        try:
            return action()
        except ssl.SSLWantReadError:
            await _ready(sock, for_write=False)
        except ssl.SSLWantWriteError:
            await _ready(sock, for_write=True)
        except BlockingIOError:
            await _ready(sock, for_write=for_write)


async def _ready(sock: socket.socket, *, for_write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if for_write else (loop.add_reader, loop.remove_reader)
    )
    # By number: whoever closes the socket meanwhile must not leave its number watched.
    number = sock.fileno()
    add(number, _set, ready)
    try:
        await ready
    finally:
        remove(number)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def is_quiet(sock: socket.socket) -> bool:
    """Whether a stream that waits was neither closed nor told anything."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return False
    readable, _, _ = select.select([sock], [], [], 0)
    return not readable


def shut(sock: socket.socket) -> None:
    """Wake whoever reads from or writes to a socket; closing its descriptor would not."""
    with contextlib.suppress(OSError):
        # Not the TLS socket's own, which would turn it into a plain one under a thread that uses it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
