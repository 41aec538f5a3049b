"""Audio files that a command is given: their content, and their names in messages."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.errors import invalid

_MAX_BATCH_BYTES = 128 * 2**20
"""Maximum bytes of the clips in one call, as files or decoded; a single larger clip is a call of its own."""
_MAX_FILE_BYTES = 192 * 2**20
"""Largest file that is read: a minute in the widest format. It also fits into a message to a service."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioFile:
    """An audio file."""

    path: Path
    """Path of the file."""
    location: str
    """The file as the user named it; the results use this name."""
    place: str
    """The field in errors: the file, or the line of a list."""

    def read(self) -> bytes:
        """Return the file's content.

        Raises:
            InvalidInputError: the path can't be read, is no file, or the file is too large.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise invalid(self.place, self._about("is no file; give an audio file"))
            size = self.path.stat().st_size
            if size > _MAX_FILE_BYTES:
                limit = f"the limit is {_MAX_FILE_BYTES / 2**20:.0f}; shorten it"
                raise invalid(self.place, self._about(f"has {size / 2**20:.0f} MiB, {limit}"))
            return self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            reason = getattr(error, "strerror", None) or error
            raise invalid(self.place, self._about(f"can't be read: {reason}")) from error

    def _about(self, description: str) -> str:
        return description if self.place == self.location else f"location {self.location} {description}"


def printable(name: str) -> str:
    """Return a file name with bytes that are not UTF-8 replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def batches(items: Sequence[Item], sizes: Sequence[int], most: int) -> Iterator[Sequence[Item]]:
    """Yield `items` in batches of at most `most` of them, and of at most `_MAX_BATCH_BYTES`."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == most or total + size > _MAX_BATCH_BYTES):
            yield items[start:index]
            start, total = index, 0
        total += size
    yield items[start:]
