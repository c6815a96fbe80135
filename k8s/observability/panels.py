"""What a dashboard is made of, as values: queries, panels, rows. `rendering` makes Grafana's JSON of it.

A metric of a process is added up over the processes; the state of the cluster is
exported by every relay and is one and the same, so of that the maximum is taken.
"""

from dataclasses import dataclass
from typing import Literal

NAMESPACE = 'namespace="$namespace"'
API = f'{NAMESPACE},job=~"$job"'
"""The API's HTTP metrics have names that others use too."""
QUEUE = f'{NAMESPACE},queue=~"$queue"'
TASK = f'{NAMESPACE},task=~"$task"'
QUEUE_TASK = f'{QUEUE},task=~"$task"'

Kind = Literal["lines", "stacked", "stat", "heatmap", "table"]
Colour = Literal["green", "orange", "red"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One PromQL expression.

    Attributes:
        expr: it may hold Grafana's variables.
        legend: what its series are called; `{{label}}` is the label's value.
        exemplars: whether exemplars are shown, which lead to traces.
    """

    expr: str
    legend: str = ""
    exemplars: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        says: what it shows, and what to do when it looks wrong.
        unit: as Grafana calls it.
        queries: of a heatmap or a table, one.
        width: in 24ths of the page.
        steps: where a colour begins; the first has no bound.
        columns: of a table: the labels in their order, then what the value is called.
    """

    title: str
    says: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    steps: tuple[tuple[float | None, Colour], ...] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """Values of a label among which the reader chooses; all of them at first, unless it is `single`."""

    name: str
    label: str
    metric: str
    single: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One dashboard.

    Attributes:
        file: its name in the chart, without the ending; a ConfigMap is called by it.
        uid: never changes, so links stay good.
        variables: besides the data source and the namespace.
    """

    file: str
    uid: str
    title: str
    says: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


QUEUE_VARIABLE = Variable(name="queue", label="Queue", metric=f"taskqueue_queue_depth{{{NAMESPACE}}}")
TASK_VARIABLE = Variable(name="task", label="Task", metric=f"taskqueue_task_attempts_started_total{{{NAMESPACE}}}")
JOB_VARIABLE = Variable(
    name="job",
    label="API job",
    metric=f'http_server_request_duration_seconds_count{{{NAMESPACE},http_route="/api/tasks/submit"}}',
)


def rate(metric: str, by: str, scope: str) -> str:
    """How often a second a counter grows, over all processes."""
    return f"sum by ({by}) (rate({metric}{{{scope}}}[$__rate_interval]))"


def increase(metric: str, by: str, scope: str) -> str:
    """By how much a counter grew in the time that is shown, over all processes."""
    return f"sum by ({by}) (increase({metric}{{{scope}}}[$__range]))"


def most(metric: str, by: str, scope: str) -> str:
    """A state of the cluster, which each relay exports."""
    return f"max by ({by}) ({metric}{{{scope}}})" if by else f"max({metric}{{{scope}}})"


def total(metric: str, by: str, scope: str) -> str:
    """A state of processes, over all of them."""
    return f"sum by ({by}) ({metric}{{{scope}}})"


def share(part: str, whole: str) -> str:
    """Which share of `whole` is `part`: 0 if nothing is, and no value while there is no whole."""
    return f"({part} or 0 * {whole}) / {whole}"


def quantiles(metric: str, scope: str, *, by: str = "", legend: str = "") -> tuple[Query, ...]:
    """The median, the 95th and the 99th percentile of a histogram over all processes."""
    labels = f"le, {by}" if by else "le"
    return tuple(
        Query(
            expr=f"histogram_quantile({value}, sum by ({labels}) (rate({metric}_bucket{{{scope}}}[$__rate_interval])))",
            legend=f"{legend} p{name}".strip(),
        )
        for value, name in ((0.5, "50"), (0.95, "95"), (0.99, "99"))
    )


def quantile(value: float, metric: str, by: str, scope: str) -> str:
    """One quantile of a histogram for each value of the labels `by`, over all processes."""
    return f"histogram_quantile({value}, sum by (le, {by}) (rate({metric}_bucket{{{scope}}}[$__rate_interval])))"
