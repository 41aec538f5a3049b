"""Where a Triton model repository lies: a folder, or S3, both named as Triton names them."""

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
    FieldViolation,
    InvalidInputError,
    ModelError,
    OutputError,
    ServiceUnavailableError,
)

LAST: Final = "served.json"
"""What is put last where a folder can't be put there whole, and removed first."""

_PART: Final = ".part-"
_STALE_SECONDS: Final = 86_400.0
_S3: Final = re.compile(
    r"s3://(?:(?P<scheme>https?)://)?(?:(?P<host>[0-9A-Za-z.-]+:[0-9]+)/)?"
    r"(?P<bucket>[0-9a-z.-]+)(?P<prefix>(?:/[0-9A-Za-z._-]+)*)/?"
)
"""Triton's own pattern; it takes no other characters."""
_S3_LIBRARIES: Final = ("boto3", "botocore", "s3transfer")
_S3_REFUSALS: Final = (
    "NoCredentialsError",
    "NoRegionError",
    "PartialCredentialsError",
    "S3UploadFailedError",
)
"""Errors that are no matter of reaching S3, beside those that carry its answer."""
_FORMS: Final = (
    "a folder, s3://BUCKET/PREFIX, s3://HOST:PORT/BUCKET/PREFIX or s3://https://HOST:PORT/BUCKET/PREFIX"
)


class Storage(Protocol):
    """Files under a place. Paths are relative to it and "/"-separated.

    Raises `OutputError` where a file can't be read or written, `ServiceUnavailableError` where S3 does not
    answer.
    """

    place: str
    """As it was given."""

    def read(self, path: str) -> bytes | None:
        """The file at `path`; None where there is none."""

    def write(self, path: str, data: bytes) -> None:
        """Write the file at `path`, so that whoever reads it finds the old or the new one."""

    def names(self, path: str) -> list[str]:
        """The children of the folder at `path`, in order; none where there is no folder."""

    def put_folder(self, path: str, files: Mapping[str, bytes | Path]) -> None:
        """Make the folder `path` of `files` (contents, or what to copy): whole or not at all.

        On S3 `LAST` comes last: without it the folder is not whole.
        """

    def remove(self, path: str) -> None:
        """Remove a folder and all in it, if it is there."""


def open_storage(place: str) -> Storage:
    """The storage at a folder's path, or at S3 in a form that Triton takes. Nothing is read yet.

    Credentials are what boto3 finds. Triton reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
    AWS_DEFAULT_REGION.

    Raises:
        InvalidInputError: neither of the two.
        ModelError: boto3 is not installed.
    """
    if place.startswith("s3://"):
        return S3Storage(place, _s3_client(S3Place.parse(place)))
    if not place or re.match(r"[\w+.-]+://", place):
        raise _not_a_place(place)
    return FolderStorage(place)


class FolderStorage:
    """A folder of this machine. See `Storage`. It comes to be with the first file."""

    def __init__(self, place: str) -> None:
        """Nothing is read yet."""
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
        """See `Storage`. It goes at once, its files after it."""
        target = self._root / path
        with self._writing(target) as part, contextlib.suppress(FileNotFoundError):
            target.rename(part)

    @contextlib.contextmanager
    def _writing(self, target: Path) -> Iterator[Path]:
        """A path beside `target` for what is to be there, or was; gone at the end, whatever comes.

        Hidden, and within the model's folder: Triton takes it for no model and no version.
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
                f"{target} can't be written: {error.strerror or error}; correct that, or give another folder"
            ) from error
        finally:
            _drop(part)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Place:
    """A place on S3, taken apart."""

    endpoint: str | None
    """URL of the server; None: Amazon's."""
    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""

    @classmethod
    def parse(cls, place: str) -> "S3Place":
        """Take `place` apart as Triton does. Raises `InvalidInputError`."""
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
        """`client` is boto3's, for the server that `place` names. Nothing is called yet."""
        self.place, self._client, self._at = place, client, S3Place.parse(place)

    def read(self, path: str) -> bytes | None:
        """See `Storage`."""
        with self._asking(path):
            try:
                found = self._client.get_object(Bucket=self._at.bucket, Key=self._key(path))
            except self._client.exceptions.NoSuchKey:
                return None
            data: bytes = found["Body"].read()
            return data

    def write(self, path: str, data: bytes) -> None:
        """See `Storage`."""
        with self._asking(path):
            self._client.put_object(Bucket=self._at.bucket, Key=self._key(path), Body=data)

    def names(self, path: str) -> list[str]:
        """See `Storage`."""
        prefix = self._key(path).rstrip("/")
        prefix = f"{prefix}/" if prefix else ""
        names: set[str] = set()
        with self._asking(path):
            for page in self._pages(prefix, Delimiter="/"):
                names |= {entry["Key"] for entry in page.get("Contents", ())}
                names |= {entry["Prefix"] for entry in page.get("CommonPrefixes", ())}
        return sorted(name for key in names if (name := key.removeprefix(prefix).strip("/")))

    def put_folder(self, path: str, files: Mapping[str, bytes | Path]) -> None:
        """See `Storage`. What a folder that is not whole holds goes first."""
        if LAST in self.names(path):
            raise OutputError(f"{self._shown(path)} is there already; remove it")
        self.remove(path)
        with self._asking(path):
            for name in sorted(files, key=lambda name: name == LAST):
                content, key = files[name], self._key(f"{path}/{name}")
                if isinstance(content, Path):
                    self._client.upload_file(str(content), self._at.bucket, key)
                else:
                    self._client.put_object(Bucket=self._at.bucket, Key=key, Body=content)

    def remove(self, path: str) -> None:
        """See `Storage`."""
        with self._asking(path):
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
    def _asking(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # boto3 is imported only where it is used
            shown, reason = self._shown(path), " ".join(str(error).split())
            if type(error).__module__.partition(".")[0] not in _S3_LIBRARIES:
                if isinstance(error, OSError):  # of a file here, which is to be put there
                    raise OutputError(f"{shown}: {reason}") from error
                raise
            if not hasattr(error, "response") and type(error).__name__ not in _S3_REFUSALS:
                raise ServiceUnavailableError(f"{shown}: S3 does not answer: {reason}") from error
            raise OutputError(
                f"{shown}: {reason}; correct the place, or AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
                "AWS_DEFAULT_REGION"
            ) from error


def _s3_client(place: S3Place) -> Any:
    try:
        boto3, botocore = importlib.import_module("boto3"), importlib.import_module("botocore.config")
    except ImportError as error:
        raise ModelError(
            "a repository on S3 needs boto3, which is not installed; pip install 'milonga[store]'"
        ) from error
    # With a server of one's own the bucket is in the path, as Triton has it there.
    style = {"addressing_style": "path"} if place.endpoint else {}
    config = botocore.Config(s3=style, retries={"mode": "standard", "max_attempts": 3}, connect_timeout=10)
    return boto3.client("s3", endpoint_url=place.endpoint, config=config)


def _not_a_place(place: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation("--repository", f"is {place!r}, must be {_FORMS}"))


def _drop(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
