"""A panel in few words, and what Grafana wants to read: written with Grafana's own foundation SDK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as dashboard_builder
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.dashboard import Dashboard, DataSourceRef, Threshold, ThresholdsMode

DATA_SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
"""The data source of deploy/grafana/provisioning."""


@dataclass(frozen=True)
class Panel:
    """A title, queries with their legends, a unit of Grafana's, and a sentence for those who wonder."""

    title: str
    queries: dict[str, str]
    """Legend -> PromQL; legends may hold `{{label}}`."""
    unit: str = "short"
    kind: Literal["lines", "stat", "table"] = "lines"
    text: str = ""
    width: int = 8
    height: int = 7
    red_above: float | None = None
    red_below: float | None = None
    needs: Literal["", "GPU"] = ""
    """`GPU` where only a machine with one gives it data; empty for all others."""


@dataclass(frozen=True)
class Board:
    """A dashboard: rows of panels under headings."""

    uid: str
    title: str
    text: str
    rows: dict[str, list[Panel]]
    variables: dict[str, str]
    """Name -> PromQL series that has the label of that name."""

    @property
    def panels(self) -> list[Panel]:
        """All panels, in order."""
        return [panel for panels in self.rows.values() for panel in panels]


def to_json(board: Board) -> str:
    """Return the dashboard as Grafana's provisioning reads it; the same text for the same board."""
    builder = (
        dashboard_builder.Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags(["loraline"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard_builder.DashboardLink("Loraline")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["loraline"])
            .as_dropdown(True)
            .keep_time(True)
        )
        .annotation(_alert_marks())
    )
    for name, series in board.variables.items():
        builder = builder.with_variable(_variable(name, series))
    number, y = 1, 0
    for heading, panels in board.rows.items():
        builder = builder.with_row(dashboard_builder.Row(heading).id(number).grid_pos(_place(0, y, 24, 1)))
        number, x, y, tallest = number + 1, 0, y + 1, 0
        for panel in panels:
            if x + panel.width > 24:
                x, y, tallest = 0, y + tallest, 0
            made = _panel(panel).id(number).grid_pos(_place(x, y, panel.width, panel.height))
            builder = builder.with_panel(made)
            number, x, tallest = number + 1, x + panel.width, max(tallest, panel.height)
        y += tallest
    model: Dashboard = builder.build()
    return JSONEncoder(sort_keys=True, indent=2).encode(model) + "\n"


def _place(x: int, y: int, width: int, height: int) -> dashboard.GridPos:
    return dashboard.GridPos(x=x, y=y, w=width, h=height)


def _alert_marks() -> dashboard_builder.AnnotationQuery:
    """Return the marks that show when an alert fired on every graph."""
    return (
        dashboard_builder.AnnotationQuery()
        .name("Alerts")
        .datasource(common.DataSourceRef(type_val="prometheus", uid="prometheus"))
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertstate="firing"}')
    )


def _variable(name: str, series: str) -> dashboard_builder.QueryVariable:
    return (
        dashboard_builder.QueryVariable(name)
        .datasource(common.DataSourceRef(type_val="prometheus", uid="prometheus"))
        .query(f"label_values({series}, {name})")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _panel(panel: Panel) -> Any:
    if panel.kind == "stat":
        made: Any = (
            stat.Panel()
            .graph_mode(common.BigValueGraphMode.AREA)
            .color_mode(common.BigValueColorMode.VALUE)
            .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))
        )
    elif panel.kind == "table":
        made = table.Panel()
    else:
        made = (
            timeseries.Panel()
            .line_width(1.5)
            .fill_opacity(8)
            .show_points(common.VisibilityMode.AUTO)
            .legend(
                common_builder.VizLegendOptions()
                .display_mode(common.LegendDisplayMode.TABLE)
                .placement(common.LegendPlacement.BOTTOM)
                .show_legend(True)
                .calcs(["lastNotNull", "max"])
            )
            .tooltip(
                common_builder.VizTooltipOptions()
                .mode(common.TooltipDisplayMode.MULTI)
                .sort(common.SortOrder.DESCENDING)
            )
        )
    made = made.title(panel.title).description(panel.text).unit(panel.unit).datasource(DATA_SOURCE)
    if panel.red_above is not None or panel.red_below is not None:
        made = made.thresholds(_thresholds(panel))
    if panel.kind == "stat":
        made = made.no_value("none")
    for letter, (legend, query) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend)
        if panel.kind == "table":
            target = target.instant().format(prometheus_table())
        made = made.with_target(target)
    return made


def prometheus_table() -> Any:
    """Return the format of answers that a table shows."""
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    return PromQueryFormat.TABLE


def _thresholds(panel: Panel) -> dashboard_builder.ThresholdsConfig:
    if panel.red_above is not None:
        steps = [Threshold(value=None, color="green"), Threshold(value=panel.red_above, color="red")]
    else:
        steps = [Threshold(value=None, color="red"), Threshold(value=panel.red_below, color="green")]
    return dashboard_builder.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
