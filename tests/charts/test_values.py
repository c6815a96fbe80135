"""What single values do."""

import re
from typing import Any

import pytest

from tests.charts import rendering
from tests.charts.rendering import VALUES, RefusedError, of_kind, render

PREFIX = "demo-taskqueue"


def the_container(name: str, values: dict[str, Any] | None = None) -> rendering.Object:
    return dict(rendering.containers(render(values)))[name]


def test_by_default_there_is_one_of_each_and_nothing_reaches_outside() -> None:
    objects = render()
    deployments = of_kind(objects, "Deployment")
    assert set(deployments) == {f"{PREFIX}-api", f"{PREFIX}-relay", f"{PREFIX}-worker-default"}
    assert {one["spec"]["replicas"] for one in deployments.values()} == {1}
    assert set(of_kind(objects, "StatefulSet")) == {"demo-redis", "demo-postgresql"}
    assert {service["spec"].get("type", "ClusterIP") for service in of_kind(objects, "Service").values()} == {
        "ClusterIP"
    }
    assert "Ingress" not in {one["kind"] for one in objects}


def test_a_pool_inherits_what_it_does_not_say() -> None:
    values = {"workerDefaults": {"concurrency": 7, "graceSeconds": 90}, "workers": {"mail": {"queues": ["mail"]}}}
    objects = render(values)
    pools = {name for name in of_kind(objects, "Deployment") if "-worker-" in name}
    assert pools == {f"{PREFIX}-worker-default", f"{PREFIX}-worker-mail"}
    mail = rendering.environment(dict(rendering.containers(objects))[f"{PREFIX}-worker-mail/worker"])
    assert mail["TASKQUEUE_CONCURRENCY"] == "7"
    assert mail["TASKQUEUE_GRACE_SECONDS"] == "90"
    assert mail["TASKQUEUE_QUEUES"] == "mail"


def test_the_api_and_the_relay_know_the_queues_of_all_pools_and_default_comes_first() -> None:
    values = {"workers": {"a": {"queues": ["zeta", "mail"]}, "b": {"queues": ["mail"]}}}
    containers = dict(rendering.containers(render(values)))
    for component in ("api", "relay"):
        queues = rendering.environment(containers[f"{PREFIX}-{component}/{component}"])["TASKQUEUE_QUEUES"]
        assert queues == "default,mail,zeta"


def test_a_pool_that_is_null_is_not_there() -> None:
    objects = render({"workers": {"default": None, "mail": {"queues": ["mail"]}}})
    assert [name for name in of_kind(objects, "Deployment") if "-worker-" in name] == [f"{PREFIX}-worker-mail"]


def test_workers_see_no_secret_but_those_of_their_servers() -> None:
    variables = rendering.environment(the_container(f"{PREFIX}-worker-default/worker"))
    assert not {"TASKQUEUE_WEBHOOK_SECRET", "TASKQUEUE_SECRET_KEY"} & set(variables)
    signing = rendering.environment(the_container(f"{PREFIX}-relay/relay"))
    assert signing["TASKQUEUE_WEBHOOK_SECRET"] == {"secretKeyRef": {"name": PREFIX, "key": "webhook-secret"}}


def test_probes_of_workers_and_relays_start_no_python() -> None:
    for name in (f"{PREFIX}-worker-default/worker", f"{PREFIX}-relay/relay"):
        container = the_container(name)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            command = container[probe]["exec"]["command"]
            assert command[:2] == ["sh", "-c"]
            assert f"{container['name']}.beat" in command[2]


def test_the_migration_is_a_new_job_when_what_it_depends_on_changes_and_only_then() -> None:
    def job(**values: object) -> str:
        [name] = of_kind(render(values), "Job")
        return name

    assert job() == job() == job(api={"replicas": 3})
    others = [
        job(image={"tag": "2"}),
        job(postgresql={"enabled": False}, externalDatabase={"existingSecret": "mine"}),
        job(migrate={"backoffLimit": 1}),
    ]
    assert len({job(), *others}) == 4


def test_without_the_migration_the_pods_wait_all_the_same() -> None:
    objects = render({"migrate": {"enabled": False}})
    assert not of_kind(objects, "Job")
    waiting = [one["spec"]["template"]["spec"]["initContainers"] for one in of_kind(objects, "Deployment").values()]
    assert len(waiting) == 3


