"""The files of a Triton model repository: version folders with weights, and the pinned versions.

::

    repository/
      tango/config.pbtxt          # the configuration; its version_policy pins versions
      tango/7/model.py            # the code that Triton's Python backend runs
      tango/7/served.json         # identities of the weights; a version without it is incomplete
      tango/7/weights/tango/…     # the model folder

The files are in a `Storage`: a folder, or S3 (`services.inference.triton.storage`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from services.errors import InvalidInputError, ModelFormatError, OutputError, invalid
from services.inference.triton.storage import LAST, Storage, open_storage

__all__ = ["ModelExport", "ModelRepository", "Storage", "Weights", "open_storage"]

CONFIG: Final = "config.pbtxt"
CODE: Final = "model.py"
SERVED: Final = LAST
WEIGHTS: Final = "weights"
NO_BYTECODE: Final = "__pycache__"
"""Name of a file that keeps Python from creating the bytecode folder of that name. The folder would change
the version's files, and Triton would load the version a second time."""
FORMAT: Final = 1
"""Version of the format of `SERVED`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights in a version folder."""

    name: str
    """Name of the model, or of the registered model."""
    version: str
    """Version of the model."""
    digest: str
    """`sha256:` and the digest over every file."""
    folder: Path | None = None
    """Model folder to copy from (the file of a LAION checkpoint); None if read from a repository."""
    checkpoint: str = ""
    """File name of a LAION checkpoint; empty for model folders."""
    extra_files: Mapping[str, Path] = field(default_factory=dict)
    """Further files to copy, by path below the weights' folder; empty if read from a repository."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelExport:
    """The contents of a version of a model."""

    config: ModelConfig
    """Configuration, with the model's name; its version_policy is ignored."""
    code: str
    """Text of `model.py`."""
    weights: Mapping[str, Weights]
    """Weights by the name of their folder below ``weights/``."""


