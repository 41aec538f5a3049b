"""What is to be tracked, on disk before anything is sent: the journal is the truth, MLflow has a copy.

``journal.jsonl``  events, one a line, only ever appended: a run begins, its parameters, metrics, files, …
``sent.json``      how far each server has them, and under which ids it knows the runs
``files/``         the artifacts

An event carries its own time. So one that is sent twice is the same event, and the server keeps it once.
The journal of a training loop (`training.loop.run_folder.Journal`) is another file: `Follower` reads it.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.errors import FieldViolation, InvalidInputError, OutputError

Event = dict[str, Any]
"""`run` (key of the run), `kind`, `time` (milliseconds), and what the kind needs."""

JOURNAL = "journal.jsonl"
MARKS = "sent.json"
FILES = "files"


@dataclass(kw_only=True, slots=True)
class Mark:
    """How far one server has the journal."""

    offset: int = 0
    """Bytes of the journal that it has."""
    runs: dict[str, str] = field(default_factory=dict)
    """Its ids of our runs, by key."""


class TrackingJournal:
    """The folder of a tracked run. One process writes it at a time; its threads may all do so."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, made if missing; a last line that was cut off in writing is dropped.

        Raises `InvalidInputError` where another process has it, `OutputError` where it can't be written.
        """
        self.folder = folder
        self._lock = threading.Lock()
        try:
            (folder / FILES).mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refused must not come later, behind something else.
            self._file = (folder / JOURNAL).open("ab", buffering=0)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end = _whole_lines(folder / JOURNAL)
                if end < (folder / JOURNAL).stat().st_size:
                    os.truncate(folder / JOURNAL, end)
            except BaseException:
                self._file.close()
                raise
        except BlockingIOError as error:
            raise InvalidInputError(
                FieldViolation("--output", f"{folder} belongs to a run that is going on; wait for its end")
            ) from error
        except OSError as error:
            raise OutputError(f"{folder} can't be written: {error.strerror}; write elsewhere") from error

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()

    def write(self, *events: Event) -> None:
        """Append events: a killed process has written them all the same, a full disk none of them."""
        data = "".join(json.dumps(event) + "\n" for event in events).encode()
        with self._lock:
            before = os.fstat(self._file.fileno()).st_size
            try:
                while data:
                    data = data[self._file.write(data) :]
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.truncate(self.folder / JOURNAL, before)
                raise OutputError(
                    f"{self.folder / JOURNAL} can't be written: {error.strerror}; free some space"
                ) from error

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """Events from `offset` bytes on, each with the offset at its end. What is being written is left."""
        with (self.folder / JOURNAL).open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield json.loads(line), offset

    def mark(self, server: str) -> Mark:
        """How far `server` has the journal."""
        return Mark(**self._marks().get(server, {}))

    def set_mark(self, server: str, mark: Mark) -> None:
        """Write that down."""
        marks = self._marks() | {server: {"offset": mark.offset, "runs": mark.runs}}
        temporary = self.folder / f".{MARKS}.part"
        try:
            temporary.write_text(json.dumps(marks, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.folder / MARKS)
        except OSError as error:
            raise OutputError(f"{self.folder / MARKS} can't be written: {error.strerror}") from error

    def _marks(self) -> dict[str, dict[str, Any]]:
        try:
            marks: dict[str, dict[str, Any]] = json.loads((self.folder / MARKS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # lost: everything is sent again, and kept once
        return marks


class Follower:
    """Reads the journal that a training loop writes, as it grows: the loop may be in another process.

    A loop that goes on after a kill drops the rows of steps that it does again, and so writes a new file;
    then all of it is read again, and whoever reads must know which steps it had.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_id = (0, 0)
        self._offset = 0

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """What was added since the last call."""
        try:
            file = self.path.open("rb")
        except OSError:
            return  # not begun
        with file:
            status = os.fstat(file.fileno())
            file_id = (status.st_dev, status.st_ino)
            if file_id != self._file_id or status.st_size < self._offset:
                self._file_id, self._offset = file_id, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError:
                    self._offset = 0  # another file after all, under a number that was free again
                    return
                self._offset += len(line)
                yield row


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65_536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
