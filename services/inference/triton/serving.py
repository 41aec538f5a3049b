"""What every `open_model` needs: the weights of a version folder, verified, and its settings."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from services.errors import FieldViolation, InvalidInputError, ModelFormatError
from services.inference.triton.repository import SERVED, WEIGHTS, parse_served
from services.runtime.settings import ENV_PREFIX, ServerSettings, load_settings
from services.weights.uri import ModelURI, ResolvedModel, resolve

Settings = TypeVar("Settings", bound=ServerSettings)


def served_models(folder: Path) -> dict[str, ResolvedModel]:
    """Find and verify the weights of a version folder, by their part in the model.

    They are known by the registry's name and version, not by those in their manifests.

    Raises:
        ModelFormatError: no version folder of this format.
        ModelError: weights that are missing, or are not those that were exported.
    """
    try:
        served = parse_served((folder / SERVED).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(
            f"{folder / SERVED} can't be read: {error}; write it with milonga triton export"
        ) from error
    found: dict[str, ResolvedModel] = {}
    for part, weights in served.items():
        path = folder / WEIGHTS / part / weights.checkpoint
        scheme = "laion" if weights.checkpoint else "file"
        model = resolve(ModelURI(scheme=scheme, path=str(path), digest=weights.digest))
        identity = replace(model.identity, name=weights.name, version=weights.version)
        found[part] = replace(model, identity=identity)
    return found


def file_uri(model: ResolvedModel) -> str:
    """Return the model URI of weights that were found; a single file is a LAION checkpoint."""
    return f"{'laion' if model.folder.is_file() else 'file'}:{model.folder}#{model.digest}"


def read_settings(
    kind: type[Settings], parameters: Mapping[str, str], field: str = "parameters.{}", **given: Any
) -> Settings:
    """Build a service's settings: from config.pbtxt's parameters, which have their names, then as everywhere.

    Names in capitals are Triton's own parameters. The others pass through the environment, which is where
    settings are parsed; it stays as it was.

    Raises:
        InvalidInputError: a parameter that is no setting, or a wrong one; `field` says how it is called.
    """
    known = kind.model_fields.keys() - ServerSettings.model_fields.keys() - given.keys()
    ours = {name: value for name, value in parameters.items() if not name.isupper()}
    unknown = sorted(ours.keys() - known)
    if unknown:
        raise InvalidInputError(
            FieldViolation(
                field.format(unknown[0]), f"is no setting of this model; known: {', '.join(sorted(known))}"
            )
        )
    variables = {f"{ENV_PREFIX}{name.upper()}": value for name, value in ours.items()}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        return load_settings(kind, **given)
    except InvalidInputError as error:
        faults = (FieldViolation(field.format(one.field), one.description) for one in error.violations)
        raise InvalidInputError(*faults) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
