"""MLflow's registry as a promotion uses it: versions, their architecture, aliases and tags."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from services.errors import (
    DigestMismatchError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    ServiceUnavailableError,
    invalid,
)
from services.models.folders import read_json
from services.models.manifest import ADAPTER_CONFIG, DIGEST, MANIFEST_NAME, READY_MADE, read_manifest
from services.models.mini import mini_folder
from services.weights.registry import DIGEST_TAG, FOLDER_TAG, RegisteredVersion, connect, shown, tracking_uri
from services.weights.uri import EMBEDDED, resolve
from training.promotion.target import Pin

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROMOTION_TAG: Final = "milonga.promotion"
"""Tag of a version: outcome of its last promotion. Further tags: ``.time``, ``.run`` and ``.reason``."""

ARCHITECTURE: Final = re.compile(r"[^/]+/config\.json|tokenizer/.*\.(json|model|txt)")
"""Files of a model folder, of any family, that define its architecture: configs and the tokenizer."""

_NOT_COMPARED: Final = frozenset(
    {
        "_name_or_path",
        "_diffusers_version",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "time_cond_proj_dim",
    }
)
"""Keys of configs that record the origin, and the condition on jumps: a student may replace its teacher."""

_REASON_CHARACTERS: Final = 1_000
Answer = TypeVar("Answer")


class Registry:
    """MLflow's registry. All methods raise `ServiceUnavailableError` where the server does not answer."""

    def __init__(self, uri: str | None = None) -> None:
        # MLflow's defaults retry for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self.uri = tracking_uri(uri)
        self.client: MlflowClient = connect(self.uri, create=True)

    def version(self, name: str, version: str) -> RegisteredVersion:
        """Return a version of a registered model.

        Raises:
            ModelNotFoundError: there is no such version.
            ModelFormatError: `milonga train register` did not make it, or not of a generating model.
        """
        found = self._call(
            lambda: self.client.get_model_version(name, version),
            f"version: {name} has no version {version} in the registry {shown(self.uri)}; "
            f"it has {self._versions(name)}",
        )
        digest = found.tags.get(DIGEST_TAG, "")
        if not DIGEST.fullmatch(digest):
            raise ModelFormatError(
                f"version: {name} version {version} has the digest {digest or 'nothing'!r} in its tag "
                f"{DIGEST_TAG}, must be sha256: and 64 digits; register it with `milonga train register`"
            )
        kind = found.tags.get("milonga.kind")
        if kind != "tango":
            raise ModelFormatError(
                f"version: {name} version {version} is of kind {kind}, must be tango: only generating "
                "models are promoted"
            )
        if found.status != "READY":
            raise ModelFormatError(
                f"version: {name} version {version} is {found.status}, must be READY; register it again"
            )
        return RegisteredVersion(
            name=name,
            version=str(found.version),
            digest=digest,
            license=found.tags.get("milonga.license", "unknown"),
        )

    def version_of_pin(self, pin: Pin) -> RegisteredVersion:
        """Return the version that a pin names. Raises as `version`, and `DigestMismatchError`."""
        found = re.fullmatch(rf"models:/(?P<name>[^/]+)/(?P<version>\d+)#(?P<digest>{DIGEST.pattern})", pin)
        if found is None:
            raise invalid(
                "pin",
                f"is {pin!r}, must be models:/NAME/VERSION#sha256:…; set one with `milonga promote "
                "bootstrap`",
            )
        version = self.version(found["name"], found["version"])
        if version.digest != found["digest"]:
            raise DigestMismatchError(
                f"{version} is {version.digest} in the registry {shown(self.uri)}, and is served as "
                f"{found['digest']}; set MLFLOW_TRACKING_URI to the registry that the pin is of"
            )
        return version

    def pin_of(self, name: str, version: str, digest: str) -> Pin | None:
        """Return the pin of a registered version or of an embedded model; None if it is neither."""
        try:
            found = self.version(name, version)
        except ModelError:
            found = None
        if found is not None and found.digest == digest:
            return found.uri
        embedded = (one for one in EMBEDDED if read_manifest(mini_folder(one)).digest == digest)
        return next((f"{one}#{digest}" for one in embedded), None)

    def alias(self, name: str, alias: str) -> str | None:
        """Return the version that an alias points to; None if there is no such alias or model."""
        try:
            found = self._call(lambda: self.client.get_model_version_by_alias(name, alias), "")
        except ModelNotFoundError:
            return None
        return str(found.version)

    def set_alias(self, name: str, alias: str, version: str | None) -> None:
        """Point an alias to a version; None deletes the alias."""
        if version is None:
            self._call(lambda: self.client.delete_registered_model_alias(name, alias), f"{name} is missing")
        else:
            self._call(
                lambda: self.client.set_registered_model_alias(name, alias, version),
                f"{name} version {version} is missing",
            )

    def tag(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version, by name below `PROMOTION_TAG`; the empty name is that tag itself."""
        for key, value in tags.items():
            tag = f"{PROMOTION_TAG}.{key}" if key else PROMOTION_TAG
            self._call(
                partial(self.client.set_model_version_tag, name, version, tag, value[:_REASON_CHARACTERS]),
                f"{name} version {version} is missing",
            )

    def check_architecture(self, champion: RegisteredVersion, candidate: RegisteredVersion) -> None:
        """Raise `ModelFormatError` if the two have different architectures or tokenizers."""
        first, second = self.architecture(champion), self.architecture(candidate)
        for path in sorted({*first, *second}):
            found, expected = second.get(path), first.get(path)
            if found != expected:
                raise ModelFormatError(
                    f"version: {candidate} is of another architecture than the served {champion}: "
                    f"{path} {_difference(expected, found)}; serve it by a Deployment of its own"
                )

    def architecture(self, version: RegisteredVersion) -> dict[str, object]:
        """Return configs and digests of the tokenizer's files, by path. Weights are not fetched.

        Raises `ModelFormatError` if the folder's manifest is missing or has another digest.
        """
        found = self._call(
            lambda: self.client.get_model_version(version.name, version.version), f"{version} is missing"
        )
        source = self._call(
            lambda: self.client.get_model_version_download_uri(version.name, version.version),
            f"{version} is missing",
        )
        root = f"{str(source).rstrip('/')}/{found.tags.get(FOLDER_TAG, 'artifacts/model')}"
        with tempfile.TemporaryDirectory(prefix="milonga-") as folder:
            manifest = self._file(root, MANIFEST_NAME, Path(folder), version)
            files = manifest.get("files", {}) if isinstance(manifest, dict) else {}
            if not files or manifest["digest"] != version.digest:
                raise ModelFormatError(
                    f"version: {version} has no manifest with its digest; register it again"
                )
            if ADAPTER_CONFIG in files or READY_MADE in files:
                return self._merged_architecture(version)
            return {
                path: _comparable(self._file(root, path, Path(folder), version))
                if path.endswith("/config.json")
                else digest
                for path, digest in files.items()
                if ARCHITECTURE.fullmatch(path)
            }

    def _merged_architecture(self, version: RegisteredVersion) -> dict[str, object]:
        """Return the architecture of a merged or completed model. Fetches its weights."""
        folder = resolve(version.uri, tracking_uri=self.uri).folder
        return {
            path: _comparable(read_json(folder / path)) if path.endswith("/config.json") else digest
            for path, digest in read_manifest(folder).files.items()
            if ARCHITECTURE.fullmatch(path)
        }

    def _file(self, root: str, path: str, folder: Path, version: RegisteredVersion) -> Any:
        from mlflow.artifacts import download_artifacts

        target = folder / path.replace("/", "_")
        target.mkdir()
        try:
            got = self._call(
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
        """Return the last ten versions of a model, for messages."""
        with contextlib.suppress(Exception):
            found = self.client.search_model_versions(f"name='{name}'", max_results=100)
            numbers = sorted(int(version.version) for version in found)
            return ", ".join(map(str, numbers[-10:])) or "none"
        return "none"

    def _call(self, call: Callable[[], Answer], missing: str) -> Answer:
        with mlflow_errors(self.uri, missing):
            return call()


@contextlib.contextmanager
def mlflow_errors(uri: str, missing: str = "") -> Iterator[None]:
    """Convert MLflow's errors to a `MilongaError`; `missing` is the message for what is not found."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if _not_found(error):
            raise ModelNotFoundError(missing or _short(error)) from error
        raise _unavailable(uri, error) from error
    except MilongaError:
        raise
    except Exception as error:  # errors of HTTP libraries, databases and object stores
        if isinstance(error, OSError) and not type(error).__module__.startswith(("requests", "urllib3")):
            raise ModelNotFoundError(missing or _short(error)) from error
        raise _unavailable(uri, error) from error


def _not_found(error: Any) -> bool:
    """Return whether MLflow's `error` means not found: its codes for versions and for aliases differ."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


def _unavailable(uri: str, error: BaseException) -> ServiceUnavailableError:
    return ServiceUnavailableError(
        f"the MLflow server {shown(uri)} can't be used: {_short(error)}; start it, or correct "
        "MLFLOW_TRACKING_URI"
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _comparable(config: Any) -> object:
    if isinstance(config, dict):
        return {key: _comparable(value) for key, value in config.items() if key not in _NOT_COMPARED}
    return config


def _difference(expected: object, found: object) -> str:
    if expected is None or found is None:
        return "is additional" if expected is None else "is missing"
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            if expected.get(key) != found.get(key):
                return f"has {key} {found.get(key)!r}, expected {expected.get(key)!r}"
    return f"is {found}, expected {expected}"
