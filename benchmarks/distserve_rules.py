"""What DistServe's own simulator does, told again, to set the planner beside it on the same requests.

Zhong et al., OSDI '24, its program `simdistserve`: one prefill and one decode worker of one or more stages
each. A stage takes all that waits for it as one batch, so that batches which meet merge; a batch takes the
step's time over the number of stages in each. Caches are not bounded, KV moves in no time, and TPOT is the
time after the first token over all tokens. Only its rules and its published coefficients are taken.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from disagg.workload import Workload

MODEL = "facebook/opt-13b"


@dataclass(frozen=True)
class Shape:
    """Tensor and pipeline parallelism of a worker."""

    tensor: int
    stages: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.stages

    def __str__(self) -> str:
        return f"TP {self.tensor}" + (f" PP {self.stages}" if self.stages > 1 else "")


@dataclass
class _Worker:
    """Stages in a row. seconds: of a step of a batch."""

    num_stages: int
    seconds: Callable[[list[int]], float]
    queues: list[list[int]] = field(init=False)
    busy: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.queues = [[] for _ in range(self.num_stages)]
        self.busy = [False] * self.num_stages


class Rules:
    """One pair and one run of requests. ttft, tpot: seconds by request, after `run`."""

    def __init__(self, coefficients: Path, prefill: Shape, decode: Shape, requests: Workload) -> None:
        costs: dict[str, dict[str, Any]] = json.loads(coefficients.read_text())[MODEL]
        self._prefill_costs, self._decode_costs = costs[str(prefill.tensor)], costs[str(decode.tensor)]
        self._arrivals = [request.arrival_s for request in requests]
        self._prompts = [request.prompt_tokens for request in requests]
        self._outputs = np.array([request.output_tokens for request in requests])
        self._left = [request.output_tokens - 1 for request in requests]
        self._held = [request.prompt_tokens + 1 for request in requests]
        self._prefill = _Worker(prefill.stages, self._prefill_s)
        self._decode = _Worker(decode.stages, self._decode_s)
        self._first, self._last = (np.zeros(len(requests)) for _ in range(2))
        self._numbers = count()
        self._events: list[tuple[float, int, _Worker | None, int, list[int]]] = []

    def _prefill_s(self, batch: list[int]) -> float:
        base, token, square = self._prefill_costs["prefill"]
        prompts = [self._prompts[index] for index in batch]
        return float(base + token * sum(prompts) + square * sum(size * size for size in prompts)) / 1000

    def _decode_s(self, batch: list[int]) -> float:
        small = len(batch) < self._decode_costs["decoding_large_small_bs_threshold"]
        base, token, sequence = self._decode_costs["decoding_smallbs" if small else "decoding_largebs"]
        return (
            float(base + token * sum(self._held[index] + 1 for index in batch) + sequence * len(batch)) / 1000
        )

    def run(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return TTFT and TPOT of every request, in seconds."""
        for index, at in enumerate(self._arrivals):
            self._push(at, None, 0, [index])
        while self._events:
            now = self._events[0][0]
            while self._events and self._events[0][0] == now:
                _, _, worker, stage, batch = heapq.heappop(self._events)
                self._done(now, worker, stage, batch)
            for worker in (self._prefill, self._decode):
                self._start(now, worker)
        return self._first - np.array(self._arrivals), (self._last - self._first) / self._outputs

    def _push(self, at: float, worker: _Worker | None, stage: int, batch: list[int]) -> None:
        # At one moment events come in the order in which they were made.
        heapq.heappush(self._events, (at, next(self._numbers), worker, stage, batch))

    def _start(self, now: float, worker: _Worker) -> None:
        for stage, queue in enumerate(worker.queues):
            if queue and not worker.busy[stage]:
                batch, worker.queues[stage], worker.busy[stage] = queue, [], True
                self._push(now + worker.seconds(batch) / worker.num_stages, worker, stage, batch)

    def _done(self, now: float, worker: _Worker | None, stage: int, batch: list[int]) -> None:
        if worker is None:
            self._prefill.queues[0] += batch
            return
        worker.busy[stage] = False
        if stage + 1 < worker.num_stages:
            worker.queues[stage + 1] += batch
            return
        for index in batch:
            self._last[index] = now
            if worker is self._prefill:
                self._first[index] = now
            else:
                self._left[index] -= 1
                self._held[index] += 1
            if self._left[index]:
                self._decode.queues[0].append(index)


def all_pairs(most: int, degrees: Sequence[int]) -> list[tuple[Shape, Shape]]:
    """Return all pairs of at most so many GPUs."""
    every = [Shape(tensor, stages) for tensor in degrees for stages in degrees]
    return [(one, two) for one in every for two in every if one.gpus + two.gpus <= most]
