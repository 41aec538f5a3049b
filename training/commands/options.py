"""Options that several training commands share."""

import os
from typing import Annotated

import typer

from services.cli.options import given_options
from services.client import ServiceOptions
from services.errors import invalid

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; repeatable.")
]
Recipe = Annotated[str, typer.Option("--recipe", help="mini, smoke or tango2.")]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Continue the run that exists, or start over.")
]
Show = Annotated[bool, typer.Option("--show", help="Print the settings and do nothing.")]


def check_connection(options: ServiceOptions, used: bool) -> None:
    """Raise `InvalidInputError` if options of a connection were given, and no stage calls a service."""
    if options.given and not used:
        raise invalid(
            given_options(options),
            "is for calls to a service; give --set candidates.source.server=HOST:PORT, "
            "scores.server or scores.reward_server as well",
        )


def is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
