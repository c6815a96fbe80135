"""The audit of the fault suite sees what it is for: each test breaks one thing of a run in which all was well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.faults import audit
from tests.faults.audit import Effect, Found, Post, Step, Workers

TASK = "0199-task"
URL = "http://receiver.test/hook"
FIRST, SECOND = "token-1", "token-2"


def row(**changes: Any) -> dict[str, Any]:
    good = {
        "id": TASK,
        "name": "faults.work",
        "status": "SUCCESS",
        "attempt": 1,
        "webhook_url": URL,
        "result": '"done"',
        "error_type": None,
        "crashes": 0,
        "losses": 0,
        "failures": 0,
        "deliveries": ["delivery-1 delivered"],
    }
    return good | changes


def step(at: float, before: str | None, status: str, attempt: int, token: str | None = None, **spent: int) -> Step:
    return Step(at, TASK, before, status, attempt, token, False, **spent)


def effect(what: str, attempt: int, token: str, at: float) -> Effect:
    return Effect(what, TASK, attempt, token, at, 1)


def post(**changes: Any) -> Post:
    return replace(Post("delivery-1", b"body", TASK, "SUCCESS", 200), **changes)


@dataclass(kw_only=True)
class Run:
    """What was seen of one task, which by default succeeds at once."""

    acknowledged: Mapping[str, str | None] = field(default_factory=lambda: {TASK: URL})
    rows: Sequence[Mapping[str, Any]] = field(default_factory=lambda: [row()])
    steps: Sequence[Step] = field(
        default_factory=lambda: [
            step(1, None, "PENDING", 0),
            step(2, "PENDING", "STARTED", 1, FIRST),
            step(4, "STARTED", "SUCCESS", 1, FIRST),
        ]
    )
    effects: Sequence[Effect] = field(
        default_factory=lambda: [effect("begin", 1, FIRST, 2.1), effect("end", 1, FIRST, 3.9)]
    )
    posts: Sequence[Post] = field(default_factory=lambda: [post()])

    def found(self, *, workers: Workers = "untouched", **allowed: bool) -> Found:
        return audit.compare(
            acknowledged=self.acknowledged,
            rows=self.rows,
            steps=self.steps,
            effects=self.effects,
            posts=self.posts,
            workers=workers,
            **allowed,
        )

    def breaches(self, *, workers: Workers = "untouched", **allowed: bool) -> list[str]:
        """The sentences that are untrue, without their counts."""
        return [
            one.partition(":")[0] + ":" + one.split(":")[1] for one in self.found(workers=workers, **allowed).breaches
        ]


def lost_once() -> Run:
    """A task whose first worker was lost, and which succeeds in its second attempt."""
    return Run(
        rows=[row(attempt=2, losses=1)],
        steps=[
            step(1, None, "PENDING", 0),
            step(2, "PENDING", "STARTED", 1, FIRST),
            step(6, "STARTED", "RETRY", 1, None, losses=1),
            step(7, "RETRY", "STARTED", 2, SECOND, losses=1),
            step(9, "STARTED", "SUCCESS", 2, SECOND, losses=1),
        ],
        effects=[effect("begin", 1, FIRST, 2.1), effect("begin", 2, SECOND, 7.1), effect("end", 2, SECOND, 8.9)],
    )


def test_a_run_in_which_all_was_well_has_no_breach() -> None:
    assert Run().found() == Found(ended=1, lost=0, changed=0, run_twice=0, webhooks=1, breaches=())
    assert lost_once().found(workers="killed").breaches == ()


def test_a_row_that_lost_its_webhook_is_a_breach() -> None:
    forgetful = Run(rows=[row(webhook_url=None, deliveries=[])], posts=[])

    assert forgetful.breaches() == [
        "I5: the row has another webhook than its client asked for",
        "I5: not one delivery",
        "I5: told to nobody",
    ]


def test_a_task_that_no_client_knows_is_told_of_as_its_row_says() -> None:
    assert Run(acknowledged={}).breaches() == []
    assert Run(acknowledged={}, posts=[]).breaches() == ["I5: told to nobody"]


def test_a_delivery_that_nobody_asked_for_is_a_breach() -> None:
    assert Run(acknowledged={TASK: None}, rows=[row(webhook_url=None)], posts=[]).breaches() == [
        "I5: a delivery unasked"
    ]


@pytest.mark.parametrize("status", ["pending", "delivering", "exhausted"])
def test_a_webhook_that_was_not_delivered_is_a_breach(status: str) -> None:
    assert Run(rows=[row(deliveries=[f"delivery-1 {status}"])]).breaches() == ["I5: not delivered"]


def test_a_webhook_may_be_given_up_where_the_test_says_so() -> None:
    given_up = Run(rows=[row(deliveries=["delivery-1 exhausted"])], posts=[post(answered=500)])

    assert given_up.breaches(exhausts=True) == []
    assert given_up.breaches() == ["I5: not delivered", "I5: no POST was answered well"]


def test_two_deliveries_of_one_task_are_a_breach() -> None:
    twice = Run(rows=[row(deliveries=["delivery-1 delivered", "delivery-2 delivered"])])
    assert twice.breaches() == ["I5: not one delivery"]


def test_a_webhook_under_another_id_than_its_delivery_has_is_a_breach() -> None:
    assert Run(posts=[post(webhook_id="other")]).breaches() == ["I5: an id that its delivery does not have"]


@pytest.mark.parametrize("answered", [None, 302, 500])
def test_a_webhook_of_which_no_post_was_answered_well_is_a_breach(answered: int | None) -> None:
    assert Run(posts=[post(answered=answered)]).breaches() == ["I5: no POST was answered well"]
    assert Run(posts=[post(answered=answered), post(answered=204)]).breaches() == []


@pytest.mark.parametrize("reclaims", [False, True])
def test_a_success_under_the_token_of_a_run_that_did_not_end_is_a_breach(reclaims: bool) -> None:
    """The zombie came to its end, and wrote over the run that holds the row."""
    taken_over = lost_once()
    taken_over.effects = [
        effect("begin", 1, FIRST, 2.1),
        effect("begin", 2, SECOND, 7.1),
        effect("end", 1, FIRST, 8.9),
    ]

    assert taken_over.breaches(workers="cut off", reclaims=reclaims) == [
        "I6: SUCCESS of a run that had not come to its end"
    ]


def test_a_success_before_the_end_of_the_run_that_holds_the_row_is_a_breach() -> None:
    """An attempt was given out twice, and the forgotten claimant wrote; the other ends a while later."""
    early = Run(
        effects=[
            effect("begin", 1, SECOND, 1.5),
            effect("begin", 1, FIRST, 2.1),
            effect("end", 1, SECOND, 3.9),
            effect("end", 1, FIRST, 5.0),
        ]
    )

    assert early.breaches(workers="cut off", reclaims=True) == ["I6: SUCCESS of a run that had not come to its end"]
    assert early.breaches(workers="cut off", reclaims=True, one_clock=False) == []


def test_a_success_without_a_run_is_a_breach() -> None:
    assert Run(effects=[]).breaches() == ["I6: SUCCESS of a run that had not come to its end"]


def test_a_result_that_the_task_never_returns_is_a_breach() -> None:
    assert Run(rows=[row(result='"half done"')]).breaches() == ["I6: SUCCESS with a result that the task never returns"]
    assert Run(rows=[row(name="sample.echo", result="1")]).breaches() == []


def test_a_run_without_a_claim_is_a_breach() -> None:
    invented = Run(effects=[effect("begin", 2, SECOND, 1.5), *Run().effects])
    assert "I6: ran without a claim" in invented.breaches(workers="cut off")


@pytest.mark.parametrize("workers", ["untouched", "killed"])
def test_a_run_that_goes_on_after_the_next_began_is_a_breach_unless_workers_were_cut_off(workers: Workers) -> None:
    overlapping = lost_once()
    overlapping.effects = [
        *overlapping.effects[:2],
        effect("end", 1, FIRST, 8.0),
        *overlapping.effects[2:],
    ]

    assert "I6: went on although the next attempt had begun" in overlapping.breaches(workers=workers)
    assert overlapping.breaches(workers="cut off") == []


def test_a_lost_worker_is_a_breach_where_none_was_touched() -> None:
    assert lost_once().breaches() == ["I4: billed for a lost worker, and none was touched"]


def billed(exit_step: Step, **spent: int) -> Run:
    """A task whose only attempt leads to this step."""
    return Run(
        rows=[row(status=exit_step.status, result=None, **({"failures": 0, "crashes": 0, "losses": 0} | spent))],
        steps=[*Run().steps[:2], exit_step],
        effects=[effect("begin", 1, FIRST, 2.1)],
        posts=[post(status=exit_step.status)],
    )


@pytest.mark.parametrize(
    ("status", "spent"),
    [
        ("FAILURE", {"failures": 1}),
        ("FAILURE", {"crashes": 1}),
        ("REVOKED", {}),
        ("REVOKED", {"failures": 1}),
    ],
)
def test_an_attempt_is_billed_once_for_how_it_ended(status: str, spent: Mapping[str, int]) -> None:
    assert billed(step(4, "STARTED", status, 1, FIRST, **spent), **spent).breaches() == []


@pytest.mark.parametrize(
    ("status", "spent"),
    [
        ("FAILURE", {}),
        ("FAILURE", {"failures": 2}),
        ("FAILURE", {"failures": 1, "crashes": 1}),
        ("REVOKED", {"failures": 1, "crashes": 1}),
        ("SUCCESS", {"failures": 1}),
    ],
)
def test_an_attempt_that_is_billed_for_something_else_is_a_breach(status: str, spent: Mapping[str, int]) -> None:
    found = billed(step(4, "STARTED", status, 1, FIRST, **spent), **spent).breaches()
    assert "I4: billed for something else than what happened" in found


@pytest.mark.parametrize(("status", "spent"), [("PENDING", {}), ("RETRY", {"failures": 1})])
def test_a_task_that_goes_on_was_billed_for_a_retry_and_not_for_a_release(
    status: str, spent: Mapping[str, int]
) -> None:
    run = lost_once()
    run.rows = [row(attempt=2, **spent)]
    run.steps = [
        *run.steps[:2],
        step(6, "STARTED", status, 1, None, **spent),
        step(7, status, "STARTED", 2, SECOND, **spent),
        step(9, "STARTED", "SUCCESS", 2, SECOND, **spent),
    ]
    assert run.breaches() == []
    run.rows = [row(attempt=2, crashes=1, **spent)]
    run.steps = [*run.steps[:2], *(replace(one, crashes=1) for one in run.steps[2:])]
    assert run.breaches() == ["I4: billed for something else than what happened"]


def test_a_claim_that_is_billed_is_a_breach() -> None:
    run = Run(rows=[row(crashes=1)], steps=[Run().steps[0], *(replace(one, crashes=1) for one in Run().steps[1:])])
    assert run.breaches() == ["I4: billed for something else than what happened"]


def test_a_task_may_be_refused_while_it_waits() -> None:
    run = Run(steps=[Run().steps[0], *(replace(one, refusals=2) for one in Run().steps[1:])])
    assert run.breaches() == []


def test_a_bill_that_no_step_explains_is_a_breach() -> None:
    assert Run(rows=[row(failures=1)]).breaches() == ["I4: billed without a step"]
    assert Run(rows=[row(attempt=2)]).breaches() == ["I4: billed without a step"]


def test_a_row_that_changes_after_its_end_is_counted() -> None:
    changed = Run(steps=[*Run().steps, replace(step(5, "SUCCESS", "SUCCESS", 1, FIRST), ended_before=True)])
    assert changed.found().changed == 1
    assert changed.breaches() == ["I3: changed after its end"]


def test_a_session_that_postgres_ended_for_its_open_transaction_is_a_breach() -> None:
    assert list(audit.idle_in_transaction("LOG:  database system is ready to accept connections\n")) == []
    log = "FATAL:  terminating connection due to idle-in-transaction timeout\n"
    assert list(audit.idle_in_transaction(log * 2)) == ["promise 6: a transaction was left open for a second, 2 times"]


def test_a_skipped_fault_is_told_with_its_reason() -> None:
    report = ("/somewhere/test_disks.py", 95, "Skipped: a disk can't be mounted here")
    assert audit.skipped("tests/faults/test_disks.py::test_a", report) == (
        "skipped: tests/faults/test_disks.py::test_a: a disk can't be mounted here"
    )


def test_runs_at_the_same_time_are_counted_until_they_noted_their_end_or_their_attempt_was_over() -> None:
    def run(task_id: str, begun: float, ended: float | None) -> list[Effect]:
        noted = [("begin", begun)] + ([("end", ended)] if ended is not None else [])
        return [Effect(what, task_id, 1, f"token of {task_id}", at, 1) for what, at in noted]

    lost = Step(8, "killed", "STARTED", "RETRY", 1, None, False, losses=1)
    one_by_one = [*run("a", 1, 2), *run("b", 2, 3)]
    assert audit.at_once([], []) == 0
    assert audit.at_once(one_by_one, []) == 1
    assert audit.at_once([*one_by_one, *run("c", 2.5, 4)], []) == 2
    assert audit.at_once([*run("killed", 1, None), *run("d", 7, 9), *run("e", 8, 9)], [lost]) == 2
    assert audit.at_once([*run("killed", 1, None), *run("d", 7, 9), *run("e", 8, 9)], []) == 3
