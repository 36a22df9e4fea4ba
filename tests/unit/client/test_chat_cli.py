"""`disagg chat` with a scripted server: interactive, piped, and interrupted."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from frontend_fakes import ANSWER, FakeBackend
from rich.console import Console

from disagg.cli import chat as chat_module
from disagg.cli.chat import ChatSession, chat
from disagg.client import Client, GenerationChunk, Usage
from disagg.errors import NoCapacityError
from disagg.types import FinishReason


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TypingConsole(Console):
    """A console whose user types the given lines; an exception is raised instead of a line."""

    def __init__(self, lines: Sequence[str | type[BaseException]] = ()) -> None:
        super().__init__(file=io.StringIO(), width=60)
        self.lines = iter(lines)

    def input(self, *_args: Any, **_options: Any) -> str:
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    @property
    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


@pytest.fixture
def address(backend: FakeBackend, serve: Any) -> Iterator[str]:
    with serve(backend) as address:
        yield address


def asked(backend: FakeBackend) -> list[str]:
    return [
        backend.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        for request in backend.generator.requests
    ]


def test_conversation(backend: FakeBackend, address: str) -> None:
    console = TypingConsole(["first", "", "second", "/reset", "/help", "third", KeyboardInterrupt, "/exit"])
    status = chat(address, system="be brief", console=console, stdin=Terminal())
    assert status == 0
    one, two, three = asked(backend)
    assert "be brief" in one and "first" in one and one.endswith("<|im_start|>assistant\n")
    assert "first" in two and ANSWER in two and "second" in two
    assert "be brief" in three and "first" not in three and "third" in three
    assert console.text.count(ANSWER) == 3
    assert "tiny" in console.text and "Ctrl-D" in console.text and "tokens ·" in console.text


def test_end_of_input_leaves(address: str) -> None:
    assert chat(address, console=TypingConsole([]), stdin=Terminal()) == 0


def test_question_as_an_argument(backend: FakeBackend, address: str) -> None:
    console = TypingConsole()
    options = {"max_tokens": 4, "temperature": 0.0}
    assert chat(address, message="hello", options=options, console=console, stdin=Terminal()) == 0
    ids = backend.tokenizer.encode(ANSWER)[:4]
    assert console.text == backend.tokenizer.decode(ids) + "\n"
    assert backend.generator.requests[0].params.temperature == 0


def test_question_from_a_pipe(backend: FakeBackend, address: str) -> None:
    console = TypingConsole()
    assert chat(address, console=console, stdin=io.StringIO("how are\nyou?\n")) == 0
    assert console.text == ANSWER + "\n"
    assert "how are\nyou?<|im_end|>" in asked(backend)[0]


def test_markup_in_an_answer_is_shown_as_it_is(backend: FakeBackend, address: str) -> None:
    backend.generator.script = backend.generator.say("[red]x[/red] [bold" + " long" * 30)
    console = TypingConsole()
    chat(address, message="hello", console=console)
    assert console.text == "[red]x[/red] [bold" + " long" * 30 + "\n"


def test_failure_is_reported_and_forgotten(backend: FakeBackend, address: str) -> None:
    backend.generator.script = lambda _request: [[65], NoCapacityError("all workers [died]")]
    console = TypingConsole()
    with Client(address) as client:
        session = ChatSession(client, console)
        assert not session.ask("hello")
        assert session.messages == [] and "all workers [died]" in console.text
        assert not session.ask("x " * 500)
        assert "/reset" in console.text
    assert chat(address, message="hello", console=TypingConsole()) == 1


def test_no_server() -> None:
    console = TypingConsole(["never"])
    assert chat("127.0.0.1:1", console=console, stdin=Terminal()) == 1
    assert "127.0.0.1:1" in console.text


def test_interrupting_an_answer_keeps_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Interrupted:
        def stream(self, **_options: Any) -> Iterator[GenerationChunk]:
            try:
                yield GenerationChunk("r", "One, two", (1, 2))
                raise KeyboardInterrupt
            finally:
                closed.append(True)

    console = TypingConsole()
    session = ChatSession(Interrupted(), console)
    assert session.ask("count", show_stats=True)
    assert closed and "stopped" in console.text and "2 tokens" in console.text
    assert session.messages[-1] == {"role": "assistant", "content": "One, two"}


def test_stats_of_a_single_message(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = chat_module._Stats()
    assert str(stats) == "no tokens"
    stats.add(GenerationChunk("r", "a", (1,), (), FinishReason.STOP, Usage(1, 1, 0)))
    assert str(stats).startswith("1 tokens · first after 0.")
