"""What long prompts do to running streams: disaggregated, colocated, and with chunked prefill.

    python benchmarks/interference.py --json out.json --plot out.png

Four streams of 64 tokens in and 256 out run back to back against `disagg serve` on this machine, undisturbed
and while prompts arrive: of 512 tokens every 3 s, of 2,048 tokens every 10 s. The phases take turns over
--rounds, so that a machine that changes its pace does so for all of them. Placements, each on two cores with
one compute thread per worker:

    1p1d        a prefill and a decode worker
    colocated   two workers that do both
    chunked     the same with a small budget for prompts in steps in which streams decode

and `bare`: a process that prefills on one core and one that decodes on the other, with no cluster about them
(bare_cores.py). What is lost there the machine takes, since both share its memory.

Inter-token latency is what the client reads between two successive tokens of a stream, first gaps (the
hand-off) included. A prompt's time is from sending it to its first token; beside it stands the time that the
same prompt takes alone on the idle cluster, where one core computes it. Client, front end, router, proxy and
Ray share the two cores with the workers. Shares are of the limits that the project has set itself: P50 of
the undisturbed run, 1.3 times its P99, 1.25 times the lone prompt, 0.9 of the undisturbed throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bare_cores import BareCores, Streams, bare_cores
from local_cluster import BUNDLED, LocalCluster, PromptSource, checkpoint, serving
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from disagg.bench.client import Client, Endpoint, RequestResult
from disagg.bench.machine import describe_machine
from disagg.sim.plot import require_matplotlib

STREAMS, STREAM_IN, STREAM_OUT = 4, 64, 256
PROMPT_OUT = 1
P99_LIMIT, PROMPT_LIMIT, THROUGHPUT_LIMIT = 1.3, 1.25, 0.9
REQUEST_TIMEOUT_S = 300.0
WARM_UP_S = 3.0
CHUNKED_TOKENS = 32
BARE = "bare"


@dataclass(frozen=True)
class Disturbance:
    """Prompts of `tokens` every `period_s`; 0 tokens: none."""

    name: str
    tokens: int = 0
    period_s: float = 0.0


UNDISTURBED = Disturbance("undisturbed")
DISTURBANCES = (Disturbance("512_every_3s", 512, 3.0), Disturbance("2048_every_10s", 2048, 10.0))


def placements(chunk: int) -> dict[str, dict[str, Any]]:
    """Return each placement's settings. chunk: token budget of a step that only prefills."""
    engine = {"max_num_batched_tokens": chunk, "kv_cache_memory": 1 << 30}
    none, two = {"replicas": 0}, {"replicas": 2, "threads": 1}
    one = {"replicas": 1, "threads": 1}
    return {
        "1p1d": {"engine": engine, "prefill": one, "decode": one},
        "colocated": {
            "engine": {**engine, "max_num_batched_tokens": 512},
            **{"prefill": none, "decode": none, "mixed": two},
        },
        "chunked": {
            "engine": engine,
            **{"prefill": none, "decode": none, "mixed": {**two, "max_prefill_tokens": CHUNKED_TOKENS}},
        },
    }


@dataclass
class Phase:
    """What was seen under one disturbance, over all rounds. Seconds."""

    disturbance: Disturbance
    gaps: list[float] = field(default_factory=list)
    stream_ttfts: list[float] = field(default_factory=list)
    prompt_ttfts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Output tokens per second of all streams, one per round."""
    failures: list[str] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.gaps, percent))


class Load:
    """Streams back to back, and prompts beside them, for so many seconds."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        self.client = Client(Endpoint.parse(cluster.url), REQUEST_TIMEOUT_S)
        self._prompts = PromptSource(cluster.vocab_size, seed)
        self._sent = 0

    async def one(self, prompt_tokens: int, output_tokens: int) -> RequestResult:
        self._sent += 1
        return await self.client.stream(self._sent, self._prompts.request(prompt_tokens, output_tokens))

    async def lone_prompt(self, tokens: int) -> float:
        """Return the seconds to the first token of a prompt on an idle cluster."""
        result = await self.one(tokens, PROMPT_OUT)
        if result.failure is not None:
            raise result.failure
        return result.ttft_s

    async def run(self, phase: Phase, seconds: float) -> None:
        """Add what is seen in `seconds` after a warm-up to `phase`; what was begun is finished."""
        start = time.perf_counter() + WARM_UP_S
        end = start + seconds
        tasks = [asyncio.create_task(self._stream_until(end)) for _ in range(STREAMS)]
        prompts = asyncio.create_task(self._prompts_until(phase.disturbance, start, end))
        gc.collect()
        gc.freeze()
        results = [result for stream in await asyncio.gather(*tasks) for result in stream]
        prompt_results = await prompts
        gc.unfreeze()
        self._account(phase, results, prompt_results, start, end)

    async def _stream_until(self, end: float) -> list[RequestResult]:
        results = []
        while time.perf_counter() < end:
            results.append(await self.one(STREAM_IN, STREAM_OUT))
        return results

    async def _prompts_until(self, what: Disturbance, start: float, end: float) -> list[RequestResult]:
        if not what.tokens:
            return []
        sent = []
        due = start
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent.append(asyncio.create_task(self.one(what.tokens, PROMPT_OUT)))
            due += what.period_s
        return list(await asyncio.gather(*sent))

    @staticmethod
    def _account(
        phase: Phase, streams: list[RequestResult], prompts: list[RequestResult], start: float, end: float
    ) -> None:
        phase.failures += [str(result.failure) for result in (*streams, *prompts) if result.failure]
        tokens = 0
        for result in streams:
            times = result.token_times
            tokens += sum(start <= at < end for at in times)
            phase.gaps += [b - a for a, b in pairwise(times) if start <= b < end]
            if times and start <= times[0] < end:
                phase.stream_ttfts.append(result.ttft_s)
        phase.rates.append(tokens / (end - start))
        phase.prompt_ttfts += [result.ttft_s for result in prompts if result.ok]


