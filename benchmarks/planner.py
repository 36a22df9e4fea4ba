"""Published searches repeated by the planner: DistServe's placement, Splitwise's cluster designs.

    python benchmarks/planner.py --traces FOLDER --plots FOLDER --json out.json

FOLDER holds azure/, distserve/ and splitwise-sim/ as their projects publish them. Two parts, --only picks:

    distserve   OPT-13B on 4 A100s, Azure conversation lengths, TTFT 200 ms and TPOT 100 ms at P90: its
                README's configuration and the best pair found, with its model (no transfer, caches without
                bounds, objectives apart) beside its own rules on the same requests, then with the memory
                that there is, then with the transfer, then with both objectives at once
    splitwise   bloom-176b on its designs of equal power: the largest rate at which all nine slowdown limits
                hold, per machine, per kW and per USD
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from distserve_rules import Rules, Shape, all_pairs
from rich.console import Console
from rich.table import Table

from disagg.bench.machine import describe_machine
from disagg.sim.hardware import HARDWARE
from disagg.sim.planner.goodput import Bisection, Criterion, Load
from disagg.sim.planner.search import Search, pair_plan
from disagg.sim.planner.space import Limits, Plan, Space, WorkerShape
from disagg.sim.plot import require_matplotlib
from disagg.sim.records import Records
from disagg.sim.simulation import Simulation
from disagg.sim.spec import SimSpec, parse_spec
from disagg.workload import TimedRequest, TraceFormat, Workload, read_trace

GIB = 1024**3
Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


def row(name: str, value: float, unit: str, **more: Any) -> Row:
    return {"name": f"planner/{name}", "value": round(value, 4), "unit": unit, "runs": 1, **more}


# -- DistServe -----------------------------------------------------------------------------------------

# Zhong et al., OSDI '24. Requests/s per GPU: of its README, and of its own program on these lengths for the
# README's configuration and for the best one. It looks in steps of 5/32.
STEP = 5 / 32
README, OWN_README, OWN_BEST = 1.56, 1.41, 1.56
# Its program takes requests of fewer tokens than OPT's positions.
OPT_POSITIONS = 2048
SEEDS = (0, 1, 2)
A100 = "a100-80gb"
NO_TRANSFER = {"bandwidth_gb_s": 1e9, "sharing": "private"}
# Half of a 200 Gbit/s NIC's 25 GB/s for each of two GPUs.
WITH_TRANSFER = {"bandwidth_gb_s": 12.5, "sharing": "shared"}
# Room for all requests of a run at once, which its program takes for granted.
BOUNDLESS = {A100: {**asdict(HARDWARE[A100]), "memory": 1024 * GIB}}


def opt_13b(coefficients: Path, links: dict[str, Any], hardware: dict[str, Any]) -> dict[str, Any]:
    """DistServe's model: prompts are not split, queues are not bounded."""
    return {
        "model": "opt-13b",
        "hardware": hardware,
        "cost": {"kind": "distserve", "file": str(coefficients)},
        "links": links,
        "engine": {
            "max_num_seqs": 100_000,
            "max_num_batched_tokens": 32 * OPT_POSITIONS,
            "enable_prefix_caching": False,
            "max_waiting": 100_000,
        },
        "router": {"policy": "least_loaded"},
    }


@dataclass(frozen=True)
class Variant:
    """What is asked of a plan. joint: both objectives of the same requests."""

    name: str
    links: dict[str, Any] = field(default_factory=lambda: NO_TRANSFER)
    hardware: dict[str, Any] = field(default_factory=dict)
    joint: bool = False


VARIANTS = (
    Variant("as_distserve", hardware=BOUNDLESS),
    Variant("with_memory"),
    Variant("with_transfer", WITH_TRANSFER),
    Variant("joint_too", WITH_TRANSFER, joint=True),
)
CRITERION = Criterion(0.2, 0.1, 0.9, joint=False)
BISECTION = Bisection(high=5, width=1.5 * STEP, share=0, grow=False)


