"""Shorthand for panels that look alike on every page, over grafana-foundation-sdk."""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

# Every query stays within the scrape job that is chosen on top of the page.
JOB = 'job=~"$job"'
WORKER = f'{JOB},worker=~"$worker"'
RATE = "[$__rate_interval]"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

# One colour for each part of a request and each pool, wherever it appears.
FRONTEND, QUEUE = "#8E8E8E", "#E0B400"
PREFILL, TRANSFER, DECODE = "#3274D9", "#8F3BB8", "#37872D"
BAD, WARN, GOOD = "#C4162A", "#E0B400", "#37872D"
COLORS = {
    "front end": FRONTEND,
    "queue": QUEUE,
    "prefill": PREFILL,
    "transfer": TRANSFER,
    "first decode step": DECODE,
    "decode": DECODE,
}


@dataclass(frozen=True)
class Series:
    """One query and the name of its lines, in Grafana's {{label}} notation."""

    expr: str
    name: str


def quantiles(metric: str, by: str = "") -> list[Series]:
    """Return P50, P90 and P99 of a histogram, over all processes."""
    group = f"le,{by}" if by else "le"
    suffix = f" {{{{{by}}}}}" if by else ""
    return [
        Series(
            f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket{{{JOB}}}{RATE})))",
            f"P{q * 100:g}{suffix}",
        )
        for q in (0.5, 0.9, 0.99)
    ]


def mean(metric: str, labels: str = JOB) -> str:
    """Return the mean of a histogram's observations."""
    return f"sum(rate({metric}_sum{{{labels}}}{RATE})) / (sum(rate({metric}_count{{{labels}}}{RATE})) > 0)"


def lines(
    title: str, unit: str, description: str, *series: Series, stacked: bool = False, top: float | None = None
) -> timeseries.Panel:
    """A panel of lines over time. unit: Grafana's name of it. top: end of the axis, where it has one."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(8)
        .height(8)
        .line_width(1 if stacked else 2)
        .fill_opacity(60 if stacked else 6)
        .show_points(common_model.VisibilityMode.NEVER)
        .span_nulls(False)
        .tooltip(common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .display_mode(common_model.LegendDisplayMode.LIST)
            .placement(common_model.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
    if top is not None:
        panel = panel.max(top)
    for query in _queries(series):
        panel = panel.with_target(query)
    for each in series:
        if each.name in COLORS:
            color = {"mode": "fixed", "fixedColor": COLORS[each.name]}
            panel = panel.override_by_name(each.name, [model.DynamicConfigValue("color", color)])
    return panel


def number(
    title: str, unit: str, description: str, series: Series, steps: tuple[tuple[float | None, str], ...] = ()
) -> stat.Panel:
    """A panel with one number, coloured by (from, colour) steps."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(3)
        .height(4)
        .color_mode(common_model.BigValueColorMode.VALUE)
        .graph_mode(common_model.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(model.ThresholdsMode.ABSOLUTE)
            .steps([model.Threshold(value, color) for value, color in steps or ((None, "text"),)])
        )
        .with_target(_queries((series,))[0])
    )


def states(title: str, description: str, series: Series) -> statetimeline.Panel:
    """A panel of bars over time, one a line of the query."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(24)
        .height(5)
        .with_target(_queries((series,))[0])
    )


def _queries(series: tuple[Series, ...]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery().expr(each.expr).legend_format(each.name).ref_id(chr(ord("A") + index))
        for index, each in enumerate(series)
    ]


def page(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """An empty page with what all have: the choice of data source and scrape job, and links to the others."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["disagg"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard.DashboardLink("disagg")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["disagg"])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(label_values("job", "Cluster", "disagg_build_info"))
    )


def label_values(name: str, label: str, series: str, *, include_all: bool = False) -> dashboard.QueryVariable:
    """A choice among the values that a label has in a series."""
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({series}, {name})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )
    return variable.include_all(True).multi(True).all_value(".*") if include_all else variable
