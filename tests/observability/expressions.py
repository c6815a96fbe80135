"""Every expression that somebody will ask Prometheus: those of the dashboards and those of the rules."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from app.core.metrics import catalogue

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "charts" / "taskqueue" / "dashboards").glob("*.json"))
RULES = sorted((ROOT / "charts" / "taskqueue" / "rules").glob("*.yaml"))

_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}
OWN = frozenset(metric.name + suffix for metric in catalogue.METRICS for suffix in _SUFFIXES[metric.kind])
"""What the processes export, as queries write it."""
OTHERS = frozenset({"up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total"})
"""What Prometheus knows besides: its own, and what prometheus-client has of every process."""


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression, and where it stands."""

    where: str
    text: str


@cache
def dashboards() -> dict[str, dict[str, Any]]:
    """The committed dashboards by their uid."""
    found = [json.loads(path.read_text()) for path in DASHBOARDS]
    return {one["uid"]: one for one in found}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """What shows something."""
    return [one for one in dashboard["panels"] if one["type"] != "row"]


def of_panels() -> Iterator[Expression]:
    """The expressions of all panels, and those of the marks on them."""
    for uid, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield Expression(f"{uid} / {panel['title']} / {target['refId']}", target["expr"])
        for mark in dashboard["annotations"]["list"]:
            yield Expression(f"{uid} / {mark['name']}", mark["expr"])


def with_exemplars() -> Iterator[Expression]:
    """The expressions whose points lead to traces."""
    for uid, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                if target.get("exemplar"):
                    yield Expression(f"{uid} / {panel['title']} / {target['refId']}", target["expr"])


def of_variables() -> Iterator[tuple[Expression, str]]:
    """The selectors of the variables' queries, each with the label whose values are asked for."""
    for uid, dashboard in dashboards().items():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
                assert found is not None, variable
                yield Expression(f"{uid} / ${variable['name']}", found[1]), found[2]


@cache
def rules(kind: str) -> list[dict[str, Any]]:
    """All rules that `record` something, or that `alert`."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


_NOT_METRICS = frozenset({"histogram_quantile", "sort_desc", "predict_linear"})
_GROUPING = re.compile(r"\b(by|on)\s*\([^)]*\)")


def metrics(expression: str) -> set[str]:
    """The metrics that an expression names, known or not."""
    bare = re.sub(r'"[^"]*"', '""', _GROUPING.sub("", expression))
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    words = re.findall(r"[a-zA-Z_][\w:]*", bare)
    return {word for word in words if ("_" in word or ":" in word or word in OTHERS) and word not in _NOT_METRICS}


def selectors(expression: str) -> list[str]:
    """Each selector of an expression, without its range."""
    bare = _GROUPING.sub(" ", expression)
    named = metrics(expression)
    return [name + matchers for name, matchers in re.findall(r"([a-zA-Z_][\w:]*)(\{[^}]*\})?", bare) if name in named]
