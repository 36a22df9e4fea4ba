"""`disagg simulate`: a cluster file and a workload on virtual time, with the live router and scheduler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table

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
from disagg.errors import ConfigError
from disagg.workload import WorkloadDefaults, WorkloadError, WorkloadOptions, build_workload

if TYPE_CHECKING:
    from disagg.sim.spec import SimSpec
    from disagg.workload import Workload

EXIT_USAGE = 2
DEFAULTS = WorkloadDefaults(
    num_requests=1000, rate_per_s=10.0, input_len="lognormal:1155,1.1", output_len="lognormal:211,0.9"
)

Output = "Report"


def simulate(
    cluster: Annotated[Path, typer.Argument(help="Cluster file, YAML: model, pools, cost, links, router.")],
    trace: TraceFlag = None,
    trace_format: TraceFormatFlag = None,
    trace_start: TraceStartFlag = None,
    duration: DurationFlag = None,
    rate_scale: RateScaleFlag = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            help=f"Default: {DEFAULTS.num_requests}, or all of the trace's.", rich_help_panel=MADE_UP
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(help=f"Requests per second. Default: {DEFAULTS.rate_per_s}.", rich_help_panel=MADE_UP),
    ] = None,
    arrivals: ArrivalsFlag = None,
    burstiness: BurstinessFlag = None,
    amplitude: AmplitudeFlag = None,
    period: PeriodFlag = None,
    input_len: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt tokens: N, LOW-HIGH or lognormal:MEAN,CV. Default {DEFAULTS.input_len}.",
            rich_help_panel=MADE_UP,
        ),
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(
            help=f"Answer tokens, likewise. Default {DEFAULTS.output_len}.", rich_help_panel=MADE_UP
        ),
    ] = None,
    prefix_len: PrefixLenFlag = None,
    prefix_groups: PrefixGroupsFlag = None,
    max_input_len: MaxInputLenFlag = None,
    max_output_len: MaxOutputLenFlag = None,
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
    over = {"policy": policy, "ttft_ms": slo_ttft_ms, "tpot_ms": slo_tpot_ms}
    try:
        _check_outputs(json_file, plot)
        spec = load_cluster(cluster, over)
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
        summary = _run(spec, build_workload(options, DEFAULTS, seed), seed, exact, plot, console)
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
