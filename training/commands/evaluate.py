"""`milonga train evaluate`. Light, so that the command line starts without torch."""

import json
from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import Recipe, Settings, Show


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Model URIs, or folders that `milonga generate --prompts` wrote, each perhaps as "
            "NAME=SOURCE. The others are compared with the first.",
            metavar="SOURCE",
        ),
    ],
    recipe: Recipe = "mini",
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="List of prompts: CSV, TSV, JSON or Parquet with a caption per row, and perhaps a reference "
            "clip. - is standard input.",
            show_default="the first folder's, else the sound world's",
        ),
    ] = None,
    settings: Settings = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of the report, the tables and the plots."),
    ] = Path("build/evaluation"),
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", help="Folder of generated clips, shared by evaluations.", show_default="OUTPUT/clips"
        ),
    ] = None,
    show: Show = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Measure models on the same prompts and seeds, and compare them, with intervals."""
    from training.evaluation.config import EVALUATIONS
    from training.loop.config import describe, override
    from training.runs.recipes import recipe as named

    assignments = [f"prompts={prompts}"] if prompts is not None else []
    config = override(named(EVALUATIONS, recipe), [*assignments, *(settings or [])])
    if show:
        typer.echo(describe(config))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training.evaluation.evaluate import REPORT, TABLES
    from training.evaluation.evaluate import evaluate as run
    from training.evaluation.markdown import difference_rows, metric_rows

    report = run(config, sources, output, cache=cache)
    if as_json:
        typer.echo(json.dumps(report))
        return
    tables = [metric_rows(report, "all"), *([difference_rows(report, "all")] if len(sources) > 1 else [])]
    console = Console(highlight=False)
    for header, rows in tables:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, name in enumerate(header):
            table.add_column(Text(name), justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table, "")
    typer.echo(f"{output / TABLES}: the same by kind of prompt; {output / REPORT}: everything")
