"""`milonga train adapt`: fine-tune a generator on one's own recordings.

milonga train adapt my-sounds/ --start file:tango2 --name my-model
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from services.errors import invalid
from training.commands.data import AudioRoot, Folds, Source
from training.commands.options import Resume, Settings, Show, is_first_process

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def adapt(
    data: Source,
    start: Annotated[
        str, typer.Option(help="URI of the model to adapt: file:FOLDER, models:/NAME@ALIAS, mini-base.")
    ],
    name: Annotated[str, typer.Option(help="Name of the model: of its folder, and in the registry.")],
    full: Annotated[
        bool, typer.Option("--full", help="Train all of the denoiser instead of low-rank adapters.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default="300")] = None,
    scenes: Annotated[
        int | None,
        typer.Option(min=0, help="Scenes of two recordings to learn too.", show_default="as many as clips"),
    ] = None,
    audio_root: AudioRoot = None,
    folds: Folds = None,
    settings: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the model.", show_default="build/adapt/NAME"),
    ] = None,
    alias: Annotated[str, typer.Option(help="Alias of the registered version; none: not registered.")] = (
        "challenger"
    ),
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri",
            help="MLflow server or database.",
            show_default="MLFLOW_TRACKING_URI, else ./mlflow.db",
        ),
    ] = None,
    resume: Resume = True,
    show: Show = False,
) -> None:
    """Fine-tune a generator on recordings with captions or classes, and register it.

    Part of the recordings is held out; the denoising error on it is compared before and after.
    """
    from training.loop.config import describe, override
    from training.runs.adapt import HELD_OUT, adaptation

    if not _NAME.fullmatch(name):
        raise invalid("--name", f"is {name[:40]!r}, must be letters, digits, '.', '_' and '-'")
    config = adaptation(data, name, start, full=full)
    config = replace(config, audio_root=audio_root, scenes=scenes)
    if folds:
        config = replace(config, split=replace(config.split, folds=tuple(folds)))
    if steps is not None:
        loop = replace(config.training.loop, steps=steps)
        config = replace(config, training=replace(config.training, loop=loop))
    config = override(config, settings or [])
    main = is_first_process()
    if main:
        typer.echo(describe(config))
    if show:
        return
    from training.finetuning.session import summary
    from training.runs.adapt import adapt as run

    target = output or Path("build/adapt") / name
    report = run(config, target, fresh=not resume)
    if not main:
        return
    typer.echo("\n".join(["", *summary(report)]))
    held_out = target.with_name(f"{target.name}.run") / HELD_OUT
    if held_out.exists():
        typer.echo(f"compare: milonga train evaluate {start} {name}=file:{target} --prompts {held_out}")
    if alias == "none":
        typer.echo(f"try: milonga generate PROMPT --model file:{target}")
    else:
        _register(target, name, start, alias, report, tracking_uri)


def _register(
    folder: Path, name: str, start: str, alias: str, report: Mapping[str, Any], tracking_uri: str | None
) -> None:
    from training.tracking.register import Provenance, register

    figures = report["data"].get("held_out", {})
    version, created = register(
        folder,
        name,
        alias=alias,
        provenance=Provenance(
            parent=start,
            data={"recordings": report["settings"]["recordings_digest"]},
            metrics={key: value for key, value in figures.items() if value is not None},
        ),
        uri=tracking_uri,
    )
    typer.echo(f"{version}, {alias}{'' if created else ' (registered before)'}")
    typer.echo(f"try: milonga generate PROMPT --model models:/{name}@{alias}")
