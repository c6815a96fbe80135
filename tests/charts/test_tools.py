"""What others' tools say of the chart. Each is skipped where it is not on PATH.

`KUBECONFORM_SCHEMAS` names where kubeconform finds schemas, with spaces between the places (its `-schema-location`):
those of Kubernetes, KEDA, the Gateway API and the Prometheus operator. `default` alone is fetched from the network.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.charts import rendering
from tests.charts.rendering import CHART, VALUES

WARNING = 5
"""Its grade; a lower one is critical."""
ANSWERED = {
    # A tag of ours is never moved, and a digest can be set: nodes need not ask a registry at each start.
    "container-image-pull-policy": VALUES,
    # The official images of Redis and Postgres run as 999, and `restricted` leaves the ids to the platform.
    "container-security-context-user-group-id": VALUES,
    # Off by default: a policy that does not know where a cluster's DNS is cuts every pod off.
    "pod-networkpolicy": [one for one in VALUES if "networkPolicy" not in one.read_text()],
    # Topology spread constraints do it, and prefer the same node to none.
    "deployment-has-host-podantiaffinity": VALUES,
    # One of each is enough to begin with; `ha-values.yaml` has more.
    "deployment-replicas": VALUES,
    # A port of the nodes is what that file asks for.
    "service-type": [CHART / "ci" / "gateway-values.yaml"],
}
"""What kube-score complains about and stays as it is, why, and in which values files."""

by_file = pytest.mark.parametrize("file", VALUES, ids=lambda file: str(file.name).removesuffix("-values.yaml"))


def run(*command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} on PATH")
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@by_file
def test_every_object_is_what_its_schema_says(file: Path) -> None:
    places = os.environ.get("KUBECONFORM_SCHEMAS", "").split()
    if not places:
        pytest.skip("needs KUBECONFORM_SCHEMAS, where the schemas are")
    options = [word for place in places for word in ("-schema-location", place)]
    said = run("kubeconform", "-strict", "-summary", *options, stdin=rendering.text({}, file))
    assert said.returncode == 0, said.stdout + said.stderr


@by_file
def test_kube_score_finds_nothing_that_is_not_answered(file: Path) -> None:
    # Limits of CPU slow the keeper of a worker that is busy, and then its leases run out.
    said = run(
        *("kube-score", "score", "--ignore-container-cpu-limit", "--output-format", "json", "-"),
        stdin=rendering.text({}, file),
    )
    checks: list[Any] = [(one["object_name"], check) for one in json.loads(said.stdout) for check in one["checks"]]
    open_ones = {
        f"{name}: {check['check']['id']}"
        for name, check in checks
        if not check["skipped"] and check["grade"] <= WARNING and file not in ANSWERED.get(check["check"]["id"], [])
    }
    assert checks
    assert not open_ones


def test_every_answer_to_kube_score_is_still_needed() -> None:
    given: set[str] = set()
    for file in VALUES:
        said = run("kube-score", "score", "--output-format", "json", "-", stdin=rendering.text({}, file))
        given |= {
            check["check"]["id"]
            for one in json.loads(said.stdout)
            for check in one["checks"]
            if not check["skipped"] and check["grade"] <= WARNING
        }
    assert set(ANSWERED) <= given


def test_the_readme_of_the_chart_tells_of_its_values_as_they_are() -> None:
    said = run("helm-docs", "--dry-run", "--chart-search-root", str(CHART), "--chart-to-generate", str(CHART))
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == (CHART / "README.md").read_text().strip()
