"""The chart as a function: values in, Kubernetes objects out. The real helm does the work."""

import base64
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "taskqueue"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
"""What the chart is rendered with: each file is one way to install it."""
WAYS = [file.name.removesuffix("-values.yaml") for file in VALUES]
"""What they are called."""
KUBERNETES = "1.34.0"
RELEASE = "demo"
NAMESPACE = "somewhere"
PREFIX = f"{RELEASE}-taskqueue"

Object = Mapping[str, Any]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is


class RefusedError(Exception):
    """Helm did not render the chart; the message is what it said."""


def text(
    values: Mapping[str, object] | None = None,
    *files: Path,
    kubernetes: str = KUBERNETES,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
) -> str:
    """The manifest, as helm prints it.

    Args:
        values: these win over those of `files`.
        files: values files.
        kubernetes: the version of the cluster.
        release: what the release is called.
        namespace: where it is installed.

    Raises:
        RefusedError: if the schema or the chart itself refuses the values.
    """
    command = ["helm", "template", release, str(CHART), "--namespace", namespace, "--kube-version", kubernetes]
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
    return loaded(text(values, *files, kubernetes=kubernetes))


@cache
def way_text(name: str) -> str:
    """The manifest of one way to install the chart: `ci/<name>-values.yaml`."""
    return text({}, CHART / "ci" / f"{name}-values.yaml")


@cache
def way(name: str) -> list[Object]:
    """Its objects."""
    return loaded(way_text(name))


def loaded(manifest: str) -> list[Object]:
    """The objects of a manifest."""
    return [one for one in yaml.load_all(manifest, _Loader) if one]  # safe, in C


def of_kind(objects: Iterable[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind, by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def templates(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """The name of each workload, and what its pods are made from: `metadata` and `spec`."""
    for one in objects:
        if one["kind"] == "Pod":
            yield one["metadata"]["name"], one
        elif one["kind"] in {"Deployment", "StatefulSet", "Job"}:
            yield one["metadata"]["name"], one["spec"]["template"]
        elif one["kind"] == "CronJob":
            yield one["metadata"]["name"], one["spec"]["jobTemplate"]["spec"]["template"]


def pods(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """The name of each workload, and the spec of its pods."""
    for name, template in templates(objects):
        yield name, template["spec"]


def containers(objects: Iterable[Object]) -> Iterator[tuple[str, Object]]:
    """Every container, those that only run at first included; named `<workload>/<container>`."""
    for name, pod in pods(objects):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield f"{name}/{container['name']}", container


def environment(container: Object) -> dict[str, Any]:
    """A container's variables: a text, or where it comes from."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container.get("env", [])}


def secret(objects: Iterable[Object], name: str) -> dict[str, str]:
    """What a Secret holds, in the clear."""
    data = of_kind(objects, "Secret")[name]["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}
