"""Derive command-line options: from the fields and docstrings of settings, and from the service catalogue."""

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from services.catalogue import CATALOGUE, ServiceEntry, Weights
from services.errors import FieldViolation, InvalidInputError, invalid

if TYPE_CHECKING:
    from services.client import GenerationOptions, ServiceOptions
    from services.runtime.settings import ProcessSettings

URI_FORMS: Final = "file:PATH, hf:OWNER/NAME, models:/NAME/VERSION, each also with #sha256:HEX"
NAME_URI: Final = "NAME=URI"

CONNECTION_PANEL: Final = "Connection"
"""Panel of options that say how services are reached."""
_MODEL_PANEL: Final = "Device, batches and limits"
_SERVER_PANEL: Final = "Health, metrics, TLS and shutdown"


def with_options(function: Callable[..., Any], options: Iterable[inspect.Parameter]) -> Callable[..., Any]:
    """Return `function` as a typer command: `options` replace its ``**`` parameter and come first."""

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        return function(**values)

    own = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(function).parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    command.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
    return command


def grouped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as a typer command: dataclass parameters become one option per field.

    The fields are annotated like parameters of a command: ``Annotated[TYPE, typer.Option(...)]``, or with
    their help only: ``Annotated[TYPE, "help"]``.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        for name, kind in groups.items():
            given = {field.name: values.pop(field.name) for field in fields(kind)}
            try:
                values[name] = kind(**given)
            except ValueError as error:  # begins with the name of the field
                field, _, fault = str(error).partition(" ")
                raise invalid(_flag(field), fault) from error
        return function(**values)

    options: list[inspect.Parameter] = []
    for one in inspect.signature(function).parameters.values():
        if one.name in groups:
            options += _field_options(groups[one.name])
        else:
            options.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name]))
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return command


def _field_options(kind: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=_documented(field.name, hints[field.name]),
        )
        for field in fields(kind)
    ]


def _documented(name: str, hint: Any) -> Any:
    """Return the annotation of an option whose field may have its help only."""
    metadata = getattr(hint, "__metadata__", ())
    if not metadata or not isinstance(metadata[0], str):
        return hint
    option = typer.Option(_flag(name), help=metadata[0], show_default=False, rich_help_panel=CONNECTION_PANEL)
    return Annotated[hint.__origin__, option]


def given_options(options: "ServiceOptions") -> str:
    """Return the options of a connection that were given, as typed; an empty string if none was."""
    return ", ".join(map(_flag, options.given))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_address(flag: str, address: str | None) -> None:
    """Raise `InvalidInputError` unless an option's address of a service is valid, or None."""
    from services.client import address_fault

    fault = None if address is None else address_fault(address)
    if fault is not None:
        raise invalid(flag, fault)


