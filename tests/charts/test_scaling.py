"""Who decides how many pods there are, and by what."""

from typing import Any

import pytest

from tests.charts import rendering
from tests.charts.rendering import NAMESPACE, PREFIX, Object, of_kind, render


def scaled(objects: list[Object], name: str) -> dict[str, Any]:
    """The spec of a ScaledObject."""
    return dict(of_kind(objects, "ScaledObject")[name]["spec"])


def authentication(objects: list[Object], name: str) -> dict[str, dict[str, str]]:
    """The parameters of a TriggerAuthentication, and where each comes from."""
    references = of_kind(objects, "TriggerAuthentication")[name]["spec"]["secretTargetRef"]
    return {one["parameter"]: {"name": one["name"], "key": one["key"]} for one in references}


def test_by_default_nothing_scales_and_replicas_are_said() -> None:
    objects = render()
    assert not {"HorizontalPodAutoscaler", "ScaledObject", "TriggerAuthentication"} & {one["kind"] for one in objects}
    assert all("replicas" in one["spec"] for one in of_kind(objects, "Deployment").values())


@pytest.mark.parametrize("way", rendering.WAYS)
def test_replicas_are_said_if_and_only_if_nothing_else_decides_them(way: str) -> None:
    objects = rendering.way(way)
    scalers = [*of_kind(objects, "HorizontalPodAutoscaler").values(), *of_kind(objects, "ScaledObject").values()]
    targets = [one["spec"]["scaleTargetRef"]["name"] for one in scalers]
    assert len(targets) == len(set(targets))
    deployments = of_kind(objects, "Deployment")
    assert {name for name, one in deployments.items() if "replicas" not in one["spec"]} == set(targets)


def test_a_pool_is_scaled_by_what_waits_in_all_its_queues_and_what_runs() -> None:
    spec = scaled(rendering.way("keda"), f"{PREFIX}-reports")
    queued = {one["name"]: one["metadata"]["listName"] for one in spec["triggers"] if one["type"] == "redis"}
    assert queued == {"queued0": "reports", "queued1": "reports:large"}
    [running] = [one for one in spec["triggers"] if one["type"] == "postgresql"]
    assert running["metadata"]["query"] == (
        "SELECT count(*) FROM task WHERE status = 'STARTED' AND queue IN ('reports', 'reports:large')"
    )
    modifiers = spec["advanced"]["scalingModifiers"]
    assert modifiers["formula"] == " + ".join([*queued, running["name"]])
    assert modifiers["target"] == "8"


def test_a_pod_is_wanted_for_as_many_tasks_as_it_runs_at_once_and_never_for_a_fraction() -> None:
    objects = render({"workerDefaults": {"autoscaling": {"by": "keda"}, "concurrency": 6}})
    assert scaled(objects, f"{PREFIX}-default")["advanced"]["scalingModifiers"]["target"] == "6"


def test_a_pool_goes_to_zero_and_an_outage_of_redis_does_not_take_it_there() -> None:
    spec = scaled(rendering.way("keda"), f"{PREFIX}-default")
    assert spec["minReplicaCount"] == 0
    assert spec["fallback"]["replicas"] >= 1
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
    assert scaled(rendering.way("keda"), f"{PREFIX}-reports")["minReplicaCount"] == 1


def test_pods_come_faster_than_they_go() -> None:
    behavior = scaled(rendering.way("keda"), f"{PREFIX}-default")["advanced"]["horizontalPodAutoscalerConfig"][
        "behavior"
    ]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] < behavior["scaleDown"]["stabilizationWindowSeconds"]


def test_keda_finds_the_servers_from_its_own_namespace_and_gets_no_password_in_the_clear() -> None:
    objects = rendering.way("keda")
    domain = f"{NAMESPACE}.svc.cluster.local"
    for trigger in scaled(objects, f"{PREFIX}-default")["triggers"]:
        metadata = trigger["metadata"]
        if trigger["type"] == "redis":
            assert metadata["address"] == f"demo-redis.{domain}:6379"
            assert trigger["authenticationRef"] == {"name": f"{PREFIX}-redis"}
        else:
            assert (metadata["host"], metadata["port"]) == (f"demo-postgresql.{domain}", "5432")
            assert trigger["authenticationRef"] == {"name": f"{PREFIX}-postgresql"}
        assert "password" not in str(metadata).lower()
    assert authentication(objects, f"{PREFIX}-redis") == {"password": {"name": "demo-redis", "key": "password"}}
    assert authentication(objects, f"{PREFIX}-postgresql") == {
        "password": {"name": "demo-postgresql", "key": "password"}
    }


