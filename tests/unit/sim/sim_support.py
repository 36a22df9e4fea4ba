"""Small clusters and cost tables of their own, so that no test needs a file from outside the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disagg.sim.spec import SimSpec, parse_spec
from disagg.workload import (
    LogNormalLength,
    Poisson,
    SharedPrefix,
    TimedRequest,
    Workload,
    synthesize,
)

TABLE = """\
model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel
m,fast,100,1,8,10,5,1
m,fast,100,1,8,14,5,1
m,fast,100,1,8,11,5,1
m,fast,200,1,8,21,5.5,1
m,fast,100,4,8,61,6.5,1
m,slow,100,1,8,30,9,1
m,slow,200,1,8,60,10,1
"""

SHAPE: dict[str, Any] = {
    "name": "m",
    "num_layers": 10,
    "hidden_size": 64,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 128,
    "vocab_size": 100,
}
# 10 layers * 2 KV heads * 8 wide * keys and values * 2 bytes
KV_BYTES = 640

GPU: dict[str, Any] = {"flops": 1e15, "bandwidth": 1e12, "memory": 1e9, "price_per_hour": 2.0, "power_w": 500}

shared_folder = os.environ.get("DISAGG_SHARED")
needs_shared = pytest.mark.skipif(shared_folder is None, reason="DISAGG_SHARED does not name ../shared")


def shared(*parts: str) -> Path:
    assert shared_folder is not None
    return Path(shared_folder, "traces", *parts)


def pool(role: str, replicas: int = 1, **more: Any) -> dict[str, Any]:
    return {"role": role, "replicas": replicas, "hardware": "gpu", "num_kv_blocks": 400, **more}


def spec_of(pools: dict[str, Any], **more: Any) -> SimSpec:
    """A cluster whose decode steps get slower with their context, so that leaps are not trivial."""
    profile = more.pop("profile", None)
    cost = {"kind": "roofline"} if profile is None else {"kind": "profile", "file": str(profile)}
    data: dict[str, Any] = {
        "model": SHAPE,
        "hardware": {"gpu": GPU},
        "pools": pools,
        "cost": cost,
        "engine": {"max_num_seqs": 16, "max_num_batched_tokens": 256},
        "router": {"policy": "least_loaded"},
    }
    return parse_spec({**data, **more})


def workload(
    count: int, rate: float = 20.0, *, seed: int = 0, prefix: SharedPrefix | None = None, prompt: int = 200
) -> Workload:
    return synthesize(
        count,
        Poisson(rate),
        LogNormalLength(prompt, 0.8, 2000),
        LogNormalLength(40, 0.8, 300),
        np.random.default_rng(seed),
        prefix,
    )


def requests(*rows: tuple[float, int, int]) -> Workload:
    """(arrival, prompt tokens, output tokens) of each request."""
    return Workload("test", tuple(TimedRequest(*row) for row in rows))
