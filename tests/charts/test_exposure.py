"""How the service is reached, watched, and kept from what it shall not reach."""

import ipaddress
import json
from typing import Any

import pytest
import yaml

from app.utils import guard
from tests.charts import rendering
from tests.charts.rendering import PREFIX, Object, of_kind, render


def policy(objects: list[Object], component: str) -> Any:
    return of_kind(objects, "NetworkPolicy")[f"{PREFIX}-{component}"]["spec"]


def blocks(objects: list[Object], component: str) -> dict[str, list[str]]:
    """The address ranges that a component may call, each with what is taken out of it."""
    return {
        to["ipBlock"]["cidr"]: to["ipBlock"].get("except", [])
        for rule in policy(objects, component)["egress"]
        for to in rule.get("to", [])
        if "ipBlock" in to and "except" in to["ipBlock"]
    }


def lets(ranges: dict[str, list[str]], address: str) -> bool:
    """Whether a policy with these ranges lets an address be called."""
    called = ipaddress.ip_address(address)
    return any(
        called in ipaddress.ip_network(cidr) and not any(called in ipaddress.ip_network(one) for one in taken_out)
        for cidr, taken_out in ranges.items()
        if ipaddress.ip_network(cidr).version == called.version
    )


def test_an_ingress_leads_to_the_api() -> None:
    ingress = of_kind(rendering.way("gateway"), "Ingress")[f"{PREFIX}-api"]["spec"]
    assert ingress["ingressClassName"] == "traefik"
    assert [rule["host"] for rule in ingress["rules"]] == ["taskqueue.example", "demo.example"]
    paths = [path for rule in ingress["rules"] for path in rule["http"]["paths"]]
    assert [(one["path"], one["pathType"]) for one in paths] == [
        *(("/", "Prefix"), ("/api", "Prefix")),
        ("/healthz", "Exact"),
    ]
    assert {one["backend"]["service"]["name"] for one in paths} == {f"{PREFIX}-api"}


def test_a_route_leads_to_the_api_and_cuts_no_long_request_off() -> None:
    route = of_kind(rendering.way("gateway"), "HTTPRoute")[f"{PREFIX}-api"]["spec"]
    assert route["parentRefs"] == [{"name": "web", "namespace": "ingress"}]
    [rule] = route["rules"]
    assert rule["backendRefs"] == [{"name": f"{PREFIX}-api", "port": 80}]
    assert "timeouts" not in rule


def test_monitors_find_the_pods_that_have_metrics() -> None:
    monitor = of_kind(rendering.way("ha"), "PodMonitor")[PREFIX]
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    [expression] = monitor["spec"]["selector"]["matchExpressions"]
    serving = {
        one["spec"]["template"]["metadata"]["labels"][expression["key"]]
        for one in of_kind(rendering.way("ha"), "Deployment").values()
    }
    assert set(expression["values"]) == serving
    service = of_kind(rendering.way("keda"), "Service")[f"{PREFIX}-metrics"]
    selected = of_kind(rendering.way("keda"), "ServiceMonitor")[PREFIX]["spec"]["selector"]["matchLabels"]
    assert selected.items() <= service["metadata"]["labels"].items()
    others = [one for name, one in of_kind(rendering.way("keda"), "Service").items() if name != f"{PREFIX}-metrics"]
    assert not any(selected.items() <= one["metadata"]["labels"].items() for one in others)


def test_jobs_are_called_as_rules_and_dashboards_call_them() -> None:
    for way, kind, key in (("ha", "PodMonitor", "podMetricsEndpoints"), ("keda", "ServiceMonitor", "endpoints")):
        [endpoint] = of_kind(rendering.way(way), kind)[PREFIX]["spec"][key]
        assert endpoint["relabelings"][0]["replacement"] == "taskqueue-$1"


def test_what_rules_and_dashboards_have_in_braces_is_left_alone() -> None:
    objects = rendering.way("ha")
    groups = of_kind(objects, "PrometheusRule")[PREFIX]["spec"]["groups"]
    [mine] = [group for group in groups if group["name"] == "mine"]
    assert mine["rules"][0]["annotations"]["summary"] == "{{ $labels.queue }} has {{ $value }} messages"
    dashboard = of_kind(objects, "ConfigMap")[f"{PREFIX}-mine"]
    assert json.loads(dashboard["data"]["mine.json"]) == {"title": "{{ not ours }}"}
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_alerts_lead_to_their_runbooks_and_dashboards() -> None:
    for base, grafana in (("", ""), ("https://git.example/q/blob/v1/", "https://grafana.example")):
        values = {"metrics": {"prometheusRule": {"enabled": True, "runbooks": base, "grafana": grafana}}}
        objects = rendering.render(values)
        groups = of_kind(objects, "PrometheusRule")[PREFIX]["spec"]["groups"]
        alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
        assert alerts
        for alert in alerts:
            assert alert["annotations"]["runbook_url"] == f"{base}docs/runbooks/{alert['alert']}.md"
            assert alert["annotations"]["dashboard_url"].startswith(f"{grafana}/d/taskqueue-")


