"""What prefill on one core and decode on another do to each other by the machine alone.

Two processes with a core and an engine each: no front end, no router, no hand-off, nothing in common but the
machine's memory and caches. What decode loses here while the other computes is no fault of a cluster's.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from engine import drain, new_engine, prompt_ids

from disagg.config import EngineConfig
from disagg.model.runner import load_runner
from disagg.types import Request, SamplingParams

KV_BYTES = 1 << 30


@dataclass(frozen=True)
class Streams:
    """So many sequences that decode together, each of `prompt` tokens and `output` more."""

    count: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Decoded:
    """steps: seconds of each in which all decoded. prompts: seconds of prefilling all of them, each time."""

    steps: list[float]
    prompts: list[float]


class _Core:
    """A runner on one core of its own, and engines over it."""

    def __init__(self, folder: Path, core: int, chunk: int) -> None:
        os.sched_setaffinity(0, {core})
        self.config = EngineConfig(
            max_num_batched_tokens=chunk, kv_cache_memory=KV_BYTES, enable_prefix_caching=False
        )
        self.runner = load_runner(folder, self.config, num_threads=1)

    def prefill(self, tokens: int) -> float:
        """Return the seconds to the first token of one prompt."""
        engine = new_engine(self.config, self.runner)
        engine.add(self._request("prompt", tokens, 1), now=0.0)
        started = time.perf_counter()
        drain(engine)
        return time.perf_counter() - started

    def decode(self, streams: Streams, seconds: float) -> Decoded:
        """Decode streams, one set after the other, for as long as that."""
        found = Decoded([], [])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._decode_set(streams, end, found)
        return found

    def _decode_set(self, streams: Streams, end: float, found: Decoded) -> None:
        engine = new_engine(self.config, self.runner)
        for number in range(streams.count):
            engine.add(self._request(str(number), streams.prompt, streams.output), now=0.0)
        started: set[str] = set()
        before = time.perf_counter()
        while len(started) < streams.count:
            started |= {output.request_id for output in engine.step(0.0)}
        found.prompts.append(time.perf_counter() - before)
        while engine.has_work() and before < end:
            before = time.perf_counter()
            if len(engine.step(0.0)) == streams.count:
                found.steps.append(time.perf_counter() - before)

    def _request(self, name: str, tokens: int, output: int) -> Request:
        ids = prompt_ids(tokens, self.runner.spec.vocab_size, hash(name) % 1000)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return Request(name, ids, tokens, params)


def _serve(link: Connection, folder: Path, core: int, chunk: int) -> None:
    """Answer calls of a _Core's methods until the link closes."""
    own = _Core(folder, core, chunk)
    calls: dict[str, Callable[..., object]] = {"prefill": own.prefill, "decode": own.decode}
    own.prefill(64)
    link.send(None)
    while (call := link.recv()) is not None:
        name, arguments = call
        link.send(calls[name](*arguments))


class BareCores:
    """Two cores, one to prefill and one to decode."""

    def __init__(self, prefill: Connection, decode: Connection) -> None:
        self._prefill, self._decode = prefill, decode

    def lone_prompt(self, tokens: int) -> float:
        """Return the seconds of a prompt's prefill while the other core has nothing to do."""
        self._prefill.send(("prefill", (tokens,)))
        return float(self._prefill.recv())

    def run(
        self, streams: Streams, seconds: float, tokens: int, period_s: float
    ) -> tuple[Decoded, list[float]]:
        """Decode for `seconds` while prompts of `tokens`, 0 for none, come every `period_s`.

        Returns what was decoded, and the seconds of each prompt from its coming, those before it included.
        """
        self._decode.send(("decode", (streams, seconds)))
        start, prompts = time.perf_counter(), []
        due = start
        while tokens and due < start + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            self.lone_prompt(tokens)
            prompts.append(time.perf_counter() - due)
            due += period_s
        decoded: Decoded = self._decode.recv()
        return decoded, prompts


@contextmanager
def bare_cores(folder: Path, chunk: int) -> Iterator[BareCores]:
    """Start both processes, on this process's first two cores. chunk: prompt tokens of a step."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    context = multiprocessing.get_context("spawn")
    links, processes = [], []
    for core in cores:
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, folder, core, chunk), daemon=True))
        processes[-1].start()
        links.append(ours)
    try:
        for link in links:
            link.recv()
        yield BareCores(*links)
    finally:
        for link, process in zip(links, processes, strict=True):
            with suppress(OSError):
                link.send(None)
            process.join(10)
