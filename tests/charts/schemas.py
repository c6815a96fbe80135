"""What the API server takes, as JSON schemas for kubeconform: those of `tests/charts/schemas`, which need no network.

They are made from what a cluster and the projects of its extensions publish, strictly, and without the descriptions:

    kubectl get --raw /openapi/v2 >openapi.json
    python -m tests.charts.schemas openapi.json CRD.yaml...

What is there is of Kubernetes 1.34, KEDA 2.20, the Gateway API 1.4 and the Prometheus operator 0.85.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas"
LOCATION = f"{SCHEMAS}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
"""Where kubeconform finds them, as its `-schema-location`."""
KINDS = {
    "v1": ("ConfigMap", "Namespace", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "batch/v1": ("CronJob", "Job"),
    "networking.k8s.io/v1": ("Ingress", "NetworkPolicy"),
    "policy/v1": ("PodDisruptionBudget",),
}
"""What the chart may have of Kubernetes itself."""
EXTENSIONS = {
    "gateway.networking.k8s.io/v1": ("HTTPRoute",),
    "keda.sh/v1alpha1": ("ScaledObject", "TriggerAuthentication"),
    "monitoring.coreos.com/v1": ("PodMonitor", "PrometheusRule", "ServiceMonitor"),
}
"""What it may have beside that."""
_DEFINITIONS = "_definitions.json"
_HERE = "#/definitions/"
_SAID_ONLY = {"description", "format", "default", "example", "title"}


def file_of(api_version: str, kind: str) -> str:
    """The name by which kubeconform asks for a schema."""
    group, _, version = api_version.rpartition("/")
    return "-".join(word.lower() for word in (kind, group.partition(".")[0], version) if word) + ".json"


def strict(schema: Any) -> Any:
    """A schema that refuses what it does not know, and is silent about what it means."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "properties":
            found[name] = {key: strict(one) for key, one in value.items()}
        elif name == "$ref":
            found[name] = _DEFINITIONS + value
        elif name not in _SAID_ONLY and not name.startswith("x-"):
            found[name] = strict(value)
    if "properties" in found and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def of_kubernetes(openapi: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The name and the text of each file for Kubernetes' own kinds."""
    definitions = {name: strict(one) for name, one in openapi["definitions"].items()}
    # As it is written in manifests: a number, or a text such as 100Mi.
    definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = {"type": ["number", "string"]}
    needed: dict[str, Any] = {}
    kinds = {
        (group["group"] + "/" * bool(group["group"]) + group["version"], group["kind"]): name
        for name, one in openapi["definitions"].items()
        for group in one.get("x-kubernetes-group-version-kind", [])
    }
    for api_version, names in KINDS.items():
        for kind in names:
            top = definitions[kinds[api_version, kind]]
            # Nobody but a cluster says in what state an object is.
            top = {**top, "properties": {key: one for key, one in top["properties"].items() if key != "status"}}
            top["properties"] |= {"apiVersion": {"const": api_version}, "kind": {"const": kind}}
            yield file_of(api_version, kind), {**top, "required": ["apiVersion", "kind", "metadata"]}
            _collect(top, definitions, needed)
    yield _DEFINITIONS, {"definitions": needed}


def of_extensions(definitions: list[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The same for those that CustomResourceDefinitions make."""
    for one in definitions:
        spec = one["spec"]
        for version in spec["versions"]:
            api_version, kind = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            if kind in EXTENSIONS.get(api_version, ()):
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"].pop("status", None)
                schema["properties"] |= {
                    "apiVersion": {"const": api_version},
                    "kind": {"const": kind},
                    "metadata": {"$ref": f"{_DEFINITIONS}{_HERE}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
                }
                yield file_of(api_version, kind), schema


def _collect(schema: Any, definitions: Mapping[str, Any], needed: dict[str, Any]) -> None:
    """Put every definition into `needed` that a schema leads to."""
    for one in schema if isinstance(schema, list) else schema.values() if isinstance(schema, dict) else ():
        _collect(one, definitions, needed)
    if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
        name = reference.removeprefix(_DEFINITIONS + _HERE)
        if name not in needed:
            needed[name] = definitions[name]
            _collect(needed[name], definitions, needed)


def _definitions(file: Path) -> Iterator[Mapping[str, Any]]:
    for document in yaml.safe_load_all(file.read_text()):
        yield from document["items"] if document["kind"].endswith("List") else [document]


def main() -> None:
    """Write all of them."""
    openapi, *extensions = map(Path, sys.argv[1:])
    SCHEMAS.mkdir(exist_ok=True)
    found = [one for file in extensions for one in _definitions(file)]
    for name, schema in [*of_kubernetes(json.loads(openapi.read_text())), *of_extensions(found)]:
        (SCHEMAS / name).write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
