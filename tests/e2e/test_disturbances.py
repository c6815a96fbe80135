"""A release that is upgraded, restarted and robbed of its pods while tasks flow: what was acknowledged ends."""

import json
import os
import time
from collections.abc import Iterator
from typing import Self

import pytest

from tests.charts.rendering import ROOT
from tests.e2e.cluster import IMAGE, Release, a_namespace, reaches, submit
from tests.support.waiting import lasting, wait_until

NEXT_IMAGE = os.environ.get("E2E_NEXT_IMAGE", IMAGE)
"""What the release is upgraded to."""
MANIFEST = ROOT / "tests" / "e2e" / "flow.yaml"
RATE = 5
SETTLE_SECONDS = 180
AWAY_SECONDS = 150
"""Long enough for three failed looks at who is alive."""
VALUES = {"api": {"graceSeconds": 10, "replicas": 2}, "relay": {"graceSeconds": 10, "replicas": 2}}


class Flow:
    """A pod that submits some tasks a second, as a caller in the cluster, for as long as the block lasts."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._manifest = MANIFEST.read_text().replace("IMAGE", IMAGE).replace("RATE", str(RATE))
        self.accepted: list[str] = []
        """The ids of the tasks that were acknowledged, once the block has ended."""
        self.errors: list[tuple[float, str]] = []
        """When (Unix time) and what."""

    def __enter__(self) -> Self:
        self._release.kubectl("apply", "--filename=-", stdin=self._manifest)
        self._release.kubectl("wait", "pod/flow", "--for=condition=Ready", "--timeout=60s")
        return self

    def __exit__(self, *_: object) -> None:
        said = [json.loads(line) for line in self._release.kubectl("logs", "flow").splitlines()]
        self._release.kubectl("delete", "--filename=-", "--grace-period=1", stdin=self._manifest)
        self.accepted = [one["accepted"] for one in said if "accepted" in one]
        self.errors = [(one["at"], one["error"]) for one in said if "error" in one]


@pytest.fixture(scope="module")
def steady() -> Iterator[Release]:
    """A release with two of what may be two."""
    with a_namespace() as namespace:
        installed = Release(namespace)
        installed.install(VALUES)
        yield installed


def all_end(release: Release, flow: Flow) -> None:
    """Every task that was acknowledged ends well, and nothing else is in the database."""
    unfinished = "SELECT count(*) FROM task WHERE finished_at IS NULL"
    wait_until(lambda: release.ask_database(unfinished) == [["0"]], SETTLE_SECONDS, "the end of all tasks")
    ended = dict(release.ask_database("SELECT id, status FROM task"))
    assert flow.accepted
    assert [one for one in flow.accepted if ended.get(one) != "SUCCESS"] == []
    release.verified()


def settled(release: Release) -> None:
    for kind in ("deployments", "statefulsets"):
        for one in release.get(kind):
            release.kubectl("rollout", "status", f"{one['kind']}/{one['metadata']['name']}", "--timeout=180s")


@pytest.mark.timeout(600)
def test_an_upgrade_and_a_restart_of_everything_of_ours_are_not_noticed(steady: Release) -> None:
    with Flow(steady) as flow:
        lasting(3)
        steady.install({**VALUES, "config": {"sampleTasks": True, "logLevel": "WARNING"}}, NEXT_IMAGE)
        steady.kubectl("rollout", "restart", "deployment")
        settled(steady)
        lasting(3)
    all_end(steady, flow)
    print(f"upgrade and restart: accepted {len(flow.accepted)}, errors {flow.errors}")  # noqa: T201  # figures to report
    assert flow.errors == []
    images = {one["image"] for pod in steady.pods("api") for one in pod["spec"]["containers"]}
    assert images == {NEXT_IMAGE}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("component", ["redis", "worker", "relay", "postgresql"])
def test_a_pod_that_is_torn_out_costs_no_task(steady: Release, component: str) -> None:
    key = "app.kubernetes.io/" + ("name" if component in {"redis", "postgresql"} else "component")
    with Flow(steady) as flow:
        lasting(3)
        away = while_away(
            steady, "delete", "pod", f"--selector={key}={component}", "--grace-period=0", "--force", "--wait=false"
        )
        lasting(5)
    all_end(steady, flow)
    report(component, flow, away)
    if component != "postgresql":
        assert flow.errors == []
    assert outside(flow, away) == []


@pytest.mark.timeout(900)
def test_restarting_redis_and_postgres_costs_no_task(steady: Release) -> None:
    with Flow(steady) as flow:
        lasting(3)
        away = while_away(steady, "rollout", "restart", "statefulset")
        lasting(5)
    all_end(steady, flow)
    report("both servers", flow, away)
    assert outside(flow, away) == []


@pytest.mark.timeout(900)
def test_no_container_is_started_again_because_redis_and_postgres_are_away_for_long(steady: Release) -> None:
    servers = ("statefulset/tq-redis", "statefulset/tq-postgresql")
    # Judged as soon as may be: each looks every 30 s, and the third time counts.
    steady.install({**VALUES, "beats": {"readySeconds": 5, "aliveSeconds": 10}}, NEXT_IMAGE)
    steady.kubectl("scale", "--replicas=0", *servers)
    try:
        wait_until(lambda: not steady.ready("api"), 60, "an API that is not ready")
        lasting(AWAY_SECONDS)
        assert not steady.ready("worker")
        assert not steady.ready("relay")
    finally:
        steady.kubectl("scale", "--replicas=1", *servers)
    settled(steady)
    assert {name: count for name, count in steady.restarts().items() if count} == {}
    with steady.api() as api:
        reaches(api, submit(api, task="sample.echo", args=["hello"]), "SUCCESS", seconds=60)


def while_away(release: Release, *disturb: str) -> tuple[float, float]:
    """Disturb, and wait until everything is as it should be. Returns from when until when (Unix time) that was not."""
    began = time.time()
    release.kubectl(*disturb)
    settled(release)
    return began, time.time()


def outside(flow: Flow, away: tuple[float, float]) -> list[str]:
    """What failed while nothing was away."""
    began, ended = away
    # Each waits ten seconds at most, and an API that was not ready is asked again a moment after it is.
    return [what for at, what in flow.errors if not began - 10 <= at <= ended + 15]


def report(what: str, flow: Flow, away: tuple[float, float]) -> None:
    """Figures to write down."""
    began, ended = away
    said = [round(at - began, 1) for at, _ in flow.errors]
    print(  # noqa: T201  # it is what a run of this is for
        f"{what}: all ready after {ended - began:.1f} s, accepted {len(flow.accepted)}, errors {len(flow.errors)}"
        f"{f', from second {min(said)} to {max(said)}' if said else ''}"
    )
