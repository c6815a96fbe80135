"""What a metric is, and what the catalogue says it with."""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]
Process = Literal["api", "worker", "relay"]

RUN = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
WAIT = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
HTTP = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""Advised by OpenTelemetry's semantic conventions for HTTP."""
HOOK = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30)
SWEEP = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BYTES = (256, 1024, 4096, 16384, 65536, 262144, 1048576)
SIZE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

API: Final = "api"
WORKER: Final = "worker"
RELAY: Final = "relay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        name: as queries write it; for a histogram without its suffixes.
        labels: in the order in which values are given.
        exported_by: the processes. What several count is added up; what is a state is of one, take the maximum.
        says: what it is, for the exposition and the catalogue page.
        do: what to do when it looks wrong.
        buckets: upper bounds; of a histogram only.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()
    exported_by: tuple[Process, ...]
    says: str
    do: str
    buckets: tuple[float, ...] = ()
