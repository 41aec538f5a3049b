"""Progress bars; in a log, as of a Kubernetes Job, a line every `LINE_SECONDS` instead."""

import sys
from collections.abc import Iterable
from typing import Any, Final, TextIO, TypeVar

from tqdm import tqdm

LINE_SECONDS: Final = 15.0
"""Seconds between two lines in a log."""

_LINE: Final = (
    "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)

T = TypeVar("T")


def progress(
    work: Iterable[T] | None = None,
    *,
    total: int,
    desc: str,
    unit: str,
    initial: int = 0,
    disable: bool = False,
) -> "tqdm[T]":
    """Return a `tqdm` bar on standard error."""
    settings: dict[str, Any] = {"mininterval": 0.5}
    if not sys.stderr.isatty():
        settings = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1}
        settings |= {"bar_format": _LINE, "file": _Lines(sys.stderr)}
    disable = disable or total == 0
    return tqdm(work, total=total, desc=desc, unit=unit, initial=initial, disable=disable, **settings)


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


class _Lines:
    """Writes each state of a bar as a whole line: log collectors hold a line back until it ends."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last = ""

    def write(self, text: str) -> None:
        """Write the state of a bar, without its control characters."""
        line = text.strip("\r\n ")
        if line and line != self._last:
            self._last = line
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()
