"""Exit codes and progress lines of the commands that change a cluster; finer than other commands' codes."""

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
"""Exit code by error class."""

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
"""Codes that these commands share. Each command defines its own 3, 5, 7 and 8."""


def exit_code(error: BaseException, codes: ExitCodes) -> int:
    """Return the code of the nearest base class in `codes`; 1, a bug, where there is none."""
    return next((codes[kind] for kind in type(error).__mro__ if kind in codes), 1)


def one_line(error: BaseException) -> str:
    """Return the message of `error` in one line; with its class where it is not a `MilongaError`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    if isinstance(error, MilongaError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def exit_codes(codes: ExitCodes) -> Iterator[None]:
    """Print an error raised inside in one line, and end the command with its code in `codes`."""
    try:
        yield
    except (MilongaError, KeyboardInterrupt) as error:
        if os.environ.get("MILONGA_DEBUG"):
            raise
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(exit_code(error, codes)) from error


def timed_lines() -> Callable[[str], None]:
    """Return a function that prints a line to standard error, with the seconds since this call."""
    start = time.monotonic()

    def report(line: str) -> None:
        typer.echo(f"{time.monotonic() - start:7.1f} s  {line}", err=True)

    return report
