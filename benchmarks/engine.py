"""How fast one engine computes: prefill, decode, a batch, quantised weights, and what the scheduler adds.

    python benchmarks/engine.py --json out.json

Makes a checkpoint of a named shape with random weights. Each figure is the median over --runs, taken in
turns with transformers on the same checkpoint (or with what --peer runs) and beside a floor: the time that
the operations need at the rate of a large matrix product, or the bytes at the rate of a plain read,
whichever is longer, both rates measured in the same run.

--peer "COMMAND": COMMAND is run once with the checkpoint's folder appended; the JSON object it prints,
{"prefill/1024": tokens/s, ...} by row name without "engine/", is put beside our figures.
--profile: also print where each row's time went.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from disagg.bench.machine import describe_machine
from disagg.config import EngineConfig, Quantization
from disagg.engine.engine import Engine
from disagg.engine.runner import Batch
from disagg.model.config import ModelSpec
from disagg.model.large_tensors import large_zeros
from disagg.model.native.decoder import NativeDecoder
from disagg.model.runner import ModelRunner, load_runner
from disagg.types import Request, SampledToken, SamplingParams

# Of engine_device.py alone.
ONLY_ON_GPU = ("qwen3-8b",)
SHAPES: dict[str, dict[str, int | float | bool]] = {
    "llama-81m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "vocab_size": 8000,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
MAX_POSITIONS = 8192
PREFILL_LENGTHS = (128, 512, 1024, 2048)
DECODE_CASES = ((1, 64), (1, 1024), (4, 256), (16, 256), (32, 256))
BATCH, BATCH_IN, BATCH_OUT = 16, 256, 64
STREAM_IN, STREAM_OUT = 8, 64
SCHEDULER_BATCHES = (1, 32, 256)
DECODE_STEPS = 16


# -- the checkpoint --------------------------------------------------------------------------------------


def make_checkpoint(shape: dict[str, Any], folder: Path) -> None:
    """Write a Llama checkpoint with random float32 weights, small enough that activations stay tame."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": MAX_POSITIONS,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "dtype": "float32",
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    query, kv = (shape[key] * shape["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    sizes = {"model.embed_tokens": (shape["vocab_size"], hidden), "model.norm": (hidden,)}
    if not shape["tie_word_embeddings"]:
        sizes["lm_head"] = (shape["vocab_size"], hidden)
    for index in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        sizes |= {
            f"{prefix}.self_attn.q_proj": (query, hidden),
            f"{prefix}.self_attn.k_proj": (kv, hidden),
            f"{prefix}.self_attn.v_proj": (kv, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, query),
            f"{prefix}.mlp.gate_proj": (inner, hidden),
            f"{prefix}.mlp.up_proj": (inner, hidden),
            f"{prefix}.mlp.down_proj": (hidden, inner),
            f"{prefix}.input_layernorm": (hidden,),
            f"{prefix}.post_attention_layernorm": (hidden,),
        }
    tensors = {
        f"{name}.weight": torch.randn(size) * 0.02 if len(size) == 2 else torch.ones(size)
        for name, size in sizes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prompt_ids(length: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())


# -- floors ----------------------------------------------------------------------------------------------


@dataclass
class Rates:
    """What the machine gives: floating-point operations and bytes per second, one sample per run."""

    operations: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    def measure(self) -> None:
        a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
        self.operations.append(2 * 1536**3 / min(timed(lambda: a @ b) for _ in range(4)))
        # On large pages, as our weights are: on small ones a plain read is slower, and no limit.
        x = large_zeros((32 << 20,), torch.float32).fill_(1.0)
        self.read.append(x.nbytes / min(timed(x.sum) for _ in range(4)))

    def seconds(self, operations: float, num_bytes: float) -> float:
        """Return the least time that so many operations and bytes need."""
        return max(operations / statistics.median(self.operations), num_bytes / statistics.median(self.read))


@dataclass(frozen=True)
class Costs:
    """Operations and bytes of a model's steps, from its shape."""

    spec: ModelSpec
    weight_bytes: int

    @property
    def layer_weights(self) -> int:
        s = self.spec
        attention = s.hidden_size * s.head_dim * (2 * s.num_heads + 2 * s.num_kv_heads)
        return s.num_layers * (attention + 3 * s.hidden_size * s.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.spec.vocab_size * self.spec.hidden_size

    def prefill(self, length: int) -> tuple[float, float]:
        s = self.spec
        # Causal: a query sees half of the keys on average; scores and their mix are a product each.
        attention = 2 * 2 * s.num_layers * s.num_heads * s.head_dim * length * length / 2
        return 2 * self.layer_weights * length + 2 * self.head_weights + attention, self.weight_bytes

    def decode(self, batch: int, context: int) -> tuple[float, float]:
        s = self.spec
        attention = 4 * s.num_layers * s.num_heads * s.head_dim * context * batch
        cache = 2 * 4 * s.num_layers * s.num_kv_heads * s.head_dim * context * batch
        return 2 * (self.layer_weights + self.head_weights) * batch + attention, self.weight_bytes + cache


# -- ours ------------------------------------------------------------------------------------------------


class Ours:
    """A runner and fresh engines over it."""

    def __init__(self, folder: Path, threads: int, quantization: Quantization | None = None) -> None:
        self.config = EngineConfig(
            max_num_batched_tokens=2048,
            kv_cache_memory=1 << 30,
            enable_prefix_caching=False,
            max_num_seqs=256,
        )
        started = time.perf_counter()
        self.runner = load_runner(folder, self.config, num_threads=threads, quantization=quantization)
        self.load_seconds = time.perf_counter() - started
        self.vocab_size = self.runner.spec.vocab_size

    def engine(self, count: int, length: int, max_tokens: int) -> Engine:
        engine = new_engine(self.config, self.runner)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for index in range(count):
            ids = prompt_ids(length, self.vocab_size, index)
            engine.add(Request(str(index), ids, length, params), now=0.0)
        return engine

    def prefill(self, length: int) -> float:
        """Return prompt tokens per second of one prompt, its first token drawn."""
        engine = self.engine(1, length, 1)
        return length / timed(lambda: drain(engine))

    def decode(self, batch: int, context: int) -> float:
        """Return output tokens per second of `batch` sequences around `context` tokens."""
        # Room for the steps that the first sequences take while the last ones are still prefilled.
        engine = self.engine(batch, max(1, context - DECODE_STEPS // 2), 4 * DECODE_STEPS)
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in engine.step(0.0)}
        seconds = timed(lambda: [engine.step(0.0) for _ in range(DECODE_STEPS)])
        for index in range(batch):
            engine.abort(str(index))
        return batch * DECODE_STEPS / seconds

    def generate(self, batch: int, length: int, output: int) -> float:
        """Return output tokens per second of a whole batch, prefill included."""
        engine = self.engine(batch, length, output)
        return batch * output / timed(lambda: drain(engine))


def new_engine(config: EngineConfig, runner: Any, num_blocks: int | None = None) -> Engine:
    return Engine(
        config,
        runner,
        num_blocks=num_blocks or runner.num_blocks,
        max_model_len=runner.max_model_len,
        hash_model=runner.fingerprint,
        eos_token_ids=(),
    )


def drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step(0.0)


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class NoModel:
    """Stands in for a model that takes no time, to see the scheduler alone."""

    max_model_len = MAX_POSITIONS
    fingerprint = "none"

    def check_request(self, request: Request) -> None:
        """Take anything."""

    def execute(self, batch: Batch) -> list[SampledToken | None]:
        token = SampledToken(5)
        return [token if item.samples else None for item in batch.items]


def scheduler_step_seconds(batch: int) -> float:
    """Return the time of one decode step of `batch` sequences without a model."""
    config = EngineConfig(max_num_seqs=batch, max_num_batched_tokens=batch * 32, enable_prefix_caching=True)
    engine = new_engine(config, NoModel(), num_blocks=batch * 64)
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for index in range(batch):
        engine.add(Request(str(index), prompt_ids(24, 8000, index), 24, params), now=0.0)
    for _ in range(4):
        engine.step(0.0)
    return timed(lambda: [engine.step(0.0) for _ in range(200)]) / 200


# -- transformers ----------------------------------------------------------------------------------------


class Transformers:
    """The same checkpoint in transformers, with scaled-dot-product attention."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None
        self.vocab_size = self.model.config.vocab_size

    def ids(self, batch: int, length: int) -> torch.Tensor:
        return torch.tensor([prompt_ids(length, self.vocab_size, index) for index in range(batch)])

    def prefill(self, length: int) -> float:
        ids = self.ids(1, length)
        with torch.inference_mode():
            return length / timed(lambda: self.model(ids, logits_to_keep=1))

    def decode(self, batch: int, context: int) -> float:
        ids = self.ids(batch, max(1, context - DECODE_STEPS // 2))
        with torch.inference_mode():
            state = self.model(ids, logits_to_keep=1, use_cache=True)
            cache, token = state.past_key_values, state.logits[:, -1:].argmax(-1)

            def steps() -> None:
                nonlocal token
                for _ in range(DECODE_STEPS):
                    token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

            return batch * DECODE_STEPS / timed(steps)

    def generate(self, batch: int, length: int, output: int) -> float:
        ids = self.ids(batch, length)
        options = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False, "pad_token_id": 0}
        seconds = timed(lambda: self.model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        return batch * output / seconds


# -- the run ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One row: how to measure it, here and in transformers, and its floor in seconds per unit."""

    name: str
    unit: str
    ours: Callable[[], float]
    peer: Callable[[], float] | None = None
    limit: Callable[[Rates], float] | None = None
    quantization: Quantization | None = None
    samples: list[float] = field(default_factory=list)
    peers: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)


def cases(
    models: dict[Quantization | None, Ours],
    peer: Transformers | None,
    costs: dict[Quantization | None, Costs],
) -> Iterator[Case]:
    """Yield all rows of one shape."""
    full, cost = models[None], costs[None]
    for length in PREFILL_LENGTHS:
        yield Case(
            f"prefill/{length}",
            "tokens/s",
            partial(full.prefill, length),
            partial(peer.prefill, length) if peer else None,
            partial(prefill_floor, cost, length),
        )
    for batch, context in DECODE_CASES:
        yield Case(
            f"decode/b{batch}_ctx{context}",
            "tokens/s",
            partial(full.decode, batch, context),
            partial(peer.decode, batch, context) if peer else None,
            partial(decode_floor, cost, batch, context),
        )
    yield Case(
        f"batch/{BATCH}x{BATCH_IN}+{BATCH_OUT}",
        "output tokens/s",
        partial(full.generate, BATCH, BATCH_IN, BATCH_OUT),
        partial(peer.generate, BATCH, BATCH_IN, BATCH_OUT) if peer else None,
        partial(batch_floor, cost),
    )
    for kind, model in models.items():
        yield Case(
            f"stream/{kind or 'float32'}",
            "output tokens/s",
            partial(model.generate, 1, STREAM_IN, STREAM_OUT),
            partial(peer.generate, 1, STREAM_IN, STREAM_OUT) if peer and kind is None else None,
            partial(decode_floor, costs[kind], 1, STREAM_IN + STREAM_OUT // 2),
            quantization=kind,
        )


def prefill_floor(cost: Costs, length: int, rates: Rates) -> float:
    return length / rates.seconds(*cost.prefill(length))


def decode_floor(cost: Costs, batch: int, context: int, rates: Rates) -> float:
    return batch / rates.seconds(*cost.decode(batch, context))


def batch_floor(cost: Costs, rates: Rates) -> float:
    prefill = BATCH * rates.seconds(*cost.prefill(BATCH_IN))
    step = rates.seconds(*cost.decode(BATCH, BATCH_IN + BATCH_OUT // 2))
    return BATCH * BATCH_OUT / (prefill + (BATCH_OUT - 1) * step)


def run_cases(
    rows: list[Case], runs: int, models: dict[Quantization | None, Ours], console: Console
) -> Rates:
    """Measure every case once per run, ours and the peer's in turn, after one round that warms up."""
    rates = Rates()
    for run in range(runs + 1):
        if run:
            rates.measure()
        for case in rows:
            with profiled(case, models[case.quantization].runner):
                value = case.ours()
            theirs = case.peer() if case.peer else None
            if run == 0:
                case.phases.clear()
                continue
            case.samples.append(value)
            if theirs is not None:
                case.peers.append(theirs)
            beside = "" if theirs is None else f", transformers {theirs:.1f}"
            console.print(f"run {run}/{runs} {case.name}: {value:.1f} {case.unit}{beside}", style="dim")
    return rates


@contextmanager
def profiled(case: Case, runner: ModelRunner) -> Iterator[None]:
    decoder = runner.model
    if isinstance(decoder, NativeDecoder):
        decoder.take_phase_seconds()
    started = time.perf_counter()
    yield
    case.phases["all"] = case.phases.get("all", 0.0) + time.perf_counter() - started
    if isinstance(decoder, NativeDecoder):
        for phase, seconds in decoder.take_phase_seconds().items():
            case.phases[phase] = case.phases.get(phase, 0.0) + seconds


def as_row(case: Case, rates: Rates, peer: dict[str, float]) -> dict[str, Any]:
    value = statistics.median(case.samples)
    row: dict[str, Any] = {
        "name": f"engine/{case.name}",
        "value": round(value, 2),
        "unit": case.unit,
        "runs": len(case.samples),
        "samples": [round(sample, 2) for sample in case.samples],
    }
    if case.limit is not None:
        row |= {"limit": round(case.limit(rates), 2), "share": round(value / case.limit(rates), 3)}
    theirs = peer.get(case.name) or (statistics.median(case.peers) if case.peers else None)
    if theirs:
        row |= {"peer": round(theirs, 2), "ratio": round(value / theirs, 2)}
    return row


def single_rows(
    folder: Path, threads: int, models: dict[Quantization | None, Ours]
) -> Iterator[dict[str, Any]]:
    """Rows that are measured once: loading, the first call beside later ones, memory, the scheduler."""
    before = resident_bytes()
    fresh = Ours(folder, threads)
    calls = [timed(partial(fresh.generate, 1, STREAM_IN, 8)) for _ in range(10)]
    asked = weight_bytes(fresh) + fresh.runner.kv_cache.blocks.nbytes
    held = resident_bytes() - before
    yield {
        "name": "engine/load",
        "value": round(fresh.load_seconds, 3),
        "unit": "s, packing included",
        "runs": 1,
    }
    yield {
        "name": "engine/first_call",
        "value": round(calls[0] / statistics.median(calls[1:]), 2),
        "unit": "times a later call",
        "runs": 1,
    }
    yield {
        "name": "engine/memory",
        "value": round(held / 2**20, 1),
        "unit": "MiB resident; weights and cache",
        "runs": 1,
        "limit": round(asked / 2**20, 1),
        "share": round(asked / max(held, 1), 3),
    }
    del fresh
    gc.collect()
    for batch in SCHEDULER_BATCHES:
        seconds = statistics.median(scheduler_step_seconds(batch) for _ in range(5))
        model_step = batch / models[None].decode(batch, 64)
        yield {
            "name": f"engine/scheduler/b{batch}",
            "value": round(seconds * 1e6, 1),
            "unit": "us a step",
            "runs": 5,
            "share_of_step": round(seconds / model_step, 4),
        }


def weight_bytes(ours: Ours) -> int:
    decoder = ours.runner.model
    if isinstance(decoder, NativeDecoder):
        return decoder.weight_bytes
    spec = ours.runner.spec
    costs = Costs(spec, 0)
    heads = costs.head_weights * (1 if spec.tie_word_embeddings else 2)
    return 4 * (costs.layer_weights + heads)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run_peer(command: str | None, folder: Path) -> dict[str, float]:
    if command is None:
        return {}
    done = subprocess.run([*shlex.split(command), str(folder)], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def console_of(stream: TextIO, width: int = 120) -> Console:
    """Return a console that cuts no table to a width which a pipe does not have. width: for the latter."""
    return Console(file=stream, width=None if stream.isatty() else width)


def print_table(rows: list[dict[str, Any]], machine: dict[str, Any], console: Console) -> None:
    table = Table(
        "what",
        "value",
        "unit",
        "floor",
        "share",
        "peer",
        "ratio",
        title=f"{machine['cpu']}, {machine['cores']} cores",
    )
    for row in rows:
        share = row.get("share", row.get("share_of_step"))
        table.add_row(
            row["name"],
            f"{row['value']:.1f}",
            row["unit"],
            f"{row['limit']:.1f}" if "limit" in row else "",
            "" if share is None else f"{share:.1%}",
            f"{row['peer']:.1f}" if "peer" in row else "",
            f"{row['ratio']:.2f}x" if "ratio" in row else "",
        )
    console.print(table)


def print_profiles(measured: list[Case], console: Console) -> None:
    for case in measured:
        total = case.phases.pop("all", 0.0)
        inside = sum(case.phases.values())
        parts = {**case.phases, "Python and sampling": total - inside}
        listed = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in parts.items())
        console.print(f"{case.name}: {listed}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=(*SHAPES, *ONLY_ON_GPU), default="llama-81m")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--peer", help="a command to compare with instead of transformers")
    parser.add_argument("--no-peer", action="store_true", help="compare with nothing")
    parser.add_argument("--profile", action="store_true", help="print where each row's time went")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="measure the GPU's engine, see engine_device.py; cpu runs it tiny, under Triton's interpreter",
    )
    arguments = parser.parse_args()
    if arguments.device is None and arguments.shape in ONLY_ON_GPU:
        parser.error(f"--shape {arguments.shape} needs --device cuda")
    return arguments


def measure(
    arguments: argparse.Namespace, folder: Path, console: Console
) -> tuple[list[dict[str, Any]], list[Case]]:
    make_checkpoint(SHAPES[arguments.shape], folder)
    kinds: tuple[Quantization | None, ...] = (None, "int8", "int4")
    models = {kind: Ours(folder, arguments.threads, kind) for kind in kinds}
    costs = {kind: Costs(model.runner.spec, weight_bytes(model)) for kind, model in models.items()}
    wanted = not (arguments.no_peer or arguments.peer)
    peer = Transformers(folder) if wanted else None
    chosen = [case for case in cases(models, peer, costs) if arguments.only in case.name]
    figures = run_peer(arguments.peer, folder)
    rates = run_cases(chosen, arguments.runs, models, console)
    rows = [as_row(case, rates, figures) for case in chosen]
    if not arguments.only:
        rows += single_rows(folder, arguments.threads, models)
    rows += [
        {"name": "engine/rate/matrix", "value": round(statistics.median(rates.operations) / 1e9, 1),
         "unit": "GFLOP/s", "runs": arguments.runs},
        {"name": "engine/rate/read", "value": round(statistics.median(rates.read) / 1e9, 1),
         "unit": "GB/s", "runs": arguments.runs},
    ]  # fmt: skip
    return rows, chosen


def measure_device(arguments: argparse.Namespace) -> None:
    """Measure the engine of a GPU: all shapes of engine_device, or the one of --shape if it is there."""
    if arguments.device == "cpu":
        # Before anything imports triton, which reads it once.
        os.environ["TRITON_INTERPRET"] = "1"
    import engine_device

    shapes = [name for name in engine_device.SHAPES if name == arguments.shape] or list(engine_device.SHAPES)
    machine, rows = engine_device.measure(torch.device(arguments.device), shapes, arguments.runs)
    print_table(rows, machine, console_of(sys.stdout))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def main() -> None:
    arguments = parse_arguments()
    if arguments.device is not None:
        measure_device(arguments)
        return
    torch.set_num_threads(arguments.threads)
    machine = {**describe_machine(), "threads": arguments.threads, "shape": arguments.shape}
    console = console_of(sys.stdout)
    with tempfile.TemporaryDirectory() as folder:
        rows, measured = measure(arguments, Path(folder), Console(stderr=True))
    print_table(rows, machine, console)
    if arguments.profile:
        print_profiles(measured, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