def distserve(traces: Path, console: Console) -> list[Row]:
    whole = read_trace(traces / "azure" / "AzureLLMInferenceTrace_conv.csv", TraceFormat.AZURE)
    fitting = (one for one in whole if one.prompt_tokens + one.output_tokens < OPT_POSITIONS)
    workload = Workload("azure conversation", tuple(fitting))
    coefficients = traces / "distserve" / "profiler-a100-80g.distserve.json"
    shown = Table(
        *("what is asked", "seed", "TP 2 + TP 1", "best pair", "is"),
        title=f"requests/s per GPU, steps of {STEP:.3f} "
        f"(README {README}; its program on other draws: {OWN_README}, best {OWN_BEST})",
    )
    rows = []
    for seed in SEEDS:
        load = Load(workload, seed=seed, num_requests=300, min_seconds=0)
        theirs = _by_their_rules(coefficients, load)
        peers = {"readme": theirs[0], "best": theirs[1]}
        shown.add_row("its rules", str(seed), *(f"{rate:.2f}" for rate in theirs[:2]), theirs[2])
        for variant in VARIANTS:
            base = opt_13b(coefficients, variant.links, variant.hardware)
            plans = _search_pairs(base, load, variant.joint)
            rates = {name: (plan.goodput or 0.0) / plan.gpus for name, plan in plans.items()}
            shape = _shapes(plans["best"])
            shown.add_row(variant.name, str(seed), *(f"{rate:.2f}" for rate in rates.values()), shape)
            for name, rate in rates.items():
                peer = {"peer": peers[name]} if variant is VARIANTS[0] else {}
                full = f"distserve/{variant.name}/seed_{seed}/{name}"
                rows.append(row(full, rate, "requests/s per GPU", plan=_shapes(plans[name]), **peer))
    console.print(shown)
    return rows


def _by_their_rules(coefficients: Path, load: Load) -> tuple[float, float, str]:
    """Return the rates of the README's pair and of the best one, and what that is, by DistServe's rules."""

    def good(pair: tuple[Shape, Shape], rate: float) -> bool:
        ttft, tpot = Rules(coefficients, *pair, load.at(rate)).run()
        return float((ttft <= 0.2).mean()) >= 0.9 and float((tpot <= 0.1).mean()) >= 0.9

    rates = {}
    for pair in all_pairs(most=4, degrees=(1, 2, 4)):
        gpus = pair[0].gpus + pair[1].gpus
        rates[pair] = BISECTION.largest(partial(good, pair), gpus) / gpus
    readme = (Shape(2), Shape(1))
    # Of equal ones the README's, as below.
    best = max(rates, key=lambda pair: (rates[pair], pair == readme))
    return rates[readme], rates[best], " + ".join(map(str, best))


def _search_pairs(base: dict[str, Any], load: Load, joint: bool) -> dict[str, Plan]:
    """Return the README's pair and the best one, simulated."""
    limits = Limits({A100: 4}, gpus_per_node=4, tensor_parallel=(1, 2, 4), pipeline_parallel=(1, 2, 4))
    search = Search(Space(base, limits), load, replace(CRITERION, joint=joint), bisection=BISECTION)
    pools = pair_plan(WorkerShape(A100, 2), 1, 1.0, WorkerShape(A100, 1), 1, 1.0).pools
    readme = Plan(pools, goodput=search.whole_goodput(pools, None))
    found = (readme, *search.low_affinity(None, pairs_only=True))
    # A node of 4 GPUs that holds one pair of 2 holds two of them: rates are per GPU.
    return {"readme": readme, "best": max(found, key=lambda plan: (plan.goodput or 0.0) / plan.gpus)}


def _shapes(plan: Plan) -> str:
    return " + ".join(str(pool.shape).removeprefix(f"{A100} ") for pool in plan.pools)


# -- Splitwise -----------------------------------------------------------------------------------------

