"""Connect to MLflow's registry, and fetch registered versions as model folders.

The registry is ``MLFLOW_TRACKING_URI``, or without it the database ``mlflow.db`` in the current folder. A
version is fetched once, into ``MILONGA_CACHE`` (``~/.cache/milonga``) under its digest, and never altered.

Needs mlflow-skinny for a server, mlflow for a database; both are imported when a registry is used.
"""

import logging
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from services.api.model import ModelVersion
from services.environment import quiet_libraries
from services.errors import (
    DigestMismatchError,
    MilongaError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    OutputError,
    ServiceUnavailableError,
    invalid,
)
from services.models.manifest import DIGEST, read_manifest, verify_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_STORE: Final = "mlflow.db"
"""Name of the database that is used without a server. Artifacts are in ``mlruns/`` next to it."""

DIGEST_TAG: Final = "milonga.digest"
"""Tag of a registered version: the digest of its model folder."""

FOLDER_TAG: Final = "milonga.folder"
"""Tag of a registered version: the model folder's path among its artifacts."""

CONNECT_SECONDS: Final = 5.0
"""Timeout of a connection to a server, in seconds."""
ANSWER_SECONDS: Final = 10.0
"""Timeout of its answer, in seconds."""

_SETTINGS: Final = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Otherwise the uv.lock of the current folder is packed into models.
    "MLFLOW_UV_AUTO_DETECT": "false",
}
_PART: Final = ".part-"
_STALE_SECONDS: Final = 86_400.0
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion(ModelVersion):
    """A version of a registered model: `name` and `version` are the registry's, not the manifest's."""

    @property
    def uri(self) -> str:
        """Return the model URI, pinned to the digest: ``models:/milonga-tango/7#sha256:…``."""
        return f"models:/{self.name}/{self.version}#{self.digest}"

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


def tracking_uri(uri: str | None = None) -> str:
    """Return `uri`, else MLFLOW_TRACKING_URI, else the full path of the database in the current folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / LOCAL_STORE}"


def database_path(uri: str) -> Path | None:
    """Return the file of an SQLite URI; None for other URIs."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def shown(uri: str) -> str:
    """Return `uri` without its password, for messages."""
    return re.sub(r"//[^/@]*@", "//", uri)


def connect(uri: str, *, create: bool = False) -> "MlflowClient":
    """Return a client of the server or database at `uri`, which has answered. `create` creates the database.

    Raises:
        ModelError: mlflow, or what it needs for this kind of store, is not installed.
        ServiceUnavailableError: no answer within seconds (MLflow itself retries for minutes).
        ModelNotFoundError: there is no such database, and `create` is false.
        OutputError: the database can't be created.
    """
    # Whether this process may use the hub is decided when it starts.
    quiet_libraries(online=True)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise _not_installed("mlflow-skinny") from error
    served = urlsplit(uri).scheme in ("http", "https")
    if not served and find_spec("sqlalchemy") is None:
        raise _not_installed("mlflow")
    path = database_path(uri)
    if path is not None and not path.exists():
        if not create:
            raise ModelNotFoundError(
                f"there is no MLflow registry at {path}; set MLFLOW_TRACKING_URI to the address of one"
            )
        _make_parent(path)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if served:
            _in_time(lambda: _ask(uri), uri)
        # MLflow's own use of SQLAlchemy is deprecated there; its user can't change that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except ImportError as error:
        raise _not_installed("mlflow") from error
    except MilongaError:
        raise
    except MlflowException as error:
        raise _unreachable(uri, _reason(error)) from error
    except Exception as error:  # drivers of databases have their own errors
        if path is not None:
            raise OutputError(
                f"{path} can't be used: {_reason(error)}; give another MLFLOW_TRACKING_URI"
            ) from error
        raise _unreachable(uri, _reason(error)) from error
    return client


def fetch(path: str, *, pin: str | None = None, uri: str | None = None) -> tuple[Path, ModelVersion]:
    """Fetch what ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` names, unless the cache has it.

    Returns the verified folder in the cache, and the version by the registry's name and number.

    Args:
        path: what follows ``models:``.
        pin: the digest that it must have. With it, a version in the cache needs no registry: services start
            while that is down.
        uri: of the registry; None: as `tracking_uri`.

    Raises:
        InvalidInputError: `path` names no version.
        ModelNotFoundError: there is no such version.
        ModelFormatError: the version is no model folder of Milonga.
        DigestMismatchError: the version differs from `pin`, or the fetched files from the version's tag.
        OutputError: the cache can't be written.
        ServiceUnavailableError, ModelError: as `connect`.
    """
    name, version, alias = parse_path(path)
    if version and pin and _intact(_place(pin), pin):
        return _cached(name, version, pin)
    uri = tracking_uri(uri)
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        found: Any = (
            client.get_model_version_by_alias(name, alias)
            if alias
            else client.get_model_version(name, version)
        )
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise _unreachable(uri, _reason(error)) from error
        raise ModelNotFoundError(
            f"model: models:{path} is not in the registry {shown(uri)}; see `mlflow ui`, or set "
            "MLFLOW_TRACKING_URI to another"
        ) from error
    digest = found.tags.get(DIGEST_TAG, "")
    if not DIGEST.fullmatch(digest):
        raise ModelFormatError(
            f"model: models:{path} has no digest in its tag {DIGEST_TAG}; register it with "
            "`milonga train register`"
        )
    if pin not in (None, digest):
        raise DigestMismatchError(f"models:{path} is {digest}, not {pin}; correct the pin or the model URI")
    folder = _place(digest)
    if not _intact(folder, digest):
        source = client.get_model_version_download_uri(name, found.version)
        subfolder = found.tags.get(FOLDER_TAG, "artifacts/model")
        _download(f"{source.rstrip('/')}/{subfolder}", folder, digest, uri)
    return _cached(name, str(found.version), digest)


