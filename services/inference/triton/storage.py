"""Storage of a Triton model repository: a folder or S3, with the locations that Triton accepts."""

import contextlib
import importlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from services.errors import (
    InvalidInputError,
    ModelError,
    OutputError,
    ServiceUnavailableError,
    invalid,
)

LAST: Final = "served.json"
"""The file that is written last and removed first: without it, a folder on S3 is incomplete."""

_PART: Final = ".part-"
_STALE_SECONDS: Final = 86_400.0
_S3: Final = re.compile(
    r"s3://(?:(?P<scheme>https?)://)?(?:(?P<host>[0-9A-Za-z.-]+:[0-9]+)/)?"
    r"(?P<bucket>[0-9a-z.-]+)(?P<prefix>(?:/[0-9A-Za-z._-]+)*)/?"
)
"""Triton's own pattern for S3 locations."""
_S3_LIBRARIES: Final = ("boto3", "botocore", "s3transfer")
_S3_REFUSALS: Final = (
    "NoCredentialsError",
    "NoRegionError",
    "PartialCredentialsError",
    "S3UploadFailedError",
)
"""Errors without a response of S3 that don't mean that S3 is unreachable."""
_FORMS: Final = (
    "a folder, s3://BUCKET/PREFIX, s3://HOST:PORT/BUCKET/PREFIX or s3://https://HOST:PORT/BUCKET/PREFIX"
)


class Storage(Protocol):
    """Files of a repository. Paths are relative to its location and separated by "/".

    Methods raise `OutputError` if a file can't be read or written, and `ServiceUnavailableError` if S3 does
    not respond.
    """

    place: str
    """Location, as the user gave it."""

    def read(self, path: str) -> bytes | None:
        """Return the content of the file at `path`; None if there is no such file."""

    def write(self, path: str, data: bytes) -> None:
        """Write the file at `path` atomically: readers see the old or the new content."""

    def names(self, path: str) -> list[str]:
        """Return the sorted names of the children of the folder `path`; none if there is no such folder."""

    def put_folder(self, path: str, files: Mapping[str, bytes | Path]) -> None:
        """Create the folder `path` with `files` (contents, or files to copy) atomically.

        On S3 the file `LAST` is written last: without it, the folder is incomplete.
        """

    def remove(self, path: str) -> None:
        """Remove the folder `path`, if it exists."""


def open_storage(place: str) -> Storage:
    """Return the storage at a folder's path, or at an S3 location in one of Triton's forms. Reads nothing.

    boto3 finds the credentials. Triton itself reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
    AWS_DEFAULT_REGION.

    Raises:
        InvalidInputError: `place` is neither a folder nor an S3 location.
        ModelError: boto3 is not installed.
    """
    if place.startswith("s3://"):
        return S3Storage(place, _s3_client(S3Place.parse(place)))
    if not place or re.match(r"[\w+.-]+://", place):
        raise _not_a_place(place)
    return FolderStorage(place)


class FolderStorage:
    """A folder of this machine, created with the first file. See `Storage`."""

    def __init__(self, place: str) -> None:
        """Does not access the folder."""
        self.place = place
        self._root = Path(place).expanduser()

    def read(self, path: str) -> bytes | None:
        """See `Storage`."""
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{self._root / path} can't be read: {error.strerror or error}") from error

    def write(self, path: str, data: bytes) -> None:
        """See `Storage`."""
        target = self._root / path
        with self._writing(target) as part:
            part.write_bytes(data)
            os.replace(part, target)

    def names(self, path: str) -> list[str]:
        """See `Storage`."""
        try:
            return sorted(p.name for p in (self._root / path).iterdir() if not p.name.startswith(_PART))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise OutputError(f"{self._root / path} can't be read: {error.strerror or error}") from error

    def put_folder(self, path: str, files: Mapping[str, bytes | Path]) -> None:
        """See `Storage`."""
        target = self._root / path
        with self._writing(target) as part:
            for name, content in files.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, part / name)
                else:
                    (part / name).write_bytes(content)
            part.rename(target)

    def remove(self, path: str) -> None:
        """See `Storage`. Renames the folder first, so that it disappears at once."""
        target = self._root / path
        with self._writing(target) as part, contextlib.suppress(FileNotFoundError):
            target.rename(part)

    @contextlib.contextmanager
    def _writing(self, target: Path) -> Iterator[Path]:
        """Yield a temporary path next to `target`; remove it at the end.

        It is hidden, and within the model's folder, so that Triton does not take it for a model or a version.
        """
        part = target.parent / f"{_PART}{target.name}-{uuid.uuid4().hex[:8]}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in target.parent.glob(f"{_PART}*"):
                if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                    _drop(old)
            yield part
        except OSError as error:
            raise OutputError(
                f"{target} can't be written: {error.strerror or error}; fix that, or give another folder"
            ) from error
        finally:
            _drop(part)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Place:
    """A parsed S3 location."""

    endpoint: str | None
    """URL of the server; None: Amazon's."""
    bucket: str
    """Name of the bucket."""
    prefix: str
    """Prefix of keys, without leading and trailing slashes; may be empty."""

    @classmethod
    def parse(cls, place: str) -> "S3Place":
        """Parse an S3 location as Triton does. Raises `InvalidInputError`."""
        found = _S3.fullmatch(place)
        if found is None or (found["scheme"] and not found["host"]):
            raise _not_a_place(place)
        return cls(
            endpoint=f"{found['scheme'] or 'http'}://{found['host']}" if found["host"] else None,
            bucket=found["bucket"],
            prefix=found["prefix"].strip("/"),
        )


