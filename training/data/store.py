"""Files of the stages of preference data: settings, rows, reports.

A stage's folder holds ``run.json`` (the settings and inputs that determine its content), its output, and,
once that is complete, ``report.json``.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from services.errors import FieldViolation, InvalidInputError, OutputError
from services.files import write_atomically
from training.loop.config import Plain
from training.loop.run_folder import RUN, claim_folder

REPORT = "report.json"

Row = dict[str, Any]
"""A JSON object."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def digest_of(value: object) -> str:
    """Return the SHA-256 in hex of a JSON value, the same on any machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 in hex of a file's content. Raises `InvalidInputError` if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise invalid("input", f"{path} can't be read: {error.strerror}; run the stage before it") from error


def invalid(field: str, description: str) -> InvalidInputError:
    """Return the error of one invalid field."""
    return InvalidInputError(FieldViolation(field, description))


def claim(output: Path, settings: Mapping[str, Plain], free: Collection[str] = ()) -> Row | None:
    """Make `output` the folder of a stage with these settings; return its report if it is complete already.

    `free` are settings that do not affect its content. Raises `InvalidInputError` if `output` was made with
    other settings, `OutputError` if the folder can't be used.
    """
    try:
        claim_folder(output, settings, free=free)
    except OutputError:
        # Another shard, begun at the same moment, was first.
        if not (output / RUN).exists():
            raise
        claim_folder(output, settings, free=free)
    report = output / REPORT
    return read_json(report) if report.exists() else None


def finish(output: Path, report: Row) -> Row:
    """Write the report, which marks the stage as complete; return it as `claim` will."""
    write_json(output / REPORT, report)
    return read_json(output / REPORT)


def read_json(path: Path) -> Row:
    """Read the JSON object in a file. Raises `InvalidInputError`."""
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise invalid("input", f"{path} can't be read: {error}; run the stage that makes it") from error
    return content


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Read the objects of a file of JSON lines. Raises `InvalidInputError`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise invalid("input", f"{path} can't be read: {error}; run the stage that makes it") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, whole or not at all."""
    write_atomically(path, "".join(_line(row) for row in rows))


class RowLog:
    """A file of JSON lines that grows row by row. Opening it drops a last line that was cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        """The rows so far."""
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
        """Append a line, which is in the file even if the process is killed right after."""
        try:
            self._file.write(_line(row).encode())
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror}; make room") from error
        self.rows.append(row)

    def close(self) -> None:
        """Wait until the lines are on the disk, and close."""
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
    """Yield pieces of `size` items, the last one maybe shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
