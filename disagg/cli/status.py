"""`disagg status`: what the cluster is made of, asked over HTTP so that it works from anywhere."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from disagg.cli.cluster_report import fetch, read, render

_PIPE_WIDTH = 120

Url = Annotated[str, typer.Option(help="Where the front end listens.")]
Key = Annotated[str | None, typer.Option(envvar="DISAGG_API_KEY", help="API key, if one is set.")]


def status(
    url: Url = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    api_key: Key = None,
) -> None:
    """Show pools, workers, their load, and how many requests met their objectives."""
    if as_json:
        typer.echo(json.dumps(fetch(url, api_key), indent=2))
    else:
        # A pipe has no width that lines could be cut to.
        console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
        console.print(render(read(url, api_key), width=console.width))
