"""From our values to Grafana's JSON, by way of Grafana's own builders: they know the schema."""

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from k8s.observability.panels import NAMESPACE, Page, Panel, Query, Variable

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "taskqueue"
SMALL_HEIGHT, HEIGHT = 4, 8
"""Of a stat and of any other panel, in the rows of Grafana's grid."""

AnyPanel = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel


def render(page: Page) -> str:
    """The dashboard as Grafana imports it: JSON, the same for the same page, with a final newline."""
    built = (
        builders.Dashboard(page.title)
        .uid(page.uid)
        .description(page.says)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(_siblings())
        .annotation(_rollouts())
        .with_variable(_datasource())
        .with_variable(
            _choice(Variable(name="namespace", label="Namespace", metric="taskqueue_build_info", single=True))
        )
    )
    for variable in page.variables:
        built.with_variable(_choice(variable))
    numbers = itertools.count(1)
    for row in page.rows:
        built.with_row(builders.Row(row.title).id(next(numbers)))
        for panel in row.panels:
            built.with_panel(_panel(panel).id(next(numbers)))
    written = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    for one in [*written["links"], *written["annotations"]["list"]]:
        del one["placement"]  # the builders know of no other place than a menu, where nobody looks
    return json.dumps(written, indent=2, sort_keys=True) + "\n"


def _siblings() -> builders.DashboardLink:
    """To the other dashboards, with the same choice and time."""
    return (
        builders.DashboardLink("Task queue")
        .type(dashboard.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )


def _rollouts() -> builders.AnnotationQuery:
    """A mark where a build is seen that was not there two minutes before."""
    builds = f"max by (version, revision) (taskqueue_build_info{{{NAMESPACE}}}"
    return (
        builders.AnnotationQuery()
        .name("Rollouts")
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color("blue")
        .expr(f"{builds}) unless on (version, revision) {builds} offset 2m)")
        .step("60s")
        .title_format("Rollout")
        .text_format("{{version}} {{revision}}")
    )


def _datasource() -> builders.DatasourceVariable:
    return builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _choice(variable: Variable) -> builders.QueryVariable:
    query = f"label_values({variable.metric}, {variable.name})"
    choice = (
        builders.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATASOURCE)
        .query({"query": query, "refId": variable.name})
        .definition(query)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    )
    return choice if variable.single else choice.multi(True).include_all(True).all_value(".*").current(_ALL)


_ALL = dashboard.VariableOption(selected=True, text="All", value="$__all")


def _panel(panel: Panel) -> AnyPanel:
    built = _BY_KIND[panel.kind](panel)
    built.title(panel.title).description(panel.says).datasource(DATASOURCE).span(panel.width)
    built.height(SMALL_HEIGHT if panel.kind == "stat" else HEIGHT)
    if panel.kind != "heatmap":
        built.unit(panel.unit)
    if panel.steps:
        built.thresholds(_thresholds(panel))
    for place, query in enumerate(panel.queries):
        built.with_target(_target(query, place, panel))
    return built


def _target(query: Query, place: int, panel: Panel) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(DATASOURCE).ref_id(chr(ord("A") + place)).expr(query.expr)
    if panel.kind == "table":
        return target.format(PromQueryFormat.TABLE).instant()
    if panel.kind == "heatmap":
        return target.format(PromQueryFormat.HEATMAP).range().legend_format("{{le}}")
    target.legend_format(query.legend)
    if query.exemplars:
        target.exemplar(True)
    return target.instant() if panel.kind == "stat" else target.range()


def _thresholds(panel: Panel) -> builders.ThresholdsConfig:
    steps = [dashboard.Threshold(value=bound, color=colour) for bound, colour in panel.steps]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _lines(panel: Panel) -> AnyPanel:
    legend = (
        common_builders.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    lines = (
        timeseries.Panel()
        .legend(legend)
        .tooltip(tooltip.sort(common.SortOrder.DESCENDING))
        .min(0)
        .line_width(1)
        .show_points(common.VisibilityMode.NEVER)
        .fill_opacity(10)
    )
    if panel.steps:
        lines.thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    if panel.kind == "stacked":
        stacked = common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A")
        lines.stacking(stacked).fill_opacity(60)
    return lines


def _stat(panel: Panel) -> AnyPanel:
    del panel
    last = common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    return stat.Panel().reduce_options(last).graph_mode(common.BigValueGraphMode.NONE)


def _heatmap(panel: Panel) -> AnyPanel:
    axis = heatmap.YAxisConfig().unit(panel.unit)
    return heatmap.Panel().calculate(False).y_axis(axis).color(heatmap.HeatmapColorOptions().scheme("Blues").steps(32))


def _table(panel: Panel) -> AnyPanel:
    *labels, value = panel.columns
    hidden = {name: True for name in ("Time", "__name__") if name not in labels}
    options: Mapping[str, Any] = {
        "excludeByName": hidden,
        "indexByName": {name: place for place, name in enumerate([*labels, "Value"])},
        "renameByName": {"Value": value},
    }
    organised = dashboard.DataTransformerConfig(id_val="organize", options=options)
    return table.Panel().with_transformation(organised)


_BY_KIND: Mapping[str, Callable[[Panel], AnyPanel]] = {
    "lines": _lines,
    "stacked": _lines,
    "stat": _stat,
    "heatmap": _heatmap,
    "table": _table,
}