def test_only_what_has_several_pods_has_a_disruption_budget() -> None:
    assert not of_kind(render(), "PodDisruptionBudget")
    objects = render({"relay": {"replicas": 2}, "workers": {"mail": {"queues": ["mail"], "replicas": 3}}})
    budgets = of_kind(objects, "PodDisruptionBudget")
    assert set(budgets) == {f"{PREFIX}-relay", f"{PREFIX}-worker-mail"}
    for name, budget in budgets.items():
        selector = of_kind(objects, "Deployment")[name]["spec"]["selector"]
        assert budget["spec"]["selector"] == selector


def test_secrets_are_generated_with_all_their_strength_and_outlive_the_release() -> None:
    first, second = (of_kind(render(), "Secret") for _ in range(2))
    assert set(first) == {PREFIX, "demo-redis", "demo-postgresql"}
    for name, secret in first.items():
        assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", name
        for key, value in secret["data"].items():
            assert value != second[name]["data"][key]
            assert len(value) > 40


def test_secrets_that_are_given_are_taken_and_make_the_manifest_the_same_each_time() -> None:
    values = {
        "secrets": {"webhookSecret": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz", "secretKey": "s" * 32},
        "redis": {"auth": {"password": "one"}},
        "postgresql": {"auth": {"password": "two"}},
    }
    assert rendering.text(values) == rendering.text(values)
    [external] = [file for file in VALUES if file.name.startswith("external")]
    assert not of_kind(render({}, external), "Secret")


def test_pods_start_again_when_a_secret_that_was_given_changes_and_not_because_of_one_that_is_generated() -> None:
    def checksum(values: dict[str, Any]) -> str:
        api = of_kind(render(values), "Deployment")[f"{PREFIX}-api"]
        return str(api["spec"]["template"]["metadata"]["annotations"]["checksum/secrets"])

    assert checksum({}) == checksum({})
    changed: list[dict[str, Any]] = [
        {"secrets": {"secretKey": "s" * 32}},
        {"redis": {"auth": {"password": "one"}}},
        {"postgresql": {"auth": {"password": "one"}}},
    ]
    assert len({checksum(one) for one in [{}, *changed]}) == 4


def test_a_url_that_is_given_becomes_a_secret() -> None:
    values = {
        "redis": {"enabled": False},
        "externalRedis": {"url": "rediss://:hidden@redis.example:6380/1"},
        "postgresql": {"enabled": False},
        "externalDatabase": {"url": "postgresql://u:hidden@db.example/d"},
    }
    objects = render(values)
    assert not of_kind(objects, "StatefulSet")
    assert set(of_kind(objects, "Secret")[f"{PREFIX}-external"]["data"]) == {"database-url", "redis-url"}
    for _, container in rendering.containers(objects):
        variables = rendering.environment(container)
        assert not variables or variables["REDIS_URL"] == {
            "secretKeyRef": {"name": f"{PREFIX}-external", "key": "redis-url"}
        }
    assert "hidden" not in str(objects)


def test_redis_keeps_and_refuses_as_a_queue_must() -> None:
    lines = of_kind(render(), "ConfigMap")["demo-redis"]["data"]["redis.conf"].splitlines()
    assert {"appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction"} <= set(lines)


def test_no_password_stands_on_a_command_line() -> None:
    for name, container in rendering.containers(render({"redis": {"auth": {"password": "hidden"}}})):
        words = " ".join([*container.get("command", []), *container.get("args", [])])
        assert "hidden" not in words, name
        assert "PASSWORD" not in words, name


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"workers": {"default": {"concurency": 2}}}, "additional properties 'concurency' not allowed"),
        ({"replicas": 2}, "additional properties 'replicas' not allowed"),
        ({"config": {"authMode": "open"}}, "at '/config/authMode': value must be one of"),
        ({"redis": {"auth": {"password": "a b"}}}, "at '/auth/password'"),
        ({"redis": {"persistance": {}}}, "additional properties 'persistance' not allowed"),
        ({"workers": {"default": None}}, "workers: there must be a pool"),
        ({"redis": {"enabled": False}}, "externalRedis: set url or existingSecret, or redis.enabled"),
        ({"externalDatabase": {"url": "postgresql://db/d"}}, "postgresql.enabled: must be false"),
        (
            {"workers": {"default": {"replicas": 13, "concurrency": 11}}},
            "postgresql.maxConnections: 200 do not do, these pods may open 209",
        ),
        ({"webhooks": {"allowedOrigins": ["receiver"]}}, "at '/webhooks/allowedOrigins/0'"),
    ],
)
def test_values_that_can_not_be_meant_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(sentence)):
        render(values)
