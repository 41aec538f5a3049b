"""The manifest of a model folder: name, version, licence, and a digest over every file.

It is the file ``milonga.json`` in the folder::

    {"format": 1, "name": "mini", "version": "1", "license": "Apache-2.0",
     "files": {"unet/config.json": "<sha256>", …}, "digest": "sha256:<sha256>"}

The digest is the SHA-256 of the sorted lines ``<path> <sha256>``, each ended by a line feed.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services.errors import DigestMismatchError, ModelFormatError, ModelNotFoundError
from services.files import describe_path, sha256_of

MANIFEST_NAME = "milonga.json"
"""File name of the manifest in a model folder."""

ADAPTER_CONFIG = "adapter_config.json"
"""File that only the folder of an adapter has."""

READY_MADE = "ready-made.json"
"""File that only a folder of own weights has: the rest comes from packages (`services.models.ready_made`)."""

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
"""What a digest looks like."""

FORMAT = 1
"""Version of the manifest's own format."""

_LISTED = 5
"""Number of files that an error message names; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The identity of a model folder."""

    name: str
    """Name of the model."""
    version: str
    """Version of the weights; ``unversioned`` for a folder without a manifest."""
    license: str
    """Licence of the weights: an SPDX identifier if there is one, or ``unknown``."""
    files: dict[str, str]
    """SHA-256 in hex of every file, by its path in the folder with forward slashes."""
    digest: str
    """``sha256:`` and the hex SHA-256 over `files`; model URIs pin it."""
    format: int = FORMAT
    """Version of this format."""


def write_manifest(folder: Path, name: str, version: str, license: str) -> Manifest:
    """Hash every file of `folder`, write the manifest there atomically, and return it."""
    manifest = _manifest_of(folder, name=name, version=version, license=license)
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{MANIFEST_NAME}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the manifest from a service's user
        os.replace(temporary, folder / MANIFEST_NAME)
    except BaseException:
        os.unlink(temporary)
        raise
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of `folder`, without verifying files.

    For a folder without a manifest, return one with the folder's name, ``unversioned`` and licence
    ``unknown``.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFormatError: the manifest is malformed.
    """
    _require_folder(folder)
    path = folder / MANIFEST_NAME
    if not path.exists():
        return _manifest_of(folder, name=folder.resolve().name, version="unversioned", license="unknown")
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(
            f"{path} is not a manifest ({error}); rewrite it, or fetch the model again"
        ) from error


def verify_manifest(folder: Path, expected_digest: str | None = None) -> Manifest:
    """Return the manifest of `folder` after verifying every file.

    `expected_digest` (``sha256:HEX``) is the pin of a model URI.

    Raises:
        DigestMismatchError: a file differs from the manifest, or the digest from the pin.
        ModelNotFoundError, ModelFormatError: as `read_manifest`.
    """
    manifest = read_manifest(folder)
    found = hash_files(folder)
    if found != manifest.files or digest_of_files(found) != manifest.digest:
        differing = sorted(path for path, _ in found.items() ^ manifest.files.items())
        paths = list(dict.fromkeys(differing)) or [MANIFEST_NAME]
        more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        known = ((path, describe_path(folder / path)) for path in paths)
        cause = next((f"{path} is {what}" for path, what in known if what), "fetch the model again")
        raise DigestMismatchError(
            f"{folder} differs from its manifest: {', '.join(paths[:_LISTED])}{more}; {cause}"
        )
    if expected_digest not in (None, manifest.digest):
        raise DigestMismatchError(
            f"{folder} holds {manifest.digest}, not {expected_digest}; correct the pin or the model URI"
        )
    return manifest


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 in hex of every file under `folder`, by relative path.

    Skips the manifest, hidden files and model cards (``*.md``, which may quote the digest). Follows links, of
    which the hub's cache consists. A process hashes a folder once, and again if a file's name, size or
    modification time differs.
    """
    folder = folder.resolve()
    return _hashed(
        folder,
        [path for path in sorted(folder.rglob("*")) if path.is_file() and _counts(path.relative_to(folder))],
    )


def hash_file(path: Path) -> str:
    """Return the SHA-256 in hex of a file, cached as in `hash_files`. Raises OSError."""
    return _hashed(path.parent, [path])[path.name]


def _hashed(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    stats = [(path, path.stat()) for path in files]
    state = tuple(
        (str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats
    )
    return dict(_hashes(folder, state))


@functools.lru_cache(maxsize=256)
def _hashes(folder: Path, state: tuple[tuple[str | int, ...], ...]) -> tuple[tuple[str, str], ...]:
    return tuple(hash_each(folder, [Path(str(name)) for name, *_ in state]))


def hash_each(folder: Path, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Yield the path of each file relative to `folder`, and its SHA-256 in hex. Reads every byte."""
    for path in files:
        yield path.relative_to(folder).as_posix(), sha256_of(path)


def _counts(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.as_posix() != MANIFEST_NAME and relative.suffix != ".md"


def digest_of_files(files: dict[str, str]) -> str:
    """Return ``sha256:HEX`` over the sorted lines ``path sha256`` of `files`."""
    lines = "".join(f"{path} {sha}\n" for path, sha in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _manifest_of(folder: Path, *, name: str, version: str, license: str) -> Manifest:
    _require_folder(folder)
    files = hash_files(folder)
    return Manifest(name=name, version=version, license=license, files=files, digest=digest_of_files(files))


def _parse(data: dict[str, Any]) -> Manifest:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, this release reads {FORMAT}")
    texts = {key: data[key] for key in ("name", "version", "license", "digest")}
    files = {str(path): str(sha) for path, sha in data["files"].items()}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("name, version, license and digest must be strings")
    return Manifest(files=files, **texts)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the path of a model folder")
