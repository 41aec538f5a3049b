"""The folder of a training run: its config, its journal, its checkpoints.

``run.json`` holds the settings of the run, ``journal.jsonl`` a line for each step and evaluation,
``checkpoints/step-…/`` the last two states. Settings and checkpoints are written under another name and
renamed; the journal is appended to, and a line that was cut off is dropped.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from services.errors import MilongaError, OutputError, invalid
from services.files import write_atomically
from services.models.folders import describe_weights
from training.loop.config import Plain, differences

CHECKPOINTS = "checkpoints"
JOURNAL = "journal.jsonl"
RUN = "run.json"
KEPT = 2
"""Checkpoints to keep: the last, and the one before in case the last is unreadable."""
GROWING: Final = "loop.steps"
"""Setting of a training that may grow when it is resumed."""


def finished_report(path: Path, settings: Mapping[str, Plain]) -> dict[str, Any] | None:
    """Return the report at `path` if it is of a run with the same settings (its ``settings``), else None."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = report["settings"] == json.loads(json.dumps(dict(settings)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if same else None


def claim_folder(
    folder: Path, settings: Mapping[str, Plain], *, fresh: bool = False, free: Collection[str] = ()
) -> None:
    """Make `folder` that of the run with these settings, or check that it is.

    Args:
        folder: made if missing.
        settings: the whole config, flat.
        fresh: delete what an earlier run left there, except its caches.
        free: settings that may differ from the earlier run's.

    Raises:
        InvalidInputError: an earlier run had other settings.
        OutputError: the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in (RUN, JOURNAL):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        path, text = folder / RUN, json.dumps(settings, indent=1) + "\n"
        old = path.read_text(encoding="utf-8") if path.exists() else text
        if old != text:
            before = json.loads(old)
            differing = {name for name in {*before, *settings} if name not in free}
            found = differences(
                {k: v for k, v in before.items() if k in differing},
                {k: v for k, v in settings.items() if k in differing},
            )
            if found:
                raise invalid(
                    "--resume",
                    f"{folder} holds a run with other settings ({'; '.join(found)}); give those, "
                    "--fresh to start over, or another --output",
                )
        if old != text or not path.exists():
            write_atomically(path, text)
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} can't be used: {error}; write elsewhere, or give --fresh") from error


def check_output(output: Path, marker: str) -> None:
    """Raise `OutputError` if `output` can't become a model's folder, or holds anything without `marker`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not (output / marker).exists():
        raise OutputError(f"{output} is there and was not made by a training; give another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent} can't be made: {error.strerror}; write elsewhere") from error


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any]) -> None:
    """Write ``step-…/state.pt`` into `folder`, whole or not at all, and drop all but the last `KEPT`.

    Raises `OutputError` if the disk is full or gone; older checkpoints are then untouched.
    """
    temporary = folder / ".writing"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with (temporary / "state.pt").open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        target = folder / f"step-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in _checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"the checkpoint of step {step} can't be written: {error}") from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Load the last readable checkpoint in `folder`, on the CPU; return None if there is none."""
    faults = []
    for path in reversed(_checkpoints(folder)):
        try:
            content: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file: several libraries' errors
            faults.append(f"{path}: {describe_weights(path / 'state.pt') or type(error).__name__}")
            continue
        if faults:
            print(f"warning: not readable, resuming from {path.name}: {'; '.join(faults)}", file=sys.stderr)
        return content
    if faults:
        raise MilongaError(f"no checkpoint is readable ({'; '.join(faults)}); give --fresh to start over")
    return None


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a journal, without a last one that was cut off."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Journal:
    """JSON lines, each with its `time` in milliseconds since 1970.

    Args:
        path: of the file.
        first: the step to resume from; rows from there on are dropped. None: all are kept.
    """

    def __init__(self, path: Path, first: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_journal(path) if first is None or row["step"] < first]
        if path.exists():
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.next_step = kept[-1]["step"] + 1 if kept else 0
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line, which is in the file even if the process is killed right after."""
        try:
            self._file.write(json.dumps({**row, "time": int(time.time() * 1000)}) + "\n")
            self._file.flush()
            self.next_step = row["step"] + 1
        except OSError as error:
            raise OutputError(f"{self._file.name} can't be written: {error.strerror}") from error

    def sync(self) -> None:
        """Wait until the lines are on the disk: no checkpoint is ahead of its journal."""
        os.fsync(self._file.fileno())


class JournalReader:
    """Reads a journal while a loop writes it, maybe in another process.

    A loop that resumes replaces the file, without the rows of steps that it does again. Then all of it is
    read again; the caller knows which steps it had.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = 0, 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """The whole rows added since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            for line in file:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row, self._offset = None, 0  # another file under the inode of the old one
                if row is None:
                    return
                self._offset += len(line)
                yield row


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))