# Patel et al., ISCA '24, table 6: slowdowns against an idle DGX-A100 at P50, P90 and P99.
PERCENTILES = (50, 90, 99)
SLOWDOWNS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}
H100 = "h100-80gb"
GPUS_PER_MACHINE = 8
# Machines of equal power; prefill + decode, or colocated.
Design = dict[str, tuple[str, int]]
DESIGNS: dict[str, dict[str, Design]] = {
    "conversation": {
        "baseline_a100_70": {"mixed": (A100, 70)},
        "baseline_h100_40": {"mixed": (H100, 40)},
        "splitwise_aa_45_25": {"prefill": (A100, 45), "decode": (A100, 25)},
        "splitwise_hh_25_15": {"prefill": (H100, 25), "decode": (H100, 15)},
        "splitwise_ha_25_26": {"prefill": (H100, 25), "decode": (A100, 26)},
    },
    "code": {
        "baseline_a100_70": {"mixed": (A100, 70)},
        "baseline_h100_40": {"mixed": (H100, 40)},
        "splitwise_aa_55_15": {"prefill": (A100, 55), "decode": (A100, 15)},
        "splitwise_hh_35_5": {"prefill": (H100, 35), "decode": (H100, 5)},
        "splitwise_ha_35_8": {"prefill": (H100, 35), "decode": (A100, 8)},
    },
}
FILES = {"conversation": "AzureLLMInferenceTrace_conv.csv", "code": "AzureLLMInferenceTrace_code.csv"}
Lengths = tuple[int, int]
Idle = dict[Lengths, tuple[float, float, float]]


def design_spec(table: Path, design: Design) -> SimSpec:
    """splitwise-sim's model of a design: as in simulator_study.py."""
    return parse_spec(
        {
            "model": "bloom-176b",
            "cost": {"kind": "table", "file": str(table)},
            "pools": {
                role: {
                    **{"role": role, "replicas": count, "hardware": hardware},
                    **{"tensor_parallel_size": GPUS_PER_MACHINE, "memory_share": 1.0},
                }
                for role, (hardware, count) in design.items()
            },
            "links": {"bandwidth_gb_s": 200 * GIB / 1e9, "sharing": "private", "handoff": "push"},
            "engine": {"max_num_seqs": 512, "max_num_batched_tokens": 100_000, "block_size": 64},
            "router": {"policy": "splitwise_jsq", "heartbeat_s": 1e9},
        }
    )


def idle_times(table: Path, load: Workload) -> Idle:
    """Return (TTFT, TBT, E2E) in seconds of each pair of lengths, alone on a machine of 8 A100s."""
    lengths = sorted({(one.prompt_tokens, one.output_tokens) for one in load})
    spaced = tuple(TimedRequest(1e4 * index, *pair) for index, pair in enumerate(lengths))
    records = Simulation(design_spec(table, {"mixed": (A100, 1)}), Workload("idle", spaced)).run()
    return dict(zip(lengths, zip(*_figures(records), strict=True), strict=True))


def _figures(records: Records) -> tuple[list[float], list[float], list[float]]:
    """TTFT, decode time over all output tokens (splitwise-sim's TBT), and E2E, by request."""
    ttft, e2e = records.ttft(), records.e2e()
    tbt = (e2e - ttft) / np.array(records.output_tokens)
    return ttft.tolist(), tbt.tolist(), e2e.tolist()


def slowdowns(records: Records, idle: Idle) -> dict[str, list[float]]:
    """Return each figure's slowdown at PERCENTILES. A request that was not served is infinitely slow."""
    alone = np.array([idle[pair] for pair in zip(records.prompt_tokens, records.output_tokens, strict=True)])
    done = records.done
    found = {}
    for index, (name, values) in enumerate(zip(SLOWDOWNS, _figures(records), strict=True)):
        base = alone[:, index]
        # An answer of one token has no time between tokens.
        ratios = np.where(base > 0, np.array(values) / np.where(base > 0, base, 1.0), 1.0)
        found[name] = np.percentile(np.where(done, ratios, np.inf), PERCENTILES, method="higher").tolist()
    return found


def passes(found: dict[str, list[float]]) -> bool:
    return all(
        value < limit
        for name, values in found.items()
        for value, limit in zip(values, SLOWDOWNS[name], strict=True)
    )


def tightest(found: dict[str, list[float]]) -> str:
    """Name the limit that is nearest, or exceeded most."""
    shares = {
        f"{name} P{percent}": value / limit
        for name, values in found.items()
        for value, limit, percent in zip(values, SLOWDOWNS[name], PERCENTILES, strict=True)
    }
    return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Found:
    """The largest rate of one design, and what it takes: watts and USD per hour."""

    trace: str
    design: str
    rate: float
    machines: int
    power_w: float
    usd_per_hour: float
    limit: str


