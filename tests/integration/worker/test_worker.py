"""A real worker, a real relay and a real API, through HTTP."""

import json
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
import redis

from app import broker, lifecycle
from tests.support.receiver import Receiver
from tests.support.service import Service
from tests.support.waiting import wait_until


@pytest.fixture
def plain(running: Service) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(running.environment["REDIS_URL"]) as client:
        yield client


def test_the_mission(running: Service) -> None:
    with Receiver() as receiver:
        for body in ({"webhook_url": receiver.url}, {}, None):
            answer = running.http.post("/api/tasks/submit", json=body)
            assert answer.status_code == 202
            assert list(answer.json()) == ["task_id"]
        task_id = running.submit("long_task", 1.0, webhook_url=receiver.url)
        early = running.http.get(f"/api/tasks/{task_id}/result")
        seen = [running.status(task_id)]
        assert (early.status_code, early.json()) == (202, {"detail": "Result not available yet"})

        def ended() -> bool:
            seen.append(running.status(task_id))
            return "SUCCESS" in seen

        wait_until(ended, 20, "the end")  # behind two tasks of five seconds in each of two slots
        done = running.http.get(f"/api/tasks/{task_id}/result")
        wait_until(
            lambda: [one for one in receiver.requests if json.loads(one.body)["data"]["task_id"] == str(task_id)],
            what="the webhook",
        )

    assert set(seen) <= {"PENDING", "STARTED", "SUCCESS"}
    assert "STARTED" in seen
    assert (done.status_code, done.json()) == (200, {"result": "Worked for 1 second"})


NOTE_RETRIES = """
CREATE TABLE noted (id uuid, failures int, wait_seconds float8);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO noted VALUES (NEW.id, NEW.failures, extract(epoch FROM NEW.run_at - now()));
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER UPDATE ON task FOR EACH ROW
WHEN (NEW.status = 'RETRY' AND OLD.status <> 'RETRY') EXECUTE FUNCTION note();
"""
FORGET_RETRIES = "DROP TRIGGER note ON task; DROP FUNCTION note; DROP TABLE noted"
TRIED = """
SELECT json_agg(json_build_array(failures, wait_seconds) ORDER BY failures)::text FROM noted WHERE id = $1
"""


def test_a_flaky_task_succeeds_after_three_retries_each_under_its_cap(running: Service) -> None:
    running.execute(NOTE_RETRIES)  # a wait of no second would be over before anybody could look
    tasks = [running.submit("sample.flaky", 3) for _ in range(6)]
    views = [running.ends(task_id, 30) for task_id in tasks]
    tried = [json.loads(running.value(TRIED, task_id)) for task_id in tasks]
    running.execute(FORGET_RETRIES)

    for view in views:
        assert (view["status"], view["attempt"], view["failures"]) == ("SUCCESS", 4, 3)
    for one in tried:
        assert [failures for failures, _ in one] == [1, 2, 3]
        assert all(0 <= wait <= cap for (_, wait), cap in zip(one, (1, 2, 4), strict=True))
    longest = [max(one[retry][1] for one in tried) for retry in range(3)]
    assert longest[2] >= 1, "there is a wait, and it is drawn anew each time"


def test_a_task_that_kills_its_process_ends_after_its_budget_and_the_pool_works_on(running: Service) -> None:
    view = running.ends(running.submit("sample.crash"))

    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", "WorkerLost", 3)
    assert view["failures"] == 0, "a crash is not a failure of the task's own code"
    assert running.ends(running.submit("sample.echo", 1))["status"] == "SUCCESS"


def test_a_task_that_leaves_without_a_word_is_a_crash(running: Service) -> None:
    view = running.ends(running.submit("odd.quit"))

    assert (view["status"], view["error"]["type"]) == ("FAILURE", "WorkerLost")


