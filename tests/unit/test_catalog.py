"""The catalogue: what can be registered, and which arguments fit."""

import functools
import sys
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from app import catalog
from app.core import errors
from app.core.config import Settings
from app.worker import sample_tasks
from tests.conftest import settings_for

Declare = Callable[..., catalog.Entry]


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Registers a function in a registry of this test alone."""
    monkeypatch.setattr(catalog, "_registry", {})

    def register(function: Callable[..., Any], name: str = "t", **options: Any) -> catalog.Entry:
        catalog.task(name, **options)(function)
        return catalog.lookup(name)

    return register


def faults(entry: catalog.Entry, *args: Any, **kwargs: Any) -> dict[str, str]:
    with pytest.raises(errors.ValidationFailed) as invalid:
        entry.validate_call(list(args), kwargs)
    return {fault.pointer: fault.detail for fault in invalid.value.errors}


def offline(**others: object) -> Settings:
    return settings_for("postgresql://nowhere/none", "redis://nowhere/0", **others)


class Colour(Enum):
    RED = "red"


class Page(BaseModel):
    number: int
    kind: Literal["text", "image"] = "text"


def render(month: str, pages: int = 1) -> str:
    """Render a month.

    More of it.
    """
    return month * pages


def test_an_entry_says_what_was_declared(declare: Declare) -> None:
    entry = declare(render, "reports.render", queue="reports", max_retries=5, time_limit=600, soft_time_limit=540)
    assert (entry.name, entry.queue, entry.max_retries) == ("reports.render", "reports", 5)
    assert (entry.time_limit, entry.soft_time_limit) == (600, 540)
    assert entry.description == "Render a month."
    assert entry.function is render
    assert catalog.entries() == (entry,)


def test_an_entry_has_defaults(declare: Declare) -> None:
    entry = declare(render)
    assert (entry.queue, entry.max_retries, entry.time_limit, entry.soft_time_limit) == (None, 3, None, None)


def test_an_unknown_task_is_named_by_its_field(declare: Declare) -> None:
    declare(render)
    with pytest.raises(errors.ValidationFailed) as invalid:
        catalog.lookup("nobody")
    assert [fault.pointer for fault in invalid.value.errors] == ["/task"]


def test_a_name_is_taken_once(declare: Declare) -> None:
    declare(render)
    declare(render)
    with pytest.raises(errors.TaskDeclarationError, match=r"Task t: the name is taken by .*render"):
        declare(lambda: None)


@pytest.mark.parametrize("name", ["", "with space", "é", "a/b", "x" * 256, "new\nline", "celery.mine"])
def test_a_name_has_only_plain_characters(declare: Declare, name: str) -> None:
    with pytest.raises(errors.TaskDeclarationError, match="the name must be"):
        declare(render, name)


@pytest.mark.parametrize(
    "options",
    [
        {"queue": "a b"},
        {"max_retries": 101},
        {"max_retries": -1},
        {"time_limit": 0},
        {"time_limit": float("nan")},
        {"soft_time_limit": 0},
        {"soft_time_limit": -1.0},
        {"soft_time_limit": 5, "time_limit": 5},
        {"soft_time_limit": 6, "time_limit": 5},
    ],
)
def test_options_are_bounded(declare: Declare, options: dict[str, Any]) -> None:
    with pytest.raises(errors.TaskDeclarationError, match=f"Task t: .*{next(iter(options))}"):
        declare(render, **options)


def untyped(x) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001  # what is refused
    del x


def collecting(*things: int) -> None:
    del things


def collecting_names(**things: int) -> None:
    del things


def positional(x: int, /) -> None:
    del x


def unserialisable(x: Callable[[], int]) -> None:
    del x


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (untyped, "parameter x needs a type annotation"),
        (collecting, r"parameter things must not collect further arguments with \*"),
        (collecting_names, r"parameter things must not collect further arguments with \*\*"),
        (positional, "parameter x must not be positional-only"),
        (unserialisable, "parameter x has a type that JSON can't carry"),
    ],
)
def test_a_signature_that_is_no_schema_is_refused(
    declare: Declare, function: Callable[..., Any], sentence: str
) -> None:
    with pytest.raises(errors.TaskDeclarationError, match=f"Task t: {sentence}"):
        declare(function)


def test_a_type_that_does_not_exist_is_refused(declare: Declare) -> None:
    def lost(x: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821  # what is refused
        del x

    with pytest.raises(errors.TaskDeclarationError, match="Task t: a type can't be resolved"):
        declare(lost)


def test_faults_point_to_where_the_argument_was_given(declare: Declare) -> None:
    entry = declare(render)
    assert faults(entry) == {"/kwargs/month": "Required"}
    assert list(faults(entry, 1)) == ["/args/0"]
    assert list(faults(entry, month=1)) == ["/kwargs/month"]
    assert list(faults(entry, "a", 1, 2)) == ["/args/2"]
    assert list(faults(entry, "a", month="b")) == ["/kwargs/month"]
    assert faults(entry, "a", colour=1) == {"/kwargs/colour": "Unknown field"}
    assert list(faults(entry, 5, pages="x")) == ["/args/0", "/kwargs/pages"]


def test_what_may_only_be_named_is_not_taken_by_position(declare: Declare) -> None:
    def keyword_only(x: int, *, y: int = 0) -> None:
        del x, y

    entry = declare(keyword_only)
    entry.validate_call([1], {"y": 2})
    assert list(faults(entry, 1, 2)) == ["/args/1"]


def test_nested_faults_extend_the_pointer(declare: Declare) -> None:
    def nested(pages: list[Page], index: dict[str, list[int]], choice: int | Page = 0) -> None:
        del pages, index, choice

    entry = declare(nested)
    entry.validate_call([[{"number": 1}]], {"index": {"a": [1]}, "choice": {"number": 2}})
    found = faults(entry, [{"number": 1}, {"number": "2"}], index={"a/b": [1, "2"]}, choice={"kind": "text"})
    assert {"/args/0/1/number", "/kwargs/index/a~1b/1", "/kwargs/choice/number"} <= set(found)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (float, 1, "5"),
        (float, 1.5, True),
        (int, 10**30, "1"),
        (int, -1, 1.0),
        (int, 0, False),
        (str, "", 1),
        (bool, True, 1),
        (datetime, "2030-01-01T00:00:00Z", "soon"),
        (date, "2030-01-01", "2030-02-30"),
        (UUID, "00000000-0000-7000-8000-000000000000", "not-a-uuid"),
        (Decimal, "1.50", "x"),
        (Colour, "red", "blue"),
        (tuple[int, str], [1, "a"], [1]),
        (set[int], [1, 2], [1, "2"]),
        (Literal["a", "b"], "a", "c"),
        (Annotated[int, Field(ge=0)], 0, -1),
        (int | None, None, "x"),
        (Page, {"number": 1}, {"number": None}),
    ],
)
def test_values_are_judged_strictly_as_json(declare: Declare, annotation: Any, good: object, bad: object) -> None:
    def function(x: Any) -> None:
        del x

    function.__annotations__["x"] = annotation
    entry = declare(function)
    entry.validate_call([good], {})
    entry.validate_call([], {"x": good})
    assert next(iter(faults(entry, bad))).startswith("/args/0")


def test_parameters_may_have_names_that_pydantic_fields_may_not(declare: Declare) -> None:
    def awkward(  # noqa: PLR0917  # all of them are the point
        _x: int, schema: int, copy: int, json: int, model_config: int, self: int, p0: int, validate: int = 1
    ) -> None:
        del _x, schema, copy, json, model_config, self, p0, validate

    entry = declare(awkward)
    given = dict.fromkeys(("_x", "schema", "copy", "json", "model_config", "self", "p0"), 1)
    entry.validate_call([], given)
    assert entry.bind("[1, 1]", '{"copy": 1, "json": 1, "model_config": 1, "self": 1, "p0": 1}') == given
    assert set(entry.parameters_schema()["properties"]) == {*given, "validate"}
    assert faults(entry, **(given | {"p1": 1})) == {"/kwargs/p1": "Unknown field"}


def test_binding_gives_typed_values_and_leaves_defaults_to_the_function(declare: Declare) -> None:
    def typed(when: datetime, colour: Colour = Colour.RED, pages: tuple[Page, ...] = ()) -> None:
        del when, colour, pages

    bound = declare(typed).bind('["2030-01-01T00:00:00+00:00"]', '{"pages": [{"number": 3}]}')
    assert bound == {"when": datetime.fromisoformat("2030-01-01T00:00:00+00:00"), "pages": (Page(number=3),)}


def test_stored_arguments_that_no_longer_fit_are_refused(declare: Declare) -> None:
    with pytest.raises(errors.ValidationFailed):
        declare(render).bind("[]", '{"year": 1}')


def test_the_schema_shows_types_bounds_and_defaults(declare: Declare) -> None:
    marker = object()

    def shown(x: Annotated[float, Field(ge=0, le=10)] = 5.0, y: Any = marker) -> None:
        del x, y

    schema = declare(shown).parameters_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["x"] == {"default": 5.0, "maximum": 10, "minimum": 0, "title": "X", "type": "number"}
    assert "required" not in schema


def test_no_sentence_repeats_a_value(declare: Declare) -> None:
    class Telltale(BaseModel):
        code: str
        loud: str = ""

        @field_validator("code")
        @classmethod
        def _check(cls, value: str) -> str:
            raise ValueError(f"{value} is wrong")

        @field_validator("loud")
        @classmethod
        def _speak(cls, _: str) -> str:
            raise PydanticCustomError("loud", "The author's own sentence")

    def function(a: Telltale, b: UUID, c: Literal["x"], d: datetime, *, e: int, f: Decimal) -> None:
        del a, b, c, d, e, f

    secret = "zq-hunter2-zq"
    entry = declare(function)
    found = faults(entry, {"code": secret, "loud": secret}, secret, secret, secret, e=secret, f=secret)
    assert set(found) == {"/args/0/code", "/args/0/loud", "/args/1", "/args/2", "/args/3", "/kwargs/e", "/kwargs/f"}
    assert found["/args/0/loud"] == "The author's own sentence"
    assert not any(secret in sentence or "hunter" in sentence for sentence in found.values())


def test_the_module_of_an_operator_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "operators_tasks.py").write_text(
        "from app.catalog import task\n@task('operators.add')\ndef add(a: int, b: int) -> int: return a + b\n"
    )
    catalog.load_modules(offline())  # so that the built-in tasks are not imported into the copy
    monkeypatch.setattr(catalog, "_registry", dict(catalog._registry))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in {"", str(Path.cwd())}])
    monkeypatch.chdir(tmp_path)
    catalog.load_modules(offline(TASKQUEUE_TASK_MODULES="operators_tasks"))
    assert catalog.lookup("operators.add").bind("[1]", '{"b": 2}') == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("from app.catalog import task\n@task('b.t')\ndef t(x): ...", "parameter x needs a type annotation"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, reason: str
) -> None:
    name = f"broken_{abs(hash(reason))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.SettingsError) as stopped:
        catalog.load_modules(offline(TASKQUEUE_TASK_MODULES=name))
    assert f"TASKQUEUE_TASK_MODULES is wrong: {name} can't be imported" in str(stopped.value)
    assert reason in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert stopped.value.__cause__ is not None


def test_the_built_in_and_the_sample_tasks_are_there() -> None:
    catalog.load_modules(offline())
    names = {entry.name for entry in catalog.entries()}
    samples = {"echo", "fail", "flaky", "sleep", "crash", "allocate", "large"}
    assert {"long_task", "http_request", *(f"sample.{name}" for name in samples)} <= names


def test_long_task_works_and_says_so() -> None:
    catalog.load_modules(offline())
    work = catalog.lookup("long_task").function
    assert work(0.0) == "Worked for 0 seconds"
    assert work(0.01) == "Worked for 0.01 seconds"


def test_the_samples_do_what_they_say() -> None:
    catalog.load_modules(offline())
    run = {entry.name: entry.function for entry in catalog.entries()}
    assert run["sample.echo"]({"a": 1}) == {"a": 1}
    assert run["sample.large"](3) == "xxx"
    assert run["sample.allocate"](1) == "Held 1 MiB"
    assert run["sample.sleep"](0) == "Slept for 0 seconds"
    assert run["sample.flaky"](0) == "Succeeded after 0 failures"
    for failing in (functools.partial(run["sample.flaky"], 1), run["sample.fail"]):
        with pytest.raises(sample_tasks.SampleError):
            failing()
