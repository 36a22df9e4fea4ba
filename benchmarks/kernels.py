"""How fast each Triton kernel is, beside the machine's own rates and beside torch doing the same.

    python benchmarks/kernels.py --device cuda --json out.json --plot out.png

Limit of every row, measured in the same run: one large copy (bytes read and written) for kernels bound by
memory, one large bfloat16 matrix product for prefill attention. Peer: torch's scaled_dot_product_attention
over contiguous keys and values, or plain torch. A kernel must first agree with its peer on the same data.
Shapes are those of a layer of Llama-3.1-8B unless the name says otherwise.

With --device cpu every line runs under Triton's interpreter on tiny shapes; names then begin with
kernels/interpreted, and their values say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from disagg.bench.machine import describe_machine
from disagg.errors import ConfigError

Action = Callable[[], Tensor]
# Larger than any L2 several times over.
FLUSH_BYTES = 512 << 20
# Of bfloat16 results, by norm: kernel and peer each round to 8 bits, attention probabilities included.
AGREE = 2e-2


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's layer, and how much of it is measured. decode: (batch, context); prefill: (sequences,
    new tokens, cached tokens); tokens: batch rows of the elementwise kernels.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_layers: int
    block_size: int
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int, int], ...]
    tokens: tuple[int, ...]
    copied_blocks: int
    sampled_rows: int


LLAMA_8B = Shape(
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    num_layers=4,
    block_size=16,
    decode=((1, 4096), (1, 131072), (8, 8192), (32, 1024), (32, 4096), (32, 16384), (128, 4096)),
    prefill=((1, 8192, 0), (1, 2048, 6144), (1, 512, 32768), (16, 512, 0)),
    tokens=(32, 8192),
    copied_blocks=2048,
    sampled_rows=64,
)
TINY = Shape(
    hidden_size=96,
    intermediate_size=160,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=5000,
    num_layers=2,
    block_size=16,
    decode=((1, 600), (3, 40)),
    prefill=((1, 48, 0), (2, 20, 33)),
    tokens=(3,),
    copied_blocks=3,
    sampled_rows=2,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One row. work: bytes moved or operations done by a run. run, peer: return what is compared."""

    name: str
    work: float
    unit: str
    run: Action
    peer: Action
    exact: bool = False


