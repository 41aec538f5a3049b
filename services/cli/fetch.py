"""`milonga fetch`: download and verify a model's weights before a service needs them."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from services.cli.options import URI_FORMS
from services.cli.outputs import is_terminal, print_lines, print_table


def fetch(
    uri: Annotated[
        str | None,
        typer.Argument(
            help=f"Model URI: mini, {URI_FORMS}.",
            envvar="MILONGA_MODEL",
            show_default=False,
            metavar="[URI]",
        ),
    ] = None,
    unpinned_model: Annotated[
        str | None,
        typer.Option(
            help="Model to fetch if no URI is given, as in `milonga serve generation`.",
            envvar="MILONGA_UNPINNED_MODEL",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Fetch a model into the cache, verify every file, and print its identity and folder.

    A complete model in the cache is not fetched again; with a version and a digest
    (models:/NAME/VERSION#sha256:HEX) that needs no registry. The cache is MILONGA_CACHE, or ~/.cache/milonga.
    """
    from services.weights.uri import resolve, served_uri

    model = resolve(served_uri(uri or "", unpinned_model or ""))
    found = {**asdict(model.identity), "folder": str(model.folder)}
    if as_json:
        typer.echo(json.dumps(found))
    elif is_terminal():
        print_table(("", ""), list(found.items()))
    else:
        print_lines((), list(found.items()))
