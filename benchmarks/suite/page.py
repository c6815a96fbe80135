"""A run as a page, `docs/performance.md`: rendered from the run's JSON alone, so that the two can be compared."""

from collections.abc import Iterable, Sequence

from benchmarks.suite import figures
from benchmarks.suite.figures import Measure, Report

_HEAD = """# Performance

<!-- Written by `make bench` from docs/performance.json; a test compares the two. -->

What this service does in a second, beside what one would use instead (a *peer*) and beside what can't be beaten with
these tools (a *limit*). Everything was durable on our side: each `202` is a commit, each result is in Postgres before
anybody hears of it. Telemetry was off, as were metrics where it does not say `counting`; there were no API keys.

## How to read it

- **Ratios count, not times.** All sides ran on one Postgres (`fsync` on) and one Redis (append-only file, synced every
  second) of one machine, in the same run, taking turns round by round. Each figure is the median of its rounds. A ratio
  is the median of the ratios of the rounds, ours by theirs, so the drift of the machine meets both alike.
- For rates more is better and the target is *at least*; for times, CPU and memory less is better, and it is *at most*.
- **The tutorial** is FastAPI with an async SQLModel row, `delay()` and `AsyncResult`, and an httpx client for each
  webhook. **The empty route** is FastAPI with the same body model, served as our API is, and does nothing at all.
- **No-op tasks**: ours with two pool children and a durable result; Celery as it comes, with two; the others as their
  documentation advises for two cores. Only procrastinate is as durable as ours, and it keeps no results.
- **Latencies** are those of one task after another. Whoever polls asks again as soon as it is answered.
- **Memory** is the proportional set size (PSS) of one process after some thousand tasks.
- The load comes from one process that shares the machine's cores with what it measures, and costs little.

## How to repeat it

`make bench` starts all that it needs and writes this page and `docs/performance.json`, which has every figure of every
round; filling a database with millions of rows takes most of its time. `make bench-quick` leaves that out, takes
three minutes on a machine that does nothing else, and writes nothing.
`make bench BENCH_ARGS="--only submit"` measures one thing: {names}. The peers are installed into an environment of
their own from `requirements/bench.txt`; those that can't be had are left out. Let nothing else run meanwhile.
"""

_COSTS = """## What costs what

CPU time of the processes themselves, which repeats better than times on the clock. What is above the empty route is
validating, one durable INSERT and one message to Redis.
"""

HEADINGS = ("measure", "ours", "against", "", "its figure", "ratio", "of the rounds", "target", "")


def page(report: Report, names: Iterable[str]) -> str:
    """The page, as Markdown.

    Args:
        report: the run.
        names: what can be measured alone.
    """
    costs = [one for one in report.measures if one.unit == "µs" and "rows wait" not in one.name]
    rest = [one for one in report.measures if one not in costs]
    lines = [_HEAD.format(names=", ".join(f"`{name}`" for name in names)).rstrip(), "", "## The run", ""]
    lines += [*_facts(report), "", "## Figures", "", *table(rest), "", *_COSTS.rstrip().splitlines(), "", *table(costs)]
    if report.skipped:
        lines += ["", "## Left out", "", *(f"- {name}: {reason}" for name, reason in report.skipped.items())]
    return "\n".join(lines) + "\n"


def _facts(report: Report) -> list[str]:
    machine, options = report.machine, report.options
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quick = "A quick run: " if options["quick"] else ""
    load = ", ".join(f"{value:g}" for value in machine["load before"])
    return [
        f"- {machine['cores']} cores ({machine['architecture']}), {machine['system']}, Python {machine['python']},",
        f"  Postgres {machine['postgres']} (fsync {machine['fsync']}), Redis {machine['redis']}",
        f"- {versions}",
        f"- {quick}{options['rounds']} rounds, {options['seconds']:g} s of each load",
        f"- The load average of the machine before it began: {load}."
        + (" Others were using the machine: take the figures as provisional." if machine["load before"][0] > 1 else ""),
        *([f"- {options['note']}"] if "note" in options else []),
    ]


def table(measures: Sequence[Measure]) -> list[str]:
    """The lines of these measures, as a table of Markdown."""
    rows: list[tuple[str, ...]] = [HEADINGS, ("---", "--:", "---", "---", "--:", "--:", "--:", "---", "---")]
    for measure in measures:
        before = None
        for line in figures.lines(measure):
            *start, ratio, target, verdict = figures.cells(line, before=before)
            rows.append((*start, ratio, figures.spread(measure, line.against), target, verdict))
            before = line
    return [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows]