@pytest.mark.parametrize("kind", ["set", "nan", "infinity", "surrogate", "digits", "deep", "object"])
def test_a_result_that_json_cannot_hold_ends_its_task_and_not_its_worker(running: Service, kind: str) -> None:
    task_id = running.submit("odd.result", kind)

    view = running.ends(task_id)

    assert (view["status"], view["error"]["type"]) == ("FAILURE", "ResultNotSerializable")
    worker = str(running.value("SELECT worker FROM task WHERE id = $1", task_id))
    assert psutil.Process(int(worker.rpartition("/")[2])).is_running(), "the process that ran it lives on"


@pytest.mark.parametrize(
    ("kind", "expected"), [("nul", "a\x00b"), ("none", None), ("type", {"__type__": "decimal", "__value__": "1"})]
)
def test_a_result_that_json_can_hold_arrives_as_it_is(running: Service, kind: str, expected: object) -> None:
    task_id = running.submit("odd.result", kind)
    running.ends(task_id)

    assert running.result(task_id) == {"result": expected}


def test_a_result_over_the_limit_ends_its_task(running: Service) -> None:
    view = running.ends(running.submit("sample.large", 1024 * 1024))
    assert (view["status"], view["error"]["type"]) == ("FAILURE", "ResultTooLarge")
    assert running.ends(running.submit("sample.large", 1024 * 1024 - 2))["status"] == "SUCCESS"


@pytest.mark.parametrize(
    ("kind", "error_type"),
    [
        ("exit", "SystemExit"),
        ("interrupt", "KeyboardInterrupt"),
        ("memory", "OutOfMemory"),
        ("generator", "GeneratorExit"),
        ("unspeakable", "_UnspeakableError"),
        ("nul", "ValueError"),
    ],
)
def test_whatever_a_task_raises_is_its_outcome_and_the_worker_lives_on(
    running: Service, kind: str, error_type: str
) -> None:
    worker = running.process("worker")

    view = running.ends(running.submit("odd.raise", kind))

    assert (view["status"], view["error"]["type"]) == ("FAILURE", error_type)
    assert worker.running()


def test_a_retry_by_hand_spends_the_budget_and_ends_with_the_cause(running: Service) -> None:
    view = running.ends(running.submit("odd.retry", 0.05))

    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", "KeyError", 3)


@pytest.mark.parametrize(("most", "ending"), [("1", ("KeyError", 2)), ("often", ("ValueError", 1))])
def test_how_often_to_retry_may_be_a_text_and_what_is_no_number_fails_its_own_task(
    running: Service, most: str, ending: tuple[str, int]
) -> None:
    view = running.ends(running.submit("odd.retry_as_often", most))
    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", *ending)


def test_a_retry_more_often_than_anybody_can_write_down_is_one_as_often_as_the_task_has(running: Service) -> None:
    view = running.ends(running.submit("odd.retry_very_often"))
    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", "KeyError", 2)


@pytest.mark.parametrize("kind", ["digits", "object"])
def test_an_outcome_that_can_t_be_reported_ends_its_task_and_not_its_worker(running: Service, kind: str) -> None:
    task_id = running.submit("odd.retry_unspeakably", kind)

    view = running.ends(task_id)

    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", "OutcomeNotStorable", 1)
    assert running.value("SELECT ARRAY[failures, crashes, losses] FROM task WHERE id = $1", task_id) == [1, 0, 0]
    assert running.child_of(task_id).is_running(), "the process that ran it lives on"


def test_a_retry_at_no_time_fails_its_own_task(running: Service) -> None:
    view = running.ends(running.submit("odd.retry_late", "nan"))
    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", "ValueError", 1)
    assert view["error"]["message"] == "countdown must be a number of seconds"


