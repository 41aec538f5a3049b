"""`milonga train evaluate-explanations`. Light, so that the command line starts without torch."""

import json
from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import Recipe, Settings, Show


def evaluate_explanations(
    recipe: Recipe = "mini",
    settings: Settings = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the report and of each clip's figures.")
    ] = Path("build/explanations"),
    show: Show = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Compare explanations with when the events of a procedural world sound, with intervals."""
    from training.evaluation.explanation_config import EXPLANATIONS
    from training.loop.config import describe, override
    from training.runs.recipes import recipe as named

    config = override(named(EXPLANATIONS, recipe), settings or [])
    if show:
        typer.echo(describe(config))
        return
    from training.evaluation.explanation_report import TABLES, markdown
    from training.evaluation.explanations import evaluate_explanations as run

    report = run(config, output)
    typer.echo(json.dumps(report) if as_json else markdown(report))
    if not as_json:
        typer.echo(f"{output / TABLES}: the same; {output / 'clips.jsonl'}: figures of each clip", err=True)
