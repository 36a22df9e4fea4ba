"""Plots of a run. matplotlib is an extra: asked for only here, and only when a plot is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from disagg.errors import ConfigError
from disagg.sim.simulation import Simulation

NEEDS_MATPLOTLIB = "--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.9'"


def require_matplotlib() -> Any:
    """Return matplotlib.figure.Figure. Raises ConfigError that says how to get it."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError(NEEDS_MATPLOTLIB, param="--plot") from None
    return Figure


def plot_run(simulation: Simulation, path: Path) -> None:
    """Write distributions of TTFT, TPOT and E2E, and the load over time, as one picture.

    The format follows the file's name. Raises ConfigError where matplotlib is missing or can't write it.
    """
    figure = require_matplotlib()(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    records, objectives = simulation.records, simulation.spec.objectives
    done = records.done
    panels = (
        (axes[0][0], "TTFT, s", records.ttft()[done], objectives.ttft_ms),
        (axes[0][1], "TPOT, s", records.tpot()[done], objectives.tpot_ms),
        (axes[1][0], "E2E, s", records.e2e()[done], None),
    )
    for axis, label, values, objective_ms in panels:
        _cumulative(axis, label, np.sort(values[~np.isnan(values)]), objective_ms)
    _in_flight(axes[1][1], simulation)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: can't write {path}: {error}", param="--plot") from None


def _cumulative(axis: Any, label: str, values: Any, objective_ms: float | None) -> None:
    if len(values):
        axis.plot(values, np.arange(1, len(values) + 1) / len(values))
        axis.set_xlim(left=0, right=float(np.percentile(values, 99.5)) * 1.05)
    if objective_ms is not None:
        axis.axvline(objective_ms / 1000, linestyle="--", color="tab:red")
    axis.set(xlabel=label, ylabel="share of requests", ylim=(0, 1))
    axis.grid(alpha=0.3)


def _in_flight(axis: Any, simulation: Simulation) -> None:
    records = simulation.records
    times = np.concatenate([np.array(records.arrival), np.array(records.finished)])
    changes = np.concatenate([np.ones(len(records)), -np.ones(len(records))])
    order = np.argsort(times, kind="stable")
    axis.step(times[order], np.cumsum(changes[order]), where="post", linewidth=0.8)
    axis.set(xlabel="time, s", ylabel="requests in flight")
    axis.grid(alpha=0.3)
