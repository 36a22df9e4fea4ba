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
from disagg.workload import (
    AllAtOnce,
    Arrivals,
    ConstantRate,
    GammaBursts,
    Poisson,
    SharedPrefix,
    TraceFormat,
    Workload,
    WorkloadError,
    parse_lengths,
    read_trace,
    synthesize,
)

DEFAULT_REQUESTS = 100
DEFAULT_INPUT_LEN = "256"
DEFAULT_OUTPUT_LEN = "64"


@dataclass(frozen=True)
class ServeOptions:
    """The flags of `disagg bench serve`, by their names. None: the flag was not given."""

    url: str = "http://127.0.0.1:8000"
    endpoint: EndpointKind = EndpointKind.COMPLETIONS
    model: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)
    num_requests: int | None = None
    request_rate: float | None = None
    """Requests per second; infinite: all at once."""
    burstiness: float | None = None
    concurrency: int | None = None
    input_len: str | None = None
    output_len: str | None = None
    prefix_len: int | None = None
    prefix_groups: int | None = None
    trace: Path | None = None
    trace_format: TraceFormat | None = None
    trace_start: float | None = None
    """Seconds into the trace."""
    duration: float | None = None
    """Seconds of the trace, before `rate_scale`."""
    rate_scale: float | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None
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
        self._check_ranges()
        self._refuse_useless()

    def _check_ranges(self) -> None:
        for name in ("num_requests", "concurrency", "prefix_len", "prefix_groups", "vocab_size"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_input_len", "max_output_len"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup", "seed", "temperature", "trace_start"):
            _at_least(name, getattr(self, name), 0)
        for name in ("timeout", "slo_ttft_ms", "slo_tpot_ms", "request_rate", "burstiness"):
            _above_zero(name, getattr(self, name))
        for name in ("duration", "rate_scale"):
            _above_zero(name, getattr(self, name))

    def _refuse_useless(self) -> None:
        """A flag that would have no effect is an error, not a surprise in the figures."""
        replaced = ("request_rate", "burstiness", "input_len", "output_len", "prefix_len", "prefix_groups")
        only_trace = ("trace_format", "trace_start", "duration", "rate_scale")
        wrong, why = (replaced, "has no effect with --trace") if self.trace else (only_trace, "needs --trace")
        for name in wrong:
            if getattr(self, name) is not None:
                raise BenchError(flag(name), why)
        if self.trace is not None and self.trace_format is None:
            raise BenchError("--trace-format", "needed with --trace: azure or mooncake")
        if self.burstiness is not None and not self.has_rate:
            raise BenchError("--burstiness", "needs a finite --request-rate")
        if self.prefix_groups is not None and self.prefix_len is None:
            raise BenchError("--prefix-groups", "needs --prefix-len")
        if self.vocab_size is not None and self.endpoint is EndpointKind.CHAT:
            raise BenchError("--vocab-size", "has no effect with --endpoint chat, whose prompts are words")

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


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def build_workload(options: ServeOptions) -> Workload:
    """The workload that the flags describe; raises BenchError naming the flag."""
    try:
        workload = _from_trace(options, options.trace) if options.trace else _synthetic(options)
        return workload.cap_lengths(options.max_input_len, options.max_output_len)
    except WorkloadError as error:
        field = "--trace" if options.trace else error.field
        raise BenchError(field, str(error) if options.trace else error.problem) from error


def _from_trace(options: ServeOptions, path: Path) -> Workload:
    trace_format = options.trace_format or TraceFormat.AZURE
    start = options.trace_start or 0.0
    workload = read_trace(path, trace_format, start, options.duration, options.num_requests)
    return workload.scale_rate(options.rate_scale or 1.0)


def _synthetic(options: ServeOptions) -> Workload:
    prefix = None
    if options.prefix_len is not None:
        prefix = SharedPrefix(options.prefix_groups or 1, options.prefix_len)
    return synthesize(
        options.num_requests or DEFAULT_REQUESTS,
        _arrivals(options),
        parse_lengths(options.input_len or DEFAULT_INPUT_LEN, "--input-len"),
        parse_lengths(options.output_len or DEFAULT_OUTPUT_LEN, "--output-len"),
        np.random.default_rng(options.seed),
        prefix,
    )


def _arrivals(options: ServeOptions) -> Arrivals:
    if options.request_rate is None or not options.has_rate:
        return AllAtOnce()
    if options.burstiness is None or options.burstiness == 1:
        return Poisson(options.request_rate)
    if math.isinf(options.burstiness):
        return ConstantRate(options.request_rate)
    return GammaBursts(options.request_rate, options.burstiness)


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


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not value >= least:
        raise BenchError(flag(name), f"must be at least {least}, got {value}")


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise BenchError(flag(name), f"must be above 0, got {value}")