class S3Storage:
    """A prefix of a bucket. See `Storage`."""

    def __init__(self, place: str, client: Any) -> None:
        """Use boto3's `client` for the server of `place`. Does not call it."""
        self.place, self._client, self._at = place, client, S3Place.parse(place)

    def read(self, path: str) -> bytes | None:
        """See `Storage`."""
        with self._s3_errors(path):
            try:
                found = self._client.get_object(Bucket=self._at.bucket, Key=self._key(path))
            except self._client.exceptions.NoSuchKey:
                return None
            data: bytes = found["Body"].read()
            return data

    def write(self, path: str, data: bytes) -> None:
        """See `Storage`."""
        with self._s3_errors(path):
            self._client.put_object(Bucket=self._at.bucket, Key=self._key(path), Body=data)

    def names(self, path: str) -> list[str]:
        """See `Storage`."""
        prefix = self._key(path).rstrip("/")
        prefix = f"{prefix}/" if prefix else ""
        names: set[str] = set()
        with self._s3_errors(path):
            for page in self._pages(prefix, Delimiter="/"):
                names |= {entry["Key"] for entry in page.get("Contents", ())}
                names |= {entry["Prefix"] for entry in page.get("CommonPrefixes", ())}
        return sorted(name for key in names if (name := key.removeprefix(prefix).strip("/")))

    def put_folder(self, path: str, files: Mapping[str, bytes | Path]) -> None:
        """See `Storage`. Removes the files of an incomplete folder first."""
        if LAST in self.names(path):
            raise OutputError(f"{self._shown(path)} exists already; remove it")
        self.remove(path)
        with self._s3_errors(path):
            for name in sorted(files, key=lambda name: name == LAST):
                content, key = files[name], self._key(f"{path}/{name}")
                if isinstance(content, Path):
                    self._client.upload_file(str(content), self._at.bucket, key)
                else:
                    self._client.put_object(Bucket=self._at.bucket, Key=key, Body=content)

    def remove(self, path: str) -> None:
        """See `Storage`."""
        with self._s3_errors(path):
            pages = self._pages(f"{self._key(path)}/")
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
            for key in sorted(keys, key=lambda key: not key.endswith(f"/{LAST}")):
                self._client.delete_object(Bucket=self._at.bucket, Key=key)

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._at.prefix, path) if part)

    def _pages(self, prefix: str, **options: str) -> Any:
        pages = self._client.get_paginator("list_objects_v2")
        return pages.paginate(Bucket=self._at.bucket, Prefix=prefix, **options)

    def _shown(self, path: str) -> str:
        return f"{self.place.rstrip('/')}/{path}"

    @contextlib.contextmanager
    def _s3_errors(self, path: str) -> Iterator[None]:
        """Convert boto3's errors about `path` to `OutputError` or `ServiceUnavailableError`."""
        try:
            yield
        except Exception as error:  # boto3's classes can't be named here: it is imported on demand
            shown, reason = self._shown(path), " ".join(str(error).split())
            if type(error).__module__.partition(".")[0] not in _S3_LIBRARIES:
                if isinstance(error, OSError):  # a local file to upload can't be read
                    raise OutputError(f"{shown}: {reason}") from error
                raise
            if not hasattr(error, "response") and type(error).__name__ not in _S3_REFUSALS:
                raise ServiceUnavailableError(f"{shown}: S3 does not respond: {reason}") from error
            raise OutputError(
                f"{shown}: {reason}; correct the location, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                "AWS_DEFAULT_REGION"
            ) from error


def _s3_client(place: S3Place) -> Any:
    try:
        boto3, botocore = importlib.import_module("boto3"), importlib.import_module("botocore.config")
    except ImportError as error:
        raise ModelError(
            "a repository on S3 needs boto3, which is not installed; pip install 'milonga[store]'"
        ) from error
    # With an endpoint, Triton puts the bucket into the path of the URL, so do the same.
    style = {"addressing_style": "path"} if place.endpoint else {}
    config = botocore.Config(s3=style, retries={"mode": "standard", "max_attempts": 3}, connect_timeout=10)
    return boto3.client("s3", endpoint_url=place.endpoint, config=config)


def _not_a_place(place: str) -> InvalidInputError:
    return invalid("--repository", f"is {place!r}, must be {_FORMS}")


def _drop(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
