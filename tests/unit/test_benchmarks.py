"""The pure parts of the benchmark suite: what is made of the figures, and the page."""

import json
from pathlib import Path

import pytest

from benchmarks.suite import __main__ as suite
from benchmarks.suite import figures, load, page
from benchmarks.suite.figures import OURS, Comparison, Measure, Report, Target

ROOT = Path(__file__).parents[2]
SUBMITS = Measure(
    name="submits",
    unit="1/s",
    figures={OURS: [900.0, 1100.0, 1000.0], "empty": [1000.0, 1000.0, 2000.0], "tutorial": [100.0, 100.0, 100.0]},
    comparisons=[
        Comparison(side="tutorial", kind="peer", target=Target(at_least=18)),
        Comparison(side="empty", kind="limit", target=Target(at_least=0.85, moonshot=1.0)),
        Comparison(side="absent", kind="peer"),
    ],
)
MEMORY = Measure(
    name="memory",
    unit="MiB",
    figures={OURS: [69.0, 71.0, 70.0]},
    comparisons=[Comparison(side=None, kind="own", target=Target(at_most=90))],
)
MACHINE = {
    "cores": 2,
    "architecture": "x86_64",
    "system": "Linux 6.18",
    "python": "3.11.7",
    "postgres": "15.1",
    "fsync": "on",
    "redis": "6.2.9",
    "load before": [0.1, 0.2, 0.3],
    "versions": {"celery": "5.7.0"},
}


def _report() -> Report:
    options = {"quick": False, "rounds": 3, "seconds": 2.0, "measures": ["submit"]}
    return Report(machine=MACHINE, options=options, measures=[SUBMITS, MEMORY], skipped={"arq": "the index lacks it"})


@pytest.mark.parametrize(
    ("part", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)], ids=["median", "p99", "most", "least"]
)
def test_a_percentile_is_one_of_the_values_and_exceeds_no_smaller_part(part: float, expected: int) -> None:
    assert figures.percentile([float(value) for value in range(100, 0, -1)], part) == expected


def test_the_percentile_of_one_value_is_that_value() -> None:
    assert figures.percentile([7.0], 0.99) == 7.0


def test_the_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_the_medians() -> None:
    assert figures.ratio(SUBMITS.figures[OURS], SUBMITS.figures["empty"]) == 0.9


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target(at_least=0.85), 0.85, True),
        (Target(at_least=0.85), 0.84, False),
        (Target(at_most=3), 3.0, True),
        (Target(at_most=3), 3.01, False),
        (Target(at_least=0.85), 0.846, True),  # it is shown as 0.85
    ],
)
def test_a_target_holds_for_what_is_shown(target: Target, value: float, met: bool) -> None:
    assert target.met_by(value) is met


def test_a_line_holds_our_median_against_that_of_another_side() -> None:
    peer, limit = figures.lines(SUBMITS)

    assert (peer.ours, peer.against, peer.theirs, peer.ratio, peer.verdict) == (
        "1,000 1/s", "tutorial", "100 1/s", "10.00", "over",
    )  # fmt: skip
    assert (limit.theirs, limit.ratio, limit.target, limit.verdict) == (
        "1,000 1/s", "0.90", "≥ 0.85 (moonshot 1)", "met",
    )  # fmt: skip


def test_a_side_that_is_not_there_has_no_line() -> None:
    assert "absent" not in {line.against for line in figures.lines(SUBMITS)}


def test_a_figure_alone_is_held_against_its_target() -> None:
    [line] = figures.lines(MEMORY)

    assert (line.ours, line.ratio, line.target, line.verdict) == ("70.0 MiB", "", "≤ 90 MiB", "met")


def test_a_measure_without_ours_is_shown_without_a_verdict() -> None:
    alone = Measure(
        name="it",
        unit="1/s",
        figures={"empty": [1.0]},
        comparisons=[Comparison(side="empty", kind="limit", target=Target(at_least=1))],
    )

    [line] = figures.lines(alone)

    assert (line.ours, line.theirs, line.ratio, line.verdict) == ("", "1.00 1/s", "", "")


def test_the_table_names_each_measure_once_and_its_columns_line_up() -> None:
    head, *rows = figures.table([SUBMITS, MEMORY]).splitlines()

    assert [row.split()[0] for row in rows] == ["submits", "empty", "memory"]
    assert (
        len({row.index(word) for row, word in zip([head, *rows], ["against", "tutorial", "empty"], strict=False)}) == 1
    )


def test_a_report_is_the_same_after_it_was_written_and_read() -> None:
    text = suite.written(_report())

    assert Report.of(json.loads(text)).plain() == json.loads(text) == json.loads(json.dumps(_report().plain()))
    assert '"tutorial": [100.0, 100.0, 100.0]' in text


def test_the_page_shows_every_line_and_what_was_left_out() -> None:
    shown = page.page(_report(), ["submit"])

    assert "| submits | 1,000 1/s | tutorial | peer | 100 1/s | 10.00 | 9.00…11.00 | ≥ 18 | over |" in shown
    assert "| | | empty | limit | 1,000 1/s | 0.90 | 0.50…1.10 | ≥ 0.85 (moonshot 1) | met |" in shown
    assert "- arq: the index lacks it" in shown
    assert "provisional" not in shown


def test_a_busy_machine_is_told_of() -> None:
    report = _report()
    report.machine = MACHINE | {"load before": [7.5, 3.0, 2.0]}

    assert "provisional" in page.page(report, ["submit"])


def test_the_page_is_what_the_checked_in_figures_render_to() -> None:
    report = Report.of(json.loads((ROOT / "docs/performance.json").read_text()))

    assert (ROOT / "docs/performance.md").read_text() == page.page(report, suite.MEASURES), "run make bench"


def test_a_request_names_the_length_of_its_body_in_bytes() -> None:
    head, body = load.request("POST", "/x", {"a": "ü"}).split("\r\n\r\n")

    assert f"content-length: {len(body.encode())}" in head
    assert load.request("GET", "/x") == "GET /x HTTP/1.1\r\nhost: api\r\n\r\n"
