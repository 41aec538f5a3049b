"""Options that several training commands share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import given_options
from services.client import ServiceOptions
from services.errors import invalid

if TYPE_CHECKING:
    from training.runs.ratings import Training

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


def take_ratings(settings: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the settings without that of people's ratings, and its value. Of several the last counts."""
    from training.runs.ratings import SETTING

    name = f"{SETTING}="
    given = [text.partition("=")[2].strip() for text in settings if text.lstrip().startswith(name)]
    return [text for text in settings if not text.lstrip().startswith(name)], given[-1] if given else None


def add_ratings(config: "Training", ratings: str | None, output: Path, *, fresh: bool) -> "Training":
    """Return a training's settings with people's ratings in their data. Raises as `with_ratings`."""
    if ratings is None:
        return config
    from training.runs.ratings import SETTING, is_database, with_ratings

    if is_database(ratings) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise invalid(
            SETTING,
            f"is {ratings}, a database, which one of several processes would read before another; give what "
            "`milonga ratings export` writes",
        )
    return with_ratings(config, ratings, output.with_name(f"{output.name}.ratings"), fresh=fresh)


def is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
