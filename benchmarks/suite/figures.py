"""What was measured, and what it is held against: pure, so that the page and the table say the same.

A measure has one figure a round for every side. Sides are measured in turns, so
the ratio that counts is the median of the ratios round by round: the drift of
the machine meets both alike.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

OURS = "ours"
Kind = Literal["peer", "limit", "own"]
"""What somebody would pick instead; what can't be beaten; or ourselves under other circumstances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a ratio is to be: no less, or no more than this. `moonshot` would be better still."""

    at_least: float | None = None
    at_most: float | None = None
    moonshot: float | None = None

    def met_by(self, value: float) -> bool:
        """Whether a value, as the table shows it, is good enough."""
        shown = round(value, 2)
        return (self.at_least is None or shown >= self.at_least) and (self.at_most is None or shown <= self.at_most)

    def __str__(self) -> str:
        wanted = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        return wanted if self.moonshot is None else f"{wanted} (moonshot {self.moonshot:g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One side that ours is held against; none of `side` holds our own figure against the target."""

    side: str | None
    kind: Kind
    target: Target | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """The figures of all sides, one a round each.

    Attributes:
        name: what was measured.
        unit: of every figure, such as `1/s`, `ms`, `MiB`.
        figures: by side; `ours` among them.
        comparisons: in the order of the table.
    """

    name: str
    unit: str
    figures: Mapping[str, Sequence[float]]
    comparisons: Sequence[Comparison] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table, as it is shown."""

    measure: str
    ours: str
    against: str
    kind: str
    theirs: str
    ratio: str
    target: str
    verdict: Literal["met", "over", ""]


@dataclass(slots=True, kw_only=True)
class Report:
    """A whole run.

    Attributes:
        machine: cores, versions, and under which load it ran.
        options: how it was asked for.
        skipped: sides that were left out, and why.
    """

    machine: dict[str, Any]
    options: dict[str, Any]
    measures: list[Measure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Report":
        """What `plain` gave."""
        return cls(
            machine=dict(plain["machine"]),
            options=dict(plain["options"]),
            skipped=dict(plain["skipped"]),
            measures=[_measure(one) for one in plain["measures"]],
        )


def _measure(plain: Mapping[str, Any]) -> Measure:
    comparisons = [
        Comparison(side=one["side"], kind=one["kind"], target=one["target"] and Target(**one["target"]))
        for one in plain["comparisons"]
    ]
    return Measure(name=plain["name"], unit=plain["unit"], figures=plain["figures"], comparisons=comparisons)


def percentile(values: Sequence[float], part: float) -> float:
    """The least of these values that so large a part of them does not exceed (nearest rank).

    Args:
        values: in any order, at least one.
        part: above 0, up to 1.
    """
    return sorted(values)[max(0, math.ceil(len(values) * part - 1e-9) - 1)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios, round by round."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def spread(measure: Measure, against: str) -> str:
    """The least and the greatest of the ratios, as the page shows them; nothing if there is no such side."""
    if against not in measure.figures or OURS not in measure.figures:
        return ""
    pairs = zip(measure.figures[OURS], measure.figures[against], strict=True)
    ratios = [one / other for one, other in pairs]
    return f"{min(ratios):.2f}…{max(ratios):.2f}"


def lines(measure: Measure) -> list[Line]:
    """The lines of one measure: one for each comparison, or one that shows our figure alone."""
    ours = measure.figures.get(OURS)
    shown = "" if ours is None else _figure(statistics.median(ours), measure.unit)
    found = [
        _line(measure, shown, one) for one in measure.comparisons if one.side is None or one.side in measure.figures
    ]
    return found or [
        Line(measure=measure.name, ours=shown, against="", kind="", theirs="", ratio="", target="", verdict="")
    ]


def _line(measure: Measure, shown: str, comparison: Comparison) -> Line:
    theirs, value = "", None
    if comparison.side is not None:
        figures = measure.figures[comparison.side]
        theirs = _figure(statistics.median(figures), measure.unit)
        value = ratio(measure.figures[OURS], figures) if OURS in measure.figures else None
    target = comparison.target
    held = value if comparison.side is not None else statistics.median(measure.figures[OURS])
    return Line(
        measure=measure.name,
        ours=shown,
        against=comparison.side or "",
        kind=comparison.kind if comparison.side is not None else "",
        theirs=theirs,
        ratio="" if value is None else f"{value:.2f}",
        target="" if target is None else str(target) + ("" if comparison.side is not None else f" {measure.unit}"),
        verdict="" if target is None or held is None else "met" if target.met_by(held) else "over",
    )


def _figure(value: float, unit: str) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2  # noqa: PLR2004  # three figures are shown
    return f"{value:,.{digits}f} {unit}"


HEADINGS = ("measure", "ours", "against", "", "its figure", "ratio", "target", "")


def cells(line: Line, *, before: Line | None) -> tuple[str, ...]:
    """The cells of a line; what the line before says already is left out."""
    again = before is not None and before.measure == line.measure
    return (
        "" if again else line.measure,
        "" if again else line.ours,
        line.against,
        line.kind,
        line.theirs,
        line.ratio,
        line.target,
        line.verdict,
    )


def rows(measures: Iterable[Measure]) -> list[tuple[str, ...]]:
    """All lines of all measures, as cells."""
    found = [line for measure in measures for line in lines(measure)]
    return [cells(line, before=before) for line, before in zip(found, [None, *found], strict=False)]


def table(measures: Iterable[Measure]) -> str:
    """The table for a terminal."""
    shown = [HEADINGS, *rows(measures)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(HEADINGS))]
    right = {1, 4, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    )
