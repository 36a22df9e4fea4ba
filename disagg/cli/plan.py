"""`disagg plan`: which split, how many workers, with what parallelism, for a workload and its objectives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from disagg.cli.simulate import DEFAULTS, EXIT_USAGE
from disagg.errors import ConfigError
from disagg.workload import TraceFormat, WorkloadError, WorkloadOptions, build_workload

if TYPE_CHECKING:
    from disagg.sim.planner.search import Result
    from disagg.sim.planner.space import Limits, Plan, Space

# Requests of which a trace or a made-up workload is sampled.
SAMPLED_REQUESTS = 2000

What = "What to plan for"
Have = "What there is"
How = "Search"
Output = "Report"


class Affinity(StrEnum):
    """high: fast links join all nodes. low: a request's two phases stay within a node."""

    HIGH = "high"
    LOW = "low"


class Objective(StrEnum):
    """joint: the same requests meet both objectives. separate: each is met by so many requests."""

    JOINT = "joint"
    SEPARATE = "separate"


def plan(
    cluster: Annotated[
        Path | None,
        typer.Argument(help="Cluster file for cost, links, engine, router; not its pools and faults."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Preset, in place of the file's.", rich_help_panel=What)
    ] = None,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Over the file's objectives.", rich_help_panel=What)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Over the file's objectives.", rich_help_panel=What)
    ] = None,
    attainment: Annotated[
        float, typer.Option(help="Share of requests that must meet them.", rich_help_panel=What)
    ] = 0.9,
    objective: Annotated[
        Objective, typer.Option(help="Must the same requests meet both?", rich_help_panel=What)
    ] = Objective.JOINT,
    demand: Annotated[
        float | None,
        typer.Option(
            help="Requests/s to serve as cheaply as possible; none: as many as can be.", rich_help_panel=What
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Take requests of this file.", rich_help_panel=What)
    ] = None,
    trace_format: Annotated[TraceFormat | None, typer.Option(rich_help_panel=What)] = None,
    input_len: Annotated[
        str | None, typer.Option(help="Prompt tokens, as for simulate.", rich_help_panel=What)
    ] = None,
    output_len: Annotated[str | None, typer.Option(help="Answer tokens.", rich_help_panel=What)] = None,
    max_input_len: Annotated[
        int | None, typer.Option(help="Cut longer prompts to this.", rich_help_panel=What)
    ] = None,
    max_output_len: Annotated[
        int | None, typer.Option(help="Cut longer answers to this.", rich_help_panel=What)
    ] = None,
    gpus: Annotated[
        list[str] | None,
        typer.Option(help="KIND:NUMBER, such as h100-80gb:16; can be given again.", rich_help_panel=Have),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one node.", rich_help_panel=Have)] = 8,
    max_usd_per_hour: Annotated[
        float | None, typer.Option(help="Limit of the whole plan.", rich_help_panel=Have)
    ] = None,
    max_power_kw: Annotated[
        float | None, typer.Option(help="Limit of the whole plan.", rich_help_panel=Have)
    ] = None,
    affinity: Annotated[
        Affinity, typer.Option(help="Fast links between nodes, or only within.", rich_help_panel=Have)
    ] = Affinity.HIGH,
    tp: Annotated[str, typer.Option(help="Tensor-parallel degrees to try.", rich_help_panel=How)] = "1,2,4,8",
    pp: Annotated[
        str, typer.Option(help="Pipeline stages to try; above 1 for simulation only.", rich_help_panel=How)
    ] = "1",
    finalists: Annotated[
        int, typer.Option(help="Plans that are simulated as a whole.", min=1, rich_help_panel=How)
    ] = 4,
    num_requests: Annotated[
        int, typer.Option(help="Requests of each simulation, at least.", min=1, rich_help_panel=How)
    ] = 500,
    min_seconds: Annotated[
        float, typer.Option(help="Seconds of arrivals, at least.", min=0, rich_help_panel=How)
    ] = 60.0,
    tolerance: Annotated[
        float, typer.Option(help="Share to which goodput is searched.", rich_help_panel=How)
    ] = 0.04,
    seed: Annotated[int, typer.Option(help="Of arrivals and draws.", min=0, rich_help_panel=How)] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all plans here.", rich_help_panel=Output)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot goodput over prefill : decode; needs matplotlib.", rich_help_panel=Output),
    ] = None,
    cluster_out: Annotated[
        Path | None,
        typer.Option(help="Write the best plan for `disagg simulate`.", rich_help_panel=Output),
    ] = None,
    config_out: Annotated[
        Path | None,
        typer.Option(help="Write the best plan for `disagg serve --config`.", rich_help_panel=Output),
    ] = None,
    values_out: Annotated[
        Path | None,
        typer.Option(
            help="Write the best disaggregated plan as values of the chart.", rich_help_panel=Output
        ),
    ] = None,
) -> None:
    """Plan a cluster: workers of each phase, their parallelism and their ratio, for the most goodput.

    Each candidate is simulated with the live router and scheduler; colocated workers compete with
    disaggregated ones. Exits 2 if the plan could not be searched or nothing meets the objectives.
    """
    from disagg.sim.planner.goodput import Bisection, Criterion, Load
    from disagg.sim.planner.search import Search
    from disagg.sim.planner.space import Limits, Space

    console = Console(stderr=True)
    files = OutputFiles(json_file, plot, cluster_out, config_out, values_out)
    try:
        files.check()
        limits = Limits(
            _gpus(gpus or []),
            gpus_per_node,
            _degrees("--tp", tp),
            _degrees("--pp", pp),
            max_usd_per_hour,
            None if max_power_kw is None else max_power_kw * 1000,
        )
        _refuse_bad_numbers(demand, tolerance, limits)
        base, objectives = load_base(cluster, model, slo_ttft_ms, slo_tpot_ms)
        options = WorkloadOptions(
            num_requests=None if trace else SAMPLED_REQUESTS,
            input_len=input_len,
            output_len=output_len,
            trace=trace,
            trace_format=trace_format,
            max_input_len=max_input_len,
            max_output_len=max_output_len,
        )
        load = Load(build_workload(options, DEFAULTS, seed), seed, num_requests, min_seconds)
        criterion = Criterion(*objectives, attainment, objective is Objective.JOINT)
        space = Space(base, limits)
        with _status(console) as notify:
            search = Search(
                space, load, criterion, bisection=Bisection(share=tolerance), seed=seed, notify=notify
            )
            result = search.run(affinity.value, demand, finalists)
        files.write(space, result)
    except (ConfigError, WorkloadError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from error
    Console().print(render(space, result, demand))
    console.print(f"{result.num_simulations} simulations", style="dim")


# -- what the flags say --------------------------------------------------------------------------------


def _gpus(given: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in given:
        kind, _, number = text.rpartition(":")
        if not kind or not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--gpus: KIND:NUMBER, such as h100-80gb:16, got {text!r}", param="--gpus")
        counts[kind] = counts.get(kind, 0) + int(number)
    if not counts:
        raise ConfigError("--gpus: say what there is, such as --gpus h100-80gb:16", param="--gpus")
    return counts


def _degrees(flag: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{flag}: whole numbers with commas between them, got {text!r}", param=flag)
    return tuple(dict.fromkeys(int(part) for part in parts))


def _refuse_bad_numbers(demand: float | None, tolerance: float, limits: Limits) -> None:
    if not 0 < tolerance < 1:
        raise ConfigError(f"--tolerance: must be between 0 and 1, got {tolerance}", param="--tolerance")
    for flag, value in (
        ("--demand", demand),
        ("--max-usd-per-hour", limits.usd_per_hour),
        ("--max-power-kw", limits.power_w),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{flag}: must be above 0", param=flag)


def load_base(
    path: Path | None, model: str | None, ttft_ms: float | None, tpot_ms: float | None
) -> tuple[dict[str, Any], tuple[float | None, float | None]]:
    """Return a cluster's mapping without pools and faults, and its objectives in seconds. Raises ConfigError.

    Faults name workers of the pools that are left out.
    """
    from disagg.sim.spec import load_mapping

    data = load_mapping(path) if path is not None else {}
    for key in ("pools", "faults"):
        data.pop(key, None)
    if model is not None:
        data["model"] = model
    if "model" not in data:
        raise ConfigError("--model: give a preset, or a cluster file", param="--model")
    given = data.get("objectives")
    objectives = dict(given) if isinstance(given, dict) else {}
    objectives.update(
        {key: value for key, value in (("ttft_ms", ttft_ms), ("tpot_ms", tpot_ms)) if value is not None}
    )
    data["objectives"] = objectives
    seconds = [
        value / 1000 if isinstance(value := objectives.get(key), int | float) else None
        for key in ("ttft_ms", "tpot_ms")
    ]
    return data, (seconds[0], seconds[1])


# -- what comes of it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFiles:
    """Where to write what; None: nowhere."""

    json_file: Path | None
    plot: Path | None
    cluster: Path | None
    config: Path | None
    values: Path | None

    def check(self) -> None:
        """Raise ConfigError now rather than after a long search."""
        from disagg.sim.plot import require_matplotlib

        flags = ("--json", "--plot", "--cluster-out", "--config-out", "--values-out")
        paths = (self.json_file, self.plot, self.cluster, self.config, self.values)
        for flag, path in zip(flags, paths, strict=True):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{flag}: no folder {path.parent}", param=flag)
        if self.plot is not None:
            require_matplotlib()

    def write(self, space: Space, result: Result) -> None:
        """Write the files. Raises ConfigError where the plan can't be put so."""
        from disagg.sim.planner import outputs
        from disagg.sim.planner.plot import plot_ratios

        best = result.plans[0]
        if self.json_file is not None:
            self.json_file.write_text(json.dumps(as_json(space, result), indent=2) + "\n")
        if self.plot is not None:
            plot_ratios(result, self.plot)
        if self.cluster is not None:
            self.cluster.write_text(outputs.cluster_file(space, best))
        if self.config is not None:
            self.config.write_text(outputs.serve_config(best))
        if self.values is not None:
            disaggregated = next((plan for plan in result.plans if not plan.colocated), best)
            self.values.write_text(outputs.helm_values(disaggregated))


@contextmanager
def _status(console: Console) -> Iterator[Callable[[str], None]]:
    """Say what is simulated, on a terminal."""
    with console.status("searching") as status:
        yield lambda text: status.update(f"simulating {text}")


def as_json(space: Space, result: Result) -> dict[str, Any]:
    """Return all plans and the sweep as plain data."""
    return {
        "plans": [_plan_data(space, plan) for plan in result.plans],
        "ratios": [
            {"prefill": one.prefill, "decode": one.decode, "estimate": one.estimate, "goodput": one.goodput}
            for one in result.ratios
        ],
        "left_out": {str(shape): reason for shape, reason in space.left_out.items()},
        "simulations": result.num_simulations,
    }


def _plan_data(space: Space, plan: Plan) -> dict[str, Any]:
    usd, watts = space.price(plan)
    return {
        "nodes": plan.nodes,
        "pools": [
            {
                "role": pool.role.value,
                "replicas": pool.replicas,
                "hardware": pool.shape.hardware,
                "tensor_parallel_size": pool.shape.tensor_parallel,
                "pipeline_parallel_size": pool.shape.pipeline_parallel,
            }
            for pool in plan.pools
        ],
        "gpus": plan.gpus,
        "usd_per_hour": usd,
        "power_w": watts,
        "estimate": plan.estimate,
        "goodput": plan.goodput,
    }


def render(space: Space, result: Result, demand: float | None) -> Table:
    """Return the table of plans, best first."""
    goal = "most goodput" if demand is None else f"{demand:g} requests/s at the lowest price"
    table = Table("", "plan", "GPUs", "USD/h", "kW", "goodput /s", "per GPU", "per USD", title=goal)
    for number, plan in enumerate(result.plans, 1):
        usd, watts = space.price(plan)
        goodput = plan.goodput or 0.0
        table.add_row(
            *(str(number), str(plan), str(plan.gpus), f"{usd:.2f}", f"{watts / 1000:.1f}"),
            *(f"{goodput:.2f}", f"{goodput / plan.gpus:.3f}"),
            f"{goodput * 3600 / usd:.0f}" if usd else "-",
        )
    return table
