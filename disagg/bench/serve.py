"""`disagg bench serve`: from flags to a workload, a run and a report."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from disagg.bench.client import Client, Endpoint
from disagg.bench.discovery import Tokenizer, find_model, find_tokenizer
from disagg.bench.failures import BenchError
from disagg.bench.progress import progress_of
from disagg.bench.prompts import (
    ChatPrompts,
    EndpointKind,
    Prompts,
    RequestBuilder,
    RequestOptions,
    TokenPrompts,
)
from disagg.bench.report import Objectives, Report, summarize
from disagg.bench.runner import Runner
from disagg.workload import Workload, WorkloadDefaults, WorkloadError, WorkloadOptions
from disagg.workload import build_workload as build
from disagg.workload.options import above_zero, at_least

DEFAULTS = WorkloadDefaults(num_requests=100, rate_per_s=math.inf, input_len="256", output_len="64")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(WorkloadOptions):
    """The flags of `disagg bench serve`, by their names. None: the flag was not given.

    Raises BenchError naming the flag.
    """

    url: str = "http://127.0.0.1:8000"
    endpoint: EndpointKind = EndpointKind.COMPLETIONS
    model: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)
    concurrency: int | None = None
    vocab_size: int | None = None
    ignore_eos: bool = True
    continuous_usage: bool = True
    temperature: float = 0.0
    seed: int = 0
    timeout: float = 300.0
    """Seconds for one request, from connecting to `[DONE]`."""
    warmup: int = 1
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            self._check_ranges()
        except WorkloadError as error:
            raise BenchError(error.field, error.problem) from None
        if self.vocab_size is not None and self.endpoint is EndpointKind.CHAT:
            raise BenchError("--vocab-size", "has no effect with --endpoint chat, whose prompts are words")

    def _check_ranges(self) -> None:
        for name in ("concurrency", "vocab_size"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup", "seed", "temperature"):
            at_least(name, getattr(self, name), 0)
        for name in ("timeout", "slo_ttft_ms", "slo_tpot_ms"):
            above_zero(name, getattr(self, name))

    @property
    def has_rate(self) -> bool:
        return self.request_rate is not None and math.isfinite(self.request_rate)

    @property
    def open_loop(self) -> bool:
        """Arrival times rule, unless there are none and the number in flight is given."""
        return self.trace is not None or self.has_rate or self.concurrency is None

    @property
    def objectives(self) -> Objectives:
        ttft, tpot = self.slo_ttft_ms, self.slo_tpot_ms
        return Objectives(ttft and ttft / 1000, tpot and tpot / 1000)

    def public(self) -> dict[str, Any]:
        """The settings for the report, as JSON can hold them; never the key."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "api_key"}
        return {
            name: str(value) if isinstance(value, Path) or value == math.inf else value
            for name, value in values.items()
            if value is not None
        }


def build_workload(options: ServeOptions) -> Workload:
    """Return the workload that the flags describe. Raises BenchError naming the flag or the trace's line."""
    try:
        return build(options, DEFAULTS, options.seed)
    except WorkloadError as error:
        if options.trace is not None:
            raise BenchError("--trace", str(error)) from error
        raise BenchError(error.field, error.problem) from error


def prepare(options: ServeOptions, workload: Workload, endpoint: Endpoint) -> RequestBuilder:
    """Ask the endpoint what it serves and make sure that it can take the workload."""
    model = find_model(endpoint, options.model)
    tokenizer = find_tokenizer(endpoint, model)
    if tokenizer is not None and tokenizer.max_model_len is not None:
        _check_lengths(workload, tokenizer.max_model_len)
    request_options = RequestOptions(
        kind=options.endpoint,
        model=model,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        continuous_usage=options.continuous_usage,
    )
    return RequestBuilder(workload, _prompts(options, tokenizer), request_options)


def _prompts(options: ServeOptions, tokenizer: Tokenizer | None) -> Prompts:
    if options.endpoint is EndpointKind.CHAT:
        return ChatPrompts(tokenizer.tokens_per_word if tokenizer else 1.0, options.seed)
    if options.vocab_size is not None:
        return TokenPrompts(np.arange(options.vocab_size), options.seed)
    if tokenizer is None:
        raise BenchError("--vocab-size", f"needed: {options.url} has no /tokenize to learn token ids from")
    return TokenPrompts(tokenizer.pool, options.seed)


def _check_lengths(workload: Workload, limit: int) -> None:
    longest = [request.prompt_tokens + request.output_tokens for request in workload]
    too_long = sum(tokens > limit for tokens in longest)
    if too_long:
        raise BenchError(
            "--max-input-len",
            f"{too_long} of {len(workload)} requests need up to {max(longest)} tokens, the server "
            f"takes {limit} for prompt and answer; give shorter lengths or caps (--max-output-len too)",
        )


async def run(options: ServeOptions, builder: RequestBuilder, endpoint: Endpoint, console: Console) -> Report:
    """Warm up, send the workload, sum up. Progress goes to `console`."""
    client = Client(endpoint, options.timeout)
    runner = Runner(client, builder, options.concurrency, options.open_loop)
    try:
        if options.warmup:
            console.print(f"warming up with {options.warmup} requests")
            await runner.warm_up(options.warmup)
        async with progress_of(runner.measurement, console):
            measured = await runner.run()
    finally:
        client.close()
    return summarize(measured, options.objectives, options.public())


def describe(options: ServeOptions, builder: RequestBuilder) -> str:
    """One line on what is about to be sent."""
    workload = builder.workload
    if not options.open_loop:
        how = f"{options.concurrency} at a time"
    elif workload.span_s:
        how = f"{workload.rate_per_s:.3g} requests/s over {workload.span_s:.0f} s"
    else:
        how = "all at once"
    if options.open_loop and options.concurrency:
        how += f", at most {options.concurrency} in flight"
    prompt, output = workload.prompt_tokens / len(workload), workload.output_tokens / len(workload)
    return f"{len(workload)} requests ({workload.name}), {how}; mean {prompt:.0f} tokens in, {output:.0f} out"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report; raises BenchError where the file cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError("--json", f"cannot write {path}: {error.strerror or error}") from error