class Cases:
    """Builds the rows' inputs one at a time, so that no two are in memory together.

    What imports triton is imported as late as this, once it is settled whether the interpreter runs it.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.dtype = torch.bfloat16

    def all(self) -> Iterator[Case]:
        for batch_size, context in self.shape.decode:
            yield self.decode(batch_size, context)
        yield self.decode(*self.shape.decode[-1], fp8=True)
        yield self.decode(*self.shape.decode[-1], head_dim=64)
        for num_seqs, num_tokens, context in self.shape.prefill:
            yield self.prefill(num_seqs, num_tokens, context)
        for num_tokens in self.shape.tokens:
            yield self.kv_store(num_tokens, fp8=False)
            yield self.kv_store(num_tokens, fp8=True)
            yield self.rms_norm(num_tokens)
            yield self.rope(num_tokens)
            yield self.swiglu(num_tokens)
        yield self.block_copy(gather=True)
        yield self.block_copy(gather=False)
        yield self.sampling(greedy=True)
        yield self.sampling(greedy=False)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def cache(self, num_seqs: int, context: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return blocks of noise, tables of scattered blocks [B, n], and one layer's keys and values
        [B, Hkv, context, D] in one piece, as the peer reads them.
        """
        shape = self.shape
        per_seq = -(-context // shape.block_size)
        size = (num_seqs * per_seq, shape.num_layers, 2, shape.num_kv_heads, shape.block_size, head_dim)
        blocks = self.randn(*size)
        order = torch.randperm(size[0], device=self.device)
        tables = order.view(num_seqs, per_seq)
        kv = blocks[:, 1][tables]
        flat = kv.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :context]
        return blocks, tables.int(), flat[0].contiguous(), flat[1].contiguous()

    def decode(
        self, batch_size: int, context: int, *, fp8: bool = False, head_dim: int | None = None
    ) -> Case:
        from disagg.model.kernels.decode_attention import decode_attention

        shape, size = self.shape, head_dim or self.shape.head_dim
        blocks, tables, keys, values = self.cache(batch_size, context, size)
        if fp8:
            blocks = blocks.to(torch.float8_e4m3fn)
            keys, values = (part.to(torch.float8_e4m3fn).to(self.dtype) for part in (keys, values))
        q = self.randn(batch_size, shape.num_heads, size)
        one = q[:, :, None]
        lens = torch.full((batch_size,), context, dtype=torch.int32, device=self.device)
        kind = "fp8_" if fp8 else f"d{head_dim}_" if head_dim else ""
        return Case(
            name=f"decode_attention/{kind}b{batch_size}_ctx{context}",
            work=2 * batch_size * context * shape.num_kv_heads * size * blocks.element_size(),
            unit="GB/s",
            run=lambda: decode_attention(
                q, blocks[:, 1], tables, lens, scale=size**-0.5, max_context=context
            ),
            peer=lambda: F.scaled_dot_product_attention(one, keys, values, enable_gqa=True)[:, :, 0],
        )

    def prefill(self, num_seqs: int, num_tokens: int, context: int) -> Case:
        from torch.nn.attention.bias import causal_lower_right

        from disagg.model.kernels.prefill_attention import prefill_attention

        shape, total = self.shape, num_tokens + context
        blocks, tables, keys, values = self.cache(num_seqs, total, shape.head_dim)
        q = self.randn(num_seqs * num_tokens, shape.num_heads, shape.head_dim)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=self.device) * num_tokens
        lens = torch.full((num_seqs,), total, dtype=torch.int32, device=self.device)
        by_head = q.view(num_seqs, num_tokens, shape.num_heads, shape.head_dim).transpose(1, 2)
        # Beforehand, since not every SDPA kernel takes fewer KV heads with this mask; costs it nothing.
        group = shape.num_heads // shape.num_kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        mask = causal_lower_right(num_tokens, total)
        seen = num_seqs * (num_tokens * context + num_tokens * (num_tokens + 1) // 2)

        def peer() -> Tensor:
            out = F.scaled_dot_product_attention(by_head, keys, values, attn_mask=mask)
            return out.transpose(1, 2).reshape(q.shape)

        return Case(
            name=f"prefill_attention/b{num_seqs}_q{num_tokens}_ctx{context}",
            work=4 * seen * shape.num_heads * shape.head_dim,
            unit="TFLOP/s",
            run=lambda: prefill_attention(
                q,
                blocks[:, 1],
                tables,
                starts,
                lens,
                scale=shape.head_dim**-0.5,
                max_query_len=num_tokens,
            ),
            peer=peer,
        )

    def kv_store(self, num_tokens: int, *, fp8: bool) -> Case:
        from disagg.model.kernels.kv_store import store_kv

        shape = self.shape
        heads, block_size = shape.num_kv_heads, shape.block_size
        kv_dtype = torch.float8_e4m3fn if fp8 else self.dtype
        num_blocks = -(-num_tokens // block_size) + 1
        size = (num_blocks, shape.num_layers, 2, heads, block_size, shape.head_dim)
        ours = torch.zeros(size, device=self.device).to(kv_dtype)
        theirs = ours.clone()
        kv = self.randn(num_tokens, 2, heads, shape.head_dim)
        slots = torch.randperm(num_blocks * block_size, device=self.device)[:num_tokens]
        block_ids, offsets = slots // block_size, slots % block_size

        def run() -> Tensor:
            store_kv(kv[:, 0], kv[:, 1], ours[:, 1], slots)
            return ours[:, 1]

        def peer() -> Tensor:
            # As bytes where fp8: torch has no indexed write of fp8.
            target, source = theirs[:, 1], kv.to(kv_dtype)
            if fp8:
                target, source = target.view(torch.uint8), source.view(torch.uint8)
            target[block_ids, :, :, offsets] = source
            return theirs[:, 1]

        return Case(
            name=f"kv_store/{'fp8_' if fp8 else ''}t{num_tokens}",
            work=kv.numel() * (kv.element_size() + ours.element_size()),
            unit="GB/s",
            run=run,
            peer=peer,
            exact=not fp8,
        )

    def rms_norm(self, num_tokens: int) -> Case:
        from disagg.model.kernels.rms_norm import add_rms_norm

        size = self.shape.hidden_size
        x, ours, weight = self.randn(num_tokens, size), self.randn(num_tokens, size), self.randn(size)
        theirs, out = ours.clone(), torch.empty_like(x)
        return Case(
            name=f"add_rms_norm/t{num_tokens}_h{size}",
            work=4 * x.numel() * x.element_size(),
            unit="GB/s",
            run=lambda: add_rms_norm(x, ours, weight, 1e-5, out=out),
            peer=lambda: F.rms_norm(theirs.add_(x), (size,), weight, 1e-5),
        )

    def rope(self, num_tokens: int) -> Case:
        from disagg.model.kernels.rope import apply_rope_

        shape = self.shape
        split = shape.num_heads + shape.num_kv_heads
        ours = self.randn(num_tokens, split + shape.num_kv_heads, shape.head_dim)
        theirs = ours.clone()
        angles = torch.rand(num_tokens, shape.head_dim // 2, device=self.device)
        cos, sin = angles.cos(), angles.sin()
        positions = torch.randperm(num_tokens, device=self.device)

        def run() -> Tensor:
            apply_rope_(ours[:, : shape.num_heads], ours[:, shape.num_heads : split], cos, sin, positions)
            return ours

        def peer() -> Tensor:
            c, s = cos[positions].to(self.dtype)[:, None], sin[positions].to(self.dtype)[:, None]
            first, second = theirs[:, :split].chunk(2, dim=-1)
            rotated = (first * c).addcmul_(second, s, value=-1)
            second.mul_(c).addcmul_(first, s)
            first.copy_(rotated)
            return theirs

        return Case(
            name=f"rope/t{num_tokens}",
            work=2 * num_tokens * split * shape.head_dim * ours.element_size(),
            unit="GB/s",
            run=run,
            peer=peer,
        )

    def swiglu(self, num_tokens: int) -> Case:
        from disagg.model.kernels.swiglu import swiglu

        size = self.shape.intermediate_size
        x, out = self.randn(num_tokens, 2 * size), self.randn(num_tokens, size)
        return Case(
            name=f"swiglu/t{num_tokens}_i{size}",
            work=3 * out.numel() * out.element_size(),
            unit="GB/s",
            run=lambda: swiglu(x, out=out),
            peer=lambda: F.silu(x[:, :size]).mul_(x[:, size:]),
        )

    def block_copy(self, *, gather: bool) -> Case:
        from disagg.model.kernels.block_copy import gather_blocks, scatter_blocks

        shape, count = self.shape, self.shape.copied_blocks
        size = (2 * shape.num_layers, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        blocks = self.randn(2 * count, *size)
        ids = torch.randperm(2 * count, device=self.device)[:count]
        staging = self.randn(count, *size)
        theirs = torch.empty_like(staging) if gather else blocks.clone()

        def run() -> Tensor:
            if gather:
                gather_blocks(blocks, ids, staging)
                return staging
            scatter_blocks(staging, blocks, ids)
            return blocks

        def peer() -> Tensor:
            if gather:
                return torch.index_select(blocks, 0, ids, out=theirs)
            return theirs.index_copy_(0, ids, staging)

        num_bytes = staging[0].numel() * staging.element_size()
        return Case(
            name=f"{'gather' if gather else 'scatter'}_blocks/{count}x{num_bytes // 1024}KiB",
            work=2 * count * num_bytes,
            unit="GB/s",
            run=run,
            peer=peer,
            exact=True,
        )

    def sampling(self, *, greedy: bool) -> Case:
        from disagg.model.kernels.sampling import sample
        from disagg.model.noise import gumbel, noise_key

        rows, vocab_size = self.shape.sampled_rows, self.shape.vocab_size
        logits = self.randn(rows, vocab_size, dtype=torch.float32)
        temperatures = torch.full((rows,), 0.0 if greedy else 0.8, device=self.device)
        keys = torch.tensor([noise_key(row, 7) for row in range(rows)], device=self.device)
        token_ids = torch.arange(vocab_size, device=self.device)

        def peer() -> Tensor:
            if greedy:
                return logits.argmax(-1)
            return (logits / temperatures[:, None]).add_(gumbel(keys[:, None], token_ids)).argmax(-1)

        return Case(
            name=f"sampling/{'greedy' if greedy else 'gumbel'}_s{rows}_v{vocab_size}",
            work=logits.numel() * logits.element_size(),
            unit="GB/s",
            run=lambda: sample(logits, temperatures, keys),
            peer=peer,
            exact=True,
        )


class CpuTimer:
    """Times calls on the CPU by the wall clock."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def median(self, action: Action) -> float:
        """Return the median seconds of a call after one that warms up."""
        action()
        return statistics.median(self._seconds(action) for _ in range(self.runs))

    def _seconds(self, action: Action) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started


class CudaTimer:
    """Times replays of a CUDA graph by events, with a cold L2 cache.

    A graph, since launching a kernel from Python takes longer than many of them run. The cache is flushed
    by reading a large buffer: writing one would leave dirty lines whose write-back the kernel then pays.
    While that runs, the replay is queued behind it, so that no host time lies between the events.
    """

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self._flush = torch.ones(FLUSH_BYTES // 4, device="cuda")

    def median(self, action: Action) -> float:
        """Return the median seconds of a call."""
        # Compiles and allocates outside the capture, on a stream of its own as graphs ask for.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                action()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        seconds = [self._seconds(graph) for _ in range(self.runs)]
        return statistics.median(seconds)

    def _seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.sum()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def check(case: Case) -> None:
    """Raise ConfigError unless kernel and peer agree: the speed of a wrong kernel is of no interest."""
    ours, theirs = case.run(), case.peer()
    if case.exact:
        agree = torch.equal(ours, theirs)
    else:
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        agree = bool(difference <= AGREE)
    if not agree:
        raise ConfigError(f"{case.name}: the kernel and torch disagree", param="kernel")


def limits(device: torch.device, timer: CpuTimer | CudaTimer) -> dict[str, float]:
    """Return the copy bandwidth in GB/s and the matrix rate in TFLOP/s of this machine, on random data."""
    cuda = device.type == "cuda"
    copy = copy_rate(device, 2 << 30 if cuda else 8 << 20, timer)
    return {"GB/s": copy, "TFLOP/s": matrix_rate(device, timer)}


def copy_rate(device: torch.device, num_bytes: int, timer: CpuTimer | CudaTimer) -> float:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer.median(lambda: target.copy_(source)) / 1e9


def matrix_rate(device: torch.device, timer: CpuTimer | CudaTimer) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / timer.median(lambda: torch.mm(a, b, out=out)) / 1e12


def measure(
    device: torch.device, timer: CpuTimer | CudaTimer, prefix: str, only: str, console: Console
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows, and what went wrong with those that are missing."""
    limit = limits(device, timer)
    rows: list[dict[str, Any]] = [
        {"name": f"{prefix}/limit/{name}", "value": significant(value), "unit": unit, "runs": timer.runs}
        for name, (unit, value) in zip(("copy", "matmul"), limit.items(), strict=True)
    ]
    failures = []
    for case in Cases(TINY if device.type == "cpu" else LLAMA_8B, device).all():
        if only not in case.name:
            continue
        try:
            rows.append(row_of(case, limit[case.unit], timer, prefix))
        except (ConfigError, RuntimeError) as error:
            # The other rows are still of use, and time on a GPU is short.
            failures.append(f"{case.name}: {error}")
            continue
        console.print(f"{rows[-1]['name']}: {rows[-1]['value']:.3g} {case.unit}", style="dim")
    return rows, failures


def row_of(case: Case, limit: float, timer: CpuTimer | CudaTimer, prefix: str) -> dict[str, Any]:
    check(case)
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[case.unit]
    seconds = timer.median(case.run)
    value, peer = case.work / seconds / scale, case.work / timer.median(case.peer) / scale
    return {
        "name": f"{prefix}/{case.name}",
        "value": significant(value),
        "unit": case.unit,
        "runs": timer.runs,
        "limit": significant(limit),
        "share": significant(value / limit),
        "peer": significant(peer),
        "ratio": significant(value / peer),
        "microseconds": significant(seconds * 1e6),
    }


def significant(value: float) -> float:
    """Round to four digits; interpreted kernels are so slow that fixed places would show zeros."""
    return float(f"{value:.4g}")


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine, its GPU and the versions that ran."""
    import triton

    machine = {**describe_machine(), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(
        Column("kernels/", no_wrap=True), "value", "unit", "limit", "share", "torch", "ratio", title=title
    )
    for row in rows:
        beside: tuple[str, ...] = ()
        if "limit" in row:
            beside = (
                f"{row['limit']:.4g}",
                f"{row['share']:.0%}",
                f"{row['peer']:.4g}",
                f"{row['ratio']:.2f}",
            )
        table.add_row(row["name"], f"{row['value']:.4g}", row["unit"], *beside)
    return table


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw each kernel's and its peer's share of the limit. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'matplotlib>=3.9'", param="plot") from error
    drawn = [row for row in rows if "limit" in row]
    names = ["/".join(row["name"].split("/")[1:]) for row in drawn]
    places = range(len(drawn))
    figure = Figure(figsize=(9, 1 + 0.4 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.barh([place - 0.2 for place in places], [row["share"] for row in drawn], 0.4, label="Triton")
    peers = [row["peer"] / row["limit"] for row in drawn]
    axes.barh([place + 0.2 for place in places], peers, 0.4, label="torch")
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the copy bandwidth, or of the matrix rate (prefill_attention)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--runs", type=int, help="timed runs a row; default 30, 3 under the interpreter")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        # Before anything imports triton, which reads it once.
        os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)
    runs = arguments.runs or (30 if device.type == "cuda" else 3)
    timer = CudaTimer(runs) if device.type == "cuda" else CpuTimer(runs)
    prefix = "kernels" if device.type == "cuda" else "kernels/interpreted"
    console = Console(stderr=True)
    rows, failures = measure(device, timer, prefix, arguments.only, console)
    machine = describe(device)
    title = f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, triton {machine['triton']}"
    Console().print(table_of(rows, title))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    if arguments.plot:
        plot(rows, title, arguments.plot)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
