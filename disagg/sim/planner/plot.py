"""Plot of a plan: goodput against prefill : decode."""

from __future__ import annotations

from pathlib import Path

from disagg.errors import ConfigError
from disagg.sim.planner.search import Result
from disagg.sim.plot import require_matplotlib


def plot_ratios(result: Result, path: Path) -> None:
    """Write goodput over the sweep, beside what each phase alone allows and the colocated plan.

    Raises ConfigError where matplotlib is missing, can't write it, or there is nothing to plot.
    """
    if not result.ratios:
        raise ConfigError("--plot: the best plan is colocated and no other was good", param="--plot")
    figure = require_matplotlib()(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    labels = [f"{point.prefill}:{point.decode}" for point in result.ratios]
    places = list(range(len(labels)))
    axis.plot(
        places, [point.estimate for point in result.ratios], "--", label="weaker phase, worker by worker"
    )
    axis.plot(places, [point.goodput for point in result.ratios], "o-", label="whole cluster")
    disaggregated = next(plan for plan in result.plans if not plan.colocated)
    for plan in result.plans:
        if plan.colocated and plan.goodput is not None:
            # The sweep is of one node's copy, and so is the line that it is held against.
            share = disaggregated.gpus / disaggregated.nodes / plan.gpus
            axis.axhline(
                plan.goodput * share, color="tab:red", linestyle=":", label=f"colocated {plan.pools[0].shape}"
            )
    axis.set_xticks(places, labels)
    axis.set(xlabel="prefill : decode workers", ylabel="goodput, requests/s", title=str(disaggregated))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: can't write {path}: {error}", param="--plot") from None
