"""`disagg chat`: its flags; the conversation itself is in disagg.cli.chat."""

from __future__ import annotations

from typing import Annotated

import typer

from disagg.cli import chat as conversation
from disagg.client import GenerationOptions


def chat(
    message: Annotated[str | None, typer.Argument(help="Ask only this; none: talk, or read a pipe.")] = None,
    address: Annotated[str, typer.Option(help="The gRPC server, host:port.")] = "127.0.0.1:9000",
    api_key: Annotated[str | None, typer.Option(envvar="DISAGG_API_KEY", help="API key, if set.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; none: the model's default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
) -> None:
    """Talk to a model over gRPC. Ctrl-C stops an answer, Ctrl-D or /exit leaves, /reset forgets."""
    options: GenerationOptions = {}
    if temperature is not None:
        options["temperature"] = temperature
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    status = conversation.chat(address, api_key=api_key, system=system, message=message, options=options)
    raise typer.Exit(status)