# Options of several commands


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """The options of a clip's sampling."""

    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise. Default: drawn, and printed.", show_default=False)
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: the model's.", show_default=False)
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance. Default: the model's.", show_default=False),
    ] = None
    guidance_stop: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps after which guidance stops, 0 to 1: the others take half the time. "
            "Default: the model's.",
            show_default=False,
        ),
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the clip should not sound like.", show_default=False)
    ] = None
    duration: Annotated[
        float | None, typer.Option(help="Seconds. Default: the model's.", show_default=False)
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Name of a scheduler, for example ddpm, ddim, dpmsolver++ or unipc. Default: the model's.",
            show_default=False,
        ),
    ] = None

    profile: Annotated[
        str | None,
        typer.Option(
            help="Profile of the model, whose steps, guidance and scheduler are the defaults: mini has "
            "quality, balanced and draft.",
            show_default="the service's",
        ),
    ] = None

    def sampling(self) -> "GenerationOptions":
        """Return them by the client's names."""
        return {
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "guidance_stop": self.guidance_stop,
            "negative_prompt": self.negative_prompt,
            "duration": self.duration,
            "scheduler": self.scheduler,
            "profile": self.profile,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The options that say which generator is used, and where it runs."""

    model: Annotated[
        str | None, typer.Option(help=f"Model URI: mini, mini-base, {URI_FORMS}.", show_default="mini")
    ] = None
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto")] = (
        None
    )
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32")
    ] = None
    server: Annotated[
        str | None, typer.Option(help="Address of a service, instead of a model in this process.")
    ] = None


# Settings


def setting_options(kind: "type[ProcessSettings]") -> list[inspect.Parameter]:
    """Return an option for each setting except secrets; those that every server has come last."""
    from pydantic import SecretStr

    from services.runtime.settings import ServerSettings

    own = [name for name in inspect.get_annotations(kind) if name != "listen"]
    panels: dict[str, str | None] = dict.fromkeys([*own, "listen"])
    panels |= {
        name: _MODEL_PANEL for name in kind.model_fields if name not in ServerSettings.model_fields
    } | panels
    panels |= dict.fromkeys(kind.model_fields, _SERVER_PANEL) | panels
    return [
        _setting_option(kind, name, panel)
        for name, panel in panels.items()
        if _type_of(kind, name) is not SecretStr and name in kind.model_fields
    ]


def read_options(kind: "type[ProcessSettings]", values: Mapping[str, Any]) -> "ProcessSettings":
    """Return the settings for the values of `setting_options`. Raises `InvalidInputError`."""
    from services.runtime.settings import load_settings

    texts: dict[str, str] = {}
    others: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            others[name] = read_pairs(flag_of(kind, name), value) or None
        elif isinstance(value, str):
            texts[name] = value
        else:
            others[name] = value
    return load_settings(kind, texts, **others)


def setting_words(name: str, value: str | Mapping[str, str]) -> tuple[str, ...]:
    """Return the command-line arguments for a setting that names weights."""
    if isinstance(value, str):
        return (f"--{name}", value)
    return tuple(word for key, uri in value.items() for word in (_singular(name), f"{key}={uri}"))


def embedded_words(entry: ServiceEntry) -> tuple[str, ...]:
    """Return the command-line arguments that make a service serve its embedded weights."""
    return tuple(word for one in entry.weights for word in setting_words(one.setting, one.embedded))


def environment_note(kind: "type[ProcessSettings]") -> str:
    """Return the note on environment variables at the end of a command's help."""
    from pydantic import SecretStr

    note = (
        f"URI is a model URI: mini and other embedded models, {URI_FORMS}; for CLAP also laion:PATH and "
        "laion-clap:PATH. Every option is also read from the environment: --metrics-port is "
        "MILONGA_METRICS_PORT"
    )
    tables = [name for name in kind.model_fields if get_origin(_type_of(kind, name)) is dict]
    secrets = [name for name in kind.model_fields if _type_of(kind, name) is SecretStr]
    note += "".join(f", {flag_of(kind, name)} is MILONGA_{name.upper()}, a JSON object" for name in tables)
    note += "".join(
        f"; MILONGA_{name.upper()} has no option: other users can list a process's options"
        for name in secrets
    )
    return f"{note}."


def flag_of(kind: "type[ProcessSettings]", name: str) -> str:
    """Return the option of a setting, with dashes."""
    if get_origin(_type_of(kind, name)) is dict:
        return _singular(name)
    return f"--{name.replace('_', '-')}"


def _singular(name: str) -> str:
    return f"--{name.removesuffix('s').replace('_', '-')}"


def _type_of(kind: "type[ProcessSettings]", name: str) -> Any:
    """Return the type of a setting, without None."""
    annotation = kind.model_fields[name].annotation
    members = get_args(annotation)
    return next(one for one in members if one is not NoneType) if NoneType in members else annotation


def _setting_option(kind: "type[ProcessSettings]", name: str, panel: str | None) -> inspect.Parameter:
    field, setting_type = kind.model_fields[name], _type_of(kind, name)
    flag, option_type, metavar, completion, note = flag_of(kind, name), setting_type, None, None, ""
    if get_origin(setting_type) is dict:
        option_type, metavar, note = list[str], NAME_URI, " Can be repeated."
    elif get_origin(setting_type) is Literal:
        choices = list(get_args(setting_type))
        option_type, completion, note = str, lambda: choices, f" One of {', '.join(choices)}."
    elif setting_type is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    elif setting_type not in (int, float, str, Path):
        option_type, metavar = str, "JSON"
    elif "URI" in field.metadata:
        metavar = "URI"
    option = typer.Option(
        flag,
        help=_help_of(kind, name) + note,
        metavar=metavar,
        autocompletion=completion,
        show_default=_default_of(field.default, name),
        rich_help_panel=panel,
    )
    return _parameter(name, option_type, option)


def _help_of(kind: "type[ProcessSettings]", name: str) -> str:
    """Return the docstring of a setting as help, with options in place of other settings' names."""
    fields = [getattr(one, "model_fields", {}).get(name) for one in kind.__mro__]
    docstring = next(field.description for field in fields if field is not None and field.description)

    def named(found: re.Match[str]) -> str:
        return flag_of(kind, found[1]) if found[1] in kind.model_fields else found[1]

    return escape(re.sub(r"`(\w+)`", named, " ".join(docstring.split())))


def _default_of(default: Any, name: str) -> str | Literal[False]:
    """Return a default for the help; False if there is none or the docstring states it."""
    match default:
        case bool():
            return name if default else f"no-{name}"
        case str() | int():
            return str(default) or False
        case float():
            return f"{default:g}"
        case tuple():
            return json.dumps(default)
        case _:
            return False


def _parameter(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option]
    )


