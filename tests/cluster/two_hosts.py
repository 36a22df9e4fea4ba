"""Two hosts on one machine: namespaces for network, processes and mounts, and a link between them.

To `segment.host_id` they are two hosts, since neither can open the other's /proc. Everything in a host dies
with it. Needs the right to make namespaces, as root has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

Result = TypeVar("Result")

_CLONE_NEWNET = 0x40000000
# Ray's sockets and shared memory are the host's own.
_SETUP = "mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs tmpfs /dev/shm && ip link set lo up"


@dataclass
class Host:
    """One of the two. pid: of its first process, as seen from outside."""

    address: str
    pid: int
    interface: str

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-p", "-m", *words]

    def run(self, *words: str, timeout: float = 120, **more: Any) -> str:
        """Return what a command that runs there prints. Raises AssertionError with it where it fails."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout, check=False, **more
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    @contextlib.contextmanager
    def threads(self, count: int) -> Iterator[Callable[..., Future[Any]]]:
        """Yield a `submit` whose functions see this host's network."""
        with ThreadPoolExecutor(count, initializer=_enter_network, initargs=(self.pid,)) as pool:
            yield pool.submit

    # -- the link ------------------------------------------------------------------------------------

    def slow(self, rate: str) -> None:
        """Let what leaves this host leave at `rate` (of tc, e.g. 10mbit)."""
        self.run(
            *f"tc qdisc replace dev {self.interface} root tbf rate {rate} burst 16k latency 500ms".split()
        )

    def full_speed(self) -> None:
        self.run(*f"tc qdisc del dev {self.interface} root".split())

    def cut(self, ports: Sequence[int]) -> None:
        """Let no packet leave this host from `ports`: whoever talks to them hears nothing any more."""
        for port in ports:
            self.run(*f"ip rule add ipproto tcp sport {port} blackhole".split())

    def mend(self, ports: Sequence[int]) -> None:
        for port in ports:
            self.run(*f"ip rule del ipproto tcp sport {port} blackhole".split())


def _enter_network(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def can_make_hosts() -> bool:
    """Whether this process may make namespaces and links here."""
    link = "ip link add link0 type veth peer name link1"
    script = f"{link} && tc qdisc add dev link0 root tbf rate 1mbit burst 16k latency 1s"
    command = ["unshare", "--net", "--pid", "--mount", "--fork", "sh", "-c", script]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def two_hosts(first: str = "10.77.0.1", second: str = "10.77.0.2") -> Iterator[tuple[Host, Host]]:
    """Run two hosts that are linked; end all that runs in them with the block."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    with _process() as one, _process() as two:
        hosts = Host(first, one, "link0"), Host(second, two, "link0")
        subprocess.run(
            f"ip link add link0 netns {one} type veth peer name link0 netns {two}".split(), check=True
        )
        for host in hosts:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "link0")
            host.run("ip", "link", "set", "link0", "up")
        yield hosts


@contextlib.contextmanager
def _process() -> Iterator[int]:
    """Run the first process of a host; yield its pid."""
    keeper = subprocess.Popen(
        [
            *("unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"),
            *("sh", "-c", f"{_SETUP} && exec sleep infinity"),
        ],
        stdout=sys.stderr,
    )
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            children = psutil.Process(keeper.pid).children()
            if children and children[0].name() == "sleep":
                break
            time.sleep(0.02)
        else:
            raise AssertionError("a host does not start")
        yield children[0].pid
    finally:
        keeper.kill()
        keeper.wait()
