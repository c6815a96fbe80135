"""The README tells the truth: what it names exists, and what it shows works."""

import ast
import base64
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app import catalog, cli, schemas
from app.core import config
from app.core.statuses import TaskStatus
from app.dev import environment
from app.utils import webhook
from app.worker import sample_tasks, tasks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OWN_TASKS = [
    entry for entry in catalog.entries() if entry.function.__module__ in {tasks.__name__, sample_tasks.__name__}
]
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no section {title}"
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row in `text`, without those of its head."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {number for number, row in enumerate(cells) if set(row[0]) <= {"-", ":"}}
    return [row for number, row in enumerate(cells) if number not in rules and number + 1 not in rules]


def python_block(text: str, having: str) -> str:
    [found] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if having in block]
    return str(found)


def settings_rows() -> list[str]:
    """The settings table as `app.core.config` and `app.dev.environment` have it."""
    return [
        f"| `{variable}` | {_default(field)} | {_in_make_run(variable)} | {_meaning(field)} |"
        for variable, field in config.variables().items()
    ]


def _default(field: str) -> str:
    known = config.Settings.model_fields[field]
    if known.is_required():
        return "required"
    if known.default_factory is not None:
        return "cores"
    return "-" if known.default in {None, ()} else f"`{cli.shown(known.default).replace(' ', ',')}`"


def _in_make_run(variable: str) -> str:
    others = {
        "DATABASE_URL": "embedded",
        "REDIS_URL": "embedded",
        "TASKQUEUE_WEBHOOK_SECRET": "generated",
        "TASKQUEUE_SECRET_KEY": "generated",
        environment.METRICS_PORT: "free ones",
    }
    if variable in environment.DEFAULTS:
        return f"`{environment.DEFAULTS[variable]}`"
    return others.get(variable, "")


def _meaning(field: str) -> str:
    return str(config.Settings.model_fields[field].description)


def test_every_setting_is_there_with_its_default_and_its_meaning() -> None:
    shown = [line for line in section("Settings").splitlines() if line.startswith("| `")]
    assert shown == settings_rows()


def test_every_test_that_a_promise_names_exists() -> None:
    named = NAMED_TEST.findall(section("What it promises"))
    assert len(named) > len(rows(section("What it promises")))
    for path, name in named:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        defined = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, functions)}
        assert name in defined, f"{path}::{name}"


def test_every_promise_names_a_test() -> None:
    promises = rows(section("What it promises"))
    assert [row[0] for row in promises] == [str(number) for number in range(1, 10)]
    assert [row[0] for row in promises if not NAMED_TEST.search(row[2])] == []


def test_every_command_is_named() -> None:
    shown = {row[0].strip("`"): row[1] for row in rows(section("Processes and commands"))}
    assert shown == {f"taskqueue {name}": text for name, (_, text) in cli.COMMANDS.items()}


def test_every_registered_task_is_there_with_its_description() -> None:
    shown = {row[0].partition("(")[0].strip("`"): row[1] for row in rows(section("Tasks that are there"))}
    assert shown == {entry.name: entry.description for entry in OWN_TASKS}


def test_every_task_is_shown_with_the_names_of_its_parameters() -> None:
    for row in rows(section("Tasks that are there")):
        name, _, parameters = row[0].strip("`)").partition("(")
        wanted = list(catalog.lookup(name).parameters_schema()["properties"])
        assert [one.strip() for one in parameters.split(",") if one] == wanted, name


def test_every_status_has_its_meaning() -> None:
    assert [row[0].strip("`") for row in rows(section("The life of a task"))] == [str(one) for one in TaskStatus]


def test_every_field_of_a_submit_is_named() -> None:
    shown = [row[0].strip("`") for row in rows(section("Three requests"))]
    assert shown == list(schemas.SubmitRequest.model_fields)


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    relative = [target for target in targets if "://" not in target]
    assert relative
    assert [target for target in relative if not (ROOT / target).exists()] == []


def test_every_anchor_is_a_heading() -> None:
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)`", README)) <= targets


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of this test alone."""
    monkeypatch.setattr(catalog, "_registry", {})


@pytest.mark.usefixtures("own_registry")
def test_the_example_task_registers_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    text = section("Writing a task")
    namespace: dict[str, Any] = {"__name__": "my_tasks"}
    exec(python_block(text, "@task("), namespace)  # noqa: S102  # our own README
    [entry] = catalog.entries()

    assert f'"task": "{entry.name}"' in text
    assert entry.description == "Render the report of a month."
    entry.validate_call([], {"month": "2030-01", "pages": 5})
    assert entry.function(**entry.bind('["2030-01"]', '{"pages": 5}')) == {"pages": 5}
    command = re.search(r"TASKQUEUE_TASK_MODULES=my_tasks TASKQUEUE_QUEUES=(\S+) make run", text)
    assert command is not None
    assert entry.queue in command.group(1).split(",")


def test_the_receiver_accepts_what_this_service_signs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(32))
    monkeypatch.setenv("TASKQUEUE_WEBHOOK_SECRET", "whsec_" + base64.b64encode(key).decode())
    namespace: dict[str, Any] = {"__name__": "receiver"}
    exec(python_block(section("Verifying a webhook"), "standardwebhooks"), namespace)  # noqa: S102  # our own README
    body, sent_at = b'{"type": "task.succeeded", "data": {"task_id": "t"}}', int(datetime.now(UTC).timestamp())
    headers = {
        "webhook-id": "msg",
        "webhook-timestamp": str(sent_at),
        "webhook-signature": webhook.sign([key], "msg", sent_at, body),
    }

    assert namespace["receive"](headers, body) == 204
    assert namespace["receive"](headers, body.replace(b"succeeded", b"failed")) == 400
    assert namespace["receive"](headers | {"webhook-timestamp": str(sent_at - 3600)}, body) == 400
    assert namespace["receive"](headers | {"webhook-signature": "garbage"}, body) == 400
    assert namespace["receive"]({}, body) == 400
