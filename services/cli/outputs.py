"""Output of commands: checks of output paths, and tables.

Tables are aligned on a terminal and tab-separated elsewhere.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.errors import OutputError, invalid
from services.files import temporary_name

ENCODINGS = {".wav": "wav", ".flac": "flac", ".ogg": "ogg", ".mp3": "mp3", ".opus": "opus"}
"""Encoding by file extension."""


def encoding_of(path: Path) -> str:
    """Return the encoding for the extension of `path`. Raises `InvalidInputError` for an unknown one."""
    try:
        return ENCODINGS[path.suffix.lower()]
    except KeyError:
        raise invalid("--output", f"{path} must end in one of {', '.join(ENCODINGS)}") from None


def check_writable(path: Path) -> None:
    """Raise `OutputError` if `path` can't be written. Call it before making the content."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if not folder.is_dir():
        raise OutputError(f"{folder} does not exist; make it first, or write elsewhere")
    temporary = temporary_name(path)
    try:
        # os.access is not enough: for root, it calls a read-only file system writable.
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}; write elsewhere") from error


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents. Raises `OutputError` if that fails or it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} can't be made: {error.strerror}; write elsewhere") from error
    check_writable(folder / "x")


def numbered(path: Path, index: int, count: int) -> Path:
    """Return `path` if `count` is 1, otherwise ``clip-1.wav``, ``clip-2.wav``, … for index 0, 1, …"""
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")


Cell = str | float
"""Text, or a number, which `print_table` rounds to three decimals."""


def print_lines(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print tab-separated lines: the `header`, unless empty, and each row."""
    for row in ([header] if header else []) + list(rows):
        print("\t".join(_exact(cell) for cell in row))
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, stderr: bool = False) -> None:
    """Print an aligned table; columns of numbers are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        numeric = all(not isinstance(row[index], str) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        # As Text, not str: brackets in file names and prompts are no markup.
        table.add_row(*(Text(cell if isinstance(cell, str) else f"{cell:.3f}") for cell in row))
    Console(stderr=stderr, highlight=False, soft_wrap=False).print(table)


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return sys.stdout.isatty()


def _exact(cell: Cell) -> str:
    # A tab or line feed within a cell would start another cell or row.
    return re.sub(r"\s", " ", cell) if isinstance(cell, str) else f"{cell:.6f}"
