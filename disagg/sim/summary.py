"""What a simulation amounts to: latencies, objectives, load of pools and links, cost. No wall clock in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from disagg.sim.records import Floats, Outcome
from disagg.sim.simulation import Simulation

PERCENTILES = (50, 90, 99)


def summarize(simulation: Simulation) -> dict[str, Any]:
    """Return every figure of a finished run as plain numbers; seconds, bytes, USD. Same run, same figures."""
    records = simulation.records
    done = records.done
    arrivals = np.array(records.arrival)
    duration = float(np.nanmax(np.array(records.finished)) - arrivals.min()) if len(records) else 0.0
    output_tokens = int(np.array(records.output_tokens)[done].sum())
    return {
        "requests": _requests(simulation),
        "duration_s": duration,
        "request_rate": len(records) / span if (span := float(np.ptp(arrivals))) > 0 else None,
        "throughput": int(done.sum()) / duration if duration else 0.0,
        "output_tokens_per_s": output_tokens / duration if duration else 0.0,
        "latency": _latencies(simulation),
        "objectives": _objectives(simulation, duration),
        "pools": _pools(simulation, duration),
        "transfer": _transfer(simulation, duration),
        "cost": _cost(simulation, duration, output_tokens),
        "placements": {
            f"{policy}/{kind}": count
            for (policy, kind), count in sorted(simulation.frontend.placements.items())
        },
    }


def _requests(simulation: Simulation) -> dict[str, int]:
    records = simulation.records
    counts = {outcome.name.lower(): records.outcome.count(outcome) for outcome in Outcome}
    del counts["pending"]
    return {"planned": len(records), **counts, "resumes": sum(records.resumes)}


def _distribution(values: Floats) -> dict[str, float] | None:
    """Return mean and percentiles (linear interpolation); None without values."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return None
    points = np.percentile(kept, PERCENTILES).tolist()
    named = {f"p{percent}": value for percent, value in zip(PERCENTILES, points, strict=True)}
    return {"mean": float(kept.mean()), **named, "max": float(kept.max())}


def _latencies(simulation: Simulation) -> dict[str, Any]:
    """Of requests that were served; itl is of single tokens, not of their means.

    queue and prefill are the parts of ttft, as in the live metrics: what is not prefill is waiting.
    """
    records, gaps, done = simulation.records, simulation.gaps, simulation.records.done
    handed = done & (np.array(records.received_tokens) > 0)
    columns: dict[str, Floats] = {
        "ttft": records.ttft()[done],
        "tpot": records.tpot()[done],
        "e2e": records.e2e()[done],
        "queue": records.ttft()[done] - np.array(records.prefill)[done],
        "prefill": np.array(records.prefill)[done],
        "handoff": np.array(records.transfer)[handed],
    }
    latencies: dict[str, Any] = {name: _distribution(values) for name, values in columns.items()}
    if gaps.count:
        points = {f"p{percent}": gaps.percentile(percent) for percent in PERCENTILES}
        latencies["itl"] = {"mean": gaps.mean, **points, "max": gaps.percentile(100)}
    return latencies


def _objectives(simulation: Simulation, duration: float) -> dict[str, Any] | None:
    """Attainment over all requests, refused ones included; goodput: requests per second that met all."""
    wanted = simulation.spec.objectives
    if wanted.ttft_ms is None and wanted.tpot_ms is None:
        return None
    records = simulation.records
    met = records.done.copy()
    result: dict[str, Any] = {"ttft_ms": wanted.ttft_ms, "tpot_ms": wanted.tpot_ms}
    tpot = records.tpot()
    for name, values, limit in (
        ("ttft", records.ttft(), wanted.ttft_ms),
        # An answer of one token has no TPOT that could be missed.
        ("tpot", np.where(np.isnan(tpot), 0.0, tpot), wanted.tpot_ms),
    ):
        if limit is not None:
            within = records.done & (values <= limit / 1000)
            result[f"{name}_attainment"] = float(within.mean())
            met &= within
    result["attainment"] = float(met.mean())
    result["goodput"] = int(met.sum()) / duration if duration else 0.0
    result["goodput_per_gpu"] = result["goodput"] / _num_gpus(simulation)
    return result


def _num_gpus(simulation: Simulation) -> int:
    return sum(pool.num_gpus for pool in simulation.spec.pools.values())


def _pools(simulation: Simulation, duration: float) -> dict[str, Any]:
    """Load of each pool. utilisation: share of time with a step. batch: mean size of decoding steps."""
    pools = {}
    for name, pool in simulation.spec.pools.items():
        workers = [worker for worker in simulation.workers.values() if worker.pool == name]
        if not workers:
            continue
        usages, counters = [w.usage for w in workers], [w.counters for w in workers]
        busy = np.array([usage.busy_s for usage in usages]) / (duration or 1.0)
        decode_steps = sum(usage.decode_steps for usage in usages)
        output_tokens = sum(usage.output_tokens for usage in usages)
        queries = sum(counter.prefix_queries for counter in counters)
        pools[name] = {
            "role": pool.role.value,
            "hardware": pool.hardware,
            "workers": len(workers),
            "gpus": pool.num_gpus,
            "kv_blocks": workers[0].info.kv_blocks_total,
            "utilisation": float(busy.mean()),
            "utilisation_max": float(busy.max()),
            "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
            "output_tokens": output_tokens,
            "steps": sum(usage.num_steps for usage in usages),
            "batch": output_tokens / decode_steps if decode_steps else 0.0,
            "preemptions": sum(counter.preemptions for counter in counters),
            "prefix_hit_share": sum(counter.prefix_hits for counter in counters) / queries
            if queries
            else 0.0,
        }
    return pools


def _transfer(simulation: Simulation, duration: float) -> dict[str, float]:
    """Load of links. share_of_links: of what all links could send in that time."""
    num_bytes = simulation.network.num_bytes
    rate = num_bytes / duration if duration else 0.0
    spec = simulation.spec
    capacity = sum(spec.bandwidth_of(spec.pools[worker.pool]) for worker in simulation.workers.values())
    return {"bytes": num_bytes, "bytes_per_s": rate, "share_of_links": rate / capacity}


def _cost(simulation: Simulation, duration: float, output_tokens: int) -> dict[str, Any]:
    spec = simulation.spec
    per_hour = power = 0.0
    for pool in spec.pools.values():
        hardware, gpus = spec.hardware_of(pool), pool.num_gpus
        per_hour += gpus * hardware.price_per_hour
        power += gpus * hardware.power_w
    total = per_hour * duration / 3600
    return {
        "gpus": _num_gpus(simulation),
        "usd_per_hour": per_hour,
        "usd": total,
        "usd_per_million_output_tokens": total / output_tokens * 1e6 if output_tokens else None,
        "power_w": power,
    }
