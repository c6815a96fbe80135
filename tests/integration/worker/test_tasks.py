"""The built-in tasks, called as plain functions or as the Celery tasks they are."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from app import catalog
from app.core.config import Settings
from app.worker import bridge, tasks
from tests.support.receiver import Answer, Receiver

CALL = catalog.lookup("http_request").function


@contextlib.contextmanager
def in_a_process_with(settings: Settings) -> Iterator[None]:
    """The settings that a worker process would have, for the time of a block."""
    bridge.close()
    opened = bridge.current(lambda: settings)
    yield
    bridge.close()
    opened._loop.close()


@pytest.fixture
def process_settings(settings: Settings) -> Iterator[None]:
    with in_a_process_with(settings.model_copy(update={"webhook_allow_private": True})):
        yield


@pytest.mark.usefixtures("process_settings")
def test_http_request_returns_what_was_answered() -> None:
    with Receiver(
        [Answer(status=418, headers={"etag": '"1"', "set-cookie": "a=b"}, body=b"short and stout")]
    ) as receiver:
        answer = CALL(f"{receiver.url}/pot", "POST", {"x-kind": "tea"}, "é")
        (request,) = receiver.requests
    assert (answer["status_code"], answer["body"], answer["truncated"]) == (418, "short and stout", False)
    assert answer["headers"]["etag"] == '"1"'
    assert "set-cookie" not in answer["headers"]
    assert (request.method, request.path, request.body) == ("POST", "/pot", "é".encode())
    assert request.headers["x-kind"] == "tea"


@pytest.mark.usefixtures("process_settings")
def test_http_request_to_nobody_is_worth_another_try() -> None:
    with pytest.raises(tasks.Unreachable):
        CALL("http://127.0.0.1:1/")


@pytest.mark.usefixtures("process_settings")
def test_http_request_with_a_forbidden_header_is_refused() -> None:
    with pytest.raises(tasks.Refused, match="header host"):
        CALL("http://127.0.0.1:1/", headers={"host": "elsewhere"})


def test_http_request_to_a_private_address_is_refused(settings: Settings) -> None:
    with in_a_process_with(settings), Receiver() as receiver:
        with pytest.raises(tasks.Refused):
            CALL(receiver.url)
        assert receiver.requests == []


SCRIPT = """
import celery, inspect
from app.catalog import task

@task("demo.twice", max_retries=1, autoretry_for=(OSError,), retry_backoff=True)
def twice(x: int, *, by: int = 2) -> int:
    "Double it."
    return x * by

assert twice(21) == 42 and twice(2, by=3) == 6
assert isinstance(twice, celery.Task) and twice.name == "demo.twice"
assert (twice.max_retries, twice.autoretry_for, twice.retry_backoff_max) == (1, (OSError,), 600)
assert list(inspect.signature(twice.entry.function).parameters) == ["x", "by"]
assert twice.entry.bind("[1]", '{"by": 3}') == {"x": 1, "by": 3}
assert "demo.twice" in twice.app.tasks and callable(twice.delay)
task.progress(0.5, "half")
"""


def test_what_task_makes_is_a_celery_task(settings: Settings) -> None:
    given = {
        "DATABASE_URL": settings.postgres_dsn,
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "TASKQUEUE_AUTH_MODE": "none",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env=os.environ | given, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
