"""The description of the API is whole, true, and the one in the repository."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi import FastAPI

from app import catalog
from app.main import create_app
from tests.conftest import settings_for

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "docs" / "openapi.json"


def printed() -> dict[str, Any]:
    """What `taskqueue openapi` prints in an environment of nothing, far from any `.env`."""
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "openapi"],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KEPT.read_text())
    return found


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from references(one)
    elif isinstance(value, list):
        for one in value:
            yield from references(one)


def test_the_one_in_the_repository_is_today_s(kept: dict[str, Any]) -> None:
    assert kept == printed(), "run `make openapi`"


def api_of(*modules: str) -> FastAPI:
    """The API with the sample tasks and those of other modules; it is never run."""
    return create_app(settings_for("postgresql://localhost/no", "redis://localhost/0", TASKQUEUE_TASK_MODULES=modules))


def test_tasks_of_ones_own_and_the_samples_are_described() -> None:
    schema = api_of("tests.support.odd_tasks").openapi()
    assert {"/api/catalog/sample.echo", "/api/catalog/long_task"} <= set(schema["paths"])
    assert any(path.startswith("/api/catalog/odd.") for path in schema["paths"])
    assert unresolved(schema) == []


def test_tasks_with_names_that_are_almost_one_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    api = api_of()
    monkeypatch.setattr(catalog, "_registry", dict(catalog._registry))
    for name in ("twin.one", "twin:one", "twin_one", "Problem"):
        catalog.task(name)(_takes(name))
    schema = api.openapi()
    assert unresolved(schema) == []
    ids = [operation["operationId"] for _, operation in operations(schema)]
    assert len(set(ids)) == len(ids)
    for name in ("twin.one", "twin:one", "twin_one", "Problem"):
        body = schema["paths"][f"/api/catalog/{name}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]["title"] == name
    assert "detail" in schema["components"]["schemas"]["Problem"]["properties"]


def _takes(name: str) -> Callable[[int], None]:
    def nothing(number: int) -> None:
        del number

    nothing.__qualname__ = name
    return nothing


def unresolved(schema: dict[str, Any]) -> list[str]:
    known = {f"#/components/{kind}/{name}" for kind, parts in schema["components"].items() for name in parts}
    return sorted(set(references(schema)) - known)


def test_every_reference_leads_somewhere(kept: dict[str, Any]) -> None:
    assert unresolved(kept) == []
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in kept["components"]["schemas"])


def test_every_operation_has_an_id_of_its_own(kept: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, operation in operations(kept)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", one) for one in ids)


def test_every_link_names_an_operation(kept: dict[str, Any]) -> None:
    ids = {operation["operationId"] for _, operation in operations(kept)}
    for _, operation in operations(kept):
        for answer in operation["responses"].values():
            assert {link["operationId"] for link in answer.get("links", {}).values()} <= ids


def test_every_submit_declares_its_key_and_its_headers(kept: dict[str, Any]) -> None:
    submits = {
        name: operation
        for name, operation in operations(kept)
        if name.startswith("POST") and ("/catalog/" in name or name.endswith(("/submit", "/batch")))
    }
    assert len(submits) == 5
    for operation in submits.values():
        assert "Idempotency-Key" in {parameter["name"] for parameter in operation["parameters"]}
        assert {"Idempotent-Replayed", "Task-Deduplicated"} <= set(operation["responses"]["202"]["headers"])


def test_a_task_is_described_by_its_own_arguments(kept: dict[str, Any]) -> None:
    operation = kept["paths"]["/api/catalog/http_request"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/task.http_request"}
    assert operation["requestBody"]["required"]
    assert operation["operationId"] == "submit_http_request"
    assert kept["components"]["schemas"]["task.http_request"]["required"] == ["url"]
    assert all(parameter["in"] != "path" for parameter in operation["parameters"])


def test_every_body_has_an_example_and_every_example_fits(kept: dict[str, Any]) -> None:
    schemas = kept["components"]["schemas"]
    for name, operation in operations(kept):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            schema = schemas.get(content["schema"].get("$ref", "").rpartition("/")[2], {})
            assert "/catalog/" in name or schema["examples"], name
    fitted = 0
    for name, schema in schemas.items():
        whole = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        validator = jsonschema_rs.Draft202012Validator(whole, validate_formats=True)
        for example in schema.get("examples", ()):
            validator.validate(example)
            fitted += 1
    assert fitted > 15


async def test_the_api_serves_what_is_printed(kept: dict[str, Any]) -> None:
    transport = httpx.ASGITransport(app=api_of())
    async with httpx.AsyncClient(transport=transport, base_url="http://api.test") as client:
        served, again = [(await client.get("/openapi.json")).json() for _ in range(2)]
    assert served == again
    for path, item in kept["paths"].items():
        assert served["paths"][path] == item