async def measure(
    cluster: LocalCluster, arguments: argparse.Namespace, progress: Progress, name: str
) -> tuple[list[Phase], dict[int, float]]:
    """Return the phases of one placement, and each prompt's time alone by its length."""
    load = Load(cluster, seed=hash(name) % 2**32)
    chosen = [item for item in DISTURBANCES if arguments.disturbance in item.name]
    phases = [Phase(UNDISTURBED), *(Phase(item) for item in chosen)]
    alone: dict[int, list[float]] = {item.tokens: [] for item in chosen}
    bar = progress.add_task(name, total=arguments.rounds * (len(phases) + len(alone)), status="warm-up")
    await asyncio.gather(*(load.one(STREAM_IN, 32) for _ in range(STREAMS)))
    for round_index in range(arguments.rounds):
        for tokens, samples in alone.items():
            progress.update(bar, status=f"round {round_index + 1}: {tokens} tokens alone")
            samples += [await load.lone_prompt(tokens) for _ in range(2)]
            progress.advance(bar)
        for phase in phases:
            progress.update(bar, status=f"round {round_index + 1}: {phase.disturbance.name}")
            await load.run(phase, arguments.seconds)
            progress.advance(bar)
    progress.update(bar, status="done")
    load.client.close()
    return phases, {tokens: statistics.median(samples) for tokens, samples in alone.items()}


def measure_bare(
    cores: BareCores, arguments: argparse.Namespace, progress: Progress
) -> tuple[list[Phase], dict[int, float]]:
    """Return the same of two cores with no cluster about them; a gap is a step's time."""
    chosen = [item for item in DISTURBANCES if arguments.disturbance in item.name]
    phases = [Phase(UNDISTURBED), *(Phase(item) for item in chosen)]
    alone: dict[int, list[float]] = {item.tokens: [] for item in chosen}
    streams = Streams(STREAMS, STREAM_IN, STREAM_OUT)
    bar = progress.add_task(BARE, total=arguments.rounds * len(phases), status="")
    for round_index in range(arguments.rounds):
        for tokens, samples in alone.items():
            samples += [cores.lone_prompt(tokens) for _ in range(2)]
        for phase in phases:
            what = phase.disturbance
            progress.update(bar, status=f"round {round_index + 1}: {what.name}")
            decoded, prompts = cores.run(streams, arguments.seconds, what.tokens, what.period_s)
            phase.gaps += decoded.steps
            phase.stream_ttfts += decoded.prompts
            phase.prompt_ttfts += prompts
            phase.rates.append(STREAMS * len(decoded.steps) / sum(decoded.steps))
            progress.advance(bar)
    progress.update(bar, status="done")
    return phases, {tokens: statistics.median(samples) for tokens, samples in alone.items()}


