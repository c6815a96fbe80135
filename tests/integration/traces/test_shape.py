"""One trace for each submit, whatever becomes of its task."""

import json
import os
import signal
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from tests.support import otlp
from tests.support.otlp import Collector, Span
from tests.support.receiver import Received, Receiver
from tests.support.service import Service
from tests.support.waiting import wait_until

TASKS = 500
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def named(spans: Sequence[Span], name: str) -> list[Span]:
    """The spans of a name, the first one first."""
    return sorted((one for one in spans if one.name == name), key=lambda one: one.ended_at - one.seconds)


def attempts(spans: Sequence[Span]) -> list[Span]:
    return sorted(named(spans, "process default"), key=lambda one: int(one.attributes["taskqueue.attempt"]))


def submitted(running: Service, task: str, *args: object, **fields: object) -> tuple[str, str]:
    """Submit a task; returns its id and that of its trace."""
    body = {"task": task, "args": list(args), **fields}
    answer = running.http.post("/api/tasks/submit", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["task_id"], answer.headers["x-trace-id"]


def test_a_submit_its_attempt_and_its_webhook_are_one_trace(running: Service, collector: Collector) -> None:
    with Receiver([500, 200]) as receiver:
        task_id, trace_id = submitted(running, "sample.echo", "hi", webhook_url=f"{receiver.url}?token=s3cret")
        spans = collector.wait_for(trace_id, lambda found: len(named(found, "POST")) == 2)
        headers = [request.headers for request in receiver.requests]
    [server], [create], [send] = (
        named(spans, name) for name in ("POST /api/tasks/submit", "create default", "send default")
    )
    [attempt], [event] = attempts(spans), named(spans, "create webhook")
    first, second = named(spans, "POST")
    assert {one.name for one in spans} == {
        "POST /api/tasks/submit", "create default", "send default", "process default", "create webhook", "POST",
    }  # fmt: skip
    assert [one.parent for one in (server, create, send, attempt, event, first, second)] == [
        "", server.id, create.id, create.id, attempt.id, event.id, event.id,
    ]  # fmt: skip
    assert [(one.kind, one.service) for one in (server, create, send, attempt, event, first)] == [
        ("SERVER", "taskqueue-api"), ("PRODUCER", "taskqueue-api"), ("CLIENT", "taskqueue-api"),
        ("CONSUMER", "taskqueue-worker"), ("PRODUCER", "taskqueue-relay"), ("CLIENT", "taskqueue-relay"),
    ]  # fmt: skip
    assert (first.links, second.links) == ((), ((trace_id, first.id),))
    assert (first.error, first.attributes["http.response.status_code"], first.attributes["error.type"]) == (
        True, 500, "http_5xx",
    )  # fmt: skip
    assert (second.error, second.attributes["http.response.status_code"]) == (False, 200)
    assert [one["traceparent"] for one in headers] == [f"00-{trace_id}-{one.id}-01" for one in (first, second)]
    assert all("baggage" not in one and "tracestate" not in one for one in headers)
    assert attempt.attributes["messaging.message.id"] == task_id
    assert attempt.attributes["taskqueue.outcome"] == "succeeded"
    assert running.view(UUID(task_id))["trace_id"] == trace_id
    assert "s3cret" not in str(spans)


def test_retries_are_siblings_that_link_to_the_one_before(running: Service, collector: Collector) -> None:
    _, trace_id = submitted(running, "sample.flaky", 2)
    spans = collector.wait_for(trace_id, lambda found: len(attempts(found)) == 3)
    [create], (first, second, third) = named(spans, "create default"), attempts(spans)
    assert {one.parent for one in (first, second, third)} == {create.id}
    assert [one.links for one in (first, second, third)] == [(), ((trace_id, first.id),), ((trace_id, second.id),)]
    assert [(one.error, one.attributes["taskqueue.task.status"]) for one in (first, second, third)] == [
        (True, "RETRY"), (True, "RETRY"), (False, "SUCCESS"),
    ]  # fmt: skip
    # The first push is the API's, the others are a relay's.
    pushes = collector.wait_for(trace_id, lambda found: len(named(found, "send default")) == 3)
    assert [one.service for one in named(pushes, "send default")] == ["taskqueue-api", *["taskqueue-relay"] * 2]


def test_a_killed_child_loses_nothing_but_what_had_not_ended(running: Service, collector: Collector) -> None:
    _, before = submitted(running, "sample.echo", 1)
    task_id, trace_id = submitted(running, "traced.sleep", 0.2)
    running.ends(UUID(task_id))
    slow, killed = submitted(running, "traced.sleep", 30)
    collector.wait_for(killed, lambda found: named(found, "before"))
    os.kill(running.child_of(UUID(slow)).pid, signal.SIGKILL)
    spans = collector.wait_for(killed, attempts)
    [lost] = attempts(spans)
    assert (lost.error, lost.attributes["taskqueue.outcome"], lost.service) == (True, "crashed", "taskqueue-worker")
    assert [one.parent for one in named(spans, "before")] == [lost.id]
    assert lost.seconds < 30
    running.http.post(f"/api/tasks/{slow}/cancel")  # it would run again
    for one in (before, trace_id):
        assert len(attempts(collector.wait_for(one, attempts))) == 1


def test_an_attempt_after_a_killed_one_goes_on_in_the_trace(running: Service, collector: Collector) -> None:
    with Receiver([200]) as receiver:
        task_id, trace_id = submitted(running, "sample.crash", webhook_url=receiver.url)
        number = running.ends(UUID(task_id), seconds=60)["attempt"]
        spans = collector.wait_for(trace_id, lambda found: named(found, "POST") and len(attempts(found)) == number)
    tried = attempts(spans)
    assert [one.attributes["taskqueue.outcome"] for one in tried] == ["crashed"] * len(tried)
    assert [one.links for one in tried[1:]] == [((trace_id, one.id),) for one in tried[:-1]]
    # Nobody but the keeper could tell of the last one, and the webhook is its.
    assert [one.parent for one in named(spans, "create webhook")] == [tried[-1].id]


def test_a_rerun_begins_a_trace_that_is_linked_to_the_old_one(running: Service, collector: Collector) -> None:
    task_id, old = submitted(running, "sample.echo", 1)
    running.ends(UUID(task_id))
    answer = running.http.post(f"/api/tasks/{task_id}/rerun")
    new = answer.headers["x-trace-id"]
    assert new != old
    spans = collector.wait_for(new, lambda found: attempts(found) and named(found, "create default"))
    [original] = named(collector.wait_for(old, lambda found: named(found, "create default")), "create default")
    [create] = named(spans, "create default")
    assert create.links == ((old, original.id),)
    assert attempts(spans)[0].parent == create.id


def test_spans_and_tasks_of_a_tasks_own_code_are_part_of_the_trace(running: Service, collector: Collector) -> None:
    traces = []
    parts = {"process default": 2, "create default": 2, "render": 1}
    for _ in range(2):
        task_id, trace_id = submitted(running, "traced.parent")
        running.ends(UUID(task_id))
        # Each process sends in its own time.
        spans = collector.wait_for(
            trace_id, lambda found: all(len(named(found, name)) == count for name, count in parts.items())
        )
        [render] = named(spans, "render")
        outer, inner = named(spans, "process default")
        create = named(spans, "create default")[1]
        assert (render.parent, create.parent, inner.parent) == (outer.id, render.id, create.id)
        assert (render.scope, render.attributes) == ("reports", {"pages": 3, "odd": "?"})
        traces.append({one.id for one in spans})
        line = next(line for line in _lines(running) if line["message"] == "rendering" and line["trace_id"] == trace_id)
        assert (line["task_id"], line["attempt"], line["queue"]) == (task_id, 1, "default")
        assert line["span_id"] == render.id
    assert not traces[0] & traces[1]


def test_a_batch_is_one_trace_with_one_span_for_its_statement(running: Service, collector: Collector) -> None:
    body = {"tasks": [{"task": "sample.echo", "args": [number]} for number in range(5)]}
    answer = running.http.post("/api/tasks/batch", json=body)
    spans = collector.wait_for(answer.headers["x-trace-id"], lambda found: len(attempts(found)) == 5)
    [create], [send] = named(spans, "create default"), named(spans, "send default")
    assert {one.parent for one in attempts(spans)} == {create.id}
    assert create.attributes["messaging.batch.message_count"] == send.attributes["messaging.batch.message_count"] == 5


def test_each_task_of_a_schedule_begins_a_trace_that_names_it(running: Service, collector: Collector) -> None:
    body = {"cron": "* * * * *", "submit": {"task": "sample.echo", "args": [1]}}
    answer = running.http.put("/api/schedules/every-minute", json=body)
    assert answer.status_code in {200, 201}, answer.text
    running.execute("UPDATE schedule SET next_run = date_trunc('minute', now()), due_at = now()")
    found = wait_until(
        lambda: [one for one in collector.spans if one.attributes.get("taskqueue.schedule") == "every-minute"], 20
    )
    assert found[0].parent == ""
    collector.wait_for(found[0].trace, attempts)
    assert running.http.delete("/api/schedules/every-minute").status_code == 204


def test_a_caller_that_is_recorded_is_the_parent(running: Service, collector: Collector) -> None:
    answer = running.http.post("/api/tasks/submit", headers={"traceparent": CALLER})
    running.http.post(f"/api/tasks/{answer.json()['task_id']}/cancel")
    assert answer.headers["x-trace-id"] == CALLER[3:35]
    spans = collector.wait_for(CALLER[3:35], lambda found: named(found, "create default"))
    assert named(spans, "POST /api/tasks/submit")[0].parent == CALLER[36:52]


def test_a_caller_that_is_not_recorded_is_not_recorded_here(running: Service, collector: Collector) -> None:
    caller = CALLER.replace("0af7", "1111")[:-1] + "0"
    answer = running.http.post(
        "/api/tasks/submit", json={"task": "sample.echo", "args": [1]}, headers={"traceparent": caller}
    )
    running.ends(UUID(answer.json()["task_id"]))
    otlp.settled_down(collector)
    assert collector.trace(caller[3:35]) == []
    assert answer.headers["x-trace-id"] == caller[3:35]


def test_a_test_event_is_in_the_trace_of_its_request(running: Service, collector: Collector) -> None:
    with Receiver([200]) as receiver:
        answer = running.http.post("/api/webhooks/test", json={"url": receiver.url}, timeout=30)
        assert answer.status_code == 200, answer.text
        trace_id = receiver.requests[0].headers["traceparent"][3:35]
    spans = collector.wait_for(trace_id, lambda found: {"SERVER", "CLIENT"} <= {one.kind for one in found})
    [server] = [one for one in spans if one.kind == "SERVER"]
    assert [one.parent for one in named(spans, "create webhook")] == [server.id]


def test_probes_are_not_traced(running: Service, collector: Collector) -> None:
    running.http.get("/healthz")
    running.http.get("/readyz")
    otlp.settled_down(collector)
    assert {"/healthz", "/readyz"}.isdisjoint(one.attributes.get("http.route") for one in collector.spans)


def test_every_attempt_has_one_outcome_line_and_every_line_is_json(running: Service) -> None:
    task_id, trace_id = submitted(running, "sample.flaky", 1)
    running.ends(UUID(task_id))
    told = [line for line in _lines(running) if line.get("task_id") == task_id and " ended " in line["message"]]
    assert [(line["attempt"], line["queue"], line["trace_id"]) for line in told] == [
        (1, "default", trace_id), (2, "default", trace_id),
    ]  # fmt: skip
    assert all(len(line["span_id"]) == 16 for line in told)


def test_neither_lines_nor_spans_have_arguments_results_or_secrets(running: Service, collector: Collector) -> None:
    mark = "s3cret-of-somebody"
    refused = [
        {"task": "sample.echo", "args": [1], "kwargs": {mark: mark}},
        {"task": "sample.sleep", "args": [mark]},
        {"task": mark},
        {"task": "sample.echo", "args": [1], "webhook_url": f"ftp://{mark}/"},
        {mark: mark},
    ]
    with Receiver([500, 200]) as receiver:
        hook = f"{receiver.url}/{mark}?token={mark}"
        ways: list[tuple[str, list[object], dict[str, object]]] = [
            ("sample.echo", [mark], {"webhook_url": hook, "tags": [mark], "concurrency_key": mark}),
            ("sample.fail", [mark], {"max_retries": 0, "webhook_url": hook}),
            ("sample.fail", [mark], {"max_retries": 1}),
            ("http_request", [f"{receiver.url}/{mark}", "POST", {"authorization": mark}, mark], {}),
            ("http_request", [f"http://127.0.0.1:1/{mark}"], {"max_retries": 0}),
            ("odd.result", [mark], {"max_retries": 0}),  # a KeyError, whose message is the argument
            ("odd.attempts", [f"/{mark}/nowhere"], {"max_retries": 0}),
        ]
        tasks = [submitted(running, name, *given, **fields) for name, given, fields in ways]
        for body in refused:
            answer = running.http.post("/api/tasks/submit", json=body, headers={"authorization": f"Bearer {mark}"})
            assert answer.status_code == 422, answer.text
        for task_id, trace_id in tasks:
            running.ends(UUID(task_id))
            collector.wait_for(trace_id, attempts)
        wait_until(lambda: len([one for one in receiver.requests if "webhook-id" in one.headers]) >= 3, 20, "webhooks")
    otlp.settled_down(collector)
    assert [line for line in _lines(running) if mark in json.dumps(line)] == []
    assert [one for one in collector.spans if mark in str(one)] == []
    ended = {line["task_id"] for line in _lines(running) if " ended " in line["message"] and "task_id" in line}
    assert {task_id for task_id, _ in tasks} <= ended


def test_no_span_of_500_tasks_is_an_orphan(running: Service, collector: Collector) -> None:
    def seldom(received: Received) -> int:
        return 503 if received.body[-1] % 7 == 0 and len(receiver.requests) % 5 == 0 else 200

    receiver = Receiver(seldom)
    with receiver:
        wanted: list[dict[str, Any]] = [{"task": "sample.echo", "args": [number]} for number in range(TASKS // 4)]
        wanted += [{"task": "sample.flaky", "args": [1], "max_retries": 1}] * (TASKS // 20)
        wanted += [{"task": "sample.fail", "args": ["no"], "max_retries": 0, "webhook_url": receiver.url}] * (
            TASKS // 20
        )
        # Children die on the way.
        wanted += [{"task": "sample.crash", "webhook_url": receiver.url}] * 2
        traces = [running.http.post("/api/tasks/submit", json=one).headers["x-trace-id"] for one in wanted]
        many = [{"task": "sample.echo", "args": [0], "webhook_url": receiver.url}] * (TASKS - len(wanted))
        traces.append(running.http.post("/api/tasks/batch", json={"tasks": many}).headers["x-trace-id"])
        wait_until(lambda: running.value("SELECT count(*) FROM task WHERE finished_at IS NULL") == 0, 90, "the end")
        wait_until(
            lambda: running.value("SELECT count(*) FROM webhook_delivery WHERE status <> 'delivered'") == 0,
            60,
            "webhooks",
        )
    theirs = f"substr(traceparent, 4, 32) = ANY ('{{{','.join(traces)}}}')"
    expected = {
        "process default": running.value(f"SELECT sum(attempt) FROM task WHERE {theirs}"),
        "create webhook": running.value(f"SELECT count(*) FROM task WHERE {theirs} AND webhook_url IS NOT NULL"),
        "POST": running.value(
            "SELECT count(*) FROM webhook_attempt a JOIN webhook_delivery d ON d.id = a.delivery_id"
            f" JOIN task ON task.id = d.task_id WHERE {theirs}"
        ),
    }

    def counted() -> dict[str, int]:
        kept = [one.name for one in collector.spans if one.trace in traces]
        return {name: kept.count(name) for name in expected}

    wait_until(lambda: counted() == expected, 20, f"{expected} (now {counted()})")
    otlp.settled_down(collector)
    assert counted() == expected
    assert [one for one in collector.orphans() if one.parent != CALLER[36:52]] == []
    assert collector.duplicates == []


def _lines(running: Service) -> list[dict[str, Any]]:
    """All that the service has logged. Raises ValueError if a line is no JSON."""
    lines = []
    for process in running.processes:
        # The last line may be half written.
        lines += [json.loads(line) for line in process.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return lines
