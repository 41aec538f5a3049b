"""A service's model under Triton: what exports it, and what loads an export. The same for every service."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.catalogue import ServiceEntry
from services.errors import FieldViolation, InvalidInputError, ModelFormatError
from services.inference.triton.backend import Opened
from services.inference.triton.repository import SERVED, WEIGHTS, parse_served
from services.runtime.settings import ServerSettings, load_settings
from services.weights.uri import ModelURI, ResolvedModel, resolve

Settings = TypeVar("Settings", bound=ServerSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Servable(Generic[Settings]):
    """What is particular to a service's model under Triton."""

    entry: ServiceEntry
    """The service."""
    settings: type[Settings]
    """Its settings."""
    uris: Callable[[Settings], Mapping[str, ModelURI]]
    """Returns the model URIs that settings name, by part."""
    configure: Callable[[Settings, Mapping[str, ResolvedModel]], ModelConfig]
    """Returns the tensors of its model, by `write_config`, from settings and their weights by part. Raises
    `InvalidInputError` where the weights are of another kind."""
    load: Callable[[Settings, Mapping[str, ResolvedModel]], Awaitable[Opened]]
    """Loads weights, by part. Raises `MilongaError`."""

    async def open(self, folder: Path, parameters: Mapping[str, str]) -> Opened:
        """Load a version folder, with the parameters of config.pbtxt. Raises `MilongaError`."""
        found = served_models(folder)
        files = {part: file_uri(model) for part, model in found.items()}
        values: dict[str, Any] = {
            one.setting: files if isinstance(one.embedded, Mapping) else files[self.entry.part(one)]
            for one in self.entry.weights
        }
        return await self.load(read_settings(self.settings, parameters, **values), found)


def served_models(folder: Path) -> dict[str, ResolvedModel]:
    """Find and verify the weights of a version folder, by part.

    Their names and versions are the registry's, not those in their manifests.

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
    """Build a service's settings from parameters with their names, and from values that are `given`.

    What neither has is from the environment, else the default. Names in capitals are Triton's own parameters.

    Raises:
        InvalidInputError: a parameter that is no setting, or a wrong one; `field` says how a parameter is
            called in the error.
    """
    known = kind.model_fields.keys() - ServerSettings.model_fields.keys() - given.keys()
    texts = {name: text for name, text in parameters.items() if not name.isupper()}
    unknown = sorted(texts.keys() - known)
    if unknown:
        raise InvalidInputError(
            FieldViolation(
                field.format(unknown[0]), f"is no setting of this model; known: {', '.join(sorted(known))}"
            )
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
