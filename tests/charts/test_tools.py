"""What others' tools say of the chart. Each is skipped where it is not on PATH."""

import json
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.charts import plain, rendering, schemas
from tests.charts.rendering import CHART, WAYS

WARNING = 5
"""Its grade; a lower one is critical."""
HARDENED = "hardened"
"""The way to install it that needs no answer to what kube-score calls critical."""
ANSWERED = {
    # Topology spread constraints do it, and prefer the same node to none.
    "deployment-has-host-podantiaffinity": WAYS,
    # One of each is enough to begin with; `ha-values.yaml` has more.
    "deployment-replicas": WAYS,
    # A port of the nodes is what that file asks for.
    "service-type": ["gateway"],
}
"""What kube-score warns of and stays as it is, why, and in which ways to install it.

What it calls critical is answered where it is, in the templates (`taskqueue.answers`).
"""
UNANSWERED = "--disable-ignore-checks-annotations"

Scored = list[tuple[str, dict[str, Any]]]

by_way = pytest.mark.parametrize("way", WAYS)


def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} on PATH")
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@by_way
def test_every_object_is_what_its_schema_says(way: str) -> None:
    assert misfits(rendering.way_text(way)) == []


def test_what_is_for_those_without_helm_is_what_its_schema_says() -> None:
    for text in plain.manifests().values():
        assert misfits(text) == []


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [({"replicas": "two"}, "want integer"), ({"replica": 2}, "'replica' not allowed"), ({}, "missing properties")],
)
def test_a_schema_finds_what_is_wrong(spec: dict[str, object], complaint: str) -> None:
    [api] = [
        one for one in rendering.render() if one["metadata"]["name"].endswith("-api") and one["kind"] == "Deployment"
    ]
    [said] = misfits(yaml.safe_dump({**api, "spec": {**api["spec"], **spec} if spec else {"replicas": 1}}))
    assert complaint in said


def misfits(manifest: str) -> list[str]:
    """What kubeconform has against a manifest. An object of a kind that has no schema is a misfit, too."""
    said = run("kubeconform", "-output", "json", "-schema-location", schemas.LOCATION, "-", stdin=manifest)
    assert not said.stderr, said.stderr
    return [one["msg"] for one in json.loads(said.stdout)["resources"]]


def scored(way: str, *options: str) -> Scored:
    """What kube-score has against one way to install it: the object's name, and the check as it tells of it."""
    # Limits of CPU slow the keeper of a worker that is busy, and then its leases run out.
    said = run(
        *("kube-score", "score", "--ignore-container-cpu-limit", "--output-format", "json", *options, "-"),
        stdin=rendering.way_text(way),
    )
    checks: Scored = [(one["object_name"], check) for one in json.loads(said.stdout) for check in one["checks"]]
    assert checks
    return [(name, check) for name, check in checks if not check["skipped"] and check["grade"] <= WARNING]


@by_way
def test_kube_score_finds_nothing_that_is_not_answered(way: str) -> None:
    assert [
        f"{name}: {check['check']['id']}"
        for name, check in scored(way)
        if way not in ANSWERED.get(check["check"]["id"], [])
    ] == []


@by_way
def test_kube_score_finds_nothing_critical(way: str) -> None:
    assert [f"{name}: {check['check']['id']}" for name, check in scored(way) if check["grade"] < WARNING] == []


def test_one_way_to_install_it_needs_no_answers() -> None:
    unanswered = scored(HARDENED, UNANSWERED)
    assert [f"{name}: {check['check']['id']}" for name, check in unanswered if check["grade"] < WARNING] == []


def test_every_answer_to_kube_score_is_still_needed() -> None:
    complaints = {check["check"]["id"] for way in WAYS for _, check in scored(way, UNANSWERED)}
    answers = {
        answer
        for way in WAYS
        for one in rendering.way(way)
        for answer in one["metadata"].get("annotations", {}).get("kube-score/ignore", "").split(",")
        if answer
    }
    assert answers
    assert answers | set(ANSWERED) <= complaints


def test_the_readme_of_the_chart_tells_of_its_values_as_they_are() -> None:
    said = run("helm-docs", "--dry-run", "--chart-search-root", str(CHART), "--chart-to-generate", str(CHART))
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == (CHART / "README.md").read_text().strip()
