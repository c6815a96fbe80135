"""What holds whatever the values are: each file of `ci/` is one way to install the chart."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import app
from app.core import config
from tests.charts import rendering
from tests.charts.rendering import CHART, ROOT, VALUES, WAYS, Object, of_kind

OLDEST_KUBERNETES = "1.30.0"


@pytest.fixture(scope="module", params=WAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return rendering.way(request.param)


def ours(pod: Object) -> Object:
    """The container of a pod that runs one of our processes; others may stand beside it."""
    [found] = [one for one in pod["containers"] if one["name"] in {"api", "relay", "worker"}]
    return dict(found)


@pytest.mark.parametrize("file", VALUES, ids=lambda file: str(file.name))
def test_helm_finds_nothing_to_complain_about(file: Path) -> None:
    linted = subprocess.run(
        ["helm", "lint", "--strict", str(CHART), "--values", str(file)], capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_every_pod_meets_the_restricted_standard(objects: list[Object]) -> None:
    for name, pod in rendering.pods(objects):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["securityContext"].get("runAsUser") != 0, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        allowed = {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"]), name
    for name, container in rendering.containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert "hostPort" not in str(container.get("ports")), name


def test_no_pod_gets_a_token_or_the_addresses_of_services(objects: list[Object]) -> None:
    for name, pod in rendering.pods(objects):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
    for account in of_kind(objects, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False


def test_everything_that_serves_has_the_three_probes_and_its_resources(objects: list[Object]) -> None:
    for name, pod in rendering.pods(objects):
        for container in pod["containers"]:
            probes = {"startupProbe", "livenessProbe", "readinessProbe"} & set(container)
            if container["name"] in {"api", "relay", "worker", "redis", "postgresql"}:
                assert len(probes) == 3, name
    for name, container in rendering.containers(objects):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name


def test_no_secret_stands_in_a_pod(objects: list[Object]) -> None:
    secret = {
        *("POSTGRES_PASSWORD", "REDIS_PASSWORD", "TASKQUEUE_WEBHOOK_SECRET", "TASKQUEUE_SECRET_KEY"),
        *("BOOTSTRAP_KEY", "TASKQUEUE_API_KEY"),
    }
    for name, container in rendering.containers(objects):
        for variable in container.get("env", []):
            if variable["name"] in secret:
                assert set(variable["valueFrom"]) == {"secretKeyRef"}, name
            elif variable["name"] in {"DATABASE_URL", "REDIS_URL"}:
                assert "valueFrom" in variable or "_PASSWORD)@" in variable["value"], name
    hidden = [value for one in of_kind(objects, "Secret").values() for value in one["data"].values()]
    others = str([one for one in objects if one["kind"] != "Secret"])
    assert [value for value in hidden if value in others] == []


def test_what_serves_waits_for_the_tables_before_it_starts(objects: list[Object]) -> None:
    for name, deployment in of_kind(objects, "Deployment").items():
        [first, *_] = deployment["spec"]["template"]["spec"]["initContainers"]
        assert first["args"][:2] == ["migrate", "--check"], name
        assert {"DATABASE_URL", "REDIS_URL", "TASKQUEUE_AUTH_MODE"} <= set(rendering.environment(first)), name


def test_the_migration_is_a_plain_job_and_comes_first_in_it(objects: list[Object]) -> None:
    [job] = of_kind(objects, "Job").values()
    assert "helm.sh/hook" not in job["metadata"].get("annotations", {})
    first, *others = [container["args"][0] for _, container in rendering.containers([job])]
    assert first == "migrate"
    assert others in ([], ["keys"])


def test_each_process_gets_the_secrets_it_needs_and_no_other(objects: list[Object]) -> None:
    keys = {"TASKQUEUE_SECRET_KEY", "TASKQUEUE_WEBHOOK_SECRET", "TASKQUEUE_API_KEY", "BOOTSTRAP_KEY"}
    needed = {
        "api": {"TASKQUEUE_SECRET_KEY", "TASKQUEUE_WEBHOOK_SECRET"},
        "relay": {"TASKQUEUE_SECRET_KEY", "TASKQUEUE_WEBHOOK_SECRET"},
        "bootstrap-key": {"TASKQUEUE_SECRET_KEY", "BOOTSTRAP_KEY"},
        "test": {"TASKQUEUE_API_KEY"},
    }
    for name, container in rendering.containers(objects):
        given = keys & set(rendering.environment(container))
        assert given in (needed.get(container["name"], set()), set()), name
        if container["name"] in {"api", "relay", "worker"}:
            assert given == needed.get(container["name"], set()), name


def test_a_pod_is_given_longer_to_end_than_its_process_takes(objects: list[Object]) -> None:
    for name, deployment in of_kind(objects, "Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        container = ours(pod)
        drain = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        grace = float(rendering.environment(container)["TASKQUEUE_GRACE_SECONDS"])
        assert drain + grace < pod["terminationGracePeriodSeconds"] <= drain + grace + 10, name


def test_every_variable_of_ours_is_a_setting_and_has_a_value_that_it_takes(objects: list[Object]) -> None:
    for name, container in rendering.containers(objects):
        if not {"api", "relay", "worker", "migrate"} & set(container.get("args", [])[:1]):
            continue
        variables = rendering.environment(container)
        known = {variable: value for variable, value in variables.items() if variable in config.variables()}
        assert {one for one in variables if one.startswith("TASKQUEUE_")} <= set(known), name
        stand_ins = {
            "DATABASE_URL": "postgresql://u:p@db/d",
            "REDIS_URL": "redis://:p@redis/0",
            "TASKQUEUE_WEBHOOK_SECRET": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz",
            "TASKQUEUE_SECRET_KEY": "s" * 32,
        }
        given = {one: value if isinstance(value, str) else stand_ins[one] for one, value in known.items()}
        config.Settings.model_validate(given)


def test_selectors_find_their_own_pods_and_no_others(objects: list[Object]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in rendering.templates(objects)}

    def found(selector: dict[str, Any]) -> set[str]:
        return {name for name, has in labels.items() if selector.items() <= has.items()}

    for kind in ("Deployment", "StatefulSet"):
        for name, one in of_kind(objects, kind).items():
            assert found(one["spec"]["selector"]["matchLabels"]) == {name}
    for name, service in of_kind(objects, "Service").items():
        if name != f"{rendering.PREFIX}-metrics":
            assert found(service["spec"]["selector"]) == {name.removesuffix("-headless")}
    for name, budget in of_kind(objects, "PodDisruptionBudget").items():
        assert found(budget["spec"]["selector"]["matchLabels"]) == {name}


def test_ports_that_are_named_are_there(objects: list[Object]) -> None:
    for name, container in rendering.containers(objects):
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            assert port is None or port in ports, name
    for service in of_kind(objects, "Service").values():
        wanted = {port["targetPort"] for port in service["spec"]["ports"]}
        serving = [
            {port["name"] for port in container.get("ports", [])} for _, container in rendering.containers(objects)
        ]
        assert any(wanted <= ports for ports in serving)
    for policy in of_kind(objects, "NetworkPolicy").values():
        rules = [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
        wanted = {port["port"] for rule in rules for port in rule.get("ports", []) if isinstance(port["port"], str)}
        assert wanted <= set().union(*serving), policy["metadata"]["name"]


def test_names_fit_whatever_the_release_is_called() -> None:
    values = {"fullnameOverride": "a-name-that-is-much-longer-than-anybody-would-ever-want-it-to-be"}
    names = [one["metadata"]["name"] for one in rendering.render(values)]
    assert max(map(len, names)) <= 63


def test_the_oldest_kubernetes_that_is_promised_will_do_and_an_older_one_is_refused() -> None:
    assert rendering.render(kubernetes=OLDEST_KUBERNETES)
    with pytest.raises(rendering.RefusedError, match="kubeVersion"):
        rendering.render(kubernetes="1.29.9")


def test_the_chart_installs_the_release_that_it_lies_beside() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert chart["appVersion"] == app.__version__ == project["project"]["version"]


def test_every_value_stands_in_the_schema_and_the_reverse() -> None:
    def compare(place: str, schema: dict[str, Any], values: dict[str, Any]) -> None:
        assert set(schema["properties"]) == set(values), place
        for name, part in schema["properties"].items():
            if part.get("additionalProperties") is False and isinstance(values[name], dict) and "properties" in part:
                compare(f"{place}.{name}", part, values[name])

    for chart in (CHART, CHART / "charts" / "redis", CHART / "charts" / "postgresql"):
        values = yaml.safe_load((chart / "values.yaml").read_text())
        schema = yaml.safe_load((chart / "values.schema.json").read_text())
        # What a chart gets from the one around it.
        implied = {} if chart == CHART else {"global": {}, "enabled": True}
        compare(chart.name, schema, implied | values)
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    pool = schema["properties"]["workers"]["additionalProperties"]["properties"]
    assert set(pool) - {"queues"} == set(schema["properties"]["workerDefaults"]["properties"])