@pytest.mark.parametrize("countdown", ["inf", "1e13"])
def test_a_retry_in_the_far_future_waits_for_a_year_and_is_no_crash(running: Service, countdown: str) -> None:
    task_id = running.submit("odd.retry_late", countdown)

    running.reaches(task_id, "RETRY", "FAILURE", "SUCCESS")

    view = running.view(task_id)
    assert (view["status"], view["attempt"], view["failures"]) == ("RETRY", 1, 1)
    assert running.value("SELECT crashes FROM task WHERE id = $1", task_id) == 0
    wait = datetime.fromisoformat(view["run_at"]) - datetime.now(UTC)
    assert wait.total_seconds() == pytest.approx(31_536_000, abs=60)


def test_a_submit_s_own_max_retries_holds(running: Service) -> None:
    assert running.ends(running.submit("sample.flaky", 1, max_retries=0))["attempt"] == 1


@pytest.mark.parametrize("name", ["odd.limited", "odd.hold_the_gil"])
def test_a_task_past_its_time_limit_ends_even_inside_a_c_call(running: Service, name: str) -> None:
    view = running.ends(running.submit(name))

    assert (view["status"], view["error"]["type"], view["attempt"]) == ("FAILURE", "TimeLimitExceeded", 1)
    assert running.ends(running.submit("sample.echo", 1))["status"] == "SUCCESS"


def test_a_c_call_longer_than_the_lease_runs_once(running: Service) -> None:
    view = running.ends(running.submit("odd.hold_the_gil", time_limit=5.0))

    assert (view["attempt"], view["error"]["type"]) == (1, "TimeLimitExceeded")


def test_progress_is_shown_while_a_task_runs(running: Service) -> None:
    task_id = running.submit("long_task", 3.0)

    shown = wait_until(lambda: running.view(task_id)["progress"], what="progress")
    assert 0.0 < shown["fraction"] <= 1.0
    assert running.ends(task_id)["status"] == "SUCCESS"


def _bell(task_id: UUID, name: str, attempt: int = 0) -> lifecycle.Bell:
    return lifecycle.Bell(task_id=task_id, name=name, queue="default", attempt=attempt, position=1)


