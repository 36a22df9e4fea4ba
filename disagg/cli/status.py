"""`disagg status`: what the cluster is made of, asked over HTTP so that it works from anywhere."""

from __future__ import annotations

import json
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

_Url = Annotated[str, typer.Option(help="Where the front end listens.")]
_Key = Annotated[str | None, typer.Option(envvar="DISAGG_API_KEY", help="API key, if one is set.")]


def status(
    url: _Url = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    api_key: _Key = None,
) -> None:
    """Show workers, their load and the router."""
    report = fetch(url, api_key)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report, Console())


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """Return the cluster's state. Exits with 1 and one line where it can't be had."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url.rstrip('/')}/status", headers=headers, timeout=10, trust_env=False)
        response.raise_for_status()
        report: dict[str, Any] = response.json()
    except (httpx.HTTPError, ValueError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] can't read {url}/status: {error}", highlight=False)
        raise typer.Exit(1) from None
    return report


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"model {report.get('model', '?')}", title_justify="left")
    for name in ("worker", "role", "state", "pid", "host", "running", "waiting", "KV blocks"):
        table.add_column(name, justify="left" if name in ("worker", "role", "state", "host") else "right")
    for worker in report["workers"]:
        table.add_row(
            worker["id"],
            worker["role"],
            worker["state"],
            str(worker["pid"]),
            worker["host"],
            str(worker["num_running"]),
            str(worker["num_waiting"]),
            f"{worker['kv_blocks_used']} / {worker['kv_blocks_total']}",
        )
    console.print(table)
    router = report["router"]
    link = "connected" if router["connected"] else "away: placing by the last view"
    console.print(f"router pid {router['pid']}, {link}")
