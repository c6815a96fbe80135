"""A Python program that uses Celery's own calls, against a real worker."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID, uuid4

import pytest
import redis

from tests.support.service import ROOT, Service
from tests.support.waiting import wait_until

LEAKS_ARE_ERRORS = ("-W", "error::ResourceWarning")


def client(
    running: Service, program: str, *, seconds: float = 60, flags: Sequence[str] = LEAKS_ARE_ERRORS, **changes: str
) -> dict[str, object]:
    """Run a program that knows only the app; what it says as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env={**os.environ, **running.environment, **changes},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_send_task_and_delay_wait_for_the_result(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.celery_app import app
        sent = app.send_task("long_task", kwargs={"x": 0.1})
        first = sent.get(timeout=10)
        from app.worker.tasks import long_task
        second = long_task.delay(0.1)
        print(json.dumps({"first": first, "second": second.get(timeout=10), "status": second.status, "id": second.id}))
        """,
    )

    assert said["first"] == said["second"] == "Worked for 0.1 seconds"
    assert said["status"] == "SUCCESS"
    assert running.status(UUID(str(said["id"]))) == "SUCCESS", "the same durable row as over HTTP"


def test_a_module_of_tasks_is_enough_to_reach_the_app(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.worker.sample_tasks import echo
        print(json.dumps({"result": echo.delay({"__type__": "nope", "__value__": [1]}).get(timeout=10)}))
        """,
    )

    assert said["result"] == {"__type__": "nope", "__value__": [1]}


def test_every_option_reaches_the_row(running: Service) -> None:
    task_id = uuid4()
    client(
        running,
        f"""
        import datetime
        from app.worker.sample_tasks import echo, flaky
        echo.apply_async(["x"], task_id="{task_id}", countdown=3600, expires=7200, retries=2, queue="default",
                         webhook_url="http://127.0.0.1:9/hook", webhook_events=["task.started"], tags=["a"],
                         max_retries=7)
        later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
        flaky.apply_async(kwargs={{"failures": 0}}, eta=later, expires=later + datetime.timedelta(hours=1))
        print("{{}}")
        """,
    )

    view = running.view(task_id)
    assert (view["status"], view["failures"], view["queue"]) == ("PENDING", 2, "default")
    assert (view["tags"], view["max_retries"]) == (["a"], 7)
    assert view["webhook"]["url"] == "http://127.0.0.1:9/hook"
    assert running.value("SELECT webhook_events FROM task WHERE id = $1", task_id) == ["task.started"]
    assert _hours(view["created_at"], view["run_at"]) == pytest.approx(1.0, abs=0.01)
    assert _hours(view["created_at"], view["expires_at"]) == pytest.approx(2.0, abs=0.01)


