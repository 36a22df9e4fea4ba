"""`disagg doctor`: what this machine has of what disagg uses, each line with what follows from it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import typer
from rich.console import Console
from rich.table import Table


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
    yield Finding("memfd", hasattr(os, "memfd_create"), "shared-memory hand-off; without it gRPC is used")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("free memory", free > 2 * 2**30, f"{free / 2**30:.1f} GiB; a local cluster takes about 2")
    disk = shutil.disk_usage("/tmp").free
    yield Finding("space in /tmp", disk > 2**30, f"{disk / 2**30:.0f} GiB; Ray logs there")
    yield _gpu()


def _package(name: str, *, needed: bool) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False if needed else None, "not installed" + ("" if needed else " (optional)"))


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("GPU", None, "unknown without torch")
    if not torch.cuda.is_available():
        return Finding("GPU", None, "none; the CPU path is used")
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding("GPU", True, names)
