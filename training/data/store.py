"""What the stages leave on disk, and how: whole files, rows that are there or not, work that goes on.

A stage's folder holds ``run.json`` (the settings and inputs that its content follows from), what it makes,
and, once all is made, ``report.json``.
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
"""An object of JSON."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def digest_of(value: object) -> str:
    """SHA-256 in hex of what JSON can hold; the same wherever and whenever it is taken."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 in hex of a file's content. Raises `InvalidInputError` where it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise invalid("input", f"{path} can't be read: {error.strerror}; run the stage before it") from error


def invalid(field: str, description: str) -> InvalidInputError:
    """The error of one wrong field."""
    return InvalidInputError(FieldViolation(field, description))


def claim(output: Path, settings: Mapping[str, Plain], free: Collection[str] = ()) -> Row | None:
    """Make `output` the folder of a stage with these settings; its report, if it is complete already.

    `free` are settings that its content does not depend on. Raises `InvalidInputError` where other settings
    made what is there, `OutputError` where the folder can't be used.
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
    """Write the report, which says that all else is there; return it as `claim` will."""
    write_json(output / REPORT, report)
    return read_json(output / REPORT)


def read_json(path: Path) -> Row:
    """The object in a file. Raises `InvalidInputError`."""
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise invalid("input", f"{path} can't be read: {error}; run the stage that makes it") from error
    return content


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The objects of a file of JSON lines. Raises `InvalidInputError`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise invalid("input", f"{path} can't be read: {error}; run the stage that makes it") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, whole or not at all."""
    write_atomically(path, "".join(_line(row) for row in rows))


class RowLog:
    """JSON lines that grow by one at a time.

    A line that was cut off in writing is dropped at the next open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        """What is there."""
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
        """Add a line, which a process that is killed right after has written all the same."""
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
    """Cut a sequence into pieces of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
