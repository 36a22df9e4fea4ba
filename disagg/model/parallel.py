"""Tensor parallelism: the group of ranks that compute one model together, and the layers that need it.

    column-parallel qkv, gate, up ─► attention, SwiGLU on own heads ─► row-parallel o, down ─► all-reduce

Two all-reduces a layer, one after the embedding, and one gather of logits to rank 0. The embedding and the
output layer are cut along the vocabulary: they are a good part of a small model's memory and of a decode
step's reading, and tied ones stay one tensor. All ranks leave an all-reduce with the same bits, so their
residual streams never drift apart.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from disagg.model.layers import Linear
from disagg.model.shard import Shard, Span

# Its type stubs leave out most of what is made here.
dist: Any = torch.distributed
Store = Any

# Peers find each other here; everything runs on one host.
LOOPBACK = "127.0.0.1"


class RankGroup:
    """Collectives among the ranks of one worker: NCCL for tensors on a GPU, else Gloo.

    The process group is made from a store of its own, never from the environment nor as the process's default
    group, so that others in this process may have groups too. A collective that a rank does not join raises
    RuntimeError: at once where it died, after `timeout_s` where it hangs.
    """

    def __init__(self, shard: Shard, store: Store, *, device: torch.device, timeout_s: float) -> None:
        self.shard = shard
        self._device = device
        self._closed = False
        timeout = timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        self._group = (_nccl if device.type == "cuda" else _gloo)(shard, store, timeout)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add x up over the ranks, in place; return it."""
        self._group.allreduce([x]).wait()
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Return the ranks' x [rows, columns], equal in shape, side by side on rank 0; None elsewhere."""
        parts = [torch.empty_like(x) for _ in range(self.shard.size)] if self.shard.leads else []
        self._group.gather([parts] if parts else [], [x], dist.GatherOptions()).wait()
        return torch.cat(parts, dim=-1) if parts else None

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace x by rank 0's, in place; return it."""
        self._group.broadcast([x], dist.BroadcastOptions()).wait()
        return x

    def least(self, value: int) -> int:
        """Return the smallest of the ranks' values. The host waits for it."""
        values = torch.tensor([value], device=self._device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._group.allreduce([values], options).wait()
        return int(values.item())

    def close(self) -> None:
        """Leave; whoever still waits for this rank fails. Again does nothing."""
        if not self._closed:
            self._closed = True
            self._group.abort()


def _gloo(shard: Shard, store: Store, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    # Said outright: GLOO_SOCKET_IFNAME may be left over from something else.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, options)


def _nccl(shard: Shard, store: Store, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)


def serve_store(size: int, *, timeout_s: float) -> Store:
    """Return the store through which `size` ranks meet, on a loopback port that the OS picks (`.port`)."""
    return dist.TCPStore(
        LOOPBACK,
        0,
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def join_store(port: int, size: int, *, timeout_s: float) -> Store:
    """Return rank 0's store as another rank sees it. Raises dist.DistError where nobody serves it."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(LOOPBACK, port, size, is_master=False, timeout=timeout, wait_for_workers=False)


class RowParallelLinear(Linear):
    """A linear layer of which this rank holds the weights of some inputs: what it gives is a sum over ranks.

    bias: on one rank alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: RankGroup) -> None:
        super().__init__(weight, bias)
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(super().__call__(x))


def embed_part(token_ids: Tensor, weight: Tensor, own: Span, group: RankGroup) -> Tensor:
    """Return [T, hidden_size] of token ids [T], of whose embeddings this rank holds `own`. Exact: all but one
    rank add zeros.
    """
    local = token_ids - own.start
    elsewhere = (local < 0) | (local >= own.length)
    hidden = F.embedding(local.masked_fill(elsewhere, 0), weight)
    return group.all_reduce(hidden.masked_fill_(elsewhere[:, None], 0))