class ModelRepository:
    """The models of a Triton repository. Triton loads a model's pinned versions.

    Methods raise `OutputError` or `ServiceUnavailableError` if files can't be read or written, and
    `ModelFormatError` if a configuration or a `SERVED` file is malformed.
    """

    def __init__(self, storage: Storage) -> None:
        """Does not access `storage`."""
        self.storage = storage

    def add(self, export: ModelExport, version: int) -> bool:
        """Add a version atomically; return whether any of its files changed.

        The first version of a model is pinned. A later one is not, and only its parameters change the
        configuration. If the version exists with the same weights, its code and names are updated.

        Raises:
            InvalidInputError: `version` is not positive or exists with other weights, or the model's
                configuration has other tensors.
        """
        model, folder = export.config.name, f"{export.config.name}/{version}"
        if version < 1:
            raise invalid("--version", f"is {version}, must be at least 1")
        existing = self.config(model)
        if existing is not None:
            self._check_tensors(existing, export.config)
        changed = not self._has(export, version)
        if changed:
            try:
                self.storage.put_folder(folder, _files_of(export))
            except OutputError:
                if not self._has(export, version):  # otherwise another process has just added the same
                    raise
                changed = False
        for name, content in ((CODE, export.code.encode()), (SERVED, _served(export))):
            if self.storage.read(f"{folder}/{name}") != content:
                self.storage.write(f"{folder}/{name}", content)
                changed = True
        if existing is None:
            self._write_config(export.config, version)
        else:
            self._set_parameters(existing, export.config)
        return changed

    def versions(self, model: str) -> list[int]:
        """Return the complete versions of a model, in ascending order."""
        numbers = sorted(int(name) for name in self.storage.names(model) if re.fullmatch("[1-9][0-9]*", name))
        return [number for number in numbers if SERVED in self.storage.names(f"{model}/{number}")]

    def config(self, model: str) -> ModelConfig | None:
        """Return the configuration of a model; None if there is no such model."""
        path = f"{model}/{CONFIG}"
        text = self.storage.read(path)
        if text is None:
            return None
        try:
            return text_format.Parse(text.decode(), ModelConfig())
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise ModelFormatError(
                f"{self.storage.place}: {path} is not a model configuration "
                f"({' '.join(str(error).split())}); correct it, or remove it and export again"
            ) from error

    def pinned(self, model: str) -> tuple[int, ...]:
        """Return the pinned versions, in ascending order; none if the configuration has no pins."""
        config = self.config(model)
        return tuple(sorted(config.version_policy.specific.versions)) if config else ()

    def pin(self, model: str, *versions: int) -> None:
        """Pin exactly `versions`: Triton loads them at its next load of `model`.

        Raises `InvalidInputError` if the model or one of the versions does not exist.
        """
        config, existing = self.config(model), self.versions(model)
        if config is None:
            raise self._no_model(model)
        missing = sorted({*versions} - {*existing})
        if missing or not versions:
            raise invalid(
                f"{self.storage.place}: {model}",
                f"has no version {', '.join(map(str, missing)) or 'to pin'}; it has "
                f"{', '.join(map(str, existing)) or 'none'}",
            )
        self._write_config(config, *versions)

    def weights(self, model: str, version: int) -> Mapping[str, Weights]:
        """Return the weights of a version, by folder. Raises `InvalidInputError` if it does not exist."""
        path = f"{model}/{version}/{SERVED}"
        data = self.storage.read(path)
        if data is None:
            raise self._no_version(model, version)
        try:
            return parse_served(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(
                f"{self.storage.place}: {path} is malformed ({error}); remove the folder, and export the "
                "version again"
            ) from error

    def code(self, model: str, version: int) -> str:
        """Return the text of a version's `model.py`. Raises `InvalidInputError` if it does not exist."""
        data = self.storage.read(f"{model}/{version}/{CODE}")
        if data is None:
            raise self._no_version(model, version)
        return data.decode()

    def remove(self, model: str) -> None:
        """Remove a model with all its versions, if it exists."""
        self.storage.remove(model)

    def _has(self, export: ModelExport, version: int) -> bool:
        """Return whether `version` exists. Raises `InvalidInputError` if it has other weights."""
        model = export.config.name
        if SERVED not in self.storage.names(f"{model}/{version}"):
            return False
        found = {name: weights.digest for name, weights in self.weights(model, version).items()}
        # The order matters: it is that of the columns of SCORE.
        if list(found.items()) != [(name, one.digest) for name, one in export.weights.items()]:
            raise invalid(
                "--version",
                f"is {version}, but {self.storage.place} has {model} {version} with other weights "
                f"({', '.join(sorted(found.values()))}); give another --version",
            )
        return True

    def _check_tensors(self, existing: ModelConfig, new: ModelConfig) -> None:
        """Raise `InvalidInputError` if the tensors differ: a model's versions share one configuration."""
        for side in ("input", "output"):
            if list(getattr(existing, side)) != list(getattr(new, side)):
                raise invalid(
                    f"{self.storage.place}: {new.name}",
                    f"has other {side}s in {CONFIG} than this version; export into another repository, "
                    "or remove that file; the new one then pins only this version",
                )

    def _set_parameters(self, existing: ModelConfig, new: ModelConfig) -> None:
        """Set the parameters of `new`; keep all else, which an administrator may have edited."""
        before = existing.SerializeToString(deterministic=True)
        for name, value in new.parameters.items():
            existing.parameters[name].CopyFrom(value)
        if existing.SerializeToString(deterministic=True) != before:
            text = text_format.MessageToString(existing).encode()
            self.storage.write(f"{new.name}/{CONFIG}", text)

    def _write_config(self, config: ModelConfig, *versions: int) -> None:
        written = ModelConfig()
        written.CopyFrom(config)
        specific = model_config_pb2.ModelVersionPolicy.Specific(versions=sorted({*versions}))
        written.version_policy.CopyFrom(model_config_pb2.ModelVersionPolicy(specific=specific))
        text = text_format.MessageToString(written).encode()
        path = f"{config.name}/{CONFIG}"
        if self.storage.read(path) != text:
            self.storage.write(path, text)

    def _no_version(self, model: str, version: int) -> InvalidInputError:
        return invalid(f"{self.storage.place}: {model}", f"has no version {version}; export it")

    def _no_model(self, model: str) -> InvalidInputError:
        return invalid(
            self.storage.place,
            f"has no model {model}; export it with `milonga triton export`, or give another",
        )


def parse_served(data: bytes) -> dict[str, Weights]:
    """Parse a `SERVED` file. Raises ValueError, KeyError, TypeError or AttributeError if it is malformed."""
    content = json.loads(data)
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, this release reads {FORMAT}")
    return {
        name: Weights(
            name=str(one["name"]),
            version=str(one["version"]),
            digest=str(one["digest"]),
            checkpoint=str(one.get("checkpoint", "")),
        )
        for name, one in content["weights"].items()
    }


def _files_of(export: ModelExport) -> dict[str, bytes | Path]:
    """Return every file of a version folder, `SERVED` last."""
    files: dict[str, bytes | Path] = {
        CODE: export.code.encode(),
        NO_BYTECODE: b"Not a folder: a version that changes is loaded again.\n",
    }
    for name, weights in export.weights.items():
        assert weights.folder is not None, (
            f"{name} was read from a repository, and has no folder to copy from"
        )
        for path in _walk(weights.folder):
            inside = path.relative_to(weights.folder).as_posix() if path != weights.folder else path.name
            files[f"{WEIGHTS}/{name}/{inside}"] = path
        files |= {f"{WEIGHTS}/{name}/{inside}": path for inside, path in weights.extra_files.items()}
    return {**files, SERVED: _served(export)}


def _served(export: ModelExport) -> bytes:
    weights = {
        name: {"name": one.name, "version": one.version, "digest": one.digest}
        | ({"checkpoint": one.checkpoint} if one.checkpoint else {})
        for name, one in export.weights.items()
    }
    return (json.dumps({"format": FORMAT, "weights": weights}, indent=1) + "\n").encode()


def _walk(folder: Path) -> list[Path]:
    """Return the files of a model folder without hidden ones; a single file is returned itself."""
    if folder.is_file():
        return [folder]
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
