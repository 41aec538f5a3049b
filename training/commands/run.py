"""`milonga train run`: the whole loop, from the command line.

milonga train run --recipe mini
milonga train run --recipe tango2 --set preferences.captions.source=audiocaps.csv
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import grouped
from services.client import ServiceOptions
from training.commands.options import Settings, Show, check_connection

if TYPE_CHECKING:
    from training.runs.run_recipes import LoopRun


@grouped
def run(
    recipe: Annotated[str, typer.Option("--recipe", help="align, mini, smoke or tango2.")] = "mini",
    settings: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of all stages.", show_default="build/run/NAME"),
    ] = None,
    show: Show = False,
    *,
    connection: ServiceOptions,
) -> None:
    """Run the whole loop: reward ▸ captions ▸ candidates ▸ pairs ▸ SFT ▸ DPO ▸ evaluation ▸ register.

    Finished stages are not run again: after an interruption, give the same command.
    """
    from training.loop.config import describe

    config = configured(recipe, settings or [], connection)
    typer.echo(describe(config))
    if show:
        return
    from training.runs.run import run_loop

    lines = run_loop(config, output or Path("build/run") / config.name).lines
    typer.echo("\n".join(["", *lines]))


def configured(recipe: str, settings: Sequence[str], connection: ServiceOptions | None = None) -> "LoopRun":
    """Return the whole config, whose services are reached by the options of `connection` that were given.

    Raises `InvalidInputError` for an unknown recipe or a wrong setting.
    """
    from training.loop.config import override
    from training.preferences.pipeline import connected, uses_services
    from training.runs.recipes import recipe as named
    from training.runs.run_recipes import RUNS

    options, config = connection or ServiceOptions(), named(RUNS, recipe)
    config = override(replace(config, preferences=connected(config.preferences, options)), settings)
    check_connection(options, uses_services(config.preferences))
    return config
