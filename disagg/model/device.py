"""On which device a model is computed."""

from __future__ import annotations

import torch

from disagg.config import Kernels, Quantization
from disagg.errors import ConfigError


def resolve_device(
    wanted: str, *, quantization: Quantization | None = None, kernels: Kernels = "auto"
) -> torch.device:
    """Return the device that `wanted` means here: auto, cpu, cuda (the current GPU) or cuda:N.

    auto: a GPU where this process has one and nothing asks for what only CPUs compute. Raises ConfigError
    naming device for one that isn't here.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    on_cpu_only = quantization is not None or kernels == "native"
    if wanted == "auto":
        return torch.device("cpu") if on_cpu_only or not torch.cuda.is_available() else _gpu(None)
    kind, _, index = wanted.partition(":")
    if kind != "cuda" or not (index.isdecimal() or wanted == "cuda"):
        raise ConfigError(
            f"device: must be auto, cpu, cuda or cuda:N, got {ascii(wanted)[:80]}", param="device"
        )
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise ConfigError(f"device: {wanted} can't be used: {why}", param="device")
    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {wanted} is not here; {torch.cuda.device_count()} GPUs are visible", param="device"
        )
    return _gpu(int(index) if index else None)


def rank_device(first: torch.device, rank: int) -> torch.device:
    """Return the device of a tensor-parallel rank where rank 0's is `first`: GPUs that follow each other."""
    return first if first.type == "cpu" else torch.device(first.type, (first.index or 0) + rank)


def check_rank_devices(first: torch.device, size: int) -> None:
    """Raise ConfigError naming tensor_parallel_size where this process has not a GPU for each rank."""
    if first.type != "cuda":
        return
    last, count = rank_device(first, size - 1), torch.cuda.device_count()
    if last.index >= count:
        raise ConfigError(
            f"tensor_parallel_size: {size} ranks from {first} on need a GPU each; {count} are visible here",
            param="tensor_parallel_size",
        )


def _gpu(index: int | None) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def describe_device(device: torch.device) -> str:
    """Return what a log says of a device."""
    if device.type != "cuda":
        return device.type
    memory = torch.cuda.get_device_properties(device).total_memory
    return f"{device}, {torch.cuda.get_device_name(device)} with {memory / 2**30:.0f} GiB"
