"""`milonga triton`: export the services' models into a Triton model repository."""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from services.catalogue import CATALOGUE, ServiceEntry
from services.cli.options import option_of, read_weights, weights_options, with_options
from services.errors import FieldViolation, InvalidInputError, invalid

if TYPE_CHECKING:
    from services.inference.triton.repository import ModelExport, Weights
    from services.inference.triton.serving import Servable
    from services.weights.uri import ModelURI, ResolvedModel

app = typer.Typer(help="Serve models with NVIDIA's Triton Inference Server.", no_args_is_help=True)

MODELS: Final = {entry.model: entry for entry in CATALOGUE.values()}
"""Services by the name of their model."""
NAMES: Final = ", ".join(MODELS)
TOKENIZER: Final = "roberta-base"
"""Folder next to a LAION checkpoint that holds its tokenizer."""
MAX_QUEUE_SIZE: Final = 256
"""Requests that may wait in Triton for a batched model; beyond that Triton responds UNAVAILABLE."""

_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CODE: Final = '''\
"""Written by `milonga triton export`: the model that the {service} service serves, under Triton."""

from services.{service}.triton import open_model
from services.inference.triton.backend import python_model

TritonPythonModel = python_model(open_model)
'''


@app.callback()
def _triton() -> None:
    pass


def _export(
    repository: Annotated[
        str, typer.Argument(help="Folder of the repository, created if missing; or s3://….")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Export only this model. Can be repeated.",
            metavar="|".join(MODELS),
            show_default="all",
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**63 - 1,
            help="Number of the version folder, for the model of --only.",
            show_default="the registered version, else the manifest's, else 1",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the service, for config.pbtxt: tango.exact=true, clap.device=cuda:1. Can be "
            "repeated.",
            metavar="MODEL.NAME=VALUE",
            show_default=False,
        ),
    ] = None,
    **weights: Any,
) -> None:
    chosen = _chosen(only)
    if version is not None and len(chosen) != 1:
        raise invalid("--version", "is for a single model; name it with --only")
    settings, values = _settings(setting, chosen), read_weights(weights, export=True)
    from services.inference.triton.repository import ModelRepository, open_storage

    storage = open_storage(repository)
    # Every model is resolved before the first is written.
    found = [export_model(entry, values[entry.name], settings[entry.model]) for entry in chosen]
    models = ModelRepository(storage)
    for exported, number in found:
        name, number = exported.config.name, version or number
        added = models.add(exported, number)
        digests = ", ".join(f"{one.name} {one.digest[:19]}…" for one in exported.weights.values())
        pinned = ", ".join(map(str, models.pinned(name)))
        other_pin = "" if str(number) == pinned else f"; pinned is {pinned}"
        typer.echo(f"{name}/{number}  {digests}{'' if added else ' (there already)'}{other_pin}")
    if Path(repository).is_dir():
        flags = "--model-control-mode=explicit --load-model='*' --strict-readiness=false"
        typer.echo(f"tritonserver --model-repository={repository} {flags}")


HELP: Final = (
    f"Write a Triton model repository: {NAMES}, each with its weights.\n\n"
    "An existing version is left as it is. A model's first version is pinned (version_policy); a later one "
    "is not served until `milonga promote run --target triton://HOST:8001` pins it."
)
app.command("export", help=HELP)(with_options(_export, weights_options(export=True)))


def export_model(
    entry: ServiceEntry, values: Mapping[str, Any], settings: Mapping[str, str] | None = None
) -> tuple["ModelExport", int]:
    """Return the export of a service's model, and its version number: that of its first weights.

    Args:
        entry: the service.
        values: its settings that name weights.
        settings: its other settings, as text, for config.pbtxt.

    Raises:
        ModelError: weights were not found, or refused.
        InvalidInputError: the weights are of the wrong kind, or a setting is invalid.
    """
    from services.inference.triton.repository import ModelExport
    from services.inference.triton.serving import read_settings
    from services.weights.uri import resolve

    servable: Servable[Any] = importlib.import_module(f"services.{entry.name}.triton").SERVABLE
    given = settings or {}
    try:
        _check_parts(values)
        read = read_settings(servable.settings, given, f"--set {entry.model}.{{}}", **values)
        uris = servable.uris(read)
        _refuse_package(uris, values)
        found = {part: resolve(uri) for part, uri in uris.items()}
        config = servable.configure(read, found)
    except InvalidInputError as error:
        raise InvalidInputError(*(_as_option(one, entry) for one in error.violations)) from error
    _configure(config, given)
    weights = {part: _weights(model) for part, model in found.items()}
    exported = ModelExport(config=config, code=_CODE.format(service=entry.name), weights=weights)
    return exported, _number(next(iter(found.values())))


