"""The service from outside: through an Ingress and a Gateway, where the cluster has them.

`E2E_OUTSIDE` is the URL at which both are reached, `E2E_INGRESS_CLASS` and `E2E_GATEWAY` (`namespace/name`) what they
are called.
"""

import base64
import json
import os
import time
from collections.abc import Iterator

import httpx
import pytest
from standardwebhooks import Webhook

from tests.e2e.cluster import Receiver, Release, a_namespace, submit
from tests.support.waiting import wait_until

OUTSIDE = os.environ.get("E2E_OUTSIDE", "")
INGRESS_CLASS = os.environ.get("E2E_INGRESS_CLASS", "traefik")
GATEWAY = os.environ.get("E2E_GATEWAY", "ingress/web")

pytestmark = pytest.mark.skipif(not OUTSIDE, reason="needs E2E_OUTSIDE, where an Ingress and a Gateway are reached")


@pytest.fixture(scope="module")
def exposed() -> Iterator[Release]:
    """A release that has both."""
    namespace, _, name = GATEWAY.partition("/")
    with a_namespace() as own:
        installed = Release(own)
        installed.install(
            {
                "ingress": {"enabled": True, "className": INGRESS_CLASS, "hosts": [{"host": "ingress.example"}]},
                "httpRoute": {
                    "enabled": True,
                    "parentRefs": [{"name": name, "namespace": namespace}],
                    "hostnames": ["gateway.example"],
                },
            }
        )
        yield installed


@pytest.fixture(scope="module")
def receiver(exposed: Release) -> Iterator[Receiver]:
    with exposed.receiver() as started:
        yield started


@pytest.fixture(params=["ingress.example", "gateway.example"])
def outside(request: pytest.FixtureRequest, exposed: Release) -> Iterator[httpx.Client]:
    headers = {"host": request.param, "authorization": f"Bearer {exposed.key()}"}
    with httpx.Client(base_url=OUTSIDE, headers=headers, timeout=60) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, 30, "the way in")
        yield client


def test_a_task_is_submitted_waited_for_and_its_result_read(outside: httpx.Client) -> None:
    task_id = submit(outside, task="sample.sleep", args=[3])
    # A long poll: it is answered when the task has ended, not before.
    answer = outside.get(f"/api/tasks/{task_id}/result", params={"wait": 25})
    assert answer.status_code == 200, answer.text
    assert outside.get(f"/api/tasks/{task_id}/status").json() == {"status": "SUCCESS"}


def test_a_task_is_followed_while_it_runs(outside: httpx.Client) -> None:
    task_id = submit(outside, task="sample.sleep", args=[3])
    with outside.stream("GET", f"/api/tasks/{task_id}/events", headers={"accept": "text/event-stream"}) as stream:
        assert stream.status_code == 200
        lines = [(time.monotonic(), line) for line in stream.iter_lines()]
    seen = [(at, json.loads(line.removeprefix("data:"))["status"]) for at, line in lines if line.startswith("data:")]
    assert seen[-1][1] == "SUCCESS"
    # What was held back until the end would come all at once.
    assert seen[-1][0] - seen[0][0] > 1


def test_the_webhook_of_a_task_from_outside_arrives_signed(
    outside: httpx.Client, exposed: Release, receiver: Receiver
) -> None:
    key = base64.b64decode(exposed.secrets()["tq-taskqueue"]["webhook-secret"]).decode()
    task_id = submit(outside, task="sample.echo", args=["hello"], webhook_url="http://receiver:8080/hook")

    def arrived() -> list[dict[str, str]]:
        return [json.loads(one["body"])["data"] for one in receiver.received() if task_id in one["body"]]

    [data] = wait_until(arrived, 30, "the webhook")
    assert data["result"] == "hello"
    for one in receiver.received():
        Webhook(key).verify(one["body"], one["headers"])