def rows_of(
    placement: str, phases: list[Phase], alone: dict[int, float], rounds: int
) -> list[dict[str, Any]]:
    """Return the placement's rows; latencies in milliseconds."""
    base = phases[0]
    rate = statistics.median(base.rates)
    rows: list[dict[str, Any]] = []

    def add(phase: Phase, what: str, value: float, unit: str, **more: float) -> None:
        row = {"name": f"interference/{placement}/{phase.disturbance.name}/{what}", "value": round(value, 2)}
        row |= {"unit": unit, "runs": rounds, **{key: round(number, 3) for key, number in more.items()}}
        if "limit" in more:
            row["share"] = round(value / more["limit"], 3)
        rows.append(row)

    for phase in phases:
        disturbed = phase is not base
        p50, p99 = (1e3 * phase.percentile(percent) for percent in (50, 99))
        limits = (1e3 * base.percentile(50), P99_LIMIT * 1e3 * base.percentile(99))
        add(phase, "itl_p50", p50, "ms", **({"limit": limits[0]} if disturbed else {}))
        add(phase, "itl_p99", p99, "ms", **({"limit": limits[1]} if disturbed else {}))
        add(phase, "itl_max", 1e3 * max(phase.gaps), "ms")
        add(phase, "stream_ttft_p50", 1e3 * statistics.median(phase.stream_ttfts), "ms")
        add(phase, "stream_ttft_max", 1e3 * max(phase.stream_ttfts), "ms")
        throughput = statistics.median(phase.rates)
        more = {"limit": THROUGHPUT_LIMIT * rate, "ratio": throughput / rate} if disturbed else {}
        add(phase, "throughput", throughput, "output tokens/s", **more)
        if phase.prompt_ttfts:
            own = alone[phase.disturbance.tokens]
            answered = statistics.median(phase.prompt_ttfts)
            add(
                phase, "prompt_ttft_p50", 1e3 * answered, "ms",
                limit=PROMPT_LIMIT * 1e3 * own, alone=1e3 * own, ratio=answered / own,
            )  # fmt: skip
            add(phase, "prompt_ttft_max", 1e3 * max(phase.prompt_ttfts), "ms")
        add(phase, "failures", len(phase.failures), "requests")
    return rows


def print_table(rows: list[dict[str, Any]], machine: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{machine['shape']} on {machine['cpu']}, {machine['cores']} cores", title_justify="left"
    )
    table.add_column("placement, prompts")
    for column in (
        "P50",
        "P99",
        "max ITL ms",
        "stream TTFT ms",
        "prompt ms",
        "alone",
        "throughput",
        "failed",
    ):
        table.add_column(column, justify="right")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        _, placement, phase, what = row["name"].split("/")
        cells.setdefault(f"{placement}, {phase}", {})[what] = row
    for name, own in cells.items():
        prompt = own.get("prompt_ttft_p50")
        table.add_row(
            name,
            *(_with_ratio(own[what]) for what in ("itl_p50", "itl_p99")),
            f"{own['itl_max']['value']:.0f}",
            f"{own['stream_ttft_p50']['value']:.0f}",
            _with_ratio(prompt) if prompt else "",
            f"{prompt['alone']:.0f}" if prompt else "",
            _with_ratio(own["throughput"]),
            f"{own['failures']['value']:.0f}",
        )
    console.print(table)
    console.print(
        "in brackets: share of the limit; P50, P99 and prompts are to stay below 1, throughput above"
    )


def _with_ratio(row: dict[str, Any]) -> str:
    share = f" ({row['share']:.2f})" if "share" in row else ""
    return f"{row['value']:.1f}{share}"


def plot(phases: dict[str, list[Phase]], path: Path) -> None:
    """Write the distribution of inter-token latency, one panel per placement."""
    figure = require_matplotlib()(figsize=(4.5 * len(phases), 4), layout="constrained")
    panels = figure.subplots(1, len(phases), squeeze=False, sharey=True)[0]
    for panel, (placement, measured) in zip(panels, phases.items(), strict=True):
        for phase in measured:
            gaps = np.sort(phase.gaps) * 1e3
            panel.plot(gaps, 1 - np.arange(len(gaps)) / len(gaps), label=phase.disturbance.name)
        panel.set(title=placement, xscale="log", yscale="log", xlabel="inter-token latency, ms")
        panel.legend()
    panels[0].set_ylabel("share of gaps that are longer")
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-81m", help=f"of benchmarks/engine.py, or {BUNDLED}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one phase")
    parser.add_argument("--chunk", type=int, default=128, help="token budget of a step")
    parser.add_argument("--only", nargs="+", default=[""], help="placements whose names contain one of these")
    parser.add_argument("--disturbance", default="", help="those whose names contain this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.plot is not None:
        require_matplotlib()
    machine = {**describe_machine(), "shape": arguments.shape, "chunk": arguments.chunk}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
    rows: list[dict[str, Any]] = []
    measured: dict[str, list[Phase]] = {}
    with (
        checkpoint(arguments.shape) as model,
        Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress,
    ):
        for name, settings in placements(arguments.chunk).items():
            if not any(part in name for part in arguments.only):
                continue
            with serving(model, settings) as cluster:
                phases, alone = asyncio.run(measure(cluster, arguments, progress, name))
            measured[name] = phases
            rows += rows_of(name, phases, alone, arguments.rounds)
        if any(part in BARE for part in arguments.only):
            with bare_cores(model, arguments.chunk) as cores:
                measured[BARE], alone = measure_bare(cores, arguments, progress)
            rows += rows_of(BARE, measured[BARE], alone, arguments.rounds)
    print_table(rows, machine, Console())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    if arguments.plot is not None:
        plot(measured, arguments.plot)


if __name__ == "__main__":
    main()
