"""`disagg simulate`: a cluster file and a workload on virtual time, with the live router and scheduler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table

from disagg.errors import ConfigError
from disagg.workload import TraceError, TraceFormat, WorkloadError

if TYPE_CHECKING:
    from disagg.sim.spec import SimSpec
    from disagg.workload import Arrivals, Workload

EXIT_USAGE = 2
DEFAULT_REQUESTS = 1000
DEFAULT_RATE = 10.0
DEFAULT_INPUT_LEN = "lognormal:1155,1.1"
DEFAULT_OUTPUT_LEN = "lognormal:211,0.9"

Synthetic = "Made-up workload"
Trace = "Workload from a trace"
Output = "Report"


class ArrivalKind(StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"
    BURSTS = "bursts"
    DIURNAL = "diurnal"


@dataclass(frozen=True)
class WorkloadOptions:
    """What the flags say of the workload; None: not given. Names are those of the flags."""

    trace: Path | None
    trace_format: TraceFormat | None
    trace_start: float | None
    duration: float | None
    rate_scale: float | None
    num_requests: int | None
    request_rate: float | None
    arrivals: ArrivalKind | None
    burstiness: float | None
    amplitude: float | None
    period: float | None
    input_len: str | None
    output_len: str | None
    prefix_len: int | None
    prefix_groups: int | None
    max_input_len: int | None
    max_output_len: int | None


# Flags that mean nothing without another one: an error, not a surprise in the figures.
_ONLY_SYNTHETIC = (
    *("request_rate", "arrivals", "burstiness", "amplitude", "period"),
    *("input_len", "output_len", "prefix_len", "prefix_groups"),
)
# Flags behind the fields that a workload complains of.
_FLAGS = {
    "rate_per_s": "--request-rate",
    "burstiness": "--burstiness",
    "amplitude": "--amplitude",
    "period_s": "--period",
    "count": "--num-requests",
    "limit": "--num-requests",
    "groups": "--prefix-groups",
    "tokens": "--prefix-len",
    "start_s": "--trace-start",
    "duration_s": "--duration",
    "factor": "--rate-scale",
    "max_prompt_tokens": "--max-input-len",
    "max_output_tokens": "--max-output-len",
}
_ONLY_TRACE = ("trace_format", "trace_start", "rate_scale")


def simulate(
    cluster: Annotated[Path, typer.Argument(help="Cluster file, YAML: model, pools, cost, links, router.")],
    trace: Annotated[Path | None, typer.Option(help="Replay this file.", rich_help_panel=Trace)] = None,
    trace_format: Annotated[TraceFormat | None, typer.Option(rich_help_panel=Trace)] = None,
    trace_start: Annotated[
        float | None, typer.Option(help="Begin so many seconds into the trace.", rich_help_panel=Trace)
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            help="Seconds of arrivals: of the trace, or of a made-up workload in place of --num-requests.",
            rich_help_panel=Trace,
        ),
    ] = None,
    rate_scale: Annotated[
        float | None, typer.Option(help="Replay so many times as fast.", rich_help_panel=Trace)
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(help=f"Default: {DEFAULT_REQUESTS}, or all of the trace's.", rich_help_panel=Synthetic),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(help=f"Requests per second. Default: {DEFAULT_RATE}.", rich_help_panel=Synthetic),
    ] = None,
    arrivals: Annotated[
        ArrivalKind | None, typer.Option(help="Default: poisson.", rich_help_panel=Synthetic)
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(help="Of bursts: gamma shape, below 1 clumps. Default 0.5.", rich_help_panel=Synthetic),
    ] = None,
    amplitude: Annotated[
        float | None,
        typer.Option(help="Of diurnal: 0 to 1 of the mean rate. Default 0.5.", rich_help_panel=Synthetic),
    ] = None,
    period: Annotated[
        float | None, typer.Option(help="Of diurnal: seconds. Default 86400.", rich_help_panel=Synthetic)
    ] = None,
    input_len: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt tokens: N, LOW-HIGH or lognormal:MEAN,CV. Default {DEFAULT_INPUT_LEN}.",
            rich_help_panel=Synthetic,
        ),
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(
            help=f"Answer tokens, likewise. Default {DEFAULT_OUTPUT_LEN}.", rich_help_panel=Synthetic
        ),
    ] = None,
    prefix_len: Annotated[
        int | None,
        typer.Option(help="Tokens of shared prefix before each prompt.", rich_help_panel=Synthetic),
    ] = None,
    prefix_groups: Annotated[
        int | None, typer.Option(help="Different shared prefixes. Default 1.", rich_help_panel=Synthetic)
    ] = None,
    max_input_len: Annotated[int | None, typer.Option(help="Cut longer prompts to this.")] = None,
    max_output_len: Annotated[int | None, typer.Option(help="Cut longer answers to this.")] = None,
    policy: Annotated[str | None, typer.Option(help="Over the file's router.policy.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and the router's draws.", min=0)] = 0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Take every decode step singly: slow, to check the fast path.")
    ] = False,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Over the file's objectives.", rich_help_panel=Output)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Over the file's objectives.", rich_help_panel=Output)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.", rich_help_panel=Output)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write distributions here (png, svg, pdf); needs matplotlib.", rich_help_panel=Output
        ),
    ] = None,
) -> None:
    """Simulate a cluster: latencies, goodput, load of pools and links, cost.

    The same cluster file, workload and seed write the same bytes. Exits 2 if the run could not be started.
    """
    console = Console(stderr=True)
    options = WorkloadOptions(
        trace=trace,
        trace_format=trace_format,
        trace_start=trace_start,
        duration=duration,
        rate_scale=rate_scale,
        num_requests=num_requests,
        request_rate=request_rate,
        arrivals=arrivals,
        burstiness=burstiness,
        amplitude=amplitude,
        period=period,
        input_len=input_len,
        output_len=output_len,
        prefix_len=prefix_len,
        prefix_groups=prefix_groups,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
    )
    over = {"policy": policy, "ttft_ms": slo_ttft_ms, "tpot_ms": slo_tpot_ms}
    try:
        _check_outputs(json_file, plot)
        spec = load_cluster(cluster, over)
        summary = _run(spec, build_workload(options, seed), seed, exact, plot, console)
    except (ConfigError, WorkloadError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from error
    if json_file is not None:
        json_file.write_text(json.dumps(summary, indent=2) + "\n")
    Console().print(render(summary))


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Raise ConfigError now rather than after a long run."""
    from disagg.sim.plot import require_matplotlib

    for flag, path in (("--json", json_file), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{flag}: no folder {path.parent}", param=flag)
    if plot is not None:
        require_matplotlib()


def load_cluster(path: Path, over: dict[str, Any]) -> SimSpec:
    """Read a cluster file with flags over it. Raises ConfigError naming the key."""
    from disagg.sim.spec import load_spec, parse_spec

    spec = load_spec(path)
    data = spec.model_dump()
    for section, keys in (("router", ("policy",)), ("objectives", ("ttft_ms", "tpot_ms"))):
        data[section].update({key: over[key] for key in keys if over[key] is not None})
    return parse_spec(data)


# -- workload ------------------------------------------------------------------------------------------


def build_workload(options: WorkloadOptions, seed: int) -> Workload:
    """Return the workload that the flags describe. Raises WorkloadError naming the flag."""
    _refuse_useless(options)
    try:
        workload = _from_trace(options, options.trace) if options.trace else _synthetic(options, seed)
        return workload.cap_lengths(options.max_input_len, options.max_output_len)
    except TraceError:  # names its file and line
        raise
    except WorkloadError as error:
        raise WorkloadError(_FLAGS.get(error.field, error.field), error.problem) from None


def _refuse_useless(options: WorkloadOptions) -> None:
    wrong, why = (
        (_ONLY_SYNTHETIC, "has no effect with --trace") if options.trace else (_ONLY_TRACE, "needs --trace")
    )
    for name in wrong:
        if getattr(options, name) is not None:
            raise WorkloadError(_flag(name), why)
    if options.trace is not None and options.trace_format is None:
        known = ", ".join(TraceFormat)
        raise WorkloadError("--trace-format", f"needed with --trace: one of {known}")
    if options.prefix_groups is not None and options.prefix_len is None:
        raise WorkloadError("--prefix-groups", "needs --prefix-len")
    for name, kind in (
        ("burstiness", ArrivalKind.BURSTS),
        ("amplitude", ArrivalKind.DIURNAL),
        ("period", ArrivalKind.DIURNAL),
    ):
        if getattr(options, name) is not None and options.arrivals is not kind:
            raise WorkloadError(_flag(name), f"needs --arrivals {kind.value}")
    if options.trace is None and options.duration is not None and options.num_requests is not None:
        raise WorkloadError("--duration", "give it or --num-requests, not both")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_trace(options: WorkloadOptions, path: Path) -> Workload:
    from disagg.workload import read_trace

    assert options.trace_format is not None
    start = options.trace_start or 0.0
    workload = read_trace(path, options.trace_format, start, options.duration, options.num_requests)
    return workload.scale_rate(options.rate_scale if options.rate_scale is not None else 1.0)


def _synthetic(options: WorkloadOptions, seed: int) -> Workload:
    import numpy as np

    from disagg.workload import SharedPrefix, parse_lengths, synthesize

    rate = DEFAULT_RATE if options.request_rate is None else options.request_rate
    count = DEFAULT_REQUESTS if options.num_requests is None else options.num_requests
    if options.duration is not None:
        if not options.duration > 0:
            raise WorkloadError("--duration", f"must be above 0, got {options.duration}")
        count = max(1, round(options.duration * rate))
    prefix = None
    if options.prefix_len is not None:
        prefix = SharedPrefix(options.prefix_groups or 1, options.prefix_len)
    return synthesize(
        count,
        _arrivals(options, rate),
        parse_lengths(options.input_len or DEFAULT_INPUT_LEN, "--input-len"),
        parse_lengths(options.output_len or DEFAULT_OUTPUT_LEN, "--output-len"),
        np.random.default_rng(seed),
        prefix,
    )


def _arrivals(options: WorkloadOptions, rate: float) -> Arrivals:
    from disagg.workload import ConstantRate, Diurnal, GammaBursts, Poisson

    if options.arrivals is ArrivalKind.CONSTANT:
        return ConstantRate(rate)
    if options.arrivals is ArrivalKind.BURSTS:
        return GammaBursts(rate, 0.5 if options.burstiness is None else options.burstiness)
    if options.arrivals is ArrivalKind.DIURNAL:
        amplitude = 0.5 if options.amplitude is None else options.amplitude
        return Diurnal(rate, amplitude, 86_400.0 if options.period is None else options.period)
    return Poisson(rate)


# -- the run -------------------------------------------------------------------------------------------


def _run(
    spec: SimSpec, workload: Workload, seed: int, exact: bool, plot: Path | None, console: Console
) -> dict[str, Any]:
    from disagg.sim.plot import plot_run
    from disagg.sim.simulation import Simulation
    from disagg.sim.summary import summarize

    started = time.perf_counter()
    with _progress(len(workload), console) as show:
        simulation = Simulation(spec, workload, seed=seed, fast=not exact, on_progress=show)
        simulation.run()
    seconds = time.perf_counter() - started
    console.print(
        f"{len(workload)} requests in {seconds:.1f} s, {simulation.loop.num_events} events", style="dim"
    )
    if plot is not None:
        plot_run(simulation, plot)
    return {"workload": workload.name, "seed": seed, "policy": spec.router.policy, **summarize(simulation)}


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("requests", total=total)
        yield lambda ended: progress.update(bar, completed=ended)


# -- the report ----------------------------------------------------------------------------------------


def render(summary: dict[str, Any]) -> Group:
    """Return the report's tables."""
    parts = [_overview(summary), _latency_table(summary["latency"]), _pool_table(summary["pools"])]
    return Group(*parts)


def _overview(summary: dict[str, Any]) -> Table:
    table = Table(
        show_header=False, title=f"{summary['workload']}, {summary['policy']}, seed {summary['seed']}"
    )
    requests, objectives, cost = summary["requests"], summary["objectives"], summary["cost"]
    refused = ", ".join(
        f"{count} {name}" for name, count in requests.items() if count and name not in ("planned", "done")
    )
    table.add_row(
        "requests", f"{requests['done']} of {requests['planned']} served{refused and '; '}{refused}"
    )
    table.add_row("duration", f"{summary['duration_s']:.1f} s, {summary['throughput']:.2f} requests/s served")
    table.add_row("output tokens", f"{summary['output_tokens_per_s']:.0f} /s")
    if objectives is not None:
        asked = ", ".join(
            f"{name.upper()} ≤ {objectives[f'{name}_ms']:g} ms: {objectives[f'{name}_attainment']:.2%}"
            for name in ("ttft", "tpot")
            if objectives[f"{name}_ms"] is not None
        )
        table.add_row("attainment", f"{objectives['attainment']:.2%} ({asked})")
        table.add_row(
            "goodput",
            f"{objectives['goodput']:.2f} requests/s, {objectives['goodput_per_gpu']:.4f} per GPU",
        )
    transfer = summary["transfer"]
    table.add_row(
        "KV transfer",
        f"{transfer['bytes'] / 1e9:.1f} GB, {transfer['bytes_per_s'] / 1e9:.2f} GB/s, "
        f"{transfer['share_of_links']:.1%} of the links",
    )
    per_token = cost["usd_per_million_output_tokens"]
    table.add_row(
        "cost",
        f"{cost['gpus']} GPUs, {cost['usd_per_hour']:.2f} USD/h"
        + (f", {per_token:.2f} USD per million output tokens" if per_token is not None else "")
        + f", {cost['power_w'] / 1000:.1f} kW",
    )
    return table


def _latency_table(latency: dict[str, Any]) -> Table:
    table = Table("latency, ms", "mean", "P50", "P90", "P99", "max")
    for name, values in latency.items():
        if values is not None:
            keys = ("mean", "p50", "p90", "p99", "max")
            table.add_row(name, *(f"{values[key] * 1000:.1f}" for key in keys))
    return table


def _pool_table(pools: dict[str, Any]) -> Table:
    table = Table("pool", "workers", "busy", "most", "batch", "M in", "M out", "preempted", "hits")
    for name, pool in pools.items():
        degree = pool["gpus"] // pool["workers"]
        table.add_row(
            name if name == pool["role"] else f"{name} ({pool['role']})",
            f"{pool['workers']} × {degree} {pool['hardware']}",
            *(f"{pool['utilisation']:.0%}", f"{pool['utilisation_max']:.0%}", f"{pool['batch']:.1f}"),
            *(f"{pool['prompt_tokens'] / 1e6:.2f}", f"{pool['output_tokens'] / 1e6:.2f}"),
            *(str(pool["preemptions"]), f"{pool['prefix_hit_share']:.0%}"),
        )
    return table
