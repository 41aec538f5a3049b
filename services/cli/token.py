"""`milonga token`: make a caller's token, and its table for the file of callers."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Final, get_args

import typer

from services.cli.outputs import check_writable
from services.errors import FieldViolation, InvalidInputError, OutputError, invalid
from services.runtime.callers import NAME, Role
from services.runtime.tokens import new_token, token_digest

ROLES: Final = get_args(Role)


def token(
    name: Annotated[str, typer.Argument(help="Name of the caller.", metavar="NAME", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File for the token, readable by its owner only. Never overwritten.",
            show_default="NAME.token",
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Role: {', '.join(ROLES)}. Can be repeated.", metavar="ROLE", show_default="caller"
        ),
    ] = None,
    calls_per_minute: Annotated[
        float | None, typer.Option(help="Quota of calls.", show_default=False)
    ] = None,
    work_per_minute: Annotated[
        float | None,
        typer.Option(
            help="Quota of work units: clips times steps times seconds of generation, seconds of scoring.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a token for a caller of services, and print its table for the file of callers.

    Only the table is printed, which holds the token's digest; append it to the file of --callers-file. To
    replace a token, add the digest of a new one to the caller's list, hand out the new token, then remove the
    old digest. Services read the file again when it changes.
    """
    roles, quota = (
        role or ["caller"],
        {
            "calls_per_minute": calls_per_minute,
            "work_per_minute": work_per_minute,
        },
    )
    _check(name, roles, quota)
    path = output or Path(f"{name}.token")
    secret = new_token()
    _write_secret(path, secret)
    lines = [
        f'[callers."{name}"]',
        f"roles = {json.dumps(roles)}",
        f'tokens = ["{token_digest(secret)}"]',
        *(f"{key} = {value!r}" for key, value in quota.items() if value is not None),
        "",
    ]
    typer.echo("\n".join(lines))
    typer.echo(f"wrote {path}; give it to the caller, who uses it by --token-file", err=True)


def _check(name: str, roles: list[str], quota: dict[str, float | None]) -> None:
    """Raise `InvalidInputError` for arguments that the file of callers would not take."""
    faults: list[FieldViolation] = []
    if not re.fullmatch(NAME, name):
        faults.append(
            FieldViolation(
                "NAME", f"is {name[:80]!r}, must be letters, digits, dots, dashes or underscores, at most 64"
            )
        )
    faults += [
        FieldViolation("--role", f"is {one[:80]!r}, must be one of {', '.join(ROLES)}")
        for one in roles
        if one not in ROLES
    ]
    faults += [
        FieldViolation(f"--{key.replace('_', '-')}", f"is {value:g}, must be a number of at least 0.001")
        for key, value in quota.items()
        if value is not None and not 0.001 <= value < float("inf")
    ]
    if faults:
        raise InvalidInputError(*faults)


def _write_secret(path: Path, secret: str) -> None:
    """Write a new file that only its owner can read.

    Raises:
        InvalidInputError: there is a file already.
        OutputError: it can't be written.
    """
    check_writable(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise invalid("--output", f"is {path}, which exists; remove it, or give another name") from error
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secret + "\n")
