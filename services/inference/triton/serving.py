"""Export a service's model to a Triton repository, and load an exported version: for every service."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.catalogue import ServiceEntry, Weights
from services.errors import InvalidInputError, ModelFormatError, invalid
from services.inference.triton.backend import LoadedModel
from services.inference.triton.repository import SERVED, WEIGHTS, parse_served
from services.runtime.settings import ServerSettings, load_settings
from services.weights.uri import ModelURI, ResolvedModel, resolve

Settings = TypeVar("Settings", bound=ServerSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Servable(Generic[Settings]):
    """The parts in which services differ under Triton."""

    entry: ServiceEntry
    """The service's row in the catalogue."""
    settings: type[Settings]
    """Class of its settings."""
    uris: Callable[[Settings], Mapping[str, ModelURI]]
    """Return the model URIs of the settings, by part."""
    configure: Callable[[Settings, Mapping[str, ResolvedModel]], ModelConfig]
    """Return the model's configuration, by `write_config`, from the settings and the weights by part. Raises
    `InvalidInputError` for weights of the wrong kind."""
    load: Callable[[Settings, Mapping[str, ResolvedModel]], Awaitable[LoadedModel]]
    """Load the weights, by part. Raises `MilongaError`."""

    async def open(self, folder: Path, parameters: Mapping[str, str]) -> LoadedModel:
        """Load a version folder, with the parameters of config.pbtxt. Raises `MilongaError`."""
        found = served_models(folder)
        files = {part: file_uri(model) for part, model in found.items()}
        values: dict[str, Any] = {
            one.setting: files if isinstance(one.embedded, Mapping) else self._file(files, one)
            for one in self.entry.weights
        }
        return await self.load(read_settings(self.settings, parameters, **values), found)

    def _file(self, files: Mapping[str, str], weights: Weights) -> str:
        part = self.entry.part(weights)
        return files.get(part, "") if weights.optional else files[part]


def served_models(folder: Path) -> dict[str, ResolvedModel]:
    """Find and verify the weights of a version folder; return them by part.

    Names and versions are those of the export (the registry's), not those of the manifests.

    Raises:
        ModelFormatError: the folder is not a version folder of this format.
        ModelError: weights are missing, or differ from those that were exported.
    """
    try:
        served = parse_served((folder / SERVED).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(
            f"{folder / SERVED} can't be read: {error}; export the model with `milonga triton export`"
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
    """Return the model URI of resolved weights, pinned; a single file is a LAION checkpoint."""
    return f"{'laion' if model.folder.is_file() else 'file'}:{model.folder}#{model.digest}"


def read_settings(
    kind: type[Settings], parameters: Mapping[str, str], field: str = "parameters.{}", **given: Any
) -> Settings:
    """Return a service's settings from config.pbtxt's `parameters` and from values that are `given`.

    Other settings come from the environment, or have their defaults. Parameters in capitals are Triton's own,
    and are ignored. `field` is the format of a parameter's name in errors.

    Raises:
        InvalidInputError: a parameter is not a setting of this model, or is invalid.
    """
    known = kind.model_fields.keys() - ServerSettings.model_fields.keys() - given.keys()
    texts = {name: text for name, text in parameters.items() if not name.isupper()}
    unknown = sorted(texts.keys() - known)
    if unknown:
        raise invalid(
            field.format(unknown[0]),
            f"is no setting of this model; use one of {', '.join(sorted(known))}",
        )
    try:
        return load_settings(kind, texts, **given)
    except InvalidInputError as error:
        raise InvalidInputError(
            *(
                replace(one, field=field.format(one.field)) if one.field in texts else one
                for one in error.violations
            )
        ) from error
