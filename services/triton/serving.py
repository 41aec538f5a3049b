"""What every `open_model` needs: the weights of a version folder, verified, and its settings."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from services.errors import FieldViolation, InvalidInputError, ModelFormatError
from services.runtime.model_uri import ModelURI, ResolvedModel, resolve
from services.runtime.settings import ENV_PREFIX, ServerSettings, load_settings
from services.triton.repository import SERVED, WEIGHTS, parse_served

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
    return {
        part: replace(
            resolve(
                ModelURI(
                    scheme="laion" if weights.checkpoint else "file",
                    path=str(folder / WEIGHTS / part / weights.checkpoint),
                    digest=weights.digest,
                )
            ),
            name=weights.name,
            version=weights.version,
        )
        for part, weights in served.items()
    }


def file_uri(model: ResolvedModel) -> str:
    """Return the model URI of weights that were found; a single file is a LAION checkpoint."""
    return f"{'laion' if model.folder.is_file() else 'file'}:{model.folder}#{model.digest}"


def read_settings(kind: type[Settings], parameters: Mapping[str, str], **given: Any) -> Settings:
    """Build a service's settings: from config.pbtxt's parameters, which have their names, then as everywhere.

    This process serves one model, so they become its environment, which is where they are parsed.

    Raises:
        InvalidInputError: a parameter that is no setting, or a wrong one.
    """
    unknown = sorted(parameters.keys() - (kind.model_fields.keys() - given.keys()))
    if unknown:
        known = ", ".join(sorted(kind.model_fields.keys() - given.keys()))
        raise InvalidInputError(
            FieldViolation(f"parameters.{unknown[0]}", f"is no setting of this model; known: {known}")
        )
    for name, value in parameters.items():
        os.environ[f"{ENV_PREFIX}{name.upper()}"] = value
    return load_settings(kind, **given)