def _chosen(only: Sequence[str] | None) -> list[ServiceEntry]:
    for name in only or ():
        if name not in MODELS:
            raise invalid("--only", f"is {name!r}, must be one of {NAMES}")
    return [entry for name, entry in MODELS.items() if not only or name in only]


def _settings(given: Sequence[str] | None, chosen: Sequence[ServiceEntry]) -> Mapping[str, dict[str, str]]:
    """Return the settings of --set, by model."""
    settings: dict[str, dict[str, str]] = {entry.model: {} for entry in chosen}
    for text in given or ():
        name, equals, value = text.partition("=")
        model, dot, key = name.partition(".")
        if not (equals and dot and key) or model not in settings:
            raise invalid(
                "--set", f"is {text!r}, must be MODEL.NAME=VALUE; MODEL is one of {', '.join(settings)}"
            )
        settings[model][key] = value
    return settings


def _as_option(violation: FieldViolation, entry: ServiceEntry) -> FieldViolation:
    """Return `violation` with the option in place of the setting: ``--scorer a`` for ``scorers.a``."""
    setting, _, name = violation.field.partition(".")
    for weights in entry.weights:
        if weights.setting == setting:
            return replace(violation, field=f"--{option_of(weights, export=True)} {name}".rstrip())
    return violation


def _check_parts(values: Mapping[str, Any]) -> None:
    """Raise `InvalidInputError` for names of weights that can't name a folder."""
    for setting, value in values.items():
        for part in () if isinstance(value, str) else value:
            if not _PART.fullmatch(part):
                raise invalid(
                    setting,
                    f"has the name {part[:80]!r}, must be letters, digits, dots, underscores and "
                    "hyphens, the first of them a letter or a digit: it names a folder",
                )


def _refuse_package(uris: "Mapping[str, ModelURI]", values: Mapping[str, Any]) -> None:
    """Raise `InvalidInputError` for weights that need the package laion_clap, which Triton can't import."""
    for part, uri in uris.items():
        if uri.scheme == "laion-clap":
            field = part if part in values else next(f"{name}.{part}" for name in values)
            raise invalid(
                field,
                f"is laion-clap:{uri.path}, which needs the package laion_clap; give laion:{uri.path}",
            )


def _number(found: "ResolvedModel") -> int:
    """Return the version number for Triton: the model's version if it is a positive number, otherwise 1."""
    version = found.identity.version
    return int(version) if version.isdecimal() and int(version) else 1


def _configure(config: Any, settings: Mapping[str, str]) -> None:
    """Set Triton's backend, instances and batching in `config`, and the service's settings as parameters."""
    from tritonclient.grpc import model_config_pb2

    from services.runtime.settings import BatchedSettings

    config.backend = "python"
    # The setting `device` chooses the device. One instance, so that all requests share its batches.
    config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_MODEL, count=1)
    if not config.model_transaction_policy.decoupled:
        # As in the service, a request waits this long for others to share its batch.
        wait = BatchedSettings.model_fields["max_wait_seconds"].default
        config.dynamic_batching.max_queue_delay_microseconds = round(wait * 1e6)
        config.dynamic_batching.default_queue_policy.max_queue_size = MAX_QUEUE_SIZE
    for name, value in settings.items():
        config.parameters[name].string_value = value


def _weights(model: "ResolvedModel") -> "Weights":
    """Return the files to copy: a model folder, or a LAION checkpoint and its tokenizer."""
    from services.inference.triton.repository import Weights

    found = model.identity
    weights = Weights(name=found.name, version=found.version, digest=found.digest, folder=model.own_folder)
    if not model.folder.is_file():
        return weights
    from services.models.clap.laion import TOKENIZER_FILES, find_tokenizer

    tokenizer = find_tokenizer(model.folder)
    files = [name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    return replace(
        weights,
        checkpoint=model.folder.name,
        extra_files={f"{TOKENIZER}/{name}": tokenizer / name for name in files},
    )
