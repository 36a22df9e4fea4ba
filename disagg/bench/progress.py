"""Shows how a run is getting on, without a thread that would take time from the client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from disagg.bench.runner import Measurement

REFRESH_S = 0.5
LINE_EVERY_S = 5.0
"""Where the output is no terminal: seconds between lines."""


@contextlib.asynccontextmanager
async def progress_of(measurement: Measurement, console: Console) -> AsyncIterator[None]:
    """A bar on a terminal, else a line now and then, while the body runs."""
    show = _bar if console.is_terminal else _lines
    task = asyncio.create_task(show(measurement, console))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _status(measurement: Measurement) -> str:
    text = f"{measurement.unfinished} in flight"
    return f"{text}, {measurement.failed} failed" if measurement.failed else text


async def _bar(measurement: Measurement, console: Console) -> None:
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("requests", total=measurement.planned, status="")
        try:
            while True:
                _draw(progress, bar, measurement)
                await asyncio.sleep(REFRESH_S)
        finally:
            _draw(progress, bar, measurement)


def _draw(progress: Progress, bar: TaskID, measurement: Measurement) -> None:
    status = _status(measurement)
    progress.update(bar, completed=len(measurement.results), status=status, refresh=True)


async def _lines(measurement: Measurement, console: Console) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        console.print(f"{len(measurement.results)} of {measurement.planned} requests, {_status(measurement)}")
