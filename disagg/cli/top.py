"""`disagg top`: the cluster live in the terminal, until q or Ctrl-C. Without a terminal it prints once."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from disagg.cli.cluster_report import Reading, read, render
from disagg.cli.status import Key, Url

# Rates are of the last readings within this time: one interval alone would flicker.
WINDOW_S = 10.0


def top(
    url: Url = "http://127.0.0.1:8000",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    api_key: Key = None,
) -> None:
    """Watch pools, queues, KV blocks, links and objectives; q or Ctrl-C leaves."""
    console = Console()

    def look() -> Reading:
        return read(url, api_key)

    if not (console.is_terminal and sys.stdin.isatty()):
        console.print(render(look(), width=console.width))
        return
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed:
        watch(look, console, interval, pressed)


def watch(
    look: Callable[[], Reading], console: Console, interval: float, pressed: Callable[[float], str]
) -> None:
    """Draw anew every `interval` seconds until `pressed`, which waits so long for a key, returns q."""
    readings = [look()]
    with Live(_screen(readings, console.width), console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(readings, console.width), refresh=True)
            if _left(pressed, interval):
                return
            readings = [*readings, look()]
            while len(readings) > 2 and readings[-1].at - readings[0].at > WINDOW_S:
                readings.pop(0)


def _left(pressed: Callable[[float], str], interval: float) -> bool:
    """Wait for the next look; True if the user wants to leave."""
    until = time.monotonic() + interval
    while (left := until - time.monotonic()) > 0:
        if pressed(left) in ("q", "Q", "\x03"):
            return True
    return False


def _screen(readings: list[Reading], width: int) -> RenderableType:
    before = readings[0] if len(readings) > 1 else None
    return Group(render(readings[-1], before, width=width), Text("q leaves", style="dim"))


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Read single keys without echo; the terminal is as it was afterwards, however this ends."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(timeout_s: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
        return sys.stdin.read(1) if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
