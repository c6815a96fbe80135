"""A pool that KEDA scales: from nothing to its most and back, and nothing is lost on the way."""

import time
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Release, a_namespace, reaches, run, submit, submit_many
from tests.support.waiting import wait_until

POOL = "tq-taskqueue-worker-default"
MOST = 4
CONCURRENCY = 2
SHORT_SECONDS = 30
LONG_SECONDS = 90
"""More than it takes to see that there are too many pods, and than one of these then has."""
VALUES = {
    "workerDefaults": {
        "concurrency": CONCURRENCY,
        "graceSeconds": 24,
        "resources": {"requests": {"cpu": "20m", "memory": "200Mi"}},
        "autoscaling": {
            "by": "keda",
            "minReplicas": 0,
            "maxReplicas": MOST,
            "pollingSeconds": 2,
            "cooldownSeconds": 10,
            "behavior": {
                "scaleUp": {"policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}]},
                "scaleDown": {
                    "stabilizationWindowSeconds": 5,
                    "policies": [{"type": "Percent", "value": 50, "periodSeconds": 15}],
                },
            },
        },
    }
}


@pytest.fixture(scope="module")
def scaled() -> Iterator[Release]:
    """A release whose workers KEDA scales."""
    if "scaledobjects" not in run("kubectl", "api-resources", "--api-group=keda.sh", "--output=name"):
        pytest.skip("needs KEDA in the cluster")
    with a_namespace() as namespace:
        installed = Release(namespace)
        installed.install(VALUES)
        yield installed


def replicas(release: Release) -> int:
    """How many pods the pool is to have."""
    return int(release.kubectl("get", "deployment", POOL, "--output=jsonpath={.spec.replicas}"))


@pytest.mark.timeout(240)
def test_a_pool_of_none_wakes_for_one_task_within_half_a_minute(scaled: Release) -> None:
    wait_until(lambda: replicas(scaled) == 0, 120, "no replicas")
    with scaled.api() as api:
        began = time.monotonic()
        task_id = submit(api, task="sample.echo", args=["hello"])
        reaches(api, task_id, "SUCCESS", seconds=90)
        took = time.monotonic() - began
    print(f"a pool of none answered after {took:.1f} s")  # noqa: T201  # a figure to report
    assert took < 30


@pytest.mark.timeout(900)
def test_a_backlog_takes_it_to_its_most_and_the_end_of_it_to_none_and_no_task_notices(scaled: Release) -> None:
    tasks = [{"task": "sample.sleep", "args": [1 + number % 20], "tags": ["backlog"]} for number in range(300)]
    with scaled.api() as api:
        task_ids = submit_many(api, tasks)
    assert len(set(task_ids)) == 300
    wait_until(lambda: replicas(scaled) == MOST, 90, f"{MOST} replicas")

    def unfinished() -> int:
        [[count]] = scaled.ask_database("SELECT count(*) FROM task WHERE finished_at IS NULL")
        return int(count)

    wait_until(lambda: unfinished() == 0, 700, "the end of all tasks")
    ended = scaled.ask_database(
        "SELECT status, sum(crashes), sum(losses), sum(failures), count(*), sum(attempt) FROM task GROUP BY status"
    )
    print(f"status, crashes, losses, failures, tasks, attempts: {ended}")  # noqa: T201  # a figure to report
    assert [row[:4] for row in ended] == [["SUCCESS", "0", "0", "0"]]
    wait_until(lambda: replicas(scaled) == 0, 120, "no replicas")
    scaled.verified()


@pytest.mark.timeout(600)
def test_what_runs_on_a_pod_that_scale_in_removes_starts_on_another_within_three_seconds(scaled: Release) -> None:
    # Every other one is long, so that each pod gets one and none is idle when half of them are too many.
    seconds = [LONG_SECONDS if number % 2 else SHORT_SECONDS for number in range(MOST * CONCURRENCY)]
    with scaled.api() as api:
        task_ids = submit_many(api, [{"task": "sample.sleep", "args": [one], "tags": ["moved"]} for one in seconds])
        wait_until(lambda: replicas(scaled) == MOST, 90, f"{MOST} replicas")
        for task_id in task_ids:
            reaches(api, task_id, "STARTED", "SUCCESS", seconds=120)
        wait_until(lambda: replicas(scaled) < MOST, 120, "fewer replicas")
        for task_id in task_ids:
            reaches(api, task_id, "SUCCESS", seconds=400)
    gaps = scaled.ask_database(
        "SELECT extract(epoch FROM task.started_at - ended_at) FROM task_attempt"
        " JOIN task ON task.id = task_id AND attempt = number + 1 WHERE 'moved' = ANY (tags)"
    )
    print(f"seconds between attempts: {gaps}")  # noqa: T201  # a figure to report
    assert scaled.ask_database("SELECT sum(crashes), sum(losses), sum(failures) FROM task") == [["0", "0", "0"]]
    assert gaps
    assert max(float(gap) for [gap] in gaps) < 3


@pytest.mark.timeout(600)
def test_a_paused_queue_starts_no_pod(scaled: Release) -> None:
    wait_until(lambda: replicas(scaled) == 0, 150, "no replicas")
    with scaled.api() as api:
        paused = api.post("/api/queues/default/pause", json={})
        assert paused.status_code == 200, paused.text
        task_id = submit(api, task="sample.echo", args=["held"])
        # Longer than KEDA takes to look twice.
        until = time.monotonic() + 8
        wait_until(lambda: replicas(scaled) > 0 or time.monotonic() > until, 20, "two looks")
        assert replicas(scaled) == 0
        api.post("/api/queues/default/resume", json={})
        reaches(api, task_id, "SUCCESS", seconds=90)