def test_the_rules_and_dashboards_of_the_chart_are_all_taken() -> None:
    objects = rendering.way("ha")
    groups = {group["name"] for group in of_kind(objects, "PrometheusRule")[PREFIX]["spec"]["groups"]}
    for file in (rendering.CHART / "rules").glob("*.yaml"):
        assert {group["name"] for group in yaml.safe_load(file.read_text())["groups"]} <= groups
    for file in (rendering.CHART / "dashboards").glob("*.json"):
        config_map = of_kind(objects, "ConfigMap")[f"{PREFIX}-{file.stem[:22]}"]
        assert json.loads(config_map["data"][file.name]) == json.loads(file.read_text())


@pytest.mark.parametrize("way", ["restricted", "hardened"])
def test_every_pod_has_a_policy(way: str) -> None:
    objects = rendering.way(way)
    selectors = [one["spec"]["podSelector"]["matchLabels"] for one in of_kind(objects, "NetworkPolicy").values()]
    for name, template in rendering.templates(objects):
        labels = template["metadata"]["labels"]
        assert len([one for one in selectors if one.items() <= labels.items()]) == 1, name


def test_the_relay_may_call_the_internet_and_nothing_that_is_special_or_the_operators() -> None:
    ranges = blocks(rendering.way("restricted"), "relay")
    public = ("1.1.1.1", "93.184.216.34", "172.15.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00::1")
    assert [one for one in public if not lets(ranges, one)] == []
    special = ["10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "172.31.255.255", "100.100.100.200"]
    special += ["168.63.129.16", "224.0.0.1", "::1", "fd00:ec2::254", "fe80::1", "2001:db8::1", "2002:7f00:1::1"]
    operators = ["10.96.0.1", "34.0.0.7", "1.2.3.4", "8.8.8.8", "2600:1900::1"]
    assert [one for one in special + operators if lets(ranges, one)] == []


def test_the_policy_lets_nothing_through_that_the_guard_of_webhooks_blocks() -> None:
    ranges = blocks(rendering.way("restricted"), "relay")
    networks: tuple[guard.IPNetwork, ...] = (*guard._DENIED_V4, *guard._DENIED_V6)
    edges = [one for network in networks for one in (network[0], network[-1])]
    assert edges
    assert [str(one) for one in edges if lets(ranges, str(one))] == []
    ports = [rule["ports"] for rule in policy(rendering.way("restricted"), "relay")["egress"] if "ports" in rule]
    assert [{"port": port} for port in sorted(guard.PORTS)] in ports


def test_receivers_in_the_cluster_and_that_of_helm_test_can_be_called() -> None:
    rules = policy(rendering.way("restricted"), "relay")["egress"]
    called = [to["podSelector"]["matchLabels"] for rule in rules for to in rule.get("to", []) if "podSelector" in to]
    assert {"app": "receiver"} in called
    assert any(one.get("app.kubernetes.io/component") == "test" for one in called)


def test_who_may_call_the_api_can_be_said_and_metrics_are_for_prometheus() -> None:
    [http, metrics] = policy(rendering.way("restricted"), "api")["ingress"]
    assert http["ports"] == [{"port": "http"}]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}} in http["from"]
    assert metrics["ports"] == [{"port": "metrics"}]
    [anybody, _] = policy(rendering.way("keda"), "api")["ingress"]
    assert "from" not in anybody


def test_keda_is_let_into_redis_and_postgres_if_it_looks_there() -> None:
    keda = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "keda"}}}
    for server in ("redis", "postgresql"):
        [rule] = policy(rendering.way("keda"), server)["ingress"]
        assert keda in rule["from"]
        [rule] = policy(rendering.way("restricted"), server)["ingress"]
        assert keda not in rule["from"]


def test_servers_call_nobody_and_names_can_be_looked_up() -> None:
    for server in ("redis", "postgresql"):
        spec = policy(rendering.way("restricted"), server)
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert "egress" not in spec
    for component in ("api", "relay", "worker", "migrate"):
        names = policy(rendering.way("restricted"), component)["egress"][0]
        assert {port["port"] for port in names["ports"]} == {53}
        assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]


def test_servers_of_ones_own_are_called_on_their_ports() -> None:
    rules = policy(rendering.way("external"), "worker")["egress"]
    assert [rule["ports"] for rule in rules if "to" not in rule] == [[{"port": 6380}], [{"port": 5432}]]
    objects = render({"networkPolicy": {"enabled": True, "workerEgress": [{"ports": [{"port": 25}]}]}})
    assert blocks(objects, "worker") == {}
