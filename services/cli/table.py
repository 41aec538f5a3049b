"""Tables: aligned where a person reads them, tab-separated where a program does."""

import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | float
"""Text, or a number that is rounded for the eye."""


def print_lines(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a line of tab-separated cells for the `header`, if there is one, and for each row."""
    for row in ([header] if header else []) + list(rows):
        print("\t".join(_exact(cell) for cell in row))
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, stderr: bool = False) -> None:
    """Print an aligned table; numbers stand under each other."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        numeric = all(not isinstance(row[index], str) for row in rows)
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        # As Text: file names and prompts hold brackets that are no markup.
        table.add_row(*(Text(cell if isinstance(cell, str) else f"{cell:.3f}") for cell in row))
    Console(stderr=stderr, highlight=False, soft_wrap=False).print(table)


def is_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def _exact(cell: Cell) -> str:
    # A tab or line feed in a file's name would make another cell or row of it.
    return re.sub(r"\s", " ", cell) if isinstance(cell, str) else f"{cell:.6f}"
