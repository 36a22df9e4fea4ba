"""Compiles every kernel for a Hopper GPU without one, through the wrappers; run by test_kernels_compile.py.

--all: attention in every type of cache too.

The interpreter takes programs that the compiler refuses (types that change in a loop, shapes unlike each
other), so equality under it alone says little about a GPU. Prints a JSON list of what was compiled.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from disagg.model.kernels.block_copy import gather_blocks, scatter_blocks
from disagg.model.kernels.common import FP8_DTYPE
from disagg.model.kernels.decode_attention import decode_attention
from disagg.model.kernels.eligibility import eligibility_threshold
from disagg.model.kernels.kv_store import store_kv
from disagg.model.kernels.prefill_attention import prefill_attention
from disagg.model.kernels.rms_norm import add_rms_norm
from disagg.model.kernels.rope import apply_rope_
from disagg.model.kernels.sampling import sample
from disagg.model.kernels.swiglu import swiglu

HOPPER = GPUTarget("cuda", 90, 32)
SEQS, KV_HEADS, GROUP, BLOCK_SIZE = 32, 2, 4, 16


class OfflineDriver:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Replaces the launch of a kernel by its compilation."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        self._run = jit.JITFunction.run

    def install(self) -> None:
        compiler = self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            compiled = compiler._run(kernel, *args, grid=grid, warmup=True, **kwargs)
            compiler.kernels.append(
                {
                    "name": kernel.__name__,
                    "hash": compiled.hash,
                    "shared": compiled.metadata.shared,
                    "tensor_cores": "mma" in compiled.asm["ptx"],
                    "cubin_bytes": len(compiled.asm["cubin"]),
                }
            )
            return compiled

        driver.set_active(OfflineDriver())
        jit.JITFunction.run = run


def attention(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    num_heads = KV_HEADS * GROUP
    blocks = torch.zeros(4, 3, 2, KV_HEADS, BLOCK_SIZE, head_dim, dtype=kv_dtype)
    kv = blocks[:, 1]
    qkv = torch.zeros(SEQS, num_heads + 2 * KV_HEADS, head_dim, dtype=dtype)
    q, k, v = qkv[:, :num_heads], qkv[:, num_heads:-KV_HEADS], qkv[:, -KV_HEADS:]
    slots = torch.zeros(SEQS, dtype=torch.int64)
    tables = torch.zeros(SEQS, 16, dtype=torch.int64)
    lens = torch.ones(SEQS, dtype=torch.int64)
    starts = torch.arange(SEQS + 1, dtype=torch.int64)
    for splits in (1, 16):
        decode_attention(q, kv, tables, lens, scale=0.1, max_context=16384, window=window, num_splits=splits)
    prefill_attention(q, kv, tables, starts, lens, scale=0.1, max_query_len=512, window=window)
    store_kv(k, v, kv, slots)
    gather_blocks(blocks, slots, torch.zeros(SEQS, *blocks.shape[1:], dtype=kv_dtype))
    scatter_blocks(torch.zeros(SEQS, *blocks.shape[1:], dtype=kv_dtype), blocks, slots)


def varied_steps(dtype: torch.dtype, head_dim: int) -> None:
    """Steps that differ in all that changes from one to the next, and in where slices of integers begin."""
    kv = torch.zeros(4, 2, KV_HEADS, BLOCK_SIZE, head_dim, dtype=dtype)
    for batch, width, first in ((1, 1, 0), (2, 7, 1), (16, 16, 3), (5, 33, 2), (32, 64, 1)):
        numbers = torch.zeros(4096, dtype=torch.int64)[first:]
        lens, starts = numbers[:batch], numbers[: batch + 1]
        tables = torch.zeros(batch + first, width, dtype=torch.int64)[first:]
        for length in (16, 100):
            q = torch.zeros(batch * length, KV_HEADS * GROUP, head_dim, dtype=dtype)
            prefill_attention(q, kv, tables, starts, lens, scale=0.1, max_query_len=length)
        q = torch.zeros(batch, KV_HEADS * GROUP, head_dim, dtype=dtype)
        for context in (10, 600, 5000, 16384):
            decode_attention(q, kv, tables, lens, scale=0.1, max_context=context)
        new = torch.zeros(batch, KV_HEADS, head_dim, dtype=dtype)
        store_kv(new, new, kv, lens)
        table = torch.zeros(64, head_dim // 2)
        apply_rope_(q, new, table, table, lens)


def elementwise() -> None:
    x = torch.zeros(SEQS, 4096, dtype=torch.bfloat16)
    positions = torch.zeros(SEQS, dtype=torch.int64)
    add_rms_norm(x, x.clone(), x[0].clone(), 1e-5)
    add_rms_norm(x, None, x[0].clone(), 1e-5)
    swiglu(x)
    q, table = x.view(SEQS, 32, 128), torch.zeros(64, 64)
    apply_rope_(q, q[:, :8], table, table, positions)
    temperatures = torch.ones(SEQS)
    eligibility_threshold(
        torch.zeros(SEQS, 128256), temperatures, temperatures, positions, temperatures.double()
    )
    # What torch then reads are ids that no kernel wrote.
    with contextlib.suppress(RuntimeError):
        sample(torch.zeros(SEQS, 128256), temperatures, positions)


def main() -> None:
    compiler = Compiler()
    compiler.install()
    assert not triton.knobs.runtime.interpret
    attention(torch.bfloat16, torch.bfloat16, 128, None)
    varied_steps(torch.bfloat16, 128)
    elementwise()
    if "--all" in sys.argv:
        attention(torch.bfloat16, FP8_DTYPE, 80, 1000)
        attention(torch.float16, torch.float16, 256, None)
        attention(torch.float32, torch.float32, 64, None)
    print(json.dumps(compiler.kernels))


if __name__ == "__main__":
    main()
