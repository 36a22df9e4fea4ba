"""`disagg doctor`: what this machine has of what disagg uses, each line with what follows from it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from disagg.routing.core import COMPILED
from disagg.transfer.copying import COMPILED as STREAM_ROWS


@dataclass(frozen=True, slots=True)
class Finding:
    """ok: None means neither good nor bad, only worth knowing."""

    what: str
    ok: bool | None
    detail: str


def doctor() -> None:
    """Check Python, packages, memory, shared memory and GPUs; exit with 1 if something needed is missing."""
    findings = list(inspect_machine())
    table = Table(show_header=False)
    marks = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[dim]note[/]"}
    for finding in findings:
        table.add_row(marks[finding.ok], finding.what, finding.detail)
    Console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


def inspect_machine() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding(
        "Python", (3, 11) <= sys.version_info[:2] <= (3, 12), f"{version}; 3.11 and 3.12 are tested"
    )
    yield Finding("cores", None, f"{os.cpu_count()}; workers share them unless threads are set")
    for package in ("torch", "ray", "grpcio", "tokenizers", "safetensors"):
        yield _package(package, needed=True)
    for package in ("triton", "nixl"):
        yield _package(package, needed=False)
    yield _built("router core", COMPILED is not None, "Python")
    yield _built("copies of KV", STREAM_ROWS is not None, "numpy")
    yield Finding("memfd", hasattr(os, "memfd_create"), "shared-memory hand-off; without it gRPC is used")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("free memory", free > 2 * 2**30, f"{free / 2**30:.1f} GiB; a local cluster takes about 2")
    disk = shutil.disk_usage("/tmp").free
    yield Finding("space in /tmp", disk > 2**30, f"{disk / 2**30:.0f} GiB; Ray logs there")
    yield from _gpus()


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False if needed else None, "not installed" + ("" if needed else " (optional)"))


def _built(what: str, compiled: bool, otherwise: str) -> Finding:
    if compiled:
        return Finding(what, True, "compiled")
    return Finding(what, None, f"{otherwise}; compiled where a C compiler is there at installation")


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        yield Finding("GPU", None, "unknown without torch")
        return
    if not torch.cuda.is_available():
        yield Finding("GPU", None, f"{_why_no_gpu(torch.version.cuda)}; workers compute on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu_finding(torch, index)


def _why_no_gpu(built_for: str | None) -> str:
    if not Path("/dev/nvidiactl").exists():
        return "none"
    if built_for is None:
        return "there is one, but this torch is built without CUDA"
    return f"there is one, but torch can't use it with this driver (torch wants CUDA {built_for})"


def _gpu_finding(torch: Any, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    detail = (
        f"{properties.name}, compute capability {capability}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB "
        f"free, CUDA {torch.version.cuda}"
    )
    problem = ""
    if (properties.major, properties.minor) < (8, 0):
        problem = "; too old for the Triton kernels in bfloat16: use dtype float16 or device cpu"
    elif importlib.util.find_spec("triton") is None:
        problem = "; without triton workers compute with plain torch: pip install 'disagg[gpu]'"
    return Finding(f"GPU {index}", not problem or None, detail + problem)
