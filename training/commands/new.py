"""`milonga train new`: a generator of one's own sounds.

milonga train new my-sounds/ --name my-model --minutes 60 --judge yamnet.tflite
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from training.commands.data import AudioRoot, Folds
from training.commands.options import Resume, Settings, Show, is_first_process


def new(
    data: Annotated[
        Path,
        typer.Argument(
            help="Recordings: a folder for each class, or a list or folder with captions.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the model, and of its registered model.")],
    minutes: Annotated[
        float, typer.Option("--minutes", min=0, help="Minutes of training on this machine; 0: full length.")
    ] = 60.0,
    judge: Annotated[
        Path | None,
        typer.Option(
            "--judge", help="yamnet.tflite, to examine the model on held-out recordings.", show_default=False
        ),
    ] = None,
    audio_root: AudioRoot = None,
    folds: Folds = None,
    license: Annotated[str, typer.Option("--license", help="Licence of the weights.")] = "unknown",
    settings: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the model.", show_default="build/new/NAME"),
    ] = None,
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Register the model in MLflow as a challenger.")
    ] = True,
    resume: Resume = True,
    show: Show = False,
) -> None:
    """Train a generator from nothing on recordings, examine it, and register it.

    A run that was stopped resumes: give the same command again.
    """
    from training.loop.config import describe, override
    from training.pretraining.config import NewModel
    from training.runs.new import NewRun, run_new, summary

    model = NewModel(name=name, data=data, audio_root=audio_root, minutes=minutes, license=license)
    if folds:
        model = replace(model, split=replace(model.split, folds=tuple(folds)))
    config = override(NewRun(model=model, judge=judge, register=register), settings or [])
    main = is_first_process()
    if main and show:
        typer.echo(describe(config))
    if show:
        return
    target = output or Path("build/new") / name
    result = run_new(config, target, fresh=not resume)
    if main:
        typer.echo("\n".join(summary(result)))
        if result.registered is not None:
            typer.echo(f"{result.registered}, {config.alias}")
            typer.echo(f"milonga generate PROMPT --model models:/{name}@{config.alias} -o clip.wav")
        typer.echo(f"{target}: milonga generate PROMPT --model file:{target} -o clip.wav")
