"""How fast one engine computes on a GPU, beside what the machine's own rates allow.

    python benchmarks/engine.py --device cuda --json out.json

Random bfloat16 weights are made on the device, so no checkpoint is needed. Limit: the time that a step's
operations need at the rate of a large matrix product, or its bytes at the rate of a large copy, whichever is
longer, both measured in the same run. Peer: the same runner under an engine that waits for each step before
it makes the next one. Decode contexts are not prefilled: their blocks count as delivered by a peer.

With --device cpu every line but CUDA's own runs under Triton's interpreter on a tiny shape; names then begin
with engine/interpreted, and their values say nothing about a GPU.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine import Costs, prompt_ids
from kernels import CpuTimer, CudaTimer, describe, limits, significant
from rich.console import Console

from disagg.config import EngineConfig
from disagg.engine.engine import Engine
from disagg.engine.overlap import engine_for
from disagg.errors import ConfigError
from disagg.model.config import ModelSpec, read_spec
from disagg.model.kv_cache import layout
from disagg.model.runner import ModelRunner
from disagg.model.transformer import Transformer
from disagg.types import Request, SamplingParams

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN3 = {**COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def shape(
    base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


SHAPES = {
    "llama-3.2-1b": shape(
        LLAMA,
        2048,
        8192,
        16,
        32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": shape(QWEN3, 4096, 12288, 36, 32, num_key_value_heads=8, head_dim=128, vocab_size=151936),
    "llama-3.1-8b": shape(LLAMA, 4096, 14336, 32, 32, num_key_value_heads=8, head_dim=128, vocab_size=128256),
}
TINY = shape(QWEN3, 32, 48, 1, 2, num_key_value_heads=1, head_dim=16, vocab_size=300)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. prefills: tokens of a prompt. decodes: (batch, context). steps: of a decode run."""

    prefills: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    steps: int
    config: EngineConfig


ON_GPU = Plan(
    prefills=(512, 2048, 8192),
    decodes=((1, 4096), (32, 1024), (32, 4096), (128, 1024)),
    steps=16,
    config=EngineConfig(
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        kv_cache_memory=0.9,
        enable_prefix_caching=False,
        kernels="triton",
    ),
)
IN_INTERPRETER = Plan(
    prefills=(6,),
    decodes=((1, 20), (3, 9)),
    steps=1,
    config=EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=8,
        num_kv_blocks=40,
        enable_prefix_caching=False,
        kernels="triton",
    ),
)


def random_runner(config: dict[str, Any], plan: Plan, device: torch.device) -> ModelRunner:
    """Return a runner of random weights and a cache full of noise, both made on the device."""
    from disagg.model.decode_graphs import rerun
    from disagg.model.device_loading import fit
    from disagg.model.runner import runner_over

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        spec = read_spec(Path(folder))
    cuda = device.type == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    with torch.inference_mode():
        model = Transformer(spec, dtype=getattr(torch, dtype), device=device)
        fill(model)
    cache_layout = layout(spec, model="random", dtype=dtype, block_size=plan.config.block_size)
    runner = runner_over(fit(model, plan.config, cache_layout), capture=None if cuda else rerun)
    runner.kv_cache.blocks.normal_()
    return runner


