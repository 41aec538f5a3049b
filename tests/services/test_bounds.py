"""Every number among the settings of services refuses nonsense, by name."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args

import pytest

from services.catalogue import CATALOGUE
from services.errors import InvalidInputError
from services.runtime.callers_file import CallerEntry
from services.runtime.settings import ServerSettings, load_settings

NEEDED: dict[str, dict[str, Any]] = {
    "scoring": {"scorers": {"a": "mini:clap-a"}},
    "reward": {"model": "mini"},
}


def kinds_of(annotation: Any) -> set[Any]:
    return {annotation, *get_args(annotation)}


def numbers() -> Iterator[tuple[type[ServerSettings], str, str, bool]]:
    for entry in CATALOGUE.values():
        kind = import_module(f"services.{entry.name}.serve").SERVICE.settings
        for name, field in kind.model_fields.items():
            if {int, float} & kinds_of(field.annotation):
                several = field.annotation not in (int, float) and tuple in {
                    getattr(field.annotation, "__origin__", None)
                }
                yield kind, entry.name, name, several


@pytest.mark.parametrize(("kind", "service", "name", "several"), numbers())
def test_every_number_of_every_service_refuses_nonsense(
    kind: type[ServerSettings], service: str, name: str, several: bool
) -> None:
    for value in ("NaN", "Infinity", "-Infinity", "1e30", "-1e30", str(10**30), str(-(10**30)), "-1"):
        written = f"[{value}]" if several else value
        with pytest.raises(InvalidInputError, match=f"{name}.* is .*"):
            load_settings(kind, {name: written}, **NEEDED.get(service, {}))


@pytest.mark.parametrize("name", ["calls_per_minute", "work_per_minute"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e30])
def test_quotas_of_callers_refuse_nonsense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        CallerEntry(**{name: value})  # type: ignore[arg-type]
