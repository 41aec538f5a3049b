"""The registry's side of a promotion: the version, its architecture, the alias that says what is served."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from services.errors import (
    DigestMismatchError,
    FieldViolation,
    InvalidInputError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    ServiceUnavailableError,
)
from services.models.manifest import MANIFEST_NAME, read_manifest
from services.models.mini import mini_folder
from services.weights.registry import DIGEST_TAG, FOLDER_TAG, connect, shown, tracking_uri
from services.weights.uri import EMBEDDED
from training.promotion.target import Pin

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROMOTION_TAG: Final = "milonga.promotion"
"""Tag of a version: how its last promotion ended; ``.time``, ``.run`` and ``.reason`` stand beside it."""

ARCHITECTURE: Final = re.compile(
    r"(unet|vae|text_encoder|vocoder)/config\.json|tokenizer/.*\.(json|model|txt)"
)
"""Files of a model folder that say what it is built of, and what its words are."""

_NOTES: Final = frozenset(
    {"_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype"}
)
"""Keys of configs that say where they come from and no more."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REASON_CHARACTERS: Final = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A version of a registered model."""

    name: str
    """Of the registered model."""
    version: str
    """Of it."""
    digest: str
    """Of its model folder."""

    @property
    def pin(self) -> Pin:
        """The model URI that names it and nothing else."""
        return f"models:/{self.name}/{self.version}#{self.digest}"

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class Registry:
    """MLflow's, as promotion uses it. Raises `ServiceUnavailableError` where the server does not answer."""

    def __init__(self, uri: str | None = None) -> None:
        # MLflow would try for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self.uri = tracking_uri(uri)
        self.client: MlflowClient = connect(self.uri, create=True)

    def version(self, name: str, version: str) -> Version:
        """Look a version up.

        Raises:
            ModelNotFoundError: there is none.
            ModelFormatError: it is none that `milonga train register` made of a generating model.
        """
        found = self._ask(
            lambda: self.client.get_model_version(name, version),
            f"version: {name} has no version {version} in the registry {shown(self.uri)}; "
            f"it has {self._versions(name)}",
        )
        digest = found.tags.get(DIGEST_TAG, "")
        if not _DIGEST.fullmatch(digest):
            raise ModelFormatError(
                f"version: {name} version {version} has the digest {digest or 'nothing'!r} in its tag "
                f"{DIGEST_TAG}, must be sha256: and 64 digits; register it with `milonga train register`"
            )
        kind = found.tags.get("milonga.kind")
        if kind != "tango":
            raise ModelFormatError(
                f"version: {name} version {version} is of kind {kind}, must be tango: only models that "
                "generate are promoted"
            )
        if found.status != "READY":
            raise ModelFormatError(
                f"version: {name} version {version} is {found.status}, must be READY; register it again"
            )
        return Version(name=name, version=str(found.version), digest=digest)

    def of_pin(self, pin: Pin) -> Version:
        """The version that a pin names. Raises as `version`, and `DigestMismatchError`."""
        found = re.fullmatch(r"models:/(?P<name>[^/]+)/(?P<version>\d+)#(?P<digest>sha256:[0-9a-f]{64})", pin)
        if found is None:
            raise InvalidInputError(
                FieldViolation(
                    "pin", f"is {pin!r}, must be models:/NAME/VERSION#sha256:…; `milonga promote bootstrap`"
                )
            )
        version = self.version(found["name"], found["version"])
        if version.digest != found["digest"]:
            raise DigestMismatchError(
                f"{version} is {version.digest} in the registry {shown(self.uri)}, and is served as "
                f"{found['digest']}; is MLFLOW_TRACKING_URI the registry that was pinned from?"
            )
        return version

    def pin_of(self, name: str, version: str, digest: str) -> Pin | None:
        """The pin of weights by what they are called: of a version, or embedded; None where it is neither."""
        try:
            found = self.version(name, version)
        except ModelError:
            found = None
        if found is not None and found.digest == digest:
            return found.pin
        embedded = (one for one in EMBEDDED if read_manifest(mini_folder(one)).digest == digest)
        return next((f"{one}#{digest}" for one in embedded), None)

    def alias(self, name: str, alias: str) -> str | None:
        """The version that an alias points to; None where there is no such alias, or model."""
        try:
            found = self._ask(lambda: self.client.get_model_version_by_alias(name, alias), "")
        except ModelNotFoundError:
            return None
        return str(found.version)

    def point(self, name: str, alias: str, version: str | None) -> None:
        """Let an alias point to a version, or to none."""
        if version is None:
            self._ask(lambda: self.client.delete_registered_model_alias(name, alias), f"{name} is gone")
        else:
            self._ask(
                lambda: self.client.set_registered_model_alias(name, alias, version),
                f"{name} version {version} is gone",
            )

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Tag a version, under `PROMOTION_TAG`; the empty name is that tag itself."""
        for key, value in tags.items():
            name = f"{PROMOTION_TAG}.{key}" if key else PROMOTION_TAG
            self._ask(
                partial(
                    self.client.set_model_version_tag,
                    *(version.name, version.version, name, value[:_REASON_CHARACTERS]),
                ),
                f"{version} is gone",
            )

    def check_architecture(self, champion: Version, candidate: Version) -> None:
        """Raise `ModelFormatError` where the two are built differently: then they are no two versions."""
        first, second = self.architecture(champion), self.architecture(candidate)
        for path in sorted({*first, *second}):
            found, expected = second.get(path), first.get(path)
            if found != expected:
                raise ModelFormatError(
                    f"version: {candidate} is of another architecture than {champion}, which is served: "
                    f"{path} {_difference(expected, found)}; serve it by a Deployment of its own"
                )

    def architecture(self, version: Version) -> dict[str, object]:
        """What a version is built of: its configs, and its tokenizer's files. Weights are not fetched.

        Raises `ModelFormatError` where the folder's manifest is missing or is not what the digest says.
        """
        found = self._ask(
            lambda: self.client.get_model_version(version.name, version.version), f"{version} is gone"
        )
        source = self._ask(
            lambda: self.client.get_model_version_download_uri(version.name, version.version),
            f"{version} is gone",
        )
        root = f"{str(source).rstrip('/')}/{found.tags.get(FOLDER_TAG, 'artifacts/model')}"
        with tempfile.TemporaryDirectory(prefix="milonga-") as folder:
            manifest = self._file(root, MANIFEST_NAME, Path(folder), version)
            files = manifest.get("files", {}) if isinstance(manifest, dict) else {}
            if not files or manifest["digest"] != version.digest:
                raise ModelFormatError(f"version: {version} has no manifest of its digest; register it again")
            return {
                # A tokenizer's files are compared by their digest.
                path: _without_notes(self._file(root, path, Path(folder), version))
                if path.endswith("/config.json")
                else digest
                for path, digest in files.items()
                if ARCHITECTURE.fullmatch(path)
            }

    def _file(self, root: str, path: str, folder: Path, version: Version) -> Any:
        from mlflow.artifacts import download_artifacts

        target = folder / path.replace("/", "_")
        target.mkdir()
        try:
            got = self._ask(
                lambda: download_artifacts(
                    artifact_uri=f"{root}/{path}", dst_path=str(target), tracking_uri=self.uri
                ),
                f"version: the files of {version} lack {path}; register it again",
            )
            return json.loads(Path(got).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelFormatError(
                f"version: {path} of {version} can't be read: {error}; register it again"
            ) from error

    def _versions(self, name: str) -> str:
        """Versions that there are, for people."""
        with contextlib.suppress(Exception):
            found = self.client.search_model_versions(f"name='{name}'", max_results=100)
            numbers = sorted(int(version.version) for version in found)
            return ", ".join(map(str, numbers[-10:])) or "none"
        return "none"

    def _ask(self, question: Any, missing: str) -> Any:
        """The answer; MLflow's errors as ours, with `missing` where it is not there."""
        with asking(self.uri, missing):
            return question()