def splitwise(traces: Path, seconds: float, plots: Path | None, console: Console) -> list[Row]:
    table, everything = traces / "splitwise-sim" / "perf_model.csv", []
    for trace, designs in DESIGNS.items():
        load = read_trace(traces / "azure" / FILES[trace], TraceFormat.AZURE)
        idle = idle_times(table, load)
        made = []
        for name, design in designs.items():
            console.print(f"{trace}: {name}", style="dim")
            made.append(largest_rate(trace, name, design, table, load, idle, seconds))
        console.print(_splitwise_table(trace, made))
        everything += made
    if plots is not None:
        plot_designs(everything, plots / "planner_splitwise.png")
    return list(_splitwise_rows(everything))


def largest_rate(
    trace: str, name: str, design: Design, table: Path, load: Workload, idle: Idle, seconds: float
) -> Found:
    """Bisect to 3 %. seconds: of Poisson arrivals at each rate."""
    spec, source = design_spec(table, design), Load(load, num_requests=1000, min_seconds=seconds)
    limits: dict[float, str] = {}

    def good(rate: float) -> bool:
        found = slowdowns(Simulation(spec, source.at(rate)).run(), idle)
        limits[rate] = tightest(found)
        return passes(found)

    machines = sum(count for _, count in design.values())
    rate = Bisection(high=1.5, share=0.03).largest(good, machines)
    gpus = {hardware: 0 for hardware, _ in design.values()}
    for hardware, count in design.values():
        gpus[hardware] += count * GPUS_PER_MACHINE
    # What stopped it: the lowest rate above it that was tried.
    above = min((tried for tried in limits if tried > rate), default=rate)
    return Found(
        trace,
        name,
        rate,
        machines,
        power_w=sum(HARDWARE[kind].power_w * count for kind, count in gpus.items()),
        usd_per_hour=sum(HARDWARE[kind].price_per_hour * count for kind, count in gpus.items()),
        limit=limits.get(above, ""),
    )


def _splitwise_table(trace: str, made: Iterable[Found]) -> Table:
    columns = ("design", "requests/s", "per machine", "per kW", "per USD/h", "beside A100", "beside H100")
    shown = Table(*columns, "stopped by", title=f"{trace}, all nine limits")
    rates = {one.design: one.rate for one in made}
    for one in made:
        shown.add_row(
            one.design,
            f"{one.rate:.1f}",
            f"{one.rate / one.machines:.2f}",
            f"{one.rate / one.power_w * 1000:.3f}",
            f"{one.rate / one.usd_per_hour:.4f}",
            *(f"{one.rate / rates[base]:.2f}x" for base in ("baseline_a100_70", "baseline_h100_40")),
            one.limit,
        )
    return shown


def _splitwise_rows(made: Iterable[Found]) -> Iterator[Row]:
    for one in made:
        name = f"splitwise/{one.trace}/{one.design}"
        yield row(f"{name}/rate", one.rate, "requests/s", stopped_by=one.limit)
        yield row(f"{name}/per_kw", one.rate / one.power_w * 1000, "requests/s per kW")
        yield row(f"{name}/per_usd", one.rate / one.usd_per_hour, "requests/s per USD/h")


def plot_designs(made: list[Found], path: Path) -> None:
    """Draw the rate of each design, as it is and by what it takes, beside the A100 baseline's."""
    measures: dict[str, Callable[[Found], float]] = {
        "requests/s": lambda one: one.rate,
        "requests/s per kW": lambda one: one.rate / one.power_w * 1000,
        "requests/s per USD/h": lambda one: one.rate / one.usd_per_hour,
    }
    figure = require_matplotlib()(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(len(DESIGNS), len(measures))
    for line, trace in zip(axes, DESIGNS, strict=True):
        own = [one for one in made if one.trace == trace]
        for axis, (title, measure) in zip(line, measures.items(), strict=True):
            bars = axis.barh([one.design for one in own], [measure(one) for one in own])
            axis.bar_label(bars, fmt="%.3g", padding=2)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_title(f"{trace}: {title}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--only", choices=("distserve", "splitwise"))
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals in each run of splitwise")
    parser.add_argument("--plots", type=Path, help="folder for pictures; needs matplotlib")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.plots is not None:
        require_matplotlib()
        arguments.plots.mkdir(parents=True, exist_ok=True)
    console, rows = Console(), []
    if arguments.only in (None, "distserve"):
        rows += distserve(arguments.traces, console)
    if arguments.only in (None, "splitwise"):
        rows += splitwise(arguments.traces, arguments.seconds, arguments.plots, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
