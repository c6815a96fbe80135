import base64
import json
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Producer
from kombu.utils.json import loads

from app import broker, lifecycle
from app.core import errors
from app.worker import results  # noqa: F401  # registers the type of raw JSON

BELL = lifecycle.Bell(
    task_id=UUID("018f3e3e-2e65-7beb-ba9f-d0ba0344787b"),
    name="reports.render",
    queue="reports",
    attempt=2,
    position=77,
    time_limit=60.0,
    traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
)


def what_celery_makes(bell: lifecycle.Bell) -> dict[str, Any]:
    """The message that Celery itself would push for this task, as kombu's Redis transport writes it."""
    app = Celery("contract", set_as_current=False)
    made = app.amqp.as_task_v2(
        str(bell.task_id),
        bell.name,
        retries=bell.attempt,
        time_limit=60.0,
        root_id=str(bell.task_id),
        ignore_result=True,
    )
    with Connection("memory://") as connection:
        channel = connection.default_channel
        Queue(bell.queue)(channel).declare()
        Producer(channel).publish(
            made.body, exchange="", routing_key=bell.queue, serializer="json", headers=made.headers, **made.properties
        )
        return dict(channel._get(bell.queue))


def test_the_envelope_is_what_celery_itself_makes_less_what_we_do_not_say() -> None:
    ours, theirs = json.loads(broker.encode(BELL, "reports")), what_celery_makes(BELL)

    assert set(ours) == set(theirs)
    assert {key: ours[key] for key in ("content-type", "content-encoding")} == {
        key: theirs[key] for key in ("content-type", "content-encoding")
    }
    for header in ("lang", "task", "id", "root_id", "retries", "ignore_result"):
        assert ours["headers"][header] == theirs["headers"][header], header
    assert set(ours["headers"]) - set(theirs["headers"]) == {
        *("version", "attempt", "position", "time_limit", "traceparent")
    }
    assert ours["headers"]["timelimit"] == [None, None], "the keeper ends what runs too long"
    assert set(ours["properties"]) <= set(theirs["properties"])
    for name in ("correlation_id", "delivery_info", "body_encoding", "priority"):
        assert ours["properties"][name] == theirs["properties"][name], name


def test_the_envelope_carries_no_arguments() -> None:
    body = json.loads(broker.encode(BELL, "reports"))["body"]

    args, kwargs, _ = json.loads(base64.b64decode(body))
    assert (args, kwargs) == ([], {})


def test_every_message_has_a_delivery_tag_of_its_own() -> None:
    tags = {json.loads(broker.encode(BELL, "q"))["properties"]["delivery_tag"] for _ in range(10)}

    assert len(tags) == 10


def test_a_task_without_a_limit_has_none_in_its_envelope() -> None:
    headers = json.loads(broker.encode(replace(BELL, time_limit=None, traceparent=None), "q"))["headers"]

    assert headers["time_limit"] is None
    assert "traceparent" not in headers


def test_a_message_is_read_back() -> None:
    received = broker.decode(broker.encode(BELL, "reports"))

    assert received == broker.Received(
        task_id=BELL.task_id,
        name=BELL.name,
        attempt=BELL.attempt,
        position=BELL.position,
        time_limit=BELL.time_limit,
        traceparent=BELL.traceparent,
    )
    again = json.loads(broker.encode(received, "reports"))
    assert again["headers"] == json.loads(broker.encode(BELL, "reports"))["headers"]


def versioned(version: object) -> bytes:
    envelope = json.loads(broker.encode(BELL, "reports"))
    envelope["headers"]["version"] = version
    return json.dumps(envelope).encode()


def test_an_envelope_without_a_version_is_of_the_first() -> None:
    envelope = json.loads(broker.encode(BELL, "reports"))
    assert envelope["headers"].pop("version") == broker.ENVELOPE_VERSION

    assert broker.read(envelope) == broker.decode(broker.encode(BELL, "reports"))


def test_an_envelope_of_a_later_version_is_refused_whatever_else_it_says() -> None:
    with pytest.raises(errors.EnvelopeError, match="later release"):
        broker.decode(versioned(broker.ENVELOPE_VERSION + 1))


def test_of_a_forged_message_only_what_a_message_says_is_believed() -> None:
    forged = json.loads(broker.encode(BELL, "reports"))
    forged["body"] = base64.b64encode(b'[[], {}, {"callbacks": [{"task": "sample.crash"}]}]').decode()
    forged["headers"] |= {"eta": "2999-01-01", "ignore_result": False, "group": "g", "traceparent": "x" * 65}
    forged["headers"] |= {"time_limit": "soon", "timelimit": [0.1, 0.1]}

    received = broker.read(forged)

    assert received.time_limit is None
    assert broker.envelope(received, "reports")["headers"]["timelimit"] == [None, None]
    assert received.traceparent is None
    assert set(broker.envelope(received, "reports")["headers"]) == {
        *json.loads(broker.encode(replace(BELL, traceparent=None), "reports"))["headers"]
    }


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"headers": null}',
        b'{"headers": {"id": "x", "task": "t", "attempt": 0, "position": 1}}',
        b"[" * 100_000,
        broker.encode(BELL, "q").replace(b'"position":77', b'"position":"77"'),
        broker.encode(BELL, "q").replace(b'"position":77', b'"position":-1'),
        broker.encode(replace(BELL, name="a\x00b"), "q"),
        broker.encode(replace(BELL, name="\ud800"), "q"),
        broker.encode(replace(BELL, name="x" * 256), "q"),
        broker.encode(replace(BELL, name=""), "q"),
        broker.encode(BELL, "q").replace(b'"version":1', b'"version":"1"'),
        broker.encode(BELL, "q").replace(b'"version":1', b'"version":null'),
        broker.encode(replace(BELL, name="celery.chord_unlock"), "q"),
        b'{"__type__": "uuid", "__value__": "x"}',
        broker.encode(BELL, "q").replace(b'"position":77', b'"position":true'),
        broker.encode(BELL, "q").replace(b'"attempt":2', b'"attempt":1e3'),
        broker.encode(BELL, "q").replace(b'"position":77', b'"position":99999999999999999999'),
    ],
)
def test_what_is_not_ours_is_refused_by_one_error(raw: bytes) -> None:
    with pytest.raises(errors.EnvelopeError):
        broker.decode(raw)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(errors.EnvelopeError):
        broker.decode(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["__type__", "__value__", "a"]) | st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_any_result_reaches_a_celery_client_as_it_is(value: Any) -> None:
    meta = broker.encode_meta(BELL.task_id, "SUCCESS", result=json.dumps(value), error_type="", error_message="")

    assert loads(meta)["result"] == value


def test_the_end_of_a_task_is_what_celery_s_backend_reads() -> None:
    failed = loads(broker.encode_meta(BELL.task_id, "FAILURE", result=None, error_type="KeyError", error_message="k"))
    assert failed["result"] == {"exc_type": "KeyError", "exc_message": ["k"], "exc_module": "builtins"}
    assert failed["status"] == "FAILURE"
    revoked = loads(broker.encode_meta(BELL.task_id, "REVOKED", result=None, error_type="Cancelled", error_message=""))
    assert revoked["result"]["exc_type"] == "TaskRevokedError"
    assert revoked["result"]["exc_message"] == ["Cancelled"]
    left = loads(broker.encode_meta(BELL.task_id, "FAILURE", result=None, error_type="SystemExit", error_message="3"))
    assert left["result"]["exc_module"] is None, "it must not end the process that waits"
