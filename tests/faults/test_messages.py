"""Messages that are repeated, out of order, stale, lost, forged, or no messages at all."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from app import broker
from app.broker import Received
from tests.faults.audit import Figures
from tests.faults.stack import QUEUE, Stack
from tests.support.waiting import wait_until

Report = Callable[[Figures], None]

LOST_MESSAGE_SECONDS = 15
MEBIBYTE = 1024 * 1024
MESSAGE = b'"lang":"py"'
"""What only a message holds, of all that Redis says to a worker."""

pytestmark = pytest.mark.timeout(300)


def test_duplicated_reordered_and_stale_messages(running: Stack, report: Report) -> None:
    running.submit_many(4, "faults.work", 3.0)
    running.running(4)
    tasks = running.submit_many(60, "faults.work", 0.02)
    with running.bell() as client:
        wait_until(lambda: running.depth() == len(tasks), 5, "all messages")
        saved = client.lrange(QUEUE, 0, -1)
        copies = saved * 5
        running.chance.shuffle(copies)
        with client.pipeline(transaction=True) as pipe:
            pipe.delete(QUEUE)
            pipe.rpush(QUEUE, *copies)
            pipe.execute()
        running.reach(tasks, "SUCCESS", seconds=60)
        # As when Redis comes back from a file that it wrote before all of them ended.
        client.rpush(QUEUE, *saved)
        wait_until(lambda: running.depth() == 0, 30, "the end of the stale messages")
    figures = running.finish(
        "messages five times, shuffled, and again after the end", recovery_seconds=0, allowed_seconds=0
    )
    report(figures)
    assert figures.run_twice == 0
    rows = running.fetch("SELECT DISTINCT attempt FROM task")
    assert [row["attempt"] for row in rows] == [1]


@pytest.mark.slow
def test_forged_and_poisoned_messages(running: Stack, report: Report) -> None:
    ended = running.submit("faults.work")
    cancelled = running.submit("faults.work", countdown=600)
    held = running.submit("faults.work", countdown=600)
    assert running.service.http.post(f"/api/tasks/{cancelled}/cancel").status_code == 200
    running.reach([ended], "SUCCESS")
    before = running.statuses([ended, cancelled, held])
    pids = {worker.pid for worker in running.workers}
    poison = [*forged([ended, cancelled, held]), *misshapen(held), *garbage()]
    running.chance.shuffle(poison)
    with running.bell() as client:
        for number, (what, raw) in enumerate(poison):
            client.rpush(QUEUE, raw)
            wait_until(lambda: running.depth() == 0, 10, f"a worker that takes {what}")
            if number % 8 == 0:
                running.reach([running.submit("faults.work", webhook=False)], "SUCCESS", seconds=15)
    assert running.statuses([ended, cancelled, held]) == before
    assert {worker.pid for worker in running.workers if worker.running()} == pids
    assert running.service.http.post(f"/api/tasks/{held}/cancel").status_code == 200
    figures = running.finish(f"{len(poison)} forged and poisoned messages", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    assert figures.run_twice == 0
    assert {one.task_id for one in running.effects()} & {ended, cancelled, held} == {ended}
    for worker in running.workers:
        assert "onnection to broker lost" not in worker.log.read_text(), "a message made a worker connect again"


def test_forged_messages_ahead_of_the_true_one(running: Stack, report: Report) -> None:
    """They name a task that may run now: not under that name, and not as that attempt."""
    running.submit_many(4, "faults.work", 2.0)
    running.running(4)
    tasks = running.submit_many(8, "faults.work", 0.05)
    forgeries = [
        message(task_id, **headers)
        for task_id in tasks
        for headers in (
            {"task": "faults.die"},
            {"task": "sample.crash"},
            {"task": "no.such.task"},
            {"attempt": 1},
            {"attempt": 7},
            {"attempt": broker.MOST_ATTEMPTS},
        )
    ]
    running.chance.shuffle(forgeries)
    with running.bell() as client:
        client.rpush(QUEUE, *forgeries)
    figures = running.finish("forged messages ahead of the true ones", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    assert figures.run_twice == 0
    rows = running.fetch("SELECT status, attempt, crashes, refusals FROM task WHERE id = ANY($1::uuid[])", tasks)
    assert {tuple(row) for row in rows} == {("SUCCESS", 1, 0, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [broker.TAIL_DEPTH // 2, broker.TAIL_DEPTH + 2])
def test_garbage_at_the_tail_of_a_backlog_with_a_lost_message_behind_it(
    running: Stack, report: Report, count: int
) -> None:
    """What can't be read is looked past; where nothing can, the search goes on once it has been dropped."""
    seconds = 14.0 if count < broker.TAIL_DEPTH else 3.0
    running.submit_many(4, "faults.work", seconds)
    running.running(4)
    lost, *others = running.submit_many(30, "faults.work", 0.4)
    with running.bell() as client:
        [raw] = [one for one in client.lrange(QUEUE, 0, -1) if lost.encode() in one]
        assert client.lrem(QUEUE, 1, raw) == 1
        at = time.time()
        client.rpush(QUEUE, *[b"garbage \xff"] * count)
        if count < broker.TAIL_DEPTH:
            again = running.messages_again([lost], at)
            assert running.statuses([lost]) == {lost: "PENDING"}
            assert client.lindex(QUEUE, 0) != b"garbage \xff"
            assert any(lost.encode() in one for one in client.lrange(QUEUE, -1, -1)), "it is not next in line"
        else:
            wait_until(lambda: client.lrange(QUEUE, -1, -1) != [b"garbage \xff"], 20, "the end of the garbage")
            at = time.time()
            again = running.recovered([lost], at)
    running.reach(others, "SUCCESS")
    figures = running.finish(
        f"{count} times garbage at the tail, a message lost behind it",
        recovery_seconds=again,
        allowed_seconds=LOST_MESSAGE_SECONDS,
    )
    report(figures)
    assert figures.run_twice == 0
    assert running.pushed_again() == 1


