"""A release that is installed, used, upgraded and disturbed."""

import base64
import json
import time
from pathlib import Path

import pytest
import yaml
from standardwebhooks import Webhook

from tests.charts import rendering
from tests.e2e.cluster import Release, a_namespace, reaches, run, status, submit, view
from tests.support.waiting import wait_until

READY_SECONDS = 90
IMAGE_MEBIBYTES = 120
"""What may lie over Python's own image."""


def test_everything_is_ready_and_nothing_was_started_twice(release: Release) -> None:
    assert set(release.restarts().values()) == {0}
    assert {len(release.pods(component)) for component in ("api", "relay", "worker")} == {1}


def test_a_release_with_nothing_set_is_ready_soon_and_works() -> None:
    with a_namespace() as namespace:
        plain = Release(namespace)
        took = plain.install_plain()
        print(f"all ready {took:.1f} s after helm install")  # noqa: T201  # a figure to report
        run("helm", "test", "tq", "--namespace", namespace, "--timeout", "120s")
        assert set(plain.restarts().values()) == {0}
    assert took < READY_SECONDS


def test_the_image_is_what_runs_and_no_more(release: Release) -> None:
    script = (
        "id -u; du -sm /opt/taskqueue | cut -f1; command -v cc gcc g++ c++ clang ld as make pip || true;"
        " touch /opt/taskqueue/it /app/it 2>/dev/null && echo written; find /opt /app -perm -4000 -o -perm -2000"
    )
    user, mebibytes, *found = release.kubectl(
        *("exec", "deployment/tq-taskqueue-api", "--container=api", "--", "sh", "-c", script)
    ).split()
    assert user == "10001"
    assert int(mebibytes) <= IMAGE_MEBIBYTES
    # Python's own image brings a pip, which can install nothing here.
    assert set(found) <= {"/usr/local/bin/pip"}


def test_the_three_requests(release: Release) -> None:
    with release.api() as api:
        submitted = api.post("/api/tasks/submit")
        assert submitted.status_code == 202
        task_id = submitted.json()["task_id"]
        assert submitted.json() == {"task_id": task_id}
        assert status(api, task_id) in {"PENDING", "STARTED"}
        waiting = api.get(f"/api/tasks/{task_id}/result")
        assert (waiting.status_code, waiting.json()) == (202, {"detail": "Result not available yet"})
        reaches(api, task_id, "SUCCESS")
        ended = api.get(f"/api/tasks/{task_id}/result")
    assert (ended.status_code, ended.json()) == (200, {"result": "Worked for 5 seconds"})


def test_helm_s_own_test_passes(release: Release) -> None:
    said = run("helm", "test", "tq", "--namespace", release.namespace, "--timeout", "120s")
    assert "Phase:          Succeeded" in said


def test_a_webhook_arrives_signed_with_the_key_of_the_release(release: Release) -> None:
    key = base64.b64decode(release.secrets()["tq-taskqueue"]["webhook-secret"]).decode()
    with release.receiver() as receiver, release.api() as api:
        task_id = submit(api, task="sample.echo", args=["hello"], webhook_url="http://receiver:8080/hook")
        [received] = wait_until(receiver.received, 30, "the webhook")
    Webhook(key).verify(received["body"], received["headers"])
    body = json.loads(received["body"])
    assert (body["type"], body["data"]["task_id"], body["data"]["result"]) == ("task.succeeded", task_id, "hello")


def test_an_upgrade_that_changes_nothing_leaves_pods_and_secrets_alone(release: Release) -> None:
    before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in release.pods()}, release.secrets()
    release.install()
    after = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in release.pods()}, release.secrets()
    assert after == before


def test_a_task_whose_pod_is_deleted_runs_on_another_at_no_cost(release: Release) -> None:
    [pod] = release.pods("worker")
    with release.api() as api:
        task_id = submit(api, task="sample.sleep", args=[25])
        reaches(api, task_id, "STARTED")
        release.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        # The grace is 20 s, so the task is handed back after 10.
        began = time.monotonic()
        wait_until(lambda: view(api, task_id)["attempt"] == 2, 20, "the second attempt")
        assert time.monotonic() - began > 5, "it was disturbed before it had to be"
        reaches(api, task_id, "SUCCESS", seconds=60)
        found = view(api, task_id)
    assert (found["attempt"], found["failures"]) == (2, 0)


def test_the_doctor_finds_nothing_that_breaks_a_promise(release: Release) -> None:
    said = release.kubectl("exec", "deployment/tq-taskqueue-api", "--container=api", "--", "taskqueue", "doctor")
    assert "bad" not in {line.split()[0] for line in said.splitlines()}
    release.kubectl("exec", "deployment/tq-taskqueue-api", "--container=api", "--", "taskqueue", "verify")


@pytest.mark.parametrize("file", rendering.VALUES, ids=lambda file: str(file.name))
def test_the_cluster_would_take_every_way_to_install_it(release: Release, file: Path) -> None:
    # The pod of `helm test` needs an account that is not there in a dry run; others need what this cluster may lack.
    served = set(release.kubectl("api-versions").split())
    objects = [one for one in rendering.render({}, file) if one["kind"] != "Pod" and one["apiVersion"] in served]
    manifest = yaml.safe_dump_all(objects)
    release.kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", stdin=manifest)


def test_a_backup_is_written_beside_the_volume_and_can_be_read(release: Release) -> None:
    release.install({"postgresql": {"backup": {"enabled": True, "size": "1Gi"}}})
    for name in ("first", "second"):
        release.kubectl("create", "job", "--from=cronjob/tq-postgresql-backup", name)
        release.kubectl("wait", f"job/{name}", "--for=condition=Complete", "--timeout=90s")
    # The pod has read what is in it, and says what there is.
    dumps = [line.split()[-1] for line in release.kubectl("logs", "job/second").splitlines() if ".dump" in line]
    assert len(dumps) == 2
    assert not [name for name in dumps if name.endswith(".part")]


@pytest.mark.timeout(300)
def test_a_task_that_fills_the_memory_of_its_pod_fails_by_that_name_and_alone(
    release: Release,
) -> None:
    with release.api() as api:
        neighbour = submit(api, task="sample.sleep", args=[20])
        reaches(api, neighbour, "STARTED")
        # The limit of the pod is 1 GiB.
        task_id = submit(api, task="sample.allocate", args=[4096], max_retries=0)
        reaches(api, task_id, "FAILURE", seconds=200)
        reaches(api, neighbour, "SUCCESS", seconds=100)
        error, unharmed = view(api, task_id)["error"], view(api, neighbour)
    print(f"out of memory: {error}, {unharmed['attempt']} attempts of its neighbour")  # noqa: T201  # a figure to report
    assert error["type"] in {"OutOfMemory", "WorkerLost"}
    assert unharmed["failures"] == 0
    crashes = release.ask_database(f"SELECT crashes FROM task WHERE id = '{neighbour}'")
    assert crashes == [["0"]]