def test_servers_of_ones_own_are_found_by_what_their_secrets_say() -> None:
    objects = rendering.way("external")
    redis, _ = scaled(objects, f"{PREFIX}-default")["triggers"]
    assert redis["metadata"] == {
        "address": "redis.example:6380",
        "databaseIndex": "1",
        "enableTLS": "true",
        "listName": "default",
        "listLength": "2",
    }
    assert authentication(objects, f"{PREFIX}-redis") == {
        "username": {"name": "my-redis", "key": "username"},
        "password": {"name": "my-redis", "key": "password"},
    }
    assert authentication(objects, f"{PREFIX}-postgresql") == {"connection": {"name": "my-cluster-app", "key": "uri"}}


def test_a_url_is_taken_apart_for_keda_which_takes_none() -> None:
    values = {
        "redis": {"enabled": False},
        "externalRedis": {"url": "rediss://queue:p%40s%2Fs@redis.example/3"},
        "postgresql": {"enabled": False},
        "externalDatabase": {"url": "postgresql+asyncpg://u:p@db.example/d"},
        "workerDefaults": {"autoscaling": {"by": "keda"}},
    }
    objects = render(values)
    metadata = scaled(objects, f"{PREFIX}-default")["triggers"][0]["metadata"]
    assert (metadata["address"], metadata["databaseIndex"], metadata["enableTLS"]) == (
        *("redis.example:6379", "3"),
        "true",
    )
    secret = rendering.secret(objects, f"{PREFIX}-external")
    for parameter, wanted in {"username": "queue", "password": "p@s/s"}.items():
        reference = authentication(objects, f"{PREFIX}-redis")[parameter]
        assert (reference["name"], secret[reference["key"]]) == (f"{PREFIX}-external", wanted)
    reference = authentication(objects, f"{PREFIX}-postgresql")["connection"]
    assert secret[reference["key"]] == "postgresql://u:p@db.example/d"


def test_a_redis_without_a_password_is_asked_without_one() -> None:
    values = {
        "redis": {"enabled": False},
        "externalRedis": {"url": "redis://redis.example:6379"},
        "workerDefaults": {"autoscaling": {"by": "keda"}},
    }
    objects = render(values)
    redis, running = scaled(objects, f"{PREFIX}-default")["triggers"]
    assert "authenticationRef" not in redis
    assert set(of_kind(objects, "TriggerAuthentication")) == {running["authenticationRef"]["name"]}


def test_names_of_scalers_fit_with_what_keda_puts_before_them() -> None:
    values = {
        "fullnameOverride": "a-name-that-is-much-longer-than-anybody-would-ever-want-it-to-be",
        "workers": {"default": None, "a-longer-pool-1": {"queues": ["one"]}, "a-longer-pool-2": {"queues": ["two"]}},
        "workerDefaults": {"autoscaling": {"by": "keda"}},
    }
    names = list(of_kind(render(values), "ScaledObject"))
    assert len(names) == 2
    assert all(len(f"keda-hpa-{name}") <= 63 for name in names)


def test_a_pool_by_cpu_never_goes_to_zero() -> None:
    objects = render({"workerDefaults": {"autoscaling": {"by": "cpu"}}})
    hpa = of_kind(objects, "HorizontalPodAutoscaler")[f"{PREFIX}-default"]["spec"]
    assert hpa["minReplicas"] == 1
    assert hpa["scaleTargetRef"]["name"] == f"{PREFIX}-worker-default"


def test_the_api_scales_by_its_cpu_and_what_is_added() -> None:
    hpa = of_kind(rendering.way("ha"), "HorizontalPodAutoscaler")[f"{PREFIX}-api"]["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (3, 6)
    assert [one["resource"]["name"] for one in hpa["metrics"]] == ["cpu", "memory"]


def test_what_may_have_several_pods_has_a_budget_though_it_scales() -> None:
    budgets = of_kind(rendering.way("ha"), "PodDisruptionBudget")
    assert set(budgets) == {f"{PREFIX}-api", f"{PREFIX}-relay", f"{PREFIX}-worker-default"}
    assert budgets[f"{PREFIX}-api"]["spec"]["minAvailable"] == 2
    assert "maxUnavailable" not in budgets[f"{PREFIX}-api"]["spec"]
