"""`milonga train run`: the whole loop, or a study of methods, from the command line.

milonga train run --recipe mini
milonga train run --recipe tango2 --set preferences.captions.source=audiocaps.csv
milonga train run --recipe mini-study
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training.runs.run_recipes import LoopRun
    from training.runs.study_recipes import StudyRun


def run(
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="align, mini, smoke or tango2; a study: mini-study or study-smoke."),
    ] = "mini",
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

    A study is SFT, DPO, BATON and rounds of DPO side by side, with several training seeds, and nothing is
    registered. What is done is not done again: give the same command after whatever stopped it.
    """
    from training.loop.config import describe
    from training.runs.study_recipes import StudyRun

    config = configured(recipe, settings or [])
    typer.echo(describe(config))
    if show:
        return
    folder = output or Path("build/run") / config.name
    if isinstance(config, StudyRun):
        from training.runs.study import run_study

        lines = run_study(config, folder).lines
    else:
        from training.runs.run import run_loop

        lines = run_loop(config, folder).lines
    typer.echo("\n".join(["", *lines]))


def configured(recipe: str, settings: Sequence[str]) -> "LoopRun | StudyRun":
    """The whole config. Raises `InvalidInputError` where the recipe or a setting is none."""
    from training.loop.config import override
    from training.runs.recipes import recipe as named
    from training.runs.run_recipes import RUNS, LoopRun
    from training.runs.study_recipes import STUDIES, StudyRun

    recipes: Mapping[str, Callable[[], LoopRun | StudyRun]] = {**RUNS, **STUDIES}
    return override(named(recipes, recipe), settings)
