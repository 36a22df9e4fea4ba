"""Integers to the device and results back, in pinned memory, without the host waiting for either.

torch's allocator of pinned memory hands a buffer out again only after the copies that use it have ended, so
nothing here needs a ring of buffers of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from disagg.model.step import Int32, Int64


def upload(parts: Sequence[Int64 | Int32], device: torch.device) -> list[Tensor]:
    """Return each array as an int64 vector on the device, after a single copy."""
    sizes = [part.size for part in parts]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    if parts:
        np.concatenate([part.reshape(-1) for part in parts], out=host.numpy())
    return list(torch.split(host.to(device, non_blocking=True), sizes))


class Moment:
    """What was launched on the current stream of `device` until now; nothing to wait for on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            # Blocking: the thread sleeps meanwhile and leaves the interpreter to others.
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Return when the device has done it."""
        if self._event is not None:
            self._event.synchronize()


class Download:
    """Copies of tensors that are on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if not tensors or tensors[0].device.type != "cuda":
            self._host = [tensor.clone() for tensor in tensors]
            self._arrived = Moment(torch.device("cpu"))
            return
        self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._arrived = Moment(tensors[0].device)

    def wait(self) -> list[Tensor]:
        """Wait until they have arrived, and return them."""
        self._arrived.wait()
        return self._host