@contextlib.contextmanager
def asking(uri: str, missing: str = "") -> Iterator[None]:
    """Errors of MLflow as ours. `missing` is what to say where what is asked for is not there."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if missing_or_invalid(error):
            raise ModelNotFoundError(missing or _short(error)) from error
        raise _away(uri, error) from error
    except MilongaError:
        raise
    except Exception as error:  # those of HTTP libraries, databases and object stores
        if isinstance(error, OSError) and not type(error).__module__.startswith(("requests", "urllib3")):
            raise ModelNotFoundError(missing or _short(error)) from error
        raise _away(uri, error) from error


def missing_or_invalid(error: Any) -> bool:
    """Whether MLflow says that something is not there; of an alias it says so in its own way."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


def _away(uri: str, error: BaseException) -> ServiceUnavailableError:
    return ServiceUnavailableError(
        f"the MLflow server {shown(uri)} can't be used: {_short(error)}; start it, or correct "
        "MLFLOW_TRACKING_URI"
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _without_notes(config: Any) -> object:
    if isinstance(config, dict):
        return {key: _without_notes(value) for key, value in config.items() if key not in _NOTES}
    return config


def _difference(expected: object, found: object) -> str:
    if expected is None or found is None:
        return "is there" if expected is None else "is missing"
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            if expected.get(key) != found.get(key):
                return f"has {key} {found.get(key)!r}, expected {expected.get(key)!r}"
    return f"is {found}, expected {expected}"