@pytest.mark.slow
def test_the_first_popped_message_of_a_burst_is_lost(running: Stack, report: Report) -> None:
    trap = running.network("redis", "worker").trap(MESSAGE, sender="server", then="cut")
    tasks = running.submit_many(400, "faults.work", 0.25)
    [lost] = [one for one in tasks if one.encode() in trap.caught]
    # It was popped within moments of its submit.
    at = running.steps([lost])[0].at
    recovery = running.recovered([lost], at)
    left = running.fetch("SELECT count(*) AS n FROM task WHERE status IN ('PENDING', 'RETRY')")[0]["n"]
    assert left > 40, "it ran last, not once it was missed"
    figures = running.finish(
        "the first of 400 messages is lost", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS
    )
    report(figures)
    assert figures.run_twice == 0
    assert running.pushed_again() == 1


@pytest.mark.slow
def test_a_message_pushed_again_of_a_task_that_then_retries(running: Stack, report: Report) -> None:
    """Its new place is behind the backlog, whose messages must not look lost for that."""
    trap = running.network("redis", "worker").trap(MESSAGE, sender="server", then="cut")
    retrying = running.submit("faults.work", 0.0, 3)
    assert trap.sprung.wait(5)
    at = time.time()
    tasks = running.submit_many(500, "faults.work", 0.25)
    wait_until(lambda: running.steps([retrying])[-1].status == "RETRY", 30, "its first failure")
    recovery = next(one.at for one in running.steps([retrying]) if one.status == "STARTED") - at
    running.reach([retrying], "SUCCESS")
    running.reach(tasks, "SUCCESS", seconds=90)
    figures = running.finish(
        "pushed again, then retried, before a backlog of 500",
        recovery_seconds=recovery,
        allowed_seconds=LOST_MESSAGE_SECONDS,
    )
    report(figures)
    assert running.pushed_again() == 1


@pytest.mark.slow
def test_a_rolling_deploy_where_not_every_worker_knows_the_task(running: Stack, report: Report) -> None:
    older = running.start_worker(TASKQUEUE_TASK_MODULES="")
    beat = running.home / str(running.service.processes.index(older)) / "run" / "worker.beat"
    wait_until(beat.exists, 30, "the older worker")
    at = time.time()
    tasks = running.submit_many(60, "faults.work", 0.1)
    known = running.submit_many(20, "sample.echo", 1)
    running.reach(known, "SUCCESS")
    running.reach(tasks, "SUCCESS", seconds=60)
    recovery = time.time() - at
    assert "is handed back" in older.log.read_text(), "it was never offered a task that it does not know"
    running.expect_end(older)
    older.stop()
    figures = running.finish("a worker that does not know the task", recovery_seconds=recovery, allowed_seconds=30)
    report(figures)
    assert figures.run_twice == 0


