"""`k8s/`: what is there for those who don't use helm is what the chart says."""

import shutil
import subprocess
from functools import cache

import pytest
import yaml

from tests.charts import plain, rendering
from tests.charts.plain import K8S
from tests.charts.rendering import Object, of_kind


@cache
def built(overlay: str) -> list[Object]:
    """The objects of an overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl on PATH")
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return rendering.loaded(done.stdout)


def test_the_manifests_are_those_of_the_chart() -> None:
    for file, text in plain.manifests().items():
        assert file.read_text() == text, f"make k8s writes {file.name} anew"


def test_what_is_rendered_is_the_same_each_time_and_holds_no_secret() -> None:
    assert plain.manifests() == plain.manifests()
    for text in plain.manifests().values():
        assert "kind: Secret\n" not in text


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_every_secret_that_is_asked_for_is_brought_or_said_to_be_needed(overlay: str) -> None:
    objects = built(overlay)
    wanted: set[tuple[str, str]] = set()
    for _, container in rendering.containers(objects):
        sources = [one["secretKeyRef"] for one in rendering.environment(container).values() if isinstance(one, dict)]
        wanted |= {(one["name"], one["key"]) for one in sources}
    brought = {(name, key) for name, one in of_kind(objects, "Secret").items() for key in one["data"]}
    if overlay == "dev":
        assert wanted == brought
    else:
        assert not brought
        readme = (K8S / "README.md").read_text()
        assert [name for pair in wanted for name in pair if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_all_of_an_overlay_is_in_one_namespace_that_admits_restricted_pods_alone(overlay: str) -> None:
    objects = built(overlay)
    [namespace] = of_kind(objects, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    inside = {one["metadata"].get("namespace") for one in objects if one["kind"] != "Namespace"}
    assert inside == {namespace["metadata"]["name"]} == {plain.NAMESPACE}


def test_development_has_sample_tasks_in_every_process_of_ours() -> None:
    objects = built("dev")
    for name, deployment in of_kind(objects, "Deployment").items():
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        assert rendering.environment(container)["TASKQUEUE_SAMPLE_TASKS"] == "true", name
    assert {image for name, one in rendering.containers(objects) if (image := one["image"]).startswith("task")} == {
        "taskqueue:dev"
    }


def test_in_production_the_workers_are_scaled_and_the_others_are_two() -> None:
    objects = built("prod")
    replicas = {name: one["spec"].get("replicas") for name, one in of_kind(objects, "Deployment").items()}
    assert replicas == {"taskqueue-api": 2, "taskqueue-relay": 2, "taskqueue-worker-default": None}
    [scaled] = of_kind(objects, "ScaledObject").values()
    assert scaled["spec"]["scaleTargetRef"]["name"] == "taskqueue-worker-default"
    for name, budget in of_kind(objects, "PodDisruptionBudget").items():
        labels = of_kind(objects, "Deployment")[name]["spec"]["template"]["metadata"]["labels"]
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_port_of_the_cluster_for_trying_out_is_one_that_a_node_may_have() -> None:
    config = yaml.safe_load((K8S / "kind.yaml").read_text())
    [mapping] = config["nodes"][0]["extraPortMappings"]
    assert 30000 <= mapping["containerPort"] < 32768
    assert mapping["listenAddress"] == "127.0.0.1"
