"""Autoscaler: how many workers each pool should have, as a pure function of what was seen and of objectives.

For each pool and each size the time that users would see is predicted:

    prefill    TTFT = backlog / n + wait at that load (Sakasegawa's M/M/n approximation) + the prompt itself
    decode     TPOT = step with sequences / n in its batch; beyond the places and the KV, a multiple of it

A pool grows to the smallest size that meets its objective, at once. It shrinks by one only if the smaller
size would have met it with room to spare at every moment of the look-back, and would at the load to which the
trend leads within the look-ahead. Where a pool can't grow for want of workers, one of the other pool that has
one to spare changes its role. Time in queues counts (a pool that falls behind is seen by its backlog, long
before a step becomes slower); samples of workers that warm up don't, but the workers do, so that a pool that
waits for what it ordered does not order again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from disagg.config import AutoscalerConfig
from disagg.routing.view import ClusterView
from disagg.types import Role, WorkerStatus

# Never predict a wait at full load as infinite: sizes are to be compared.
_MOST_BUSY = 0.999
_PENALTY = 10.0


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at one moment.

    age_s: since it became ready; less than warm_up_s, and its load says nothing yet. draining: on its way out
    or into another pool. queued_s: predicted seconds to compute all prompts queued there, prompt_s: an
    average prompt alone. sequences: decoding, or placed to; max_sequences: places. step_base_s,
    step_sequence_s: predicted decode step, a + b * sequences. kv_usage: 0 to 1.
    """

    worker_id: str
    role: Role
    age_s: float
    draining: bool = False
    queued_s: float = 0.0
    prompt_s: float = 0.0
    sequences: float = 0.0
    max_sequences: int = 64
    step_base_s: float = 0.0
    step_sequence_s: float = 0.0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All workers at one moment, in seconds on any one clock. starting: ordered, not ready yet, by role."""

    at: float
    workers: tuple[WorkerSample, ...]
    starting: tuple[Role, ...] = ()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a pool may have. total_max, over both pools, is in the configuration."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a pool is asked for at one moment, over all its workers that are warm.

    busy: prefill workers' worth of work under way. backlog_s: seconds of queued prompts. prompt_s: one
    prompt. sequences, kv: decode's, kv in caches. The rest describes one worker.
    """

    at: float
    size: int
    busy: float = 0.0
    backlog_s: float = 0.0
    prompt_s: float = 0.0
    sequences: float = 0.0
    kv: float = 0.0
    places: int = 1
    step_base_s: float = 0.0
    step_sequence_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What pools should be. flip: move a worker from the first role's pool to the second's. reason: words."""

    sizes: dict[Role, int]
    flip: tuple[Role, Role] | None = None
    reason: str = ""


def plan(
    history: Sequence[Snapshot], bounds: dict[Role, Bounds], config: AutoscalerConfig, last_change: float
) -> Plan:
    """Return what the prefill and decode pools should be now; mixed workers are left alone.

    history: oldest first, the last is now. last_change: when a plan was last carried out.
    """
    now = history[-1]
    sizes = {role: _size(now, role) for role in bounds}
    wanted = {role: _wanted(role, history, sizes[role], bounds[role], config) for role in bounds}
    settled = now.at - last_change >= config.settle_s
    grow = [role for role in bounds if wanted[role] > sizes[role]]
    if not settled and not any(sizes[role] < bounds[role].low for role in bounds):
        return Plan(sizes, reason="settling")
    if not grow:
        shrink = [role for role in bounds if wanted[role] < sizes[role]]
        reason = f"{shrink[0].value} has more than it needs" if shrink else "as it should be"
        return Plan(wanted, reason=reason)
    # One pool grows while the other keeps what it has: a shrinking one gives its worker to it.
    target = {role: max(wanted[role], sizes[role]) for role in bounds}
    spare = config.max_workers - sum(target.values())
    if spare >= 0:
        return Plan(target, reason=f"{grow[0].value} would miss its objective")
    return _within_total(grow, sizes, wanted, history, bounds, config)


def _within_total(
    grow: list[Role],
    sizes: dict[Role, int],
    wanted: dict[Role, int],
    history: Sequence[Snapshot],
    bounds: dict[Role, Bounds],
    config: AutoscalerConfig,
) -> Plan:
    """Grow as far as the total allows; else move a worker whose own pool can do without it."""
    free = config.max_workers - sum(sizes.values())
    target = dict(sizes)
    for role in grow:
        more = min(wanted[role] - sizes[role], max(0, free))
        target[role] += more
        free -= more
    if target != sizes:
        return Plan(target, reason=f"{grow[0].value} would miss its objective")
    receiver = grow[0]
    for giver in bounds:
        if giver is receiver or giver in grow or sizes[giver] <= bounds[giver].low:
            continue
        if _meets(giver, _demands(history, giver, config), sizes[giver] - 1, config, 1.0):
            sizes = {**sizes, giver: sizes[giver] - 1, receiver: sizes[receiver] + 1}
            return Plan(sizes, flip=(giver, receiver), reason=f"{giver.value} can lend to {receiver.value}")
    return Plan(target, reason=f"{receiver.value} needs more than there is")


def _size(snapshot: Snapshot, role: Role) -> int:
    """Return a pool's workers, those included that were ordered and are not ready yet."""
    alive = sum(worker.role is role and not worker.draining for worker in snapshot.workers)
    return alive + sum(item is role for item in snapshot.starting)