def fill(model: Transformer) -> None:
    """Give matrices small noise and norms ones, as trained weights have them."""
    norms = [model.norm]
    matrices = [model.embed_tokens, model.lm_head.weight]
    for layer in model.layers:
        norms += [layer.input_norm, layer.mlp_norm]
        norms += [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
        matrices += [linear.weight for linear in layer.linears()]
    for matrix in matrices:
        matrix.normal_(std=0.02)
    for norm in norms:
        norm.weight.fill_(1.0)


class Bench:
    """One runner under engines that overlap steps or don't."""

    def __init__(self, runner: ModelRunner, plan: Plan) -> None:
        self.runner = runner
        self.plan = plan

    def engine(self, overlapped: bool) -> Engine:
        make: Callable[..., Engine] = engine_for if overlapped else Engine
        return make(
            self.plan.config,
            self.runner,
            num_blocks=self.runner.num_blocks,
            max_model_len=self.runner.max_model_len,
            hash_model="random",
            eos_token_ids=(),
        )

    def request(self, index: int, length: int, max_tokens: int) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return Request(str(index), prompt_ids(length, self.runner.spec.vocab_size, index), length, params)

    def fits(self, batch: int, tokens: int) -> bool:
        size = self.plan.config.block_size
        # What is delivered at a time is at most half of the cache.
        needed = batch * (math.ceil(tokens / size) + 1)
        return needed < self.runner.num_blocks and tokens < self.runner.max_model_len

    def prefill(self, length: int, overlapped: bool) -> float:
        """Return the seconds from a prompt's arrival to its first token on the host."""
        engine = self.engine(overlapped)
        engine.add(self.request(0, length, 1), now=0.0)
        started = time.perf_counter()
        while engine.has_work():
            engine.step(0.0)
        return time.perf_counter() - started

    def decode(self, batch: int, context: int, overlapped: bool) -> float:
        """Return the seconds of a decode step of `batch` sequences from `context` tokens on."""
        engine, warm = self.engine(overlapped), 3
        for index in range(batch):
            request = self.request(index, context, warm + self.plan.steps + batch)
            engine.add(request, now=0.0, remote_kv=context - 1)
        running = 0
        while running < batch:
            engine.step(0.0)
            for reservation in engine.take_reservations():
                engine.activate(reservation.request_id, context - 1, 0.0)
                running += 1
        for _ in range(warm):
            engine.step(0.0)
        started = time.perf_counter()
        for _ in range(self.plan.steps):
            engine.step(0.0)
        seconds = (time.perf_counter() - started) / self.plan.steps
        for index in range(batch):
            engine.abort(str(index))
        while engine.has_work():
            engine.step(0.0)
        return seconds


def weight_bytes(spec: ModelSpec, itemsize: int) -> int:
    costs = Costs(spec, 0)
    return itemsize * (costs.layer_weights + costs.head_weights)


def cache_bytes(spec: ModelSpec, batch: int, context: int, itemsize: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * batch * itemsize


def rows_of(
    name: str, bench: Bench, limit: dict[str, float], runs: int, console: Console
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one shape. limit: GB/s and TFLOP/s of this machine."""
    spec, itemsize = bench.runner.spec, bench.runner.kv_cache.blocks.element_size()
    costs = Costs(spec, weight_bytes(spec, itemsize))

    def least(operations: float, num_bytes: float) -> float:
        return max(operations / (limit["TFLOP/s"] * 1e12), num_bytes / (limit["GB/s"] * 1e9))

    for length in bench.plan.prefills:
        floor = least(*costs.prefill(length))
        measured = timed_both(lambda overlapped, n=length: bench.prefill(n, overlapped), runs)  # type: ignore[misc]
        yield row(f"{name}/prefill/{length}", length, floor, measured, console)
    for batch, context in bench.plan.decodes:
        if not bench.fits(batch, context + 3 * bench.plan.steps + batch):
            console.print(f"{name}/decode/b{batch}_ctx{context}: does not fit into this GPU", style="yellow")
            continue
        operations, _ = costs.decode(batch, context)
        floor = least(operations, costs.weight_bytes + cache_bytes(spec, batch, context, itemsize))
        measured = timed_both(lambda overlapped, b=batch, c=context: bench.decode(b, c, overlapped), runs)  # type: ignore[misc]
        yield row(f"{name}/decode/b{batch}_ctx{context}", batch, floor, measured, console)


def timed_both(action: Callable[[bool], float], runs: int) -> tuple[list[float], list[float]]:
    """Return seconds with and without overlap, in turns, after one round that compiles and warms up."""
    pairs = [(action(True), action(False)) for _ in range(runs + 1)][1:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def row(
    name: str, tokens: int, floor: float, measured: tuple[list[float], list[float]], console: Console
) -> dict[str, Any]:
    seconds, peer = (statistics.median(samples) for samples in measured)
    made = {
        "name": name,
        "value": significant(tokens / seconds),
        "unit": "tokens/s",
        "runs": len(measured[0]),
        "limit": significant(tokens / floor),
        "share": significant(floor / seconds),
        "peer": significant(tokens / peer),
        "ratio": significant(peer / seconds),
        "milliseconds": significant(seconds * 1e3),
    }
    console.print(f"{name}: {made['value']:.4g} tokens/s, {made['share']:.0%} of the limit", style="dim")
    return made


def measure(
    device: torch.device, shapes: list[str], runs: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the machine and the rows of the shapes. Raises ConfigError for a shape that does not fit."""
    console, cuda = Console(stderr=True), device.type == "cuda"
    limit = limits(device, CudaTimer(10) if cuda else CpuTimer(2))
    prefix = "engine" if cuda else "engine/interpreted"
    rows: list[dict[str, Any]] = [
        {"name": f"{prefix}/limit/{unit}", "value": significant(value), "unit": unit, "runs": 10}
        for unit, value in limit.items()
    ]
    for name in shapes if cuda else ["tiny"]:
        plan = ON_GPU if cuda else IN_INTERPRETER
        try:
            bench = Bench(random_runner(SHAPES[name] if cuda else TINY, plan, device), plan)
        except ConfigError as error:
            console.print(f"{name}: {error}", style="red", markup=False)
            continue
        rows += rows_of(f"{prefix}/{name}", bench, limit, runs, console)
        del bench
        if cuda:
            torch.cuda.empty_cache()
    return describe(device), rows
