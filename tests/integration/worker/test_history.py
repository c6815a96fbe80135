"""What a real worker keeps of the attempts that it runs: errors, log lines, progress."""

import signal
from typing import Any
from uuid import UUID

from tests.support.service import Service
from tests.support.waiting import wait_until


def history(running: Service, task_id: UUID) -> list[dict[str, Any]]:
    answer = running.http.get(f"/api/tasks/{task_id}/attempts")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


NOTE_WRITES = (
    "CREATE TABLE written (id uuid)",
    (
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO written VALUES (NEW.id); RETURN NULL; END $$"
    ),
    "CREATE TRIGGER note AFTER UPDATE ON task FOR EACH ROW EXECUTE FUNCTION note()",
)


def test_a_task_that_logs_nothing_leaves_no_row(running: Service) -> None:
    task_id = running.submit("sample.echo", 1)
    running.ends(task_id)
    assert running.value("SELECT count(*) FROM task_attempt WHERE task_id = $1", task_id) == 0
    [only] = history(running, task_id)
    assert (only["outcome"], only["log"], only["log_dropped"]) == ("succeeded", [], 0)
    assert only["started_at"] <= only["ended_at"]


def test_the_last_lines_of_a_task_are_served(running: Service) -> None:
    task_id = running.submit("odd.log", "lines", 60)
    running.ends(task_id)
    [only] = history(running, task_id)
    assert [line["message"] for line in only["log"]] == [f"line {number}" for number in range(10, 60)]
    assert only["log_dropped"] == 10
    assert {(line["level"], line["logger"]) for line in only["log"]} == {("INFO", "odd.tasks")}
    assert all(only["started_at"] <= line["at"] <= only["ended_at"] for line in only["log"])


def test_whatever_a_task_logs_it_ends_as_it_should(running: Service) -> None:
    task_id = running.submit("odd.log", "odd")
    assert running.ends(task_id)["status"] == "SUCCESS"
    messages = sorted(line["message"] for line in history(running, task_id)[0]["log"])
    assert messages[0] == "(could not be formatted)"
    assert messages[1].startswith("ab? xxx")
    assert messages[2].startswith("caught\nTraceback")
    assert messages[3:] == ["from a thread"]


def test_every_failed_attempt_has_its_error_its_traceback_and_its_lines(running: Service) -> None:
    task_id = running.submit("odd.log", "fail")
    running.ends(task_id)
    first, second = history(running, task_id)
    for one in (first, second):
        assert (one["outcome"], one["error"]["type"], one["error"]["message"]) == ("failed", "OSError", "no such page")
        assert 'raise OSError("no such page")' in one["error"]["traceback"]
        assert [line["message"] for line in one["log"]] == ["before it failed"]
    assert first["ended_at"] <= second["started_at"]


def test_a_process_that_dies_takes_its_lines_along(running: Service) -> None:
    task_id = running.submit("odd.log", "die")
    first = wait_until(lambda: [one for one in history(running, task_id) if one["ended_at"]], what="a crash")[0]
    assert (first["outcome"], first["error"]["type"], first["log"]) == ("crashed", "WorkerLost", [])
    running.http.post(f"/api/tasks/{task_id}/cancel")
    running.ends(task_id)


def test_no_argument_of_a_built_in_task_is_in_its_log(running: Service) -> None:
    task_id = running.submit("http_request", f"{running.http.base_url}/healthz?token=zq-hunter2-zq")
    assert running.ends(task_id)["status"] == "SUCCESS"
    assert "hunter2" not in running.http.get(f"/api/tasks/{task_id}/attempts").text


def test_a_task_that_reports_without_end_is_written_twice_a_second_and_in_the_end_what_it_said_last(
    running: Service,
) -> None:
    for statement in NOTE_WRITES:
        running.value(statement)
    task_id = running.submit("odd.report", 20_000, 1.5)

    def shown() -> dict[str, Any] | None:
        progress: dict[str, Any] | None = running.view(task_id)["progress"]
        return progress if progress is not None and progress["fraction"] == 0.75 else None

    assert wait_until(shown, what="the last report") == {"fraction": 0.75, "message": "the last? word"}
    view = running.ends(task_id)
    seconds = running.value(
        "SELECT extract(epoch FROM finished_at - started_at)::float8 FROM task WHERE id = $1", task_id
    )
    assert view["status"] == "SUCCESS"
    # A claim, a settle, the stamp of its message, and a renewal each second beside its reports.
    assert 4 <= running.value("SELECT count(*) FROM written WHERE id = $1", task_id) <= 4 + 3 * seconds


def test_a_worker_says_that_it_is_there_and_that_it_goes(running: Service) -> None:
    def there() -> list[str]:
        found: list[str] = running.value("SELECT COALESCE(array_agg(name), '{}') FROM worker")
        return found

    [worker] = wait_until(there, what="a worker that says so")
    assert worker.endswith(f"/{running.process('worker').pid}")
    assert running.value("SELECT (queues, slots)::text FROM worker") == "({default},2)"
    process = running.process("worker")
    process.signal(signal.SIGTERM)
    process.wait(10)
    wait_until(lambda: not there(), 20, "the end of its presence")
    running.start_worker()
    wait_until(there, what="the next one")
