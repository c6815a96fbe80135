"""The catalogue as a page, `docs/metrics.md`: `python -m app.core.metrics.page` prints it."""

import sys
from collections.abc import Iterable

from app.core.metrics import catalogue
from app.core.metrics.catalogue import PARTS, Metric

_HEAD = """# Metrics

<!-- Written by `make metrics` from app/core/metrics/catalogue.py; a test compares the two. -->

Each process serves its own at `/metrics` on `TASKQUEUE_METRICS_PORT`, in Prometheus's text format or as OpenMetrics.
Without a port a process counts nothing. The port is for the monitoring, not for strangers: it asks nobody who they are.

- **Counters and histograms** count what one process did. Add the processes up: `sum by (…) (rate(…))`.
- **The state of the queues and webhooks** is exported by the relays alone, and each of them exports all of it. Take the
  maximum: `max by (…) (…)`. What can't be read is not shown; a 0 is a 0.
- A worker's metrics are those of its whole pool. Its children tell the keeper beside them what happened, and the keeper
  counts: no files, and nothing that grows when children are replaced. `kill -9` of a child loses at most what it was
  about to tell. When the keeper is replaced the counters begin anew, which `rate()` knows from any restart.
- `process_…` metrics are those of the process itself; of a worker, of its main process.
- The histogram of requests has the id of a trace as an example (an exemplar) where traces are recorded.

What is known beforehand (tasks, queues, outcomes) is there from the start, at 0. No label has a value that a client can
make up: `task` and `queue` are `unknown` beyond the first 1,000 and 200 of a process, `exception` is `other` beyond the
first 100. With a hundred tasks a worker exports a few thousand series.

| label | values |
|---|---|
"""


def _labels() -> Iterable[tuple[str, Iterable[str]]]:
    yield "`outcome` of attempts", catalogue.ATTEMPT_OUTCOMES
    yield "`outcome` of tasks", catalogue.TASK_OUTCOMES
    yield "`reason` of rejected submits", catalogue.REJECTIONS
    yield "`state` of tasks", catalogue.STATES
    yield "`reason` of what was recovered", catalogue.RECOVERIES


def page() -> str:
    """The page, as Markdown."""
    lines = [_HEAD.rstrip()]
    lines += [f"| {label} | {', '.join(f'`{value}`' for value in values)} |" for label, values in _labels()]
    for title, metrics in PARTS.items():
        lines += ["", f"## {title}", "", "| metric | what it says | what to do |", "|---|---|---|"]
        lines += [_row(metric) for metric in metrics]
    return "\n".join(lines) + "\n"


def _row(metric: Metric) -> str:
    labels = f"{{{', '.join(metric.labels)}}}" if metric.labels else ""
    buckets = f" up to {metric.buckets[-1]:,}" if metric.buckets else ""
    kind = f"{metric.kind}{buckets}, of {', '.join(metric.exported_by)}"
    return f"| `{metric.name}{labels}`<br>{kind} | {metric.says} | {metric.do} |"


if __name__ == "__main__":
    sys.stdout.write(page())