def fetch_digest(digest: str, *, uri: str | None = None) -> tuple[Path, ModelVersion]:
    """Fetch a version with this digest, whatever it is called, unless the cache has it. Raises as `fetch`."""
    folder = _place(digest)
    if _intact(folder, digest):
        manifest = read_manifest(folder)
        return _cached(manifest.name, manifest.version, digest)
    uri = tracking_uri(uri)
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        found: Any = client.search_model_versions(f"tags.`{DIGEST_TAG}`='{digest}'")
    except MlflowException as error:
        raise _unreachable(uri, _reason(error)) from error
    if not found:
        raise ModelNotFoundError(
            f"no version in the registry {shown(uri)} has the digest {digest}; register that model first: "
            "`milonga train register FOLDER`"
        )
    return fetch(f"/{found[0].name}/{found[0].version}", pin=digest, uri=uri)


def parse_path(path: str) -> tuple[str, str, str]:
    """Return name, version and alias of what follows ``models:``; one of the latter two is empty.

    Raises `InvalidInputError` unless it is ``/NAME/VERSION`` or ``/NAME@ALIAS``.
    """
    found = re.fullmatch(r"/?(?P<name>[\w .-]+)(?:/(?P<version>\d+)|@(?P<alias>[\w-]+))", path)
    if found is None:
        raise invalid("model", f"is 'models:{path[:80]}', must be models:/NAME/VERSION or models:/NAME@ALIAS")
    return found["name"], found["version"] or "", found["alias"] or ""


def cache_folder() -> Path:
    """Return the folder of the cache of fetched models."""
    given = os.environ.get("MILONGA_CACHE")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "milonga"


def _place(digest: str) -> Path:
    """Return the place of the model folder with this digest in the cache."""
    return cache_folder() / "models" / digest.removeprefix("sha256:")


def _cached(name: str, version: str, digest: str) -> tuple[Path, ModelVersion]:
    """Return the folder with this digest, and its version in the registry."""
    folder = _place(digest)
    license = read_manifest(folder).license
    return folder, ModelVersion(name=name, version=version, digest=digest, license=license)


def _intact(folder: Path, digest: str) -> bool:
    """Return whether `folder` exists and has this digest. A damaged folder is deleted."""
    if not folder.is_dir():
        return False
    try:
        verify_manifest(folder, digest)
    except ModelError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _download(source: str, folder: Path, digest: str, uri: str) -> None:
    """Move the artifacts at `source` to `folder`: all of them, verified, or none."""
    from mlflow.artifacts import download_artifacts

    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f"{_PART}*"):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=folder.parent))
        try:
            fetched = Path(download_artifacts(artifact_uri=source, dst_path=str(part), tracking_uri=uri))
        except OSError as error:
            if type(error).__module__.startswith("requests"):
                raise _unreachable(uri, _reason(error)) from error
            raise
        except Exception as error:  # several libraries' errors, by the kind of store
            raise _unreachable(uri, _reason(error)) from error
        verify_manifest(fetched, digest)
        try:
            fetched.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
    except OSError as error:
        raise OutputError(
            f"{folder.parent} can't be written: {error.strerror or error}; set MILONGA_CACHE elsewhere"
        ) from error
    except DigestMismatchError as error:
        raise DigestMismatchError(
            f"what the registry {shown(uri)} gave is not {digest}, which it was registered as; register the "
            "model again"
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _ask(uri: str) -> None:
    """Send one small request to a server, without retries."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    response = http_request(  # type: ignore[no-untyped-call]
        get_default_host_creds(uri),  # type: ignore[no-untyped-call]
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "GET",
        max_retries=0,
        timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
        raise_on_status=False,
    )
    if response.status_code in (401, 403):
        raise ServiceUnavailableError(
            f"the MLflow server {shown(uri)} refused us ({response.status_code}); set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if response.status_code != 200:
        raise _unreachable(uri, f"it answers with status {response.status_code}")


def _in_time(question: Callable[[], Answer], uri: str) -> Answer:
    """Return what `question` returns, or raise in time: the lookup of a host's name has no timeout."""
    answers: list[Answer] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name="mlflow-connect", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 1)
    if errors:
        raise errors[0]
    if not answers:
        raise _unreachable(uri, f"no answer in {ANSWER_SECONDS:.0f} s")
    return answers[0]


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        raise OutputError(
            f"{path} can't be made: {error.strerror}; go to another folder, or set MLFLOW_TRACKING_URI"
        ) from error


def _unreachable(uri: str, reason: str) -> ServiceUnavailableError:
    return ServiceUnavailableError(
        f"the MLflow server {shown(uri)} can't be used: {reason}; start it, or correct MLFLOW_TRACKING_URI "
        f"(without it: {LOCAL_STORE} in the current folder)"
    )


def _not_installed(name: str) -> ModelError:
    return ModelError(
        f"an MLflow registry needs {name}, which is not installed; pip install '{name}>=3.17.2,<3.18', or "
        "download the model and give file:PATH"
    )


def _reason(error: BaseException) -> str:
    """Return the innermost of the errors that HTTP libraries wrap into each other, in one line."""
    text = " ".join(str(error).split())
    inner = re.findall(r"(?:\[Errno -?\d+\] |timed out|timeout)[^'\")]*", text)
    return (inner[-1] if inner else text[:200]).strip() or type(error).__name__