def test_repeated_stale_and_forged_messages_do_no_harm(running: Service, plain: redis.Redis, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    task_id = running.submit("odd.attempts", str(ledger))
    for attempt in (0, 0, 1, 7):
        plain.lpush("default", broker.encode(_bell(task_id, "odd.attempts", attempt), "default"))
    plain.lpush("default", broker.encode(_bell(task_id, "sample.crash"), "default"))
    plain.lpush("default", broker.encode(_bell(uuid4(), "sample.crash"), "default"))
    huge = broker.encode(_bell(uuid4(), "sample.echo"), "default").replace(b'"attempt":0', b'"attempt":99999999999')
    plain.lpush("default", huge)

    assert running.ends(task_id)["attempt"] == 1
    assert len(ledger.read_text().splitlines()) == 1
    wait_until(lambda: plain.llen("default") == 0, what="an empty queue")
    assert running.ends(running.submit("sample.echo", 1))["status"] == "SUCCESS"


def test_garbage_in_the_queue_does_not_stop_it(running: Service, plain: redis.Redis) -> None:
    poisoned = json.loads(broker.encode(_bell(uuid4(), "sample.echo"), "default"))
    poisoned["body"] = "W3siX190eXBlX18iOiJub3BlIiwiX192YWx1ZV9fIjoxfSx7fSx7fV0="
    plain.rpush("default", b"garbage", b"\xff\xfe", b"{}", b"[1]", b'{"headers": {}}', json.dumps(poisoned))

    assert running.ends(running.submit("sample.echo", 1), seconds=40)["status"] == "SUCCESS"
    assert running.process("worker").running()


def test_a_task_that_this_worker_does_not_know_is_handed_back(running: Service, plain: redis.Redis) -> None:
    task_id = running.submit("sample.sleep", 0.0, countdown=3600)
    running.value("UPDATE task SET name = 'next.release', run_at = now() WHERE id = $1", task_id)

    refusals = wait_until(
        lambda: running.value("SELECT refusals FROM task WHERE id = $1 AND refusals >= 2", task_id),
        what="two refusals",
    )
    assert refusals
    assert running.status(task_id) == "PENDING"
    assert not plain.exists(f"celery-task-meta-{task_id}"), "Celery's opinion must not be stored"
    assert running.process("worker").running()


def test_arguments_of_another_release_are_tried_elsewhere_and_run_when_they_fit(running: Service) -> None:
    task_id = running.submit("sample.echo", 1, countdown=3600)
    running.value("""UPDATE task SET kwargs = '{"colour": "red"}', run_at = now() WHERE id = $1""", task_id)
    wait_until(lambda: running.value("SELECT refusals >= 2 FROM task WHERE id = $1", task_id), what="two refusals")
    view = running.view(task_id)
    assert (view["status"], view["error"]["type"], view["failures"]) == ("RETRY", "InvalidArguments", 0)

    running.value("UPDATE task SET kwargs = '{}', run_at = now() WHERE id = $1", task_id)
    assert running.ends(task_id)["status"] == "SUCCESS"


def test_a_dead_keeper_is_replaced_and_the_task_that_ran_is_not_disturbed(running: Service) -> None:
    worker = running.process("worker")
    task_id = running.submit("sample.sleep", 10.0)
    running.reaches(task_id, "STARTED")
    keeper = worker.keeper()
    assert keeper is not None
    # Time for the next keeper to start on a busy machine; it has to renew this one too.
    running.value("UPDATE task SET lease_until = now() + interval '7 s' WHERE id = $1", task_id)
    keeper.kill()

    wait_until(lambda: (found := worker.keeper()) and found.pid != keeper.pid, what="another keeper")
    view = running.ends(task_id)
    assert (view["status"], view["attempt"]) == ("SUCCESS", 1)


def test_a_killed_child_is_a_crash_and_its_neighbour_is_not_disturbed(running: Service) -> None:
    others = "SELECT count(*) = 0 FROM task WHERE status = 'STARTED'"
    wait_until(lambda: running.value(others), 20, "the end of what other tests left running")
    pool = running.process("worker")
    wait_until(
        lambda: sum(one.status() != psutil.STATUS_ZOMBIE for one in pool.children()) == 2,
        20,
        "successors of what other tests have killed",
    )
    victim, neighbour = [running.submit("sample.sleep", 3.0) for _ in range(2)]
    for task_id in (victim, neighbour):
        running.reaches(task_id, "STARTED")
    worker = str(running.value("SELECT worker FROM task WHERE id = $1", victim))
    psutil.Process(int(worker.rpartition("/")[2])).kill()

    views = [running.ends(task_id) for task_id in (victim, neighbour)]
    assert [(view["status"], view["attempt"]) for view in views] == [("SUCCESS", 2), ("SUCCESS", 1)]
    assert running.value("SELECT crashes FROM task WHERE id = $1", victim) == 1


def test_a_frozen_process_whose_task_was_taken_over_writes_nothing(running: Service) -> None:
    worker = running.process("worker")
    task_id = running.submit("odd.stop_yourself", 0.0)
    running.reaches(task_id, "STARTED")
    frozen = wait_until(
        lambda: [one for one in worker.children() if one.status() == psutil.STATUS_STOPPED], what="the freeze"
    )
    running.value(
        "UPDATE task SET token = gen_random_uuid() WHERE id = $1",  # as if another worker had claimed it
        task_id,
    )

    wait_until(lambda: not frozen[0].is_running() or frozen[0].status() == psutil.STATUS_ZOMBIE, what="its end")
    assert running.status(task_id) in {"STARTED", "RETRY", "PENDING"}
    for one in worker.children():
        if one.status() == psutil.STATUS_STOPPED:
            one.resume()
    wait_until(lambda: _thawed(running) and running.status(task_id) == "SUCCESS", 30, "the successor's end")


def _thawed(running: Service) -> bool:
    for one in running.process("worker").children():
        if one.status() == psutil.STATUS_STOPPED:
            one.send_signal(signal.SIGCONT)
    return True
