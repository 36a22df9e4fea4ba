"""`disagg chat`: a conversation over gRPC, or one question from an argument or a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console

from disagg.client import Client, GenerationChunk, GenerationOptions
from disagg.errors import DisaggError, InvalidRequestError

HELP = "Ctrl-C stops an answer · /reset forgets the conversation · /exit or Ctrl-D leaves"


def chat(
    address: str = "127.0.0.1:9000",
    *,
    api_key: str | None = None,
    system: str | None = None,
    message: str | None = None,
    options: GenerationOptions | None = None,
    console: Console | None = None,
    stdin: TextIO | None = None,
) -> int:
    """Talk to a server and return the process's exit status.

    message: ask only this; without it, and where stdin is no terminal, all of stdin is the one question.
    """
    console = console or Console()
    stdin = stdin or sys.stdin
    with Client(address, api_key=api_key) as client:
        session = ChatSession(client, console, system=system, options=options)
        if message is None and not stdin.isatty():
            message = stdin.read().strip()
        if message is not None:
            return 0 if session.ask(message) else 1
        return _interact(client, session, console)


class ChatSession:
    """A conversation's history. An answer that was stopped stays in it as far as it got."""

    def __init__(
        self,
        client: Client,
        console: Console,
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        self._client = client
        self._console = console
        self._system = system
        self._options: GenerationOptions = options or {}
        self.messages: list[Mapping[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str, *, show_stats: bool = False) -> bool:
        """Print the answer as it comes; return False, and keep the history as it was, if it failed."""
        conversation = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        stats = _Stats()
        try:
            self._print_answer(conversation, answer, stats)
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/dim]", end="")
        except DisaggError as error:
            self._report(error)
            return False
        self._console.print()
        if show_stats:
            self._console.print(f"[dim]{stats}[/dim]")
        self.messages = [*conversation, {"role": "assistant", "content": "".join(answer)}]
        return True

    def _print_answer(self, conversation: list[Mapping[str, str]], answer: list[str], stats: _Stats) -> None:
        chunks = self._client.stream(messages=conversation, **self._options)
        with contextlib.closing(chunks) as stream:
            for chunk in stream:
                stats.add(chunk)
                answer.append(chunk.text)
                # The model's words are not markup, and a terminal wraps by itself.
                self._console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)

    def _report(self, error: DisaggError) -> None:
        self._console.print()
        self._console.print(f"error: {error.message}", style="red", markup=False, highlight=False)
        if isinstance(error, InvalidRequestError) and error.code == "context_length_exceeded":
            self._console.print("the conversation no longer fits; /reset starts a new one", style="dim")


class _Stats:
    """Times of one answer, as the user saw it."""

    def __init__(self) -> None:
        self._asked = time.perf_counter()
        self._first: float | None = None
        self._last = self._asked
        self._tokens = 0

    def add(self, chunk: GenerationChunk) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._tokens += len(chunk.token_ids)

    def __str__(self) -> str:
        if self._first is None:
            return "no tokens"
        text = f"{self._tokens} tokens · first after {self._first - self._asked:.2f} s"
        seconds = self._last - self._first
        return text if self._tokens < 2 or not seconds else f"{text} · {(self._tokens - 1) / seconds:.0f}/s"


def _interact(client: Client, session: ChatSession, console: Console) -> int:
    # Line editing and history for input(), where the platform has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        info = client.model_info()
    except DisaggError as error:
        console.print(f"error: {error.message}", style="red", markup=False, highlight=False)
        return 1
    console.print(f"[bold]{info.model}[/bold] · {info.max_model_len} tokens", highlight=False)
    console.print(HELP, style="dim", highlight=False)
    while True:
        try:
            text = console.input("[bold cyan]> [/bold cyan]").strip()
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D leaves[/dim]")
            continue
        if text == "/exit":
            return 0
        if text == "/reset":
            session.reset()
            console.print("the conversation starts anew", style="dim")
        elif text.startswith("/"):
            console.print(HELP, style="dim", highlight=False)
        elif text:
            session.ask(text, show_stats=True)