def _hours(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() / 3600


def test_an_expired_task_is_revoked_and_its_waiter_hears_of_it(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from celery.exceptions import TaskRevokedError
        from app.worker.sample_tasks import echo
        waiting = echo.apply_async([1], countdown=60, expires=0.2)
        try:
            waiting.get(timeout=20)
        except TaskRevokedError as told:
            print(json.dumps({"told": str(told), "status": waiting.status}))
        """,
    )

    assert said == {"told": "The task was still waiting when it expired", "status": "REVOKED"}


def test_a_failed_task_raises_at_its_waiter(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.celery_app import app
        told = {}
        for name, args in (("odd.raise", ["nul"]), ("sample.crash", [])):
            try:
                app.send_task(name, args).get(timeout=30)
            except Exception as raised:
                told[name] = [type(raised).__name__, str(raised)]
        print(json.dumps(told))
        """,
    )

    assert said["odd.raise"] == ["ValueError", "ab?"]
    crash = said["sample.crash"]
    assert isinstance(crash, list)
    assert crash[0] == "WorkerLost"


def test_a_task_that_raised_what_ends_a_program_does_not_end_its_waiter(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.celery_app import app
        told = {}
        for kind in ("exit", "interrupt", "generator"):
            try:
                app.send_task("odd.raise", [kind]).get(timeout=30)
            except BaseException as raised:
                told[kind] = [type(raised).__name__, isinstance(raised, Exception)]
        print(json.dumps(told))
        """,
    )

    assert said == {
        "exit": ["SystemExit", True],
        "interrupt": ["KeyboardInterrupt", True],
        "generator": ["GeneratorExit", True],
    }


def test_a_forked_process_submits_too_and_takes_nothing_from_its_parent(running: Service) -> None:
    said = client(
        running,
        """
        import gc, json, os, time
        from app.worker.sample_tasks import echo
        first = echo.delay("parent").get(timeout=10)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # What the child finalises of its parent's connections must not reach their shared epoll instance.
            gc.collect()
            os.write(writing, echo.delay("child").id.encode())
            os._exit(0)
        os.waitpid(child, 0)
        task_id = os.read(reading, 100).decode()
        took = []
        for _ in range(5):
            began = time.monotonic()
            echo.delay("parent again")
            took.append(time.monotonic() - began)
        again = echo.delay("parent again").get(timeout=10)
        print(json.dumps({"parent": first, "again": again, "child": task_id, "slowest": max(took)}))
        """,
        flags=(),  # the child is to finalise what it inherited; an error there would hide what that does
    )

    assert (said["parent"], said["again"]) == ("parent", "parent again")
    slowest = said["slowest"]
    assert isinstance(slowest, float)
    assert slowest < 2
    running.ends(UUID(str(said["child"])))
    assert running.result(UUID(str(said["child"]))) == {"result": "child"}


def test_what_cannot_run_is_refused_when_it_is_submitted(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.celery_app import app
        from app.worker.sample_tasks import echo, sleep
        calls = {
            "unknown": lambda: app.send_task("no.such.task"),
            "argument": lambda: sleep.delay("long"),
            "missing": lambda: echo.delay(),
            "queue": lambda: echo.apply_async([1], queue="elsewhere"),
            "link": lambda: echo.apply_async([1], link=echo.s(2)),
            "option": lambda: echo.apply_async([1], urgency=9),
            "soft limit": lambda: echo.apply_async([1], soft_time_limit=5),
            "webhook": lambda: echo.apply_async([1], webhook_url="ftp://example.com/"),
            "events": lambda: echo.apply_async([1], webhook_url="http://127.0.0.1:9/", webhook_events=["paused"]),
            "events for nobody": lambda: echo.apply_async([1], webhook_events=["task.failed"]),
            "not json": lambda: echo.delay(float("nan")),
            "id": lambda: echo.apply_async([1], task_id="seven"),
        }
        told = {}
        for name, call in calls.items():
            try:
                told[name] = call().id
            except Exception as raised:
                told[name] = type(raised).__name__
        print(json.dumps(told))
        """,
    )

    assert said == {
        "unknown": "NotRegistered",
        "argument": "ValidationFailed",
        "missing": "ValidationFailed",
        "queue": "ValueError",
        "link": "TypeError",
        "option": "TypeError",
        "soft limit": "TypeError",
        "webhook": "ValueError",
        "events": "ValueError",
        "events for nobody": "ValueError",
        "not json": "ValueError",
        "id": "ValueError",
    }


def test_a_number_out_of_range_is_refused_when_it_is_submitted(running: Service) -> None:
    said = client(
        running,
        """
        import datetime, json
        from app.worker.sample_tasks import echo
        far = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=366)
        calls = [
            {"max_retries": 101}, {"max_retries": -1}, {"max_retries": 3, "retries": 4}, {"retries": -1},
            {"time_limit": 0}, {"time_limit": 86401}, {"time_limit": float("nan")},
            {"countdown": 1e12}, {"countdown": float("inf")}, {"countdown": float("nan")}, {"expires": 1e12},
            {"eta": far}, {"expires": far}, {"tags": ["a"] * 21}, {"tags": ["a" * 65]}, {"tags": [""]},
        ]
        told = {}
        for options in calls:
            try:
                told[str(options)] = echo.apply_async([1], **options).id
            except Exception as raised:
                told[str(options)] = type(raised).__name__
        print(json.dumps(told))
        """,
    )

    assert len(said) == 16
    assert {call: what for call, what in said.items() if what != "ValueError"} == {}


def test_with_redis_away_a_submit_from_python_succeeds_and_runs_later(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.worker.sample_tasks import echo
        print(json.dumps({"id": echo.delay("later").id}))
        """,
        REDIS_URL="redis://127.0.0.1:1/0",
    )

    assert running.ends(UUID(str(said["id"])))["status"] == "SUCCESS"


SUBMIT_UNDER_A_CAP_OF_TWO = """
import json
from app import publisher
from app.worker.sample_tasks import echo
publisher.DEPTH_CAP = 2
print(json.dumps({{"ids": [echo.apply_async([n], queue="{queue}").id for n in range({count})]}}))
"""


def test_a_full_queue_is_left_to_the_relay_by_python_too_and_nobody_overtakes(running: Service) -> None:
    def submit(queue: str, count: int) -> list[bool]:
        """Which of so many new tasks were pushed. No process looks after these queues."""
        program = SUBMIT_UNDER_A_CAP_OF_TWO.format(queue=queue, count=count)
        ids = client(running, program, TASKQUEUE_QUEUES="filled,given_full")["ids"]
        assert isinstance(ids, list)
        return [bool(running.value("SELECT published_at IS NOT NULL FROM task WHERE id = $1", one)) for one in ids]

    with redis.Redis.from_url(running.environment["REDIS_URL"]) as plain:
        assert submit("filled", 4) == [True, True, False, False]
        assert plain.llen("filled") == 2
        plain.delete("filled")
        assert submit("filled", 1) == [False], "others were there before"

        plain.rpush("given_full", "a", "b")
        assert submit("given_full", 1) == [False], "it looks before its first push"
        plain.delete("given_full")


def test_a_task_called_as_a_function_is_a_function(running: Service) -> None:
    said = client(
        running,
        """
        import json
        from app.worker.sample_tasks import echo
        from app.worker.tasks import long_task
        print(json.dumps({"echo": echo([1]), "long": long_task(0.01)}))
        """,
        DATABASE_URL="postgresql://nobody@127.0.0.1:1/none",
    )

    assert said == {"echo": [1], "long": "Worked for 0.01 seconds"}


def test_a_waiter_is_woken_even_if_redis_lost_the_copy(running: Service) -> None:
    said = client(
        running,
        """
        import json, os, threading, time
        import redis
        from app.worker.sample_tasks import sleep
        waiting = sleep.delay(1.0)
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as plain:
            # From before the task ends until after, whatever is stored or announced for it is thrown away.
            stop = threading.Event()
            def throw_away():
                while not stop.wait(0.002):
                    plain.delete(f"celery-task-meta-{waiting.id}")
            thread = threading.Thread(target=throw_away)
            thread.start()
            waiting.get(timeout=20)
            stop.set()
            thread.join()
            plain.delete(f"celery-task-meta-{waiting.id}")
            from celery.result import AsyncResult
            from app.celery_app import app
            status = AsyncResult(waiting.id, app=app).status
        print(json.dumps({"status": status}))
        """,
    )

    assert said == {"status": "SUCCESS"}


def test_an_unknown_id_is_pending_to_celery_and_unknown_to_us(running: Service) -> None:
    task_id = uuid4()
    said = client(
        running,
        f"""
        import json
        from celery.result import AsyncResult
        from app.celery_app import app
        print(json.dumps({{"status": AsyncResult("{task_id}", app=app).status}}))
        """,
    )

    assert said == {"status": "PENDING"}
    assert running.http.get(f"/api/tasks/{task_id}/status").status_code == 404
    wait_until(running.ready, what="readiness")
