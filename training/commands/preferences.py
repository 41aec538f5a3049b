"""`milonga train preferences`: preference data from the command line.

milonga train preferences --recipe mini
milonga train preferences --recipe tango2 --set captions.source=audiocaps.csv --shard 0/8 --until candidates
"""

from pathlib import Path
from typing import Annotated

import typer

from services.cli.options import grouped
from services.client import ServiceOptions
from services.errors import invalid
from training.commands.options import Recipe, Settings, Show, check_connection


@grouped
def preferences(
    recipe: Recipe = "mini",
    settings: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the stages.", show_default="build/preferences/NAME"),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Make share I (from 0) of N of the candidates only.")
    ] = "0/1",
    until: Annotated[
        str, typer.Option(help="Last stage: captions, perturb, candidates, scores, pairs or dataset.")
    ] = "dataset",
    show: Show = False,
    *,
    connection: ServiceOptions,
) -> None:
    """Make preference pairs as Audio-alpaca was made: captions, candidates, scores, pairs, Parquet."""
    from training.data.store import Row
    from training.loop.config import describe, override
    from training.preferences.dataset import print_table
    from training.preferences.pipeline import (
        PREFERENCES,
        STAGES,
        Stage,
        connected,
        make_preferences,
        uses_services,
    )
    from training.runs import recipes

    config = override(connected(recipes.recipe(PREFERENCES, recipe), connection), settings or [])
    check_connection(connection, uses_services(config))
    if config.ratings is not None:
        raise invalid(
            "ratings", "is for milonga train run, reward, sft, dpo and baton, which make no pairs of it"
        )
    if until not in STAGES:
        raise invalid("--until", f"is {until!r}, must be one of {', '.join(STAGES)}")
    share = read_shard(shard)
    typer.echo(describe(config))
    if show:
        return

    def print_report(stage: Stage, folder: Path, report: Row) -> None:
        figures = {name: value for name, value in report.items() if isinstance(value, int | float)}
        typer.echo(f"{stage}: {', '.join(f'{name} {value}' for name, value in figures.items())}  {folder}")
        for one in report.get("removed", ()):
            if one["alone"]:
                typer.echo(f"  {one['scorer']}: {one['name']} removed {one['first']} (alone {one['alone']})")
        if stage == "dataset":
            print_table(report["table"])

    make_preferences(
        config,
        output or Path("build/preferences") / config.name,
        shard=share,
        until=until,
        on_stage=print_report,
    )


def read_shard(text: str) -> tuple[int, int]:
    """Return index and count of ``I/N``. Raises `InvalidInputError`."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise invalid("--shard", f"is {text!r}, must be I/N with I from 0 to N - 1")
    return int(index), int(count)
