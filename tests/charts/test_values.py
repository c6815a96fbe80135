"""What single values do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app import keys
from tests.charts import rendering
from tests.charts.rendering import PREFIX, VALUES, RefusedError, of_kind, render


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
    assert {one["kind"] for one in objects} == {
        *("ServiceAccount", "Secret", "ConfigMap", "Service", "Deployment", "StatefulSet", "Job", "Pod"),
    }


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


def test_probes_of_workers_and_relays_start_no_python() -> None:
    for name in (f"{PREFIX}-worker-default/worker", f"{PREFIX}-relay/relay"):
        container = the_container(name)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            command = container[probe]["exec"]["command"]
            assert command[:2] == ["sh", "-c"]
            # Not ready while Redis or Postgres is away, but not started again for that.
            named = f"{container['name']}.beat" if probe == "readinessProbe" else f"{container['name']}.*"
            assert f"-name '{named}'" in command[2]


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
    [job] = of_kind(render({"migrate": {"enabled": False}}), "Job").values()
    assert [name.split("/")[1] for name, _ in rendering.containers([job])] == ["wait-for-schema", "bootstrap-key"]
    objects = render({"migrate": {"enabled": False}, "bootstrapKey": {"enabled": False}})
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
        "secrets": {
            "webhookSecret": "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz",
            "secretKey": "s" * 32,
            "apiKey": f"tq_live_{'i' * 10}_{'s' * 43}5d41402a",
        },
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
        if "DATABASE_URL" in variables:
            assert variables["REDIS_URL"] == {"secretKeyRef": {"name": f"{PREFIX}-external", "key": "redis-url"}}
    assert "hidden" not in str(objects)


def test_redis_keeps_and_refuses_as_a_queue_must() -> None:
    lines = of_kind(render(), "ConfigMap")["demo-redis"]["data"]["redis.conf"].splitlines()
    assert {"appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction"} <= set(lines)


@pytest.mark.parametrize(("password", "written"), [('a"b\\c', 'requirepass "a\\"b\\\\c"\n'), ("", None), (None, None)])
def test_redis_asks_for_its_password_or_does_not_start(
    tmp_path: Path, password: str | None, written: str | None
) -> None:
    [shell, options, script] = dict(rendering.containers(render()))["demo-redis/redis"]["command"]
    (tmp_path / "auth").mkdir()
    if password is not None:
        (tmp_path / "auth" / "password").write_text(password)
    here = script.replace("/usr/local/etc/redis", str(tmp_path)).replace(">/tmp/", f">{tmp_path}/")
    started = subprocess.run(
        [shell, options, here.replace("exec redis-server", "exec echo started")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("started" in started.stdout) is (written is not None)
    assert not written or (tmp_path / "auth.conf").read_text() == written


def test_by_default_nothing_is_backed_up_and_a_backup_lies_beside_the_data_and_outlives_the_release() -> None:
    assert not {"CronJob", "PersistentVolumeClaim"} & {one["kind"] for one in render()}
    objects = render({"postgresql": {"backup": {"enabled": True, "keep": 3}}})
    [(claim, volume)] = of_kind(objects, "PersistentVolumeClaim").items()
    assert volume["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    [job] = of_kind(objects, "CronJob").values()
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert {"name": "backup", "persistentVolumeClaim": {"claimName": claim}} in pod["volumes"]
    [script] = [one["command"][-1] for one in pod["containers"]]
    # The fourth and what is older.
    assert "tail -n +4 " in script
    mine = render({"postgresql": {"backup": {"enabled": True, "existingClaim": "mine"}}})
    assert not of_kind(mine, "PersistentVolumeClaim")
    assert "'claimName': 'mine'" in str(of_kind(mine, "CronJob"))


def test_an_exporter_stands_beside_a_server() -> None:
    exporter = {"name": "exporter", "image": "exporter.example/{{ .Release.Name }}"}
    for server in ("redis", "postgresql"):
        pod = dict(rendering.pods(render({server: {"extraContainers": [exporter]}})))[f"demo-{server}"]
        assert [one["name"] for one in pod["containers"]] == [server, "exporter"]
        assert pod["containers"][1]["image"] == "exporter.example/demo"


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
            "postgresql.maxConnections: 200 do not do, these pods may open 265",
        ),
        (
            {"workerDefaults": {"autoscaling": {"by": "keda", "maxReplicas": 20}, "concurrency": 8}},
            "postgresql.maxConnections: 200 do not do, these pods may open 316",
        ),
        (
            {"api": {"autoscaling": {"enabled": True, "maxReplicas": 20}}},
            "postgresql.maxConnections: 200 do not do, these pods may open 245",
        ),
        ({"api": {"autoscaling": {"enabled": True, "minReplicas": 11}}}, "api.autoscaling: minReplicas is more than"),
        (
            {"workers": {"default": {"autoscaling": {"by": "cpu", "minReplicas": 11}}}},
            "workers.default.autoscaling: minReplicas is more than maxReplicas",
        ),
        ({"workerDefaults": {"autoscaling": {"fallback": {"replicas": 0}}}}, "at '/workerDefaults/autoscaling/fall"),
        ({"workerDefaults": {"autoscaling": {"by": "kedda"}}}, "value must be one of 'none', 'keda', 'cpu'"),
        (
            {
                "redis": {"enabled": False},
                "externalRedis": {"existingSecret": "mine"},
                "workerDefaults": {"autoscaling": {"by": "keda"}},
            },
            "externalRedis.keda.address: KEDA needs it",
        ),
        ({"ingress": {"enabled": True}}, "ingress.hosts: name at least one"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs: name at least one Gateway"),
        (
            {"metrics": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}},
            "metrics: every pod would be scraped twice",
        ),
        ({"secrets": {"apiKey": "tq_live_short"}}, "at '/secrets/apiKey'"),
        ({"bootstrapKey": {"scopes": ["all"]}}, "at '/bootstrapKey/scopes/0'"),
        ({"networkPolicy": {"enabled": "yes"}}, "at '/networkPolicy/enabled': got string, want boolean"),
        ({"global": {"imageRegistry": 5}}, "at '/global/imageRegistry': got number, want string"),
        ({"webhooks": {"allowedOrigins": ["receiver"]}}, "at '/webhooks/allowedOrigins/0'"),
    ],
)
def test_values_that_can_not_be_meant_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(sentence)):
        render(values)


def test_the_release_comes_with_a_key_that_the_service_takes_in() -> None:
    objects = render({"bootstrapKey": {"owner": "reports", "scopes": ["tasks:read"]}})
    key = rendering.secret(objects, PREFIX)["api-key"]
    assert keys.id_of(key) is not None
    [taking_in] = [one for name, one in rendering.containers(objects) if name.endswith("/bootstrap-key")]
    assert taking_in["args"] == [
        *("keys", "create", "--key-from-env=BOOTSTRAP_KEY", "--name=bootstrap", "--owner=reports"),
        "--scope=tasks:read",
    ]
    assert key not in str([one for one in objects if one["kind"] != "Secret"])


def test_without_keys_there_is_none_and_the_test_asks_without_one() -> None:
    objects = render({"config": {"authMode": "none"}})
    assert set(of_kind(objects, "Secret")[PREFIX]["data"]) == {"webhook-secret", "secret-key"}
    assert not [name for name, _ in rendering.containers(objects) if name.endswith("/bootstrap-key")]
    test = dict(rendering.containers(objects))[f"{PREFIX}-test/test"]
    assert not rendering.environment(test)


def test_there_is_no_helm_test_without_a_key_that_it_could_use() -> None:
    for values in ({"bootstrapKey": {"enabled": False}}, {"helmTest": {"enabled": False}}):
        objects = render(values)
        assert not of_kind(objects, "Pod")
        relay = dict(rendering.containers(objects))[f"{PREFIX}-relay/relay"]
        assert "TASKQUEUE_WEBHOOK_ALLOWED_ORIGINS" not in rendering.environment(relay)


def test_the_receiver_of_helm_test_is_the_one_private_origin_and_can_be_found() -> None:
    objects = render()
    relay = dict(rendering.containers(objects))[f"{PREFIX}-relay/relay"]
    assert rendering.environment(relay)["TASKQUEUE_WEBHOOK_ALLOWED_ORIGINS"] == f"http://{PREFIX}-test:8080"
    service = of_kind(objects, "Service")[f"{PREFIX}-test"]
    assert service["spec"]["ports"][0]["port"] == 8080
    assert service["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_a_migration_goes_around_pgbouncer() -> None:
    containers = dict(rendering.containers(rendering.way("external")))
    [migrate] = [one for name, one in containers.items() if name.endswith("/migrate")]
    assert rendering.environment(migrate)["DATABASE_URL"]["secretKeyRef"]["key"] == "direct-uri"
    api = containers[f"{PREFIX}-api/api"]
    assert rendering.environment(api)["DATABASE_URL"]["secretKeyRef"]["key"] == "uri"


def test_every_image_can_come_from_one_registry() -> None:
    objects = rendering.way("gateway")
    images = {one["image"] for name, one in rendering.containers(objects) if not name.endswith(("/proxy", "/models"))}
    assert all(image.startswith("registry.example/") for image in images), images
    assert len(images) == 3
    for name, pod in rendering.pods(objects):
        assert pod["imagePullSecrets"] == [{"name": "registry"}], name


def test_a_digest_wins_over_a_tag() -> None:
    digest = "sha256:" + "0" * 64
    images = {one["image"] for name, one in rendering.containers(rendering.way("pools")) if PREFIX in name}
    assert images == {f"taskqueue@{digest}"}


def test_each_component_has_an_account_of_its_own_unless_one_is_named() -> None:
    accounts = {name: pod["serviceAccountName"] for name, pod in rendering.pods(render()) if PREFIX in name}
    assert {accounts[f"{PREFIX}-{one}"] for one in ("api", "relay", "worker-default")} == {
        f"{PREFIX}-{one}" for one in ("api", "relay", "worker")
    }
    objects = render({"workers": {"mail": {"queues": ["mail"], "serviceAccountName": "mailer"}}})
    mail = dict(rendering.pods(objects))[f"{PREFIX}-worker-mail"]
    assert mail["serviceAccountName"] == "mailer"
    assert "mailer" not in of_kind(objects, "ServiceAccount")
    others = {pod["serviceAccountName"] for name, pod in rendering.pods(rendering.way("external")) if PREFIX in name}
    assert others == {"my-account"}


def test_what_is_extra_is_rendered_and_added() -> None:
    objects = rendering.way("gateway")
    assert {"demo-more", f"{PREFIX}-text"} <= set(of_kind(objects, "ConfigMap"))
    for name, container in rendering.containers(objects):
        if PREFIX in name and not name.endswith(("/proxy", "/models")):
            assert container["envFrom"] == [{"configMapRef": {"name": "demo-more"}}], name
            assert {"name": "models", "mountPath": "/models"} in container["volumeMounts"], name
    api = dict(rendering.pods(objects))[f"{PREFIX}-api"]
    assert [one["name"] for one in api["containers"]] == ["api", "proxy"]
    worker = dict(rendering.pods(objects))[f"{PREFIX}-worker-default"]
    assert [one["name"] for one in worker["initContainers"]] == ["wait-for-schema", "models"]


def test_labels_and_annotations_that_all_objects_shall_have_are_on_all_and_in_no_selector() -> None:
    objects = [one for one in rendering.way("restricted") if one["metadata"]["name"].startswith(PREFIX)]
    for one in objects:
        assert one["metadata"]["labels"]["team"] == "platform", one["metadata"]["name"]
        if "helm.sh/hook" not in one["metadata"].get("annotations", {}):
            assert one["metadata"]["annotations"]["contact"] == "platform@example.com", one["metadata"]["name"]
        assert "team" not in str(one.get("spec", {}).get("selector")), one["metadata"]["name"]


def test_settings_reach_the_processes_that_read_them() -> None:
    values = {
        "config": {"publicDocs": True, "rateLimits": {"poll": 7}, "taskMemoryMebibytes": 512},
        "api": {"trustedProxies": ["10.0.0.0/8", "192.168.1.1"]},
    }
    containers = dict(rendering.containers(render(values)))
    api = rendering.environment(containers[f"{PREFIX}-api/api"])
    assert api["TASKQUEUE_PUBLIC_DOCS"] == "true"
    assert api["TASKQUEUE_RATE_LIMIT_POLL"] == "7"
    assert api["FORWARDED_ALLOW_IPS"] == "10.0.0.0/8,192.168.1.1"
    worker = rendering.environment(containers[f"{PREFIX}-worker-default/worker"])
    assert worker["TASKQUEUE_TASK_MEMORY_MEBIBYTES"] == "512"
