"""`milonga train run`: the whole loop from the command line.

milonga train run --recipe mini
milonga train run --recipe tango2 --set preferences.captions.source=audiocaps.csv
"""

from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[str, typer.Option("--recipe", help="mini, smoke or tango2.")] = "mini",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of all stages.", show_default="build/run/NAME"),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings and do nothing.")] = False,
) -> None:
    """Run the whole loop: reward ▸ captions ▸ candidates ▸ pairs ▸ SFT ▸ DPO ▸ evaluation ▸ register.

    What is done is not done again: give the same command after whatever stopped it.
    """
    from training.config import describe, override
    from training.recipes import recipe as named
    from training.run_recipes import RUNS

    config = override(named(RUNS, recipe), settings or [])
    typer.echo(describe(config))
    if show:
        return
    from training.run import run_loop

    done = run_loop(config, output or Path("build/run") / config.name)
    typer.echo("\n".join(["", *done.lines]))