def message(task_id: str, **headers: Any) -> bytes:
    """A message as this service writes it, apart from these headers."""
    said = Received(task_id=UUID(task_id), name="faults.work", attempt=0, position=1)
    envelope = broker.envelope(said, QUEUE)
    envelope["headers"] |= headers
    return json.dumps(envelope).encode()


TYPED = {"__type__": "datetime", "__value__": "2026-01-01T00:00:00"}
"""What kombu's JSON makes an object of."""
OTHER_PARTS: tuple[Any, ...] = (None, 5, "%%%", [], {}, TYPED)
# fmt: off
WRONG: dict[str, tuple[Any, ...]] = {
    "attempt": (1, 2, 7, -1, 2**31 - 2, 2**31, 2**70, "0", "first", None, 0.0, True, [], {}),
    "task": (
        "faults.die", "sample.crash", "os.system", "no.such.task", "celery.backend_cleanup", "celery.accumulate",
        "celery.chord_unlock", "celery.chain", "celery.map", "", " ", "x" * 5000, "\x00", None, 5, ["faults.work"],
    ),
    "id": (str(uuid4()), "x", "", None, 5, [], "../../etc/passwd", TYPED),
    "position": (-1, 2**63, "1", None, 1.5),
    "eta": ("2000-01-01T00:00:00",),
    "expires": ("2000-01-01T00:00:00",),
    "timelimit": ([0.001, 0.001],),
    "time_limit": (-5, "5", TYPED),
    "retries": ("many",),
    "traceparent": ("x" * 100_000, 5),
    "unknown": (TYPED, "x" * 8 * MEBIBYTE),
    "callbacks": (5, [TYPED]),
    "compression": ("gzip",),
    "shadow": (TYPED,),
}
# fmt: on


def forged(tasks: list[str]) -> Iterator[tuple[str, bytes]]:
    """Messages that look like ours, about tasks that must not run."""
    for task_id in tasks:
        yield "a message as ours are", message(task_id)
        for header, values in WRONG.items():
            for value in values:
                yield f"{header} {value!r:.40}", message(task_id, **{header: value})


def misshapen(task_id: str) -> Iterator[tuple[str, bytes]]:
    """Messages whose parts are missing, or are something else."""
    envelope = json.loads(message(task_id))
    for key in ("body", "headers", "properties", "content-type", "content-encoding"):
        yield f"no {key}", json.dumps({one: value for one, value in envelope.items() if one != key}).encode()
        for value in OTHER_PARTS:
            yield f"{key} {value!r}", json.dumps(envelope | {key: value}).encode()
    for key in envelope["properties"]:
        fewer = {one: value for one, value in envelope["properties"].items() if one != key}
        yield f"no {key}", json.dumps(envelope | {"properties": fewer}).encode()
    for key in ("id", "task", "attempt", "position", "lang"):
        fewer = {one: value for one, value in envelope["headers"].items() if one != key}
        yield f"no header {key}", json.dumps(envelope | {"headers": fewer}).encode()
    callback = {"task": "faults.die", "args": [], "kwargs": {}, "options": {}}
    for body in ([[TYPED], {}, {}], [[1], {"failures": 9}, {"callbacks": [callback], "errbacks": [callback]}]):
        text = base64.b64encode(json.dumps(body).encode()).decode()
        yield "a body with arguments", json.dumps(envelope | {"body": text}).encode()
    yield "pickle", json.dumps(envelope | {"content-type": "application/x-python-serialize"}).encode()
    yield "a huge body", json.dumps(envelope | {"body": "x" * 8 * MEBIBYTE}).encode()


def garbage() -> Iterator[tuple[str, bytes]]:
    """What is no message at all."""
    for raw in (
        b"", b" ", b"\x00", b"\xff\xfe\x00\x80", b"null", b"5", b"NaN", b"true", b'"text"', b"[]", b"[[]]", b"{}",
        b"{", b'{"headers": {}}', b'{"properties": 5}', b"[" * 100_000, b"9" * 100_000, b"x" * 8 * MEBIBYTE,
        b'{"__type__": "datetime", "__value__": "x"}', b'{"__type__": "no such", "__value__": 1}',
        b"*3\r\n$3\r\nSET\r\n", b"\x80\x04\x95",
    ):  # fmt: skip
        yield f"{raw[:40]!r}", raw
