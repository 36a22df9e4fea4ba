"""The `bench` commands. Mount with `app.add_typer(bench_app, name="bench")`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from disagg.bench import serve as bench
from disagg.bench.client import Client, Endpoint
from disagg.bench.failures import BenchError, WarmUpError
from disagg.bench.prompts import EndpointKind
from disagg.bench.report import Report, render, to_json
from disagg.bench.workload_flags import (
    MADE_UP,
    AmplitudeFlag,
    ArrivalsFlag,
    BurstinessFlag,
    DurationFlag,
    MaxInputLenFlag,
    MaxOutputLenFlag,
    PeriodFlag,
    PrefixGroupsFlag,
    PrefixLenFlag,
    RateScaleFlag,
    TraceFlag,
    TraceFormatFlag,
    TraceStartFlag,
)

EXIT_FAILED_REQUESTS = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

bench_app = typer.Typer(help="Measure an OpenAI-compatible endpoint.", no_args_is_help=True)

Server = "Endpoint"
Output = "Report"


@bench_app.callback()
def _group() -> None:
    """Measure an OpenAI-compatible endpoint."""


@bench_app.command()
def serve(
    url: Annotated[str, typer.Option(rich_help_panel=Server)] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        EndpointKind, typer.Option(help="What to call; chat prompts are words.", rich_help_panel=Server)
    ] = EndpointKind.COMPLETIONS,
    model: Annotated[
        str | None, typer.Option(help="Default: the one that is served.", rich_help_panel=Server)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["DISAGG_API_KEY", "OPENAI_API_KEY"], rich_help_panel=Server)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", rich_help_panel=Server)] = 300.0,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Draw prompt tokens from [0, N). Default: from tokens that /tokenize names.",
            rich_help_panel=Server,
        ),
    ] = None,
    continuous_usage: Annotated[
        bool,
        typer.Option(
            help="Ask for token counts with each chunk, as vLLM can; OpenAI itself refuses it.",
            rich_help_panel=Server,
        ),
    ] = True,
    num_requests: Annotated[
        int | None,
        typer.Option(
            help=f"Default: {bench.DEFAULTS.num_requests}, or all of the trace's.", rich_help_panel=MADE_UP
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(help="Requests per second; inf (the default): no pauses.", rich_help_panel=MADE_UP),
    ] = None,
    arrivals: ArrivalsFlag = None,
    burstiness: BurstinessFlag = None,
    amplitude: AmplitudeFlag = None,
    period: PeriodFlag = None,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Most requests in flight; without a rate, a closed loop of so many users."),
    ] = None,
    input_len: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens without the shared prefix: N, LOW-HIGH or lognormal:MEAN,CV. "
            f"Default {bench.DEFAULTS.input_len}.",
            rich_help_panel=MADE_UP,
        ),
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(
            help=f"Answer tokens, in the same ways. Default {bench.DEFAULTS.output_len}.",
            rich_help_panel=MADE_UP,
        ),
    ] = None,
    prefix_len: PrefixLenFlag = None,
    prefix_groups: PrefixGroupsFlag = None,
    ignore_eos: Annotated[bool, typer.Option(help="Force the answer's length, and check it.")] = True,
    temperature: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and contents.")] = 0,
    warmup: Annotated[int, typer.Option(help="Requests sent first and not measured.")] = 1,
    trace: TraceFlag = None,
    trace_format: TraceFormatFlag = None,
    trace_start: TraceStartFlag = None,
    duration: DurationFlag = None,
    rate_scale: RateScaleFlag = None,
    max_input_len: MaxInputLenFlag = None,
    max_output_len: MaxOutputLenFlag = None,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Objective for goodput.", rich_help_panel=Output)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Objective for goodput.", rich_help_panel=Output)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.", rich_help_panel=Output)
    ] = None,
) -> None:
    """Send load to an OpenAI-compatible endpoint, check every stream, report latencies and goodput.

    Exits 1 if any request failed (warm-up included), 2 if the run could not be started, 130 on Ctrl-C,
    which reports what was measured.
    """
    console = Console(stderr=True)
    try:
        options = bench.ServeOptions(
            url=url,
            endpoint=endpoint,
            model=model,
            api_key=api_key,
            num_requests=num_requests,
            request_rate=request_rate,
            arrivals=arrivals,
            burstiness=burstiness,
            amplitude=amplitude,
            period=period,
            concurrency=concurrency,
            input_len=input_len,
            output_len=output_len,
            prefix_len=prefix_len,
            prefix_groups=prefix_groups,
            trace=trace,
            trace_format=trace_format,
            trace_start=trace_start,
            duration=duration,
            rate_scale=rate_scale,
            max_input_len=max_input_len,
            max_output_len=max_output_len,
            vocab_size=vocab_size,
            ignore_eos=ignore_eos,
            continuous_usage=continuous_usage,
            temperature=temperature,
            seed=seed,
            timeout=timeout,
            warmup=warmup,
            slo_ttft_ms=slo_ttft_ms,
            slo_tpot_ms=slo_tpot_ms,
        )
        report = _run(options, json_file, console)
    except BenchError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        failed = isinstance(error, WarmUpError)
        raise typer.Exit(EXIT_FAILED_REQUESTS if failed else EXIT_USAGE) from error
    Console().print(render(report))
    raise typer.Exit(_exit_code(report))


@bench_app.command()
def profile(
    json_file: Annotated[Path, typer.Option("--json", help="Write the profile here.")],
    url: Annotated[str, typer.Option()] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the one that is served.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=["DISAGG_API_KEY", "OPENAI_API_KEY"])] = None,
    max_input_len: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=16)] = 1024,
    repeats: Annotated[int, typer.Option(help="Rounds of probes; medians count.", min=1)] = 3,
) -> None:
    """Measure an idle cluster's step times, as `disagg simulate` reads them (cost: {kind: profile}).

    Exits 2 if the endpoint can't be measured.
    """
    console = Console(stderr=True)
    try:
        if not json_file.parent.is_dir():
            raise BenchError("--json", f"no folder {json_file.parent}")
        made = _profile(
            bench.ServeOptions(url=url, model=model, api_key=api_key), max_input_len, repeats, console
        )
        bench.write_json(json_file, made)
    except BenchError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from error
    Console().print(_profile_table(made))


def _profile(
    options: bench.ServeOptions, max_input_len: int, repeats: int, console: Console
) -> dict[str, Any]:
    from disagg.bench.profile import STREAM_OUT, Profiler, fit_profile
    from disagg.workload import TimedRequest, Workload

    address = Endpoint.parse(options.url, options.api_key)
    longest = Workload("profile", (TimedRequest(0.0, max_input_len, STREAM_OUT),))
    builder = bench.prepare(options, longest, address)

    async def measure() -> dict[str, Any]:
        client = Client(address, options.timeout)
        profiler = Profiler(client.stream, builder, max_tokens=max_input_len, repeats=repeats)
        columns = (TextColumn("probes"), BarColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                bar = progress.add_task("probes", total=1.0)
                return fit_profile(await profiler.run(lambda share: progress.update(bar, completed=share)))
        finally:
            client.close()

    return asyncio.run(measure())


def _profile_table(made: dict[str, Any]) -> Table:
    table = Table("phase", "constant, ms", "per token or stream, ms", "per token of context, µs")
    for name in ("prefill", "decode", "request", "handoff"):
        own = made[name]
        b, c = own.get("b"), own.get("c")
        table.add_row(
            name,
            f"{own['a'] * 1e3:.2f}",
            "" if b is None else f"{b * 1e3:.4f}",
            "" if c is None else f"{c * 1e6:.4f}",
        )
    beside = made["interference"]
    table.caption = f"beside each other: prefill +{beside['prefill']:.0%}, decode +{beside['decode']:.0%}"
    return table


def _run(options: bench.ServeOptions, json_file: Path | None, console: Console) -> Report:
    if json_file is not None and not json_file.parent.is_dir():
        # Found out now rather than after an hour of load.
        raise BenchError("--json", f"no folder {json_file.parent}")
    address = Endpoint.parse(options.url, options.api_key)
    workload = bench.build_workload(options)
    builder = bench.prepare(options, workload, address)
    console.print(bench.describe(options, builder), markup=False)
    report = asyncio.run(bench.run(options, builder, address, console))
    if json_file is not None:
        bench.write_json(json_file, to_json(report))
    return report


def _exit_code(report: Report) -> int:
    if report.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED_REQUESTS if report.failed else 0
