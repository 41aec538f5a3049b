"""Files of the pipeline's stages: JSON, JSON Lines, digests, and a folder per stage.

A stage's folder contains ``run.json`` (the settings and inputs that determine its content), the output and,
once the stage is complete, ``report.json``. Files are written atomically, so that a stage can be resumed.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from services.errors import OutputError, invalid
from services.files import sha256_of, write_atomically
from training.loop.config import Plain
from training.loop.run_folder import RUN, claim_folder

REPORT = "report.json"

Row = dict[str, Any]
"""A JSON object."""

Item = TypeVar("Item")


def digest_of_value(value: object) -> str:
    """Return the SHA-256 in hex of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path, field: str = "input", remedy: str = "run the stage that makes it") -> str:
    """Return the SHA-256 in hex of a file. Raises `InvalidInputError` for `field` if it can't be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise invalid(field, f"{path} can't be read: {error.strerror}; {remedy}") from error


def claim(output: Path, settings: Mapping[str, Plain], free: Collection[str] = ()) -> Row | None:
    """Make `output` the folder of a stage with these settings; return its report if it is complete.

    `free` names settings that do not affect the content. Raises `InvalidInputError` if the folder belongs to
    other settings, `OutputError` if it can't be used.
    """
    try:
        claim_folder(output, settings, free=free)
    except OutputError:
        # Another shard created it at the same time.
        if not (output / RUN).exists():
            raise
        claim_folder(output, settings, free=free)
    report = output / REPORT
    return read_json(report) if report.exists() else None


def finish(output: Path, report: Row) -> Row:
    """Write the report, which marks the stage as complete, and return it as `claim` does."""
    write_json(output / REPORT, report)
    return read_json(output / REPORT)


def read_json(path: Path) -> Row:
    """Read a JSON object from a file. Raises `InvalidInputError`."""
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise invalid("input", f"{path} can't be read: {error}; run the stage that makes it") from error
    return content


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically. Raises `OutputError`."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Read the objects of a JSON Lines file. Raises `InvalidInputError`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise invalid("input", f"{path} can't be read: {error}; run the stage that makes it") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON Lines atomically. Raises `OutputError`."""
    write_atomically(path, "".join(_line(row) for row in rows))


class RowLog:
    """A JSON Lines file that rows are appended to. An incomplete last line is dropped on opening.

    All methods raise `OutputError` if the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        """All rows of the file."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = 0
            for line in content.splitlines(keepends=True):
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    break
                self.rows.append(row)
                whole += len(line)
            self._file = path.open("ab")
            if whole != len(content):
                self._file.truncate(whole)
        except OSError as error:
            raise OutputError(f"{path} can't be used: {error.strerror}; write elsewhere") from error

    def append(self, row: Row) -> None:
        """Append a row and flush it, so that it survives a kill of the process."""
        try:
            self._file.write(_line(row).encode())
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror}; make room") from error
        self.rows.append(row)

    def close(self) -> None:
        """Sync the file to disk and close it."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror}; make room") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield consecutive slices of `size` items; the last one may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
