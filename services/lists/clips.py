"""The clips that lists name: files, and cells of Parquet files."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Final

AUDIO_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif")
"""Suffixes of sound files that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedClip:
    """A cell of a Parquet column of ``{bytes, path}``, as Hugging Face's datasets write it."""

    path: Path
    """The Parquet file."""
    column: str
    group: int
    """Row group."""
    row: int
    """Row in the row group."""

    def read_bytes(self, audio_root: Path) -> bytes:
        """Return the encoded clip; one without bytes is a file below `audio_root`.

        Raises OSError or ValueError.
        """
        cell = _column(self.path, self.column, self.group)[self.row] or {}
        content: bytes | None = cell.get("bytes")
        if content is None:
            if not cell.get("path"):
                raise ValueError("holds neither bytes nor a path")
            return find_audio(cell["path"], audio_root).read_bytes()
        return content


@functools.lru_cache(maxsize=4)
def _column(path: Path, column: str, group: int) -> list[dict[str, Any] | None]:
    """Read one column of one row group; cached, since clips are read in order."""
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        with ParquetFile(path) as file:
            rows: list[dict[str, Any] | None] = file.read_row_group(group, [column])[column].to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error
    return rows


def find_audio(text: str, root: Path) -> Path:
    r"""Return the path of the audio file that a list calls `text`, which may be a Windows path (``a\b.wav``).

    An absolute path that exists is returned unchanged. Lists often contain paths of another machine, so
    otherwise the longest suffix of `text` that exists under `root` is taken; if none exists, all of it.
    """
    path: PurePath = Path(text)
    if path.is_absolute() and exists(Path(path)):
        return Path(path)
    if "\\" in text and not exists(root / path):
        path = PureWindowsPath(text)
    parts = path.parts[1:] if path.anchor else path.parts
    for start in range(len(parts)):
        if exists(found := root.joinpath(*parts[start:])):
            return found
    return root.joinpath(*parts)


def exists(path: Path) -> bool:
    """Return whether there is a file; there is none of a name that can't be one."""
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        return path.exists()
    return False