def _wanted(
    role: Role, history: Sequence[Snapshot], size: int, bounds: Bounds, config: AutoscalerConfig
) -> int:
    """Return the size that a pool should have if nothing but its objective and bounds counted."""
    demands = _demands(history, role, config)
    if size < bounds.low or size > bounds.high:
        return max(bounds.low, min(size, bounds.high))
    if not demands:
        return size
    recent = [item for item in demands if item.at >= demands[-1].at - config.react_s]
    need = size
    while need < bounds.high and not _meets(role, recent, need, config, 1.0, averaged=True):
        need += 1
    if need > size:
        return need
    covered = demands[-1].at - demands[0].at >= config.look_back_s * 0.9
    smaller = size - 1
    if smaller < max(bounds.low, 1) or not covered:
        return size
    later = [*demands, _projected(demands, config.look_ahead_s)]
    return smaller if _meets(role, later, smaller, config, config.headroom) else size


def _meets(
    role: Role,
    demands: Sequence[Demand],
    size: int,
    config: AutoscalerConfig,
    share: float,
    *,
    averaged: bool = False,
) -> bool:
    """Whether a pool of `size` keeps within `share` of its objective at each demand, or at their average."""
    if not demands:
        return False
    limit = share * (config.slo_ttft_s if role is Role.PREFILL else config.slo_tpot_s)
    items = [_average(demands)] if averaged else demands
    return all(predict(role, item, size) <= limit for item in items)


def predict(role: Role, demand: Demand, size: int) -> float:
    """Return seconds to the first token, or between tokens, that a pool of `size` would give."""
    if size < 1:
        return math.inf
    if role is Role.PREFILL:
        busy = min(demand.busy / size, _MOST_BUSY)
        wait: float = busy ** (math.sqrt(2 * (size + 1)) - 1) / (size * (1 - busy)) * demand.prompt_s
        return demand.backlog_s / size + wait + demand.prompt_s
    sequences = demand.sequences / size
    step = demand.step_base_s + demand.step_sequence_s * min(sequences, demand.places)
    # What has no place waits while others decode; a full cache preempts.
    crowding = max(1.0, sequences / demand.places)
    overflow = max(0.0, demand.kv / size - 0.9)
    return step * crowding * (1 + _PENALTY * overflow)


def _demands(history: Sequence[Snapshot], role: Role, config: AutoscalerConfig) -> list[Demand]:
    """Return what was asked of a pool over the look-back, without moments at which nobody was warm."""
    since = history[-1].at - config.look_back_s
    found = []
    for snapshot in history:
        warm = [item for item in snapshot.workers if item.role is role and item.age_s >= config.warm_up_s]
        if snapshot.at >= since and warm:
            found.append(_demand(snapshot.at, warm))
    return found


def _demand(at: float, warm: Sequence[WorkerSample]) -> Demand:
    return Demand(
        at=at,
        size=len(warm),
        busy=float(sum(worker.queued_s > 0 for worker in warm)),
        # What is under way is not waited for; the prompt itself is counted apart.
        backlog_s=sum(max(0.0, worker.queued_s - worker.prompt_s) for worker in warm),
        prompt_s=fmean(worker.prompt_s for worker in warm),
        sequences=sum(worker.sequences for worker in warm),
        kv=sum(worker.kv_usage for worker in warm),
        places=min(worker.max_sequences for worker in warm),
        step_base_s=fmean(worker.step_base_s for worker in warm),
        step_sequence_s=fmean(worker.step_sequence_s for worker in warm),
    )


def _average(demands: Sequence[Demand]) -> Demand:
    """Return the mean load; the latest description of a worker. A backlog counts as it is now."""
    last = demands[-1]
    return replace(
        last,
        busy=fmean(item.busy for item in demands),
        sequences=fmean(item.sequences for item in demands),
        kv=fmean(item.kv for item in demands),
        backlog_s=min(last.backlog_s, fmean(item.backlog_s for item in demands) * 2),
    )


def _projected(demands: Sequence[Demand], ahead_s: float) -> Demand:
    """Return the load to which the trend over the history leads; a falling trend is not trusted."""
    last = _average(demands[-max(1, len(demands) // 4) :])
    first = _average(demands[: max(1, len(demands) // 4)])
    span = demands[-1].at - demands[0].at
    if span <= 0:
        return last
    factor = ahead_s / span

    def led(before: float, now: float) -> float:
        return now + max(0.0, now - before) * factor

    return replace(
        last,
        busy=led(first.busy, last.busy),
        sequences=led(first.sequences, last.sequences),
        kv=led(first.kv, last.kv),
        backlog_s=led(first.backlog_s, last.backlog_s),
    )


def sample_workers(view: ClusterView) -> list[WorkerSample]:
    """Return one sample per worker of a view; ages are not known to it, and left 0."""
    samples = []
    for worker_id, state in view.workers.items():
        slot = view.slot(worker_id)
        if slot is None:
            continue
        costs = view.costs(slot)
        step_base, step_sequence, step_context = costs.decode
        context = costs.sequences and state.load.kv_blocks_used * state.info.block_size / costs.sequences
        samples.append(
            WorkerSample(
                worker_id=worker_id,
                role=state.info.role,
                age_s=0.0,
                draining=state.status is not WorkerStatus.READY,
                queued_s=float(view.queued_tokens[slot]) * costs.token_s,
                prompt_s=costs.service_s(view.expected_prompt, view.expected_prompt**2 / 2),
                sequences=float(costs.sequences),
                max_sequences=state.info.max_num_seqs,
                step_base_s=step_base,
                step_sequence_s=step_sequence + step_context * context,
                kv_usage=state.load.kv_blocks_used / max(1, state.info.kv_blocks_total),
            )
        )
    return samples
