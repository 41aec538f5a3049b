"""`milonga train register` and `milonga train sync`. Light: they import what they need when they run."""

from pathlib import Path
from typing import Annotated

import typer

_URI = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        help="MLflow server or database.",
        show_default="MLFLOW_TRACKING_URI, else ./mlflow.db",
    ),
]


def register(
    folder: Annotated[
        Path, typer.Argument(help="Model folder: trained, or made by `milonga convert`.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the registered model.",
            show_default="milonga-tango, milonga-reward or milonga-captioner",
        ),
    ] = None,
    alias: Annotated[
        str, typer.Option(help="Alias to point to the version, e.g. challenger or champion.")
    ] = "challenger",
    clap: Annotated[
        str | None,
        typer.Option(help="Of a reward model: URI of its CLAP model.", show_default="mini:clap-a"),
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="Model URI of the model that it was trained from.", show_default=False)
    ] = None,
    tracking_uri: _URI = None,
) -> None:
    """Register a model in MLflow as a new version. The same files are registered once."""
    from training.tracking.register import Provenance
    from training.tracking.register import register as register_model

    version, created = register_model(
        folder, name, alias=alias, clap=clap, provenance=Provenance(parent=parent), uri=tracking_uri
    )
    already = "" if created else " (registered before)"
    typer.echo(f"{version}, {alias}{already}")
    typer.echo(version.uri)


def sync(
    folder: Annotated[Path, typer.Argument(help="The `tracking` folder of a run.", show_default=False)],
    tracking_uri: _URI = None,
) -> None:
    """Send what a run logged while the MLflow server was away."""
    from training.tracking.runs import sync as send

    typer.echo(f"{send(folder, uri=tracking_uri)} entries sent")
