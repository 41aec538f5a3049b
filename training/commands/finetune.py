"""`milonga train sft`, `dpo`, `baton`, `distill`: fine-tuning of a denoiser from the command line.

milonga train dpo --recipe mini --set data.pairs=build/preferences/mini/dataset --output build/dpo/mini
accelerate launch -m services.cli train dpo --recipe tango2 --set start=file:tango-full-ft …
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from training.commands.options import (
    Recipe,
    Resume,
    Settings,
    Show,
    add_ratings,
    is_first_process,
    take_ratings,
)

Stage = Literal["sft", "dpo", "baton", "distill"]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the model.", show_default="build/COMMAND/NAME"),
]


def _command(stage: Stage, doc: str) -> Callable[..., None]:
    """Return the command of a stage, with `doc` as its help."""

    def command(
        recipe: Recipe = "mini",
        settings: Settings = None,
        output: Output = None,
        resume: Resume = True,
        show: Show = False,
    ) -> None:
        _run(stage, recipe, settings or [], output, fresh=not resume, show=show)

    command.__name__, command.__doc__ = stage, doc
    return command


def _run(
    stage: Stage,
    recipe: str,
    settings: Sequence[str],
    output: Path | None,
    *,
    fresh: bool,
    show: bool,
) -> None:
    from training.finetuning.baton import train_baton
    from training.finetuning.distill import train_distill
    from training.finetuning.dpo import train_dpo
    from training.finetuning.sft import train_sft
    from training.loop.config import describe, override
    from training.runs import recipes

    found: Mapping[str, tuple[Mapping[str, Callable[[], Any]], Callable[..., dict[str, Any]]]] = {
        "sft": (recipes.SFT, train_sft),
        "dpo": (recipes.DPO, train_dpo),
        "baton": (recipes.BATON, train_baton),
        "distill": (recipes.DISTILL, train_distill),
    }
    known, train = found[stage]
    settings, ratings = take_ratings(settings)
    config = override(recipes.recipe(known, recipe), settings)
    target = output or Path("build") / stage / config.name
    if not show:
        config = add_ratings(config, ratings, target, fresh=fresh)
    main = is_first_process()
    if main:
        typer.echo(describe(config))
    if show:
        return
    from training.finetuning.session import summary

    report = train(config, target, fresh=fresh)
    if main:
        typer.echo("\n".join(["", *summary(report)]))
        typer.echo(f"{target}: milonga serve generation --model file:{target}")


sft = _command("sft", "Fine-tune a denoiser on the chosen clips of preference pairs.")
dpo = _command("dpo", "Align a denoiser with preference pairs by diffusion-DPO.")
baton = _command("baton", "Fine-tune a denoiser on clips weighted by their reward (BATON).")
distill = _command(
    "distill", "Distil a denoiser into one that makes a clip in 1 to 8 calls, without the unconditional half."
)
