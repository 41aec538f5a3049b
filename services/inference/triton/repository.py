"""A Triton model repository, as files: version folders with weights, and which version is pinned.

::

    repository/
      tango/config.pbtxt          # the configuration; its version_policy is the pin
      tango/7/model.py            # what Triton's Python backend runs
      tango/7/served.json         # which weights these are; a version without it is not whole
      tango/7/weights/tango/…     # the model folder

Knows files only. Where they lie is a `Storage`: a folder, or S3 (`services.inference.triton.storage`).
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

from services.errors import FieldViolation, InvalidInputError, ModelFormatError, OutputError
from services.inference.triton.storage import LAST, Storage, open_storage

__all__ = ["Exported", "ModelRepository", "Storage", "Weights", "open_storage"]

CONFIG: Final = "config.pbtxt"
CODE: Final = "model.py"
SERVED: Final = LAST
WEIGHTS: Final = "weights"
NO_BYTECODE: Final = "__pycache__"
"""Name of a file: where it is, Python can make no folder of that name, so it leaves no bytecode. Triton would
find that version changed, and at the next load of the model load it again, beside itself."""
FORMAT: Final = 1
"""Version of the format of `SERVED`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Which weights a version folder holds."""

    name: str
    """Name of the model, or of the registered model."""
    version: str
    """Its version there."""
    digest: str
    """`sha256:` and the digest over every file."""
    folder: Path | None = None
    """The model folder (of LAION's checkpoints the file) to copy from; None when read back."""
    checkpoint: str = ""
    """Of LAION's checkpoints: the file's name."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """What else is copied, by its path below the weights' folder; none when read back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What a version of a model is made of."""

    config: ModelConfig
    """Configuration, named after the model; its version_policy does not count."""
    code: str
    """Text of `model.py`."""
    weights: Mapping[str, Weights]
    """By the name of their folder below ``weights/``."""


class ModelRepository:
    """The models of a Triton repository. A pinned version is one that Triton loads.

    Every method raises `OutputError` or `ServiceUnavailableError` where the files can't be got at, and
    `ModelFormatError` where one of ours can't be read.
    """

    def __init__(self, storage: Storage) -> None:
        """Nothing is read yet."""
        self.storage = storage

    def add(self, exported: Exported, version: int) -> bool:
        """Put a version there, whole or not at all; whether it was not there before, just so.

        The first version of a model is pinned. Later ones are not, and leave the configuration as it is, but
        for parameters that they bring. Weights that are there stay, whatever they were called: code and names
        are renewed.

        Raises `InvalidInputError` where `version` is taken by other weights, or no number that Triton takes,
        and where the configuration that is there has other tensors.
        """
        model, place = exported.config.name, f"{exported.config.name}/{version}"
        if version < 1:
            raise InvalidInputError(FieldViolation("--version", f"is {version}, must be at least 1"))
        there = self.config(model)
        if there is not None:
            self._check_tensors(there, exported.config)
        added = not self._holds(exported, version)
        if added:
            try:
                self.storage.put_folder(place, _files_of(exported))
            except OutputError:
                if not self._holds(exported, version):  # else another process was faster, with the same
                    raise
                added = False
        for name, content in ((CODE, exported.code.encode()), (SERVED, _served(exported))):
            if self.storage.read(f"{place}/{name}") != content:
                self.storage.write(f"{place}/{name}", content)
                added = True
        if there is None:
            self._write_config(exported.config, version)
        else:
            self._set_parameters(there, exported.config)
        return added

    def versions(self, model: str) -> list[int]:
        """The versions that are there whole, in order."""
        numbers = sorted(int(name) for name in self.storage.names(model) if re.fullmatch("[1-9][0-9]*", name))
        return [number for number in numbers if SERVED in self.storage.names(f"{model}/{number}")]

    def config(self, model: str) -> ModelConfig | None:
        """The configuration as it is there, with the pin; None where there is no such model."""
        path = f"{model}/{CONFIG}"
        text = self.storage.read(path)
        if text is None:
            return None
        try:
            return text_format.Parse(text.decode(), ModelConfig())
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise ModelFormatError(
                f"{self.storage.place}: {path} is no model configuration ({' '.join(str(error).split())}); "
                "correct it; or remove it, and export again"
            ) from error

    def pinned(self, model: str) -> tuple[int, ...]:
        """The versions that Triton is to load, in order; none where the configuration names none."""
        config = self.config(model)
        return tuple(sorted(config.version_policy.specific.versions)) if config else ()

    def pin(self, model: str, *versions: int) -> None:
        """Have Triton load exactly `versions`, the next time that it loads `model`.

        Raises `InvalidInputError` where the model, or one of them, is not there.
        """
        config, there = self.config(model), self.versions(model)
        if config is None:
            raise self._no_model(model)
        missing = sorted({*versions} - {*there})
        if missing or not versions:
            raise InvalidInputError(
                FieldViolation(
                    f"{self.storage.place}: {model}",
                    f"has no version {', '.join(map(str, missing)) or 'to pin'}; it has "
                    f"{', '.join(map(str, there)) or 'none'}",
                )
            )
        self._write_config(config, *versions)

    def weights(self, model: str, version: int) -> Mapping[str, Weights]:
        """Which weights a version holds. Raises `InvalidInputError` where it is not there."""
        path = f"{model}/{version}/{SERVED}"
        data = self.storage.read(path)
        if data is None:
            raise self._no_version(model, version)
        try:
            return parse_served(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(
                f"{self.storage.place}: {path} is not one of ours ({error}); remove the folder, and export "
                "the version again"
            ) from error

    def code(self, model: str, version: int) -> str:
        """The text of `model.py` of a version. Raises `InvalidInputError` where it is not there."""
        data = self.storage.read(f"{model}/{version}/{CODE}")
        if data is None:
            raise self._no_version(model, version)
        return data.decode()

    def remove_version(self, model: str, version: int) -> None:
        """Remove a version, if it is there. Raises `InvalidInputError` where it is pinned."""
        if version in self.pinned(model):
            raise InvalidInputError(
                FieldViolation(f"{self.storage.place}: {model}", f"is pinned to {version}; pin another first")
            )
        self.storage.remove(f"{model}/{version}")

    def remove(self, model: str) -> None:
        """Remove a model with all its versions, if it is there."""
        self.storage.remove(model)

    def _holds(self, exported: Exported, version: int) -> bool:
        model = exported.config.name
        if SERVED not in self.storage.names(f"{model}/{version}"):
            return False
        found = {name: weights.digest for name, weights in self.weights(model, version).items()}
        # In their order, which is that of the columns of SCORE.
        if list(found.items()) != [(name, one.digest) for name, one in exported.weights.items()]:
            raise InvalidInputError(
                FieldViolation(
                    "--version",
                    f"is {version}, and {self.storage.place} has {model} {version} with other weights "
                    f"({', '.join(sorted(found.values()))}); give another --version",
                )
            )
        return True

    def _check_tensors(self, there: ModelConfig, wanted: ModelConfig) -> None:
        """All versions of a model have one configuration. Raises `InvalidInputError` where it can't be."""
        for side in ("input", "output"):
            if list(getattr(there, side)) != list(getattr(wanted, side)):
                raise InvalidInputError(
                    FieldViolation(
                        f"{self.storage.place}: {wanted.name}",
                        f"has other {side}s in {CONFIG} than this version; export into another repository, "
                        "or remove that file, which pins this version alone",
                    )
                )

    def _set_parameters(self, there: ModelConfig, wanted: ModelConfig) -> None:
        """Take over the settings that were given; what else there is may be somebody's own."""
        before = there.SerializeToString(deterministic=True)
        for name, value in wanted.parameters.items():
            there.parameters[name].CopyFrom(value)
        if there.SerializeToString(deterministic=True) != before:
            text = text_format.MessageToString(there).encode()
            self.storage.write(f"{wanted.name}/{CONFIG}", text)

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
        return InvalidInputError(
            FieldViolation(f"{self.storage.place}: {model}", f"has no version {version}; export it")
        )

    def _no_model(self, model: str) -> InvalidInputError:
        return InvalidInputError(
            FieldViolation(
                self.storage.place,
                f"has no model {model}; `milonga triton export` writes one, or give another",
            )
        )


def parse_served(data: bytes) -> dict[str, Weights]:
    """What `SERVED` says. Raises ValueError, KeyError, TypeError or AttributeError where it is not ours."""
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


def _files_of(exported: Exported) -> dict[str, bytes | Path]:
    """Every file of a version folder, `SERVED` last."""
    files: dict[str, bytes | Path] = {
        CODE: exported.code.encode(),
        NO_BYTECODE: b"Not a folder: a version that changes is loaded again.\n",
    }
    for name, weights in exported.weights.items():
        assert weights.folder is not None, f"{name} was read back, and has no folder to copy from"
        for path in _walk(weights.folder):
            inside = path.relative_to(weights.folder).as_posix() if path != weights.folder else path.name
            files[f"{WEIGHTS}/{name}/{inside}"] = path
        files |= {f"{WEIGHTS}/{name}/{inside}": path for inside, path in weights.beside.items()}
    return {**files, SERVED: _served(exported)}


def _served(exported: Exported) -> bytes:
    weights = {
        name: {"name": one.name, "version": one.version, "digest": one.digest}
        | ({"checkpoint": one.checkpoint} if one.checkpoint else {})
        for name, one in exported.weights.items()
    }
    return (json.dumps({"format": FORMAT, "weights": weights}, indent=1) + "\n").encode()


def _walk(folder: Path) -> list[Path]:
    """The files of a model folder; itself, if it is one. Hidden ones are none of the model's."""
    if folder.is_file():
        return [folder]
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
