"""Every alert fires when it should, is silent when it should be, and says where to go on."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core.metrics import catalogue
from tests.observability import expressions, naming
from tests.support.prometheus import promtool

CASES = Path(__file__).with_name("cases.yaml")
RUNBOOKS = expressions.ROOT / "docs" / "runbooks"
ALERTS = expressions.rules("alert")
NAMES = sorted({alert["alert"] for alert in ALERTS})
LOGGED = {"Redis hands out no messages", "OOMKilled"}
"""What runbooks quote besides the names of panels: words of logs."""
PARTS = ["What it means", "How to confirm", "What to do"]


def test_promtool_finds_nothing_wrong() -> None:
    said = promtool("check", "rules", *expressions.RULES)
    found = len(ALERTS) + len(expressions.rules("record"))
    assert sum(map(int, re.findall(r"SUCCESS: (\d+) rules found", said))) == found


@pytest.mark.timeout(600)  # a few seconds of work, but no wait is long enough on a machine that has others to serve
def test_they_fire_and_are_silent_as_the_cases_say(tmp_path: Path) -> None:
    for path in expressions.RULES:
        written = yaml.safe_load(path.read_text())
        for group in written["groups"]:
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (tmp_path / path.name).write_text(yaml.safe_dump(written))
    (tmp_path / CASES.name).write_text(CASES.read_text())
    assert "SUCCESS" in promtool("test", "rules", CASES.name, directory=tmp_path)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent() -> None:
    fires, silent = set(), set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for check in case.get("alert_rule_test", ()):
            if f"{check['alertname']} fires" in case["name"] and check["exp_alerts"]:
                fires.add(check["alertname"])
            if f"{check['alertname']} is silent" in case["name"] and not check["exp_alerts"]:
                silent.add(check["alertname"])
    assert sorted(fires) == NAMES
    assert sorted(silent) == NAMES


@pytest.mark.parametrize("alert", ALERTS, ids=[f"{one['alert']} {one['labels'].get('long', '')}" for one in ALERTS])
def test_every_alert_says_what_is_wrong_and_where_to_go_on(alert: dict[str, Any]) -> None:
    assert alert["alert"].startswith("Taskqueue")
    assert alert["labels"]["severity"] in {"critical", "warning"}
    said = alert["annotations"]
    assert set(said) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert said["summary"]
    assert said["description"].endswith(".")
    assert (expressions.ROOT / said["runbook_url"]).is_file()
    assert said["runbook_url"] == f"docs/runbooks/{alert['alert']}.md"
    found = re.fullmatch(r"/d/([\w-]+)(?:\?(.*))?", said["dashboard_url"])
    assert found is not None
    dashboard = expressions.dashboards()[found[1]]
    chosen = {f"var-{one['name']}" for one in dashboard["templating"]["list"]}
    assert set(re.findall(r"[?&]([\w-]+)=", said["dashboard_url"])) <= chosen


def test_the_windows_of_an_objective_burn_at_one_rate() -> None:
    burning = [one for one in ALERTS if "BudgetBurn" in one["alert"]]
    assert len(burning) == 8
    for alert in burning:
        long, short = alert["labels"]["long"], alert["labels"]["short"]
        factors = re.findall(r"> \(([\d.]+) \* ([\d.]+)\)", alert["expr"])
        assert len(set(factors)) == 1
        assert len(factors) == 2
        assert re.findall(r"ratio_rate(\w+) ", alert["expr"]) == [long, short]


def test_the_objective_is_a_bound_of_the_histogram() -> None:
    bounds = {f"{float(bound)}" for one in catalogue.METRICS for bound in one.buckets}
    used = {le for one in expressions.rules("record") for le in re.findall(r'le="([^"]*)"', one["expr"])}
    assert used == {"30.0"}
    assert used <= bounds


def test_recorded_names_say_level_metric_and_operation() -> None:
    for rule in expressions.rules("record"):
        assert re.fullmatch(r"[a-z_]+:taskqueue_[a-z_]+:(max|ratio|(ratio_)?rate\d+[mhd])", rule["record"]), rule[
            "record"
        ]
        assert "_total:" not in rule["record"]


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert sorted(path.stem for path in RUNBOOKS.glob("*.md") if path.stem != "README") == NAMES
    listed = re.findall(
        r"^\| \[(\w+)\]\((\w+)\.md\) \| ([\w, ]+) \|", (RUNBOOKS / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, _, _ in listed) == NAMES
    for name, file, severity in listed:
        assert file == name
        meant = sorted({one["labels"]["severity"] for one in ALERTS if one["alert"] == name})
        assert severity == ", ".join(meant)


@pytest.mark.parametrize("name", NAMES)
def test_a_runbook_names_only_what_there_is(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == PARTS
    flat = " ".join(text.split())
    assert naming.routes_that_are_not(flat) == []
    assert naming.commands_that_are_not(flat) == []
    assert naming.settings_that_are_not(flat) == set()
    assert naming.alerts_that_are_not(flat) == set()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not (RUNBOOKS / link).exists()] == []
    titles = {panel["title"] for one in expressions.dashboards().values() for panel in expressions.panels(one)}
    pages = {one["title"].removeprefix("Task queue / ") for one in expressions.dashboards().values()}
    rows = {panel["title"] for one in expressions.dashboards().values() for panel in one["panels"]}
    quoted = {words for words in re.findall(r'"([A-Z][^"]*)"', re.sub(r"`[^`]*`", "", flat)) if words not in LOGGED}
    assert quoted <= titles | pages | rows
