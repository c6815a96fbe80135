"""The chart as a function: values in, Kubernetes objects out. The real helm does the work."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "taskqueue"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
"""What the chart is rendered with: each file is one way to install it."""
KUBERNETES = "1.34.0"
RELEASE = "demo"

Object = Mapping[str, Any]


class RefusedError(Exception):
    """Helm did not render the chart; the message is what it said."""


def text(values: Mapping[str, object] | None = None, *files: Path, kubernetes: str = KUBERNETES) -> str:
    """The manifest, as helm prints it.

    Args:
        values: these win over those of `files`.
        files: values files.
        kubernetes: the version of the cluster.

    Raises:
        RefusedError: if the schema or the chart itself refuses the values.
    """
    command = ["helm", "template", RELEASE, str(CHART), "--namespace", "somewhere", "--kube-version", kubernetes]
    for file in files:
        command += ["--values", str(file)]
    rendered = subprocess.run(
        [*command, "--values", "-"], input=json.dumps(values or {}), capture_output=True, text=True, check=False
    )
    if rendered.returncode:
        raise RefusedError(rendered.stderr)
    return rendered.stdout


def render(values: Mapping[str, object] | None = None, *files: Path, kubernetes: str = KUBERNETES) -> list[Object]:
    """The objects of the manifest. Raises as `text`."""
    return [one for one in yaml.safe_load_all(text(values, *files, kubernetes=kubernetes)) if one]


def of_kind(objects: Iterable[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind, by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def pods(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """The name of each workload, and the spec of its pods."""
    for one in objects:
        if one["kind"] == "Pod":
            yield one["metadata"]["name"], one["spec"]
        elif one["kind"] in {"Deployment", "StatefulSet", "Job"}:
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def containers(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """Every container, those that only run at first included; named `<workload>/<container>`."""
    for name, pod in pods(objects):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield f"{name}/{container['name']}", container


def environment(container: Object) -> dict[str, Any]:
    """A container's variables: a text, or where it comes from."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container.get("env", [])}
