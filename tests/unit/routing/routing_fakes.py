"""Workers and requests for the routing tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from disagg.config import RouterConfig
from disagg.routing.router import Router
from disagg.routing.types import BlockEvents, PlacementRequest, StepSample, WorkerReport
from disagg.types import Role, WorkerInfo, WorkerLoad, WorkerStatus

PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED


def info(worker_id: str, role: Role, *, incarnation: str = "one", **more: Any) -> WorkerInfo:
    fields: dict[str, Any] = {
        "address": "127.0.0.1:4000",
        "host": "here",
        "pid": 1,
        "max_model_len": 4096,
        "block_size": 16,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "kv_blocks_total": 1000,
    }
    return WorkerInfo(worker_id, incarnation, role, **{**fields, **more})


def report(
    worker_id: str,
    role: Role,
    *,
    status: WorkerStatus = WorkerStatus.READY,
    load: WorkerLoad | None = None,
    blocks: BlockEvents | None = None,
    steps: Sequence[StepSample] = (),
    **more: Any,
) -> WorkerReport:
    return WorkerReport(info(worker_id, role, **more), status, load or WorkerLoad(), blocks, steps)


def request(request_id: str, num_tokens: int = 160, **more: Any) -> PlacementRequest:
    fields: dict[str, Any] = {"frontend_id": "front", "max_new_tokens": 32, **more}
    return PlacementRequest(request_id, num_tokens=num_tokens, **fields)


def router(policy: str = "prefix_aware", *, prefill: int = 0, decode: int = 0, mixed: int = 0) -> Router:
    made = Router(RouterConfig.model_validate({"policy": policy}), random.Random(7))
    for role, count in ((PREFILL, prefill), (DECODE, decode), (MIXED, mixed)):
        for index in range(count):
            made.worker_report(report(f"{role.value}-{index}", role), 0.0)
    return made
