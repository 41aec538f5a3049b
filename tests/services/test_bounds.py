"""Every number among the settings of services refuses nonsense, by name."""

from importlib import import_module
from typing import Any, get_args, get_origin

import pytest

from services.catalogue import CATALOGUE
from services.errors import InvalidInputError
from services.runtime.callers_file import CallerEntry
from services.runtime.settings import ServerSettings, load_settings

NONSENSE = ("NaN", "Infinity", "-Infinity", "1e30", "-1e30", str(10**30), str(-(10**30)), "-1")


def numbers() -> list[tuple[type[ServerSettings], str]]:
    """Return the settings that are numbers, of the settings of each service."""
    kinds = [import_module(f"services.{entry.name}.serve").SERVICE.settings for entry in CATALOGUE.values()]
    return [
        (kind, name)
        for kind in kinds
        for name, field in kind.model_fields.items()
        if {int, float} & {field.annotation, *get_args(field.annotation)}
    ]


@pytest.mark.parametrize(("kind", "name"), numbers())
def test_every_number_of_every_service_refuses_nonsense(kind: type[ServerSettings], name: str) -> None:
    needed: dict[str, Any] = {
        other: {"a": "mini"} if get_origin(field.annotation) is dict else "mini"
        for other, field in kind.model_fields.items()
        if field.is_required() or get_origin(field.annotation) is dict
    }
    load_settings(kind, **needed)
    several = get_origin(kind.model_fields[name].annotation) is tuple
    for value in NONSENSE:
        with pytest.raises(InvalidInputError, match=f"{name}.* is .*"):
            load_settings(kind, {name: f"[{value}]" if several else value}, **needed)


@pytest.mark.parametrize("name", ["calls_per_minute", "work_per_minute"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e30])
def test_quotas_of_callers_refuse_nonsense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        CallerEntry(**{name: value})  # type: ignore[arg-type]
