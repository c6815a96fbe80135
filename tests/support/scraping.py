"""What a process exports, as Prometheus reads it."""

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from app.core.metrics import catalogue, exposition
from app.dev import ports


class Scrape:
    """The samples of one look."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://{ports.ADDRESS}:{port}/metrics", timeout=10) as answer:
            self.text = answer.read().decode()
        families = text_string_to_metric_families(self.text)
        self.samples: list[Sample] = [sample for family in families for sample in family.samples]

    def of(self, name: str, **labels: str) -> list[Sample]:
        """The samples of this name that have these labels, among others perhaps."""
        return [one for one in self.samples if one.name == name and labels.items() <= one.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        """Their sum; 0 if there are none."""
        return sum(one.value for one in self.of(name, **labels))

    def series(self) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        """All there are, without their values."""
        return {(one.name, frozenset(one.labels.items())) for one in self.samples}

    def by(self, name: str, label: str) -> Mapping[str, float]:
        """The values of a metric that are not 0, by one of its labels."""
        return {one.labels[label]: one.value for one in self.of(name) if one.value}


def sampled(name: str, **labels: str) -> float | None:
    """What this process itself has of a series; None if there is none."""
    [metric] = [one for one in catalogue.METRICS if name in {one.name, *(f"{one.name}_{end}" for end in _ENDS)}]
    text = exposition.exposition(metric.exported_by[0], openmetrics=False)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return None


_ENDS = ("bucket", "count", "sum")
