"""The instruments behind the catalogue: counts and distributions that only grow, gauges that can go away.

They are ours, not those of Prometheus's client, for the price of a scrape: a
worker with a hundred tasks has more than ten thousand samples, of which the
client's instruments and its text take longer than a scrape should. What a
series is called is put together once here, when it is first seen.
"""

import itertools
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.utils import floatToGoString

from app.core.metrics.catalogue import METRICS, Metric

Labels = tuple[str, ...]
Values = Mapping[tuple[str, Labels], float]
"""Values by the name of the metric and its labels."""
Line = tuple[str, float, str]
"""A sample: what it is called, its value, and an example of it, as OpenMetrics writes one."""


class Instrument(Protocol):
    """What can be shown."""

    def lines(self) -> Iterable[Line]:
        """Its samples, in the order of the exposition."""
        ...


def escaped(value: str) -> str:
    """The value of a label, or a help text, as the exposition has it."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _called(name: str, labels: Iterable[tuple[str, str]]) -> str:
    pairs = ",".join(f'{label}="{escaped(value)}"' for label, value in labels)
    return f"{name}{{{pairs}}}" if pairs else name


class Counts:
    """A counter, by labels."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._guard = threading.Lock()
        self._values: dict[Labels, float] = {}
        self._names: dict[Labels, str] = {}

    def count(self, *labels: str, by: float = 1.0) -> None:
        """Add; by 0 the counter appears."""
        with self._guard:
            if labels not in self._values:
                self._names[labels] = _called(self._metric.name, zip(self._metric.labels, labels, strict=True))
            self._values[labels] = self._values.get(labels, 0.0) + by

    def reach(self, *labels: str, value: float) -> None:
        """Be this much at least: somebody else counts."""
        self.count(*labels, by=max(0.0, value - self._values.get(labels, 0.0)))

    def lines(self) -> Iterable[Line]:
        """As `Instrument`."""
        with self._guard:
            return [(self._names[labels], value, "") for labels, value in self._values.items()]


@dataclass(slots=True)
class _Distribution:
    """One series of a histogram: how many values were in each bucket, the last of which has no bound."""

    names: tuple[str, ...]
    counts: list[int]
    total: float = 0.0
    examples: dict[int, str] = field(default_factory=dict)


class Distributions:
    """A histogram, by labels."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._guard = threading.Lock()
        self._series: dict[Labels, _Distribution] = {}

    def observe(self, value: float, *labels: str, trace_id: str | None = None) -> None:
        """Add a value; with the trace that is an example of it, if there is one."""
        bucket = bisect_left(self._metric.buckets, value)
        with self._guard:
            series = self._series.get(labels) or self._begun(labels)
            series.counts[bucket] += 1
            series.total += value
            if trace_id is not None:
                series.examples[bucket] = f' # {{trace_id="{trace_id}"}} {value!r} {time.time():.3f}'

    def expect(self, *labels: str) -> None:
        """Have the histogram appear, with nothing in it: of a series that begins with a value, nobody sees it grow."""
        with self._guard:
            if labels not in self._series:
                self._begun(labels)

    def _begun(self, labels: Labels) -> _Distribution:
        name, given = self._metric.name, list(zip(self._metric.labels, labels, strict=True))
        every = (*self._metric.buckets, float("inf"))
        bounds = [floatToGoString(bound) for bound in every]  # type: ignore[no-untyped-call]  # as it is
        names = [_called(f"{name}_bucket", [*given, ("le", bound)]) for bound in bounds]
        names += [_called(f"{name}_count", given), _called(f"{name}_sum", given)]
        self._series[labels] = _Distribution(tuple(names), [0] * len(bounds))
        return self._series[labels]

    def lines(self) -> Iterable[Line]:
        """As `Instrument`."""
        with self._guard:
            copies = [(one.names, list(one.counts), one.total, dict(one.examples)) for one in self._series.values()]
        for names, counts, total, examples in copies:
            *reached, all_of_them = itertools.accumulate(counts)
            for bucket, (name, value) in enumerate(zip(names, (*reached, all_of_them), strict=False)):
                yield name, value, examples.get(bucket, "")
            yield names[-2], all_of_them, ""
            yield names[-1], total, ""


class Gauges:
    """What is now. A value that is not known any more is taken away: a 0 would look like an empty queue.

    Values that are learnt together are a group, and go together.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._groups: dict[str, Values] = {}
        self._own: dict[tuple[str, Labels], float] = {}
        self._asked: dict[str, Callable[[], Values]] = {}

    def show(self, name: str, labels: Labels, value: float) -> None:
        """Show a value from now on."""
        _check(name, labels)
        with self._guard:
            self._own[name, labels] = value

    def add(self, name: str, labels: Labels, difference: float) -> None:
        """Change a value, which is 0 at first."""
        key = name, labels
        with self._guard:
            self._own[key] = self._own.get(key, 0.0) + difference

    def show_group(self, group: str, values: Values) -> None:
        """Show these values, and of the same group no others."""
        for name, labels in values:
            _check(name, labels)
        with self._guard:
            self._groups[group] = values

    def hide_group(self, group: str) -> None:
        """Show nothing of a group."""
        with self._guard:
            self._groups.pop(group, None)

    def ask(self, group: str, values: Callable[[], Values]) -> Callable[[], None]:
        """Ask for the values of a group whenever somebody looks. Returns what ends it."""
        with self._guard:
            self._asked[group] = values

        def end() -> None:
            with self._guard:
                if self._asked.get(group) is values:
                    del self._asked[group]

        return end

    def values(self) -> dict[str, dict[Labels, float]]:
        """All that is shown, by metric and labels."""
        with self._guard:
            asked = list(self._asked.values())
            found = [dict(self._own), *self._groups.values()]
        shown: dict[str, dict[Labels, float]] = {}
        for values in (*found, *(ask() for ask in asked)):
            for (name, labels), value in values.items():
                shown.setdefault(name, {})[labels] = value
        return shown


def _check(name: str, labels: Labels) -> None:
    metric = BY_NAME[name]
    if metric.kind != "gauge" or len(labels) != len(metric.labels):
        raise ValueError(f"{name} is no gauge with {len(labels)} labels")


BY_NAME = {metric.name: metric for metric in METRICS}
COUNTS = {metric.name: Counts(metric) for metric in METRICS if metric.kind == "counter"}
DISTRIBUTIONS = {metric.name: Distributions(metric) for metric in METRICS if metric.kind == "histogram"}
GAUGES = Gauges()


def lines_of(metrics: Iterable[Metric]) -> Iterator[tuple[Metric, list[Line]]]:
    """The samples of those of these metrics that have any."""
    gauges = GAUGES.values()
    for metric in metrics:
        if metric.kind == "gauge":
            shown = gauges.get(metric.name, {})
            lines = [
                (_called(metric.name, zip(metric.labels, labels, strict=True)), value, "")
                for labels, value in shown.items()
            ]
        else:
            instrument: Instrument = COUNTS.get(metric.name) or DISTRIBUTIONS[metric.name]
            lines = list(instrument.lines())
        if lines:
            yield metric, lines


class Few:
    """Keeps the first so many words apart, and calls all others by one name: labels must not grow without end."""

    def __init__(self, most: int, *, others: str) -> None:
        self._most = most
        self._others = others
        self._known: set[str] = set()

    def __call__(self, word: str) -> str:
        """The word, or the name of all others."""
        if word in self._known:
            return word
        if not word or len(self._known) >= self._most:
            return self._others
        self._known.add(word)
        return word
