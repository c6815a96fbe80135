import math
import re
from pathlib import Path

import pytest

from app import lifecycle
from app.core import backoff
from app.core.statuses import TaskStatus
from app.lifecycle import (
    Budgets,
    Cancelled,
    Crashed,
    Error,
    Failed,
    Interrupted,
    Lost,
    Misfit,
    Outcome,
    RetryAsked,
    Succeeded,
    TimedOut,
    decide,
)

BOOM = Error(type="ValueError", message="boom")

OUTCOMES: list[tuple[Budgets, Outcome, str, str | None, str | None]] = [
    # spent so far, outcome, status, budget billed, error type
    (Budgets(), Succeeded("1"), "SUCCESS", None, None),
    (Budgets(failures=3), Succeeded("1"), "SUCCESS", None, None),
    (Budgets(), Failed(BOOM), "FAILURE", "failures", "ValueError"),
    (Budgets(max_retries=3), RetryAsked(BOOM, 1.0), "RETRY", "failures", "ValueError"),
    (Budgets(failures=2, max_retries=3), RetryAsked(BOOM, 1.0), "RETRY", "failures", "ValueError"),
    (Budgets(failures=3, max_retries=3), RetryAsked(BOOM, 1.0), "FAILURE", "failures", "ValueError"),
    (Budgets(max_retries=0), RetryAsked(BOOM, 1.0), "FAILURE", "failures", "ValueError"),
    (Budgets(failures=1, max_retries=3), RetryAsked(BOOM, 1.0, max_retries=1), "FAILURE", "failures", "ValueError"),
    (Budgets(failures=3, max_retries=3), RetryAsked(BOOM, 1.0, max_retries=9), "FAILURE", "failures", "ValueError"),
    (Budgets(), TimedOut(2.0), "FAILURE", "failures", "TimeLimitExceeded"),
    (Budgets(failures=3, crashes=2, losses=9), Interrupted(), "PENDING", None, None),
    (Budgets(), Cancelled(), "REVOKED", None, "Cancelled"),
    (Budgets(), Misfit(BOOM), "RETRY", "refusals", "ValueError"),
    (Budgets(refusals=8), Misfit(BOOM), "RETRY", "refusals", "ValueError"),
    (Budgets(refusals=9), Misfit(BOOM), "FAILURE", "refusals", "ValueError"),
    (Budgets(), Crashed(), "RETRY", "crashes", "WorkerLost"),
    (Budgets(crashes=1), Crashed(), "RETRY", "crashes", "WorkerLost"),
    (Budgets(crashes=2), Crashed(), "FAILURE", "crashes", "WorkerLost"),
    (Budgets(), Crashed(out_of_memory=True), "RETRY", "crashes", "OutOfMemory"),
    (Budgets(crashes=2), Crashed(out_of_memory=True), "FAILURE", "crashes", "OutOfMemory"),
    (Budgets(crashes=2), Lost(), "RETRY", "losses", "WorkerLost"),
    (Budgets(losses=8), Lost(), "RETRY", "losses", "WorkerLost"),
    (Budgets(losses=9), Lost(), "FAILURE", "losses", "WorkerLost"),
]


@pytest.mark.parametrize(("spent", "outcome", "status", "billed", "error_type"), OUTCOMES)
def test_an_outcome_means_one_transition(
    spent: Budgets, outcome: Outcome, status: str, billed: str | None, error_type: str | None
) -> None:
    transition = decide(spent, outcome)

    assert transition.status == status
    assert transition.spends == billed
    assert (transition.error.type if transition.error else None) == error_type
    assert transition.status in lifecycle.TRANSITIONS[TaskStatus.STARTED]
    assert transition.terminal == (not lifecycle.TRANSITIONS[transition.status])


def test_a_retry_waits_as_long_as_the_task_asked_and_never_less_than_nothing() -> None:
    assert decide(Budgets(), RetryAsked(BOOM, 2.5)).run_in_seconds == 2.5
    assert decide(Budgets(), RetryAsked(BOOM, -1.0)).run_in_seconds == 0.0


@pytest.mark.parametrize("asked", [math.inf, 1e13, 31_536_001.0, math.nan, -math.inf])
def test_no_retry_waits_longer_than_a_year_whatever_the_task_asked(asked: float) -> None:
    waits = decide(Budgets(), RetryAsked(BOOM, asked)).run_in_seconds

    assert 0.0 <= waits <= 31_536_000.0
    assert asked != math.inf or waits == 31_536_000.0


def test_the_first_lost_worker_costs_no_time_and_each_further_one_costs_more() -> None:
    waits = [decide(Budgets(losses=losses), Lost()).run_in_seconds for losses in range(9)]

    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_a_retry_waits_anything_under_its_cap_and_is_picked_up_before_it() -> None:
    waits = [backoff.full_jitter(4) for _ in range(500)]

    assert all(0.0 <= wait <= 3.75 for wait in waits)
    assert len({round(wait, 3) for wait in waits}) > 300, "not in whole seconds"
    assert backoff.full_jitter(0) == 0.0


def test_a_refused_task_waits_longer_each_time_up_to_half_a_minute() -> None:
    assert [backoff.refusal_wait(refusals) for refusals in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_reconnecting_waits_under_a_cap_that_grows() -> None:
    assert all(0.0 <= backoff.reconnect_wait(failures) <= 2.0 for failures in range(50))
    assert max(backoff.reconnect_wait(0) for _ in range(50)) <= 0.1


def test_an_error_is_stored_without_what_postgres_cannot_hold() -> None:
    error = Error(type="", message="a\x00b\ud800c" + "x" * 20_000, traceback="\x00t")

    assert error.type == "Exception"
    assert error.message.startswith("ab?c")
    assert len(error.message) == 16_384
    assert error.message.endswith("…")
    assert error.traceback == "t"


def test_terminal_statuses_lead_nowhere_and_all_others_do() -> None:
    for status, following in lifecycle.TRANSITIONS.items():
        assert (status in lifecycle.TERMINAL) == (not following)


def test_the_state_diagram_in_the_readme_is_the_transition_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    diagram = re.search(r"```mermaid\nstateDiagram-v2\n(.*?)```", readme, re.DOTALL)
    assert diagram is not None
    drawn = set(re.findall(r"^\s*([A-Z]+) --> ([A-Z]+)", diagram.group(1), re.MULTILINE))

    assert drawn == {(str(a), str(b)) for a, following in lifecycle.TRANSITIONS.items() for b in following}