# Weights


def weights_options(*, export: bool = False) -> list[inspect.Parameter]:
    """Return the options for every service's weights: of `milonga triton export`, or of `milonga up`."""
    return [_weights_option(weights, export) for entry in CATALOGUE.values() for weights in entry.weights]


def read_weights(
    values: Mapping[str, Any], *, export: bool = False
) -> dict[str, dict[str, str | Mapping[str, str]]]:
    """Return the settings for the values of `weights_options`, by service.

    Raises:
        InvalidInputError: a value has the wrong form.
    """
    return {
        entry.name: {
            one.setting: _weights_value(values[_parameter_of(one, export)], one, export)
            for one in entry.weights
        }
        for entry in CATALOGUE.values()
    }


def option_of(weights: Weights, export: bool = False) -> str:
    """Return the option for `weights`, without dashes."""
    return (weights.export_option if export else "") or weights.option


def _parameter_of(weights: Weights, export: bool) -> str:
    return option_of(weights, export).replace("-", "_")


def read_pairs(flag: str, pairs: Sequence[str]) -> dict[str, str]:
    """Parse `pairs`, each ``NAME=URI``; return the model URIs by name.

    Raises:
        InvalidInputError: a pair has another form, or two pairs have the same name.
    """
    found: dict[str, str] = {}
    faults = []
    for pair in pairs:
        name, equals, uri = (part.strip() for part in pair.partition("="))
        if not (name and equals and uri):
            faults.append(
                FieldViolation(flag, f"is {pair[:80]!r}, must be {NAME_URI}, for example a=mini:clap-a")
            )
        elif name in found:
            faults.append(FieldViolation(flag, f"has the name {name!r} twice; give different names"))
        else:
            found[name] = uri
    if faults:
        raise InvalidInputError(*faults)
    return found


def _weights_option(weights: Weights, export: bool) -> inspect.Parameter:
    name, embedded, flag = _parameter_of(weights, export), weights.embedded, option_of(weights, export)
    if isinstance(embedded, str):
        option = typer.Option(f"--{flag}", help=weights.help, metavar="URI")
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=embedded, annotation=Annotated[str, option]
        )
    default = " ".join(f"{key}={uri}" for key, uri in embedded.items())
    option = typer.Option(f"--{flag}", help=weights.help, metavar=NAME_URI, show_default=default)
    return _parameter(name, list[str], option)


def _weights_value(value: Any, weights: Weights, export: bool) -> str | Mapping[str, str]:
    if isinstance(weights.embedded, str):
        return str(value)
    return read_pairs(f"--{option_of(weights, export)}", value) if value else weights.embedded
