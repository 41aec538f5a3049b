"""Configs of the training programs: frozen dataclasses, overridden by field and written as flat JSON.

    override(recipe(), ["loop.steps=50", "objective=bce"])

Field names are dotted paths through nested dataclasses; types come from their annotations.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from services.errors import FieldViolation, InvalidInputError, ModelFormatError, invalid

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Config = TypeVar("Config")
"""A frozen dataclass."""

Plain = None | bool | int | float | str | tuple["Plain", ...] | list["Plain"]
"""A setting as JSON writes it."""


def flatten(config: object, prefix: str = "") -> dict[str, Plain]:
    """Return every setting by its dotted name, in the order of the fields, as plain JSON values."""
    assert dataclasses.is_dataclass(config)
    found: dict[str, Plain] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= flatten(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = _plain(value)
    return found


def describe(config: object) -> str:
    """Return every setting, one per line, as ``--set`` takes it."""
    return "\n".join(f"{name}={_written(value)}" for name, value in flatten(config).items())


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Return `config` with the settings of `assignments` (``name=value``), all of them applied at once.

    Values: numbers, text, paths; ``true`` or ``false``; ``none`` where a setting is optional; lists with
    commas. Of several for one name the last counts.

    Raises `InvalidInputError` with every fault: an unknown name, a value of another type, or one that the
    config's own checks refuse.
    """
    texts: dict[str, str] = {}
    violations = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if equals:
            texts[name.strip()] = text.strip()
        else:
            violations.append(FieldViolation("--set", f"{assignment!r} must be NAME=VALUE"))
    known = flatten(config)
    values = {}
    for name, text in texts.items():
        if name not in known:
            violations.append(FieldViolation(name, _unknown(name, text, known)))
            continue
        try:
            values[name] = _read(text, annotation_of(config, name))
        except ValidationError as error:
            violations.append(FieldViolation(name, f"is {text!r}, {_expected(error.errors()[-1])}"))
    if violations:
        raise InvalidInputError(*violations)
    try:
        return _replaced(config, values)
    except (ValueError, ModelFormatError) as error:  # the latter of a model's own settings
        given = ", ".join(f"{name}={text}" for name, text in texts.items())
        raise invalid("--set", f"{given}: {error}") from error


def validated(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build a config of `kind` from the nested plain values of a TOML or JSON file.

    Args:
        kind: the dataclass; pydantic reads its annotations, aliases and constraints included.
        values: by field name; types must match, and unknown names are refused.
        source: the file's name, for error messages.

    Raises `InvalidInputError` with one violation per wrong field, named by its path in the file.
    """
    adapter = TypeAdapter(kind)
    try:
        # As JSON, since pydantic's strict mode takes lists for tuples and text for paths only there.
        return adapter.validate_json(json.dumps(values, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        schema = adapter.json_schema()
        raise InvalidInputError(
            *(FieldViolation(_path(source, one["loc"]), _fault(one, schema)) for one in error.errors())
        ) from error


def differences(before: Mapping[str, Plain], now: Mapping[str, Plain]) -> list[str]:
    """Return the settings that differ between two flat configs, a line for each."""
    names = [*before, *(name for name in now if name not in before)]
    missing = object()
    return [
        f"{name} was {_written(before.get(name, 'not there'))}, is {_written(now.get(name, 'not there'))}"
        for name in names
        if _comparable(before.get(name, missing)) != _comparable(now.get(name, missing))
    ]


def _replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with `values` by dotted name. Each dataclass is built once, so its checks see all."""
    changes: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    for head, part in inner.items():
        changes[head] = _replaced(getattr(config, head), part)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def annotation_of(config: object, name: str) -> Any:
    """Return the type of the setting with this dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return get_type_hints(type(config))[last]


def _read(text: str, annotation: Any) -> Any:
    """Return `text` as a value of the annotated type. Raises `ValidationError`."""
    kinds = (annotation, *get_args(annotation))
    if text.lower() == "none" and type(None) in kinds:
        return None
    listed = any(get_origin(kind) is tuple for kind in kinds)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return _expanded(TypeAdapter(annotation).validate_python(parts if listed else text))


def _expanded(value: Any) -> Any:
    """Return `value` with ``~`` in paths expanded: a shell does not expand it after ``NAME=``."""
    if isinstance(value, tuple):
        return tuple(_expanded(item) for item in value)
    return value.expanduser() if isinstance(value, Path) else value


def _unknown(name: str, text: str, known: Mapping[str, Plain]) -> str:
    # Those of the same group, if it names one; else those with a similar spelling.
    group, dot, _ = name.rpartition(".")
    siblings = [key for key in known if dot and key.startswith(f"{group}.")]
    near = siblings or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    listed = f"known: {', '.join(near)}" if near else "--show lists all"
    return f"is given as {text!r}, and no setting has this name; {listed}"


def _path(source: str, location: Sequence[int | str]) -> str:
    """Return the path of a value in `source`: ``gates.toml: gate 2.minimum``; list items count from 1."""
    names = [f" {one + 1}" if isinstance(one, int) else f".{one}" for one in location]
    return f"{source}: {''.join(names).lstrip('.')}" if names else source


def _fault(error: "ErrorDetails", schema: Mapping[str, Any]) -> str:
    """Return the description of one wrong value, from pydantic's `error` and the JSON schema of the whole."""
    match error["type"]:
        case "value_error":
            return str(error["ctx"]["error"])
        case "missing":
            return "is missing"
        case "unexpected_keyword_argument":
            node = schema
            for step in error["loc"][:-1]:
                node = node["items"] if isinstance(step, int) else node["properties"][step]
                node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
            return f"is not known; known: {', '.join(sorted(node['properties']))}"
        case _:
            return f"is {error['input']!r}, {_expected(error)}"


def _expected(error: "ErrorDetails") -> str:
    """Return the description of the values that are valid."""
    match error["type"]:
        case "bool_parsing":
            return "must be true or false"
        case "missing":  # of a tuple
            return f"must be {error['loc'][0] + 1} values with commas between"  # type: ignore[operator]
        case "too_long":
            return f"must be {error['ctx']['max_length']} values with commas between"
        case _:
            return re.sub(", unable to .*", "", error["msg"]).replace("Input should", "must")


def _plain(value: Any) -> Plain:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    assert value is None or isinstance(value, bool | int | float | str)
    return value


def _comparable(value: object) -> object:
    return [_comparable(item) for item in value] if isinstance(value, tuple | list) else value


def _written(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_written, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
