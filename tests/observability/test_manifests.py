"""The demo cluster's manifests hold together."""

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.expressions import DASHBOARDS, ROOT, RULES
from tests.support.prometheus import promtool

DEMO = ROOT / "k8s" / "observability"


@cache
def objects() -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH")
    built = subprocess.run(["kubectl", "kustomize", DEMO], capture_output=True, text=True, check=False, timeout=60)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects() if one["kind"] == kind}


def test_the_dashboards_and_rules_are_all_carried() -> None:
    for directory, files in (("dashboards", DASHBOARDS), ("rules", RULES)):
        listed = yaml.safe_load((ROOT / "charts" / "taskqueue" / directory / "Kustomization").read_text())
        [made] = listed["configMapGenerator"]
        assert sorted(made["files"]) == [path.name for path in files]


def test_every_volume_is_there() -> None:
    made = of_kind("ConfigMap")
    for name, deployment in of_kind("Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        volumes = {one["name"]: one for one in pod["volumes"]}
        for volume in volumes.values():
            assert "emptyDir" in volume or volume["configMap"]["name"] in made, name
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        for mount in container["volumeMounts"]:
            if "subPath" in mount:
                assert mount["subPath"] in made[volumes[mount["name"]]["configMap"]["name"]]["data"]


def test_every_service_leads_to_a_port() -> None:
    deployments = of_kind("Deployment").values()
    for name, service in of_kind("Service").items():
        [pod] = [
            one["spec"]["template"]["spec"]
            for one in deployments
            if one["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
        ]
        [container] = pod["containers"]
        open_ports = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_ports, name


def test_every_pod_meets_the_restricted_standard() -> None:
    for name, deployment in of_kind("Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        [container] = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert ":" in container["image"]
        assert not container["image"].endswith(":latest")
        assert container["resources"]["limits"]["memory"]


def test_urls_lead_to_services() -> None:
    text = (DEMO / "config" / "datasources.yaml").read_text()
    services = of_kind("Service")
    for source in yaml.safe_load(text)["datasources"]:
        host, _, port = source["url"].removeprefix("http://").partition(":")
        assert int(port) in {one["port"] for one in services[host]["spec"]["ports"]}
    uids = {source["uid"] for source in yaml.safe_load(text)["datasources"]}
    [prometheus] = [one for one in yaml.safe_load(text)["datasources"] if one["type"] == "prometheus"]
    assert prometheus["jsonData"]["exemplarTraceIdDestinations"][0]["datasourceUid"] in uids


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    written = yaml.safe_load((DEMO / "config" / "prometheus.yml").read_text())
    [job] = written["scrape_configs"]
    # Debian's Prometheus knows no Kubernetes; all that is done to what is found it does.
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = [{"targets": ["127.0.0.1:1"]}]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(written))
    assert "SUCCESS" in promtool("check", "config", path)


def test_the_chart_is_told_where_traces_go() -> None:
    values = yaml.safe_load((DEMO / "values.yaml").read_text())
    [variable] = values["extraEnv"]
    assert variable["name"] == "OTEL_EXPORTER_OTLP_ENDPOINT"
    host, _, port = variable["value"].removeprefix("http://").partition(":")
    name, _, namespace = host.partition(".")
    service = of_kind("Service")[name]
    assert service["metadata"]["namespace"] == namespace
    assert int(port) in {one["port"] for one in service["spec"]["ports"]}
