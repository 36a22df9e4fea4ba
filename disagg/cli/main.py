"""The `disagg` command. Subcommands import what they need when they run: `--help` must not load torch."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from disagg.bench.cli import bench_app
from disagg.cli.doctor import doctor
from disagg.cli.plan import plan
from disagg.cli.serve import serve
from disagg.cli.simulate import simulate
from disagg.cli.status import status
from disagg.cli.talk import chat
from disagg.cli.top import top

app = typer.Typer(
    name="disagg",
    help="Serve large language models with prefill and decode in separate pools.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
app.command()(serve)
app.command()(chat)
app.command()(status)
app.command()(top)
app.command()(doctor)
app.command()(simulate)
app.command()(plan)
app.add_typer(bench_app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("disagg"))
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    app()
