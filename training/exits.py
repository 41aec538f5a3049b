"""What the commands that change a cluster share: exit codes finer than other commands', and timed lines."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final

import typer

from services.errors import (
    DeadlineExceededError,
    InvalidInputError,
    MilongaError,
    ModelError,
    OutputError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
    UnauthenticatedError,
)

ExitCodes = Mapping[type[BaseException], int]
"""Exit code by error."""

EXIT_CODES: Final[ExitCodes] = MappingProxyType(
    {
        InvalidInputError: 2,
        ModelError: 2,
        QueueFullError: 4,
        DeadlineExceededError: 4,
        ServiceUnavailableError: 6,
        UnauthenticatedError: 6,
        OutputError: 6,
        RequestCancelledError: 130,
        KeyboardInterrupt: 130,
    }
)
"""Those that these commands share. Codes 3, 5, 7 and 8 are left to the commands."""


def exit_code(error: BaseException, codes: ExitCodes) -> int:
    """That of the nearest class; 1 for what is not there: our fault."""
    return next((codes[kind] for kind in type(error).__mro__ if kind in codes), 1)


def one_line(error: BaseException) -> str:
    """What an error says, for people, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    if isinstance(error, MilongaError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def exit_codes(codes: ExitCodes) -> Iterator[None]:
    """End the command with one of `codes` where an error ends it, and say that in one line."""
    try:
        yield
    except (MilongaError, KeyboardInterrupt) as error:
        if os.environ.get("MILONGA_DEBUG"):
            raise
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(exit_code(error, codes)) from error


def timed_lines() -> Callable[[str], None]:
    """Says lines to people, on standard error, with the seconds since now."""
    start = time.monotonic()

    def tell(line: str) -> None:
        typer.echo(f"{time.monotonic() - start:7.1f} s  {line}", err=True)

    return tell
