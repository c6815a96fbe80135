"""What texts for people name, to be compared with what there is."""

import json
import re

from app import cli
from app.core import config
from tests.observability.expressions import ROOT, rules

_ROUTE = re.compile(r"`(GET|POST|PUT|DELETE) (/[^`\s?]*)[^`]*`")
_COMMAND = re.compile(r"`[^`]*?(?:-- )?(?<![\w/-])taskqueue ((?:[a-z]+)(?: [a-z]+)?)`")
_ALERT = re.compile(r"\bTaskqueue[A-Z]\w+")
_SETTING = re.compile(r"\bTASKQUEUE_[A-Z_]+")


def routes_that_are_not(text: str) -> list[str]:
    """The routes that a text names in backquotes and the API's description does not have."""
    paths = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]
    named = _ROUTE.findall(text)
    return [f"{method} {path}" for method, path in named if method.lower() not in paths.get(path, {})]


def commands_that_are_not(text: str) -> list[str]:
    """The commands that a text names in backquotes and `taskqueue` does not have."""
    return [words for words in _COMMAND.findall(text) if words not in cli.COMMANDS]


def settings_that_are_not(text: str) -> set[str]:
    """The settings that a text names and nobody reads."""
    return set(_SETTING.findall(text)) - set(config.variables())


def alerts_that_are_not(text: str) -> set[str]:
    """The alerts that a text names and no rule makes."""
    return set(_ALERT.findall(text)) - {rule["alert"] for rule in rules("alert")}
