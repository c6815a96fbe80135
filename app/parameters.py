"""A function's signature as the schema of its arguments.

One pydantic model is made per task. Its fields have names of our own and the
parameters' names as aliases, so that a parameter may be called `schema`, `copy`
or `_x`, which no pydantic field may. Values are judged as JSON is, strictly: an
integer may stand for a float, and a text for a date, but not for a number.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind

from app.core import errors, jsontext
from app.core.errors import FieldError
from app.core.fields import Place, field_errors

_UNSUPPORTED = {
    inspect.Parameter.VAR_POSITIONAL: "must not collect further arguments with *",
    inspect.Parameter.VAR_KEYWORD: "must not collect further arguments with **",
    inspect.Parameter.POSITIONAL_ONLY: "must not be positional-only",
}


class _Schema(GenerateJsonSchema):
    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        # A default that JSON can't show is simply not shown.
        if kind != "non-serializable-default":
            super().emit_warning(kind, detail)


class Parameters:
    """What one task accepts."""

    def __init__(self, task: str, function: Callable[..., Any]) -> None:
        """Read a signature.

        Raises:
            TaskDeclarationError: if a parameter has no type, or one that JSON can't carry, or collects others.
        """
        self._positional: list[str] = []
        self._fields: dict[str, str] = {}
        definitions: dict[str, Any] = {}
        for index, (name, (annotation, field)) in enumerate(self._read(task, function).items()):
            definitions[f"p{index}"] = (annotation, field)
            self._fields[name] = f"p{index}"
        config = ConfigDict(extra="forbid", title=task)
        self._model: type[BaseModel] = create_model("Parameters", __config__=config, **definitions)

    def validate(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Raises ValidationFailed unless the arguments fit; see `Entry.validate_call`."""
        self._validated(args, kwargs)

    def named(self, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments that fit, by name; see `Entry.named`."""
        return dict(zip(self._positional, args, strict=False)) | kwargs

    def bind(self, args: str, kwargs: str) -> dict[str, Any]:
        """The arguments in their types; see `Entry.bind`."""
        model = self._validated(json.loads(args), json.loads(kwargs))
        given = model.model_fields_set
        return {name: getattr(model, field) for name, field in self._fields.items() if field in given}

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the parameters, as an object by name."""
        return self._model.model_json_schema(schema_generator=_Schema)

    def _read(self, task: str, function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
        try:
            hints = get_type_hints(function, include_extras=True)
        except (NameError, TypeError) as unknown:
            raise errors.TaskDeclarationError(f"Task {task}: a type can't be resolved ({unknown})") from unknown
        found: dict[str, tuple[Any, Any]] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            fault = _fault(parameter, hints)
            if fault is not None:
                raise errors.TaskDeclarationError(f"Task {task}: parameter {name} {fault}")
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                self._positional.append(name)
            required = parameter.default is inspect.Parameter.empty
            found[name] = (hints[name], Field(... if required else parameter.default, alias=name))
        return found

    def _validated(self, args: list[Any], kwargs: dict[str, Any]) -> BaseModel:
        places: dict[str, Place] = {name: ("args", index) for index, name in enumerate(self._positional[: len(args)])}
        self._check_shape(args, kwargs, places)
        given = dict(zip(places, args, strict=True)) | kwargs
        try:
            return self._model.model_validate_json(jsontext.written(given), strict=True)
        except ValidationError as invalid:
            findings = invalid.errors(include_url=False, include_context=False, include_input=False)
            faults = field_errors(findings, given, root=lambda name: places.get(name, ("kwargs", name)))
            raise errors.ValidationFailed(faults) from None

    def _check_shape(self, args: list[Any], kwargs: dict[str, Any], places: dict[str, Place]) -> None:
        if len(args) > len(places):
            accepted = f"The task takes {len(places)} positional arguments at most"
            raise errors.ValidationFailed([FieldError(errors.pointer("args", len(places)), accepted)])
        twice = [name for name in places if name in kwargs]
        if twice:
            sentence = "Given twice: in args and in kwargs"
            raise errors.ValidationFailed([FieldError(errors.pointer("kwargs", name), sentence) for name in twice])


def _fault(parameter: inspect.Parameter, hints: dict[str, Any]) -> str | None:
    if parameter.kind in _UNSUPPORTED:
        return _UNSUPPORTED[parameter.kind]
    if parameter.name not in hints:
        return "needs a type annotation"
    try:
        TypeAdapter(hints[parameter.name]).json_schema(schema_generator=_Schema)
    except PydanticUserError:
        return "has a type that JSON can't carry"
    return None
