"""The dashboards are what their source says, keep the rules of good ones, and name only what there is."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as schema
from grafana_foundation_sdk.models import units

from app.core.metrics import catalogue
from k8s.observability import __main__ as generating
from k8s.observability.rendering import render
from tests.observability import expressions, naming

DASHBOARDS = expressions.dashboards()
UNITS = {value for value in vars(units).values() if isinstance(value, str)}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
VARIABLE = re.compile(r"\$(\w+)")
BUILT_IN = {"__rate_interval", "__range"}

of_each = pytest.mark.parametrize(("uid", "dashboard"), DASHBOARDS.items(), ids=list(DASHBOARDS))


def test_the_committed_files_are_what_make_dashboards_writes() -> None:
    generated = {f"{page.file}.json": render(page) for page in generating.PAGES}
    assert {path.name: path.read_text() for path in expressions.DASHBOARDS} == generated, "run `make dashboards`"


def test_former_files_are_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "DIRECTORY", tmp_path)
    (tmp_path / "former.json").touch()
    (tmp_path / "Kustomization").touch()
    generating.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "Kustomization",
        *(path.name for path in expressions.DASHBOARDS),
    }


@of_each
def test_it_loads_by_grafanas_schema_and_loses_nothing(uid: str, dashboard: dict[str, Any]) -> None:
    loaded = schema.Dashboard.from_json(dashboard)
    again = _decoded(JSONEncoder().encode(loaded))
    assert loaded.uid == uid
    assert [one["title"] for one in again["panels"]] == [one["title"] for one in dashboard["panels"]]
    for panel, former in zip(again["panels"], dashboard["panels"], strict=True):
        assert panel.get("targets") == former.get("targets")
        assert panel.get("fieldConfig") == former.get("fieldConfig")
        assert panel.get("options") == former.get("options")


def _decoded(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


@of_each
def test_it_is_provisioned_not_edited(uid: str, dashboard: dict[str, Any]) -> None:
    assert "id" not in dashboard
    assert dashboard["editable"] is False
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["tags"] == ["taskqueue"]
    assert dashboard["description"]
    assert uid.startswith("taskqueue-")
    assert len(uid) <= 40


@of_each
def test_its_variables_are_read_anew_with_the_time(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    names = [one["name"] for one in dashboard["templating"]["list"]]
    assert names[:2] == ["datasource", "namespace"]
    for variable in dashboard["templating"]["list"]:
        assert variable["label"]
        if variable["type"] == "query":
            assert variable["refresh"] == 2
            assert variable["datasource"] == DATASOURCE


@of_each
def test_every_data_source_is_a_variable(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    assert set(map(str, _datasources(dashboard))) == {str(DATASOURCE)}
    [variable] = [one for one in dashboard["templating"]["list"] if one["type"] == "datasource"]
    assert (variable["name"], variable["query"]) == ("datasource", "prometheus")


def _datasources(part: Any) -> list[Any]:
    """Every data source that is named anywhere within."""
    if isinstance(part, list):
        return [found for one in part for found in _datasources(one)]
    if isinstance(part, dict):
        own = [part["datasource"]] if "datasource" in part else []
        return own + [found for one in part.values() for found in _datasources(one)]
    return []


@of_each
def test_nothing_covers_another_and_all_fits_the_page(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    places = [one["gridPos"] for one in dashboard["panels"]]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert [number for number, count in Counter(one["id"] for one in dashboard["panels"]).items() if count > 1] == []


@of_each
def test_every_panel_says_what_it_shows_and_what_to_do(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    for panel in expressions.panels(dashboard):
        says = panel["description"]
        assert panel["title"]
        assert len(says.split()) >= 10, panel["title"]
        assert says.endswith(".")
        assert naming.routes_that_are_not(says) == []
        assert naming.commands_that_are_not(says) == []
        assert naming.settings_that_are_not(says) == set()
        assert naming.alerts_that_are_not(says) == set()


@of_each
def test_every_panel_has_a_unit_that_grafana_knows(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    for panel in expressions.panels(dashboard):
        heat = panel["type"] == "heatmap"
        unit = panel["options"]["yAxis"]["unit"] if heat else panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS, panel["title"]


@of_each
def test_every_panel_asks_within_the_chosen_namespace_and_time(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    chosen = {one["name"] for one in dashboard["templating"]["list"]}
    for panel in expressions.panels(dashboard):
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            expression = target["expr"]
            assert set(VARIABLE.findall(expression)) <= chosen | BUILT_IN
            named = expressions.selectors(expression)
            assert named
            assert [one for one in named if "$namespace" not in one] == []
            ranges = set(re.findall(r"\[([^\]]*)\]", re.sub(r'"[^"]*"', "", expression)))
            assert ranges <= {"$__rate_interval", "$__range"}, expression
            if panel["type"] == "timeseries":
                assert target["legendFormat"], panel["title"]


@of_each
def test_what_every_relay_exports_is_never_added_up(uid: str, dashboard: dict[str, Any]) -> None:
    del uid
    of_the_cluster = {one.name for one in catalogue.PARTS["The state of queues and webhooks"] if one.kind == "gauge"}
    for target in itertools.chain.from_iterable(panel["targets"] for panel in expressions.panels(dashboard)):
        for name in expressions.metrics(target["expr"]) & of_the_cluster:
            before = target["expr"].partition(name)[0]
            assert re.search(r"max(?: by \([\w, ]+\))? ?\($", before), target["expr"]


def test_every_metric_that_is_named_exists() -> None:
    known = expressions.OWN | expressions.OTHERS | {rule["record"] for rule in expressions.rules("record")}
    asked = [*expressions.of_panels(), *(one for one, _ in expressions.of_variables())]
    written = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in _all_rules()]
    unknown = {(one.where, name) for one in asked for name in expressions.metrics(one.text) - known}
    unknown |= {(where, name) for where, text in written for name in expressions.metrics(text) - known}
    assert unknown == set()


def test_every_metric_that_is_exported_is_on_a_dashboard() -> None:
    shown = {name for one in expressions.of_panels() for name in expressions.metrics(one.text)}
    recorded = {rule["record"]: expressions.metrics(rule["expr"]) for rule in expressions.rules("record")}
    shown |= {name for record in shown & set(recorded) for name in recorded[record]}
    bare = {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown} | shown
    assert {metric.name for metric in catalogue.METRICS} - bare == set()


def _all_rules() -> list[dict[str, Any]]:
    return [*expressions.rules("record"), *expressions.rules("alert")]
