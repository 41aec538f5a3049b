"""`milonga triton`: our models for a Triton server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from services.cli import judging
from services.cli.serve import URI_FORMS, read_scorers
from services.errors import FieldViolation, InvalidInputError

app = typer.Typer(help="Our models in NVIDIA's Triton Inference Server.", no_args_is_help=True)

MODELS = ("tango", "clap", "reward")


@app.callback()
def _triton() -> None:
    pass


@app.command()
def export(
    repository: Annotated[
        str, typer.Argument(help="Folder of the repository, made if it is not there; or s3://….")
    ],
    model: Annotated[str, typer.Option(help=f"What makes sound: mini, {URI_FORMS}.", metavar="URI")] = "mini",
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A scorer of clap. May be given several times.",
            metavar="NAME=URI",
            show_default="clap-a=mini:clap-a clap-b=mini:clap-b",
        ),
    ] = None,
    reward: Annotated[str, typer.Option(help="Reward model.", metavar="URI")] = judging.REWARD,
    clap: Annotated[
        str, typer.Option(help="CLAP model that the reward model was trained on.", metavar="URI")
    ] = judging.CLAP,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Export this model alone. May be given several times.",
            metavar="tango|clap|reward",
            show_default="all three",
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**63 - 1,
            help="Number of the version folder, of what --only names.",
            show_default="the registered version, else the manifest's, else 1",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the service, for config.pbtxt: tango.exact=true, clap.device=cuda:1. May be "
            "given several times.",
            metavar="MODEL.NAME=VALUE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a Triton model repository: tango, clap and reward, each with its weights.

    A version that is there already is left as it is. A model's first version is pinned (version_policy); a
    later one lies beside it until `milonga promote run --target triton://HOST:8001` takes it there.
    """
    chosen = _chosen(only)
    if version is not None and len(chosen) != 1:
        raise InvalidInputError(FieldViolation("--version", "is for one model; name it by --only"))
    settings = _settings(setting, chosen)
    # Only now: the services' modules import torch.
    from services.cli import triton_export as exporting
    from services.inference.triton.repository import ModelRepository, open_storage

    storage = open_storage(repository)
    scorers = read_scorers(scorer or tuple(f"{n}={uri}" for n, uri in judging.SCORERS.items())) or {}
    exports = {
        "tango": lambda: exporting.export_tango(model, settings["tango"]),
        "clap": lambda: exporting.export_clap(scorers, settings["clap"]),
        "reward": lambda: exporting.export_reward(reward, clap, settings["reward"]),
    }
    # All are found before the first is written.
    found = [exports[name]() for name in chosen]
    models = ModelRepository(storage)
    for exported, number in found:
        name, number = exported.config.name, version or number
        added = models.add(exported, number)
        digests = ", ".join(f"{one.name} {one.digest[:19]}…" for one in exported.weights.values())
        pinned = ", ".join(map(str, models.pinned(name)))
        beside = "" if str(number) == pinned else f"; pinned is {pinned}"
        typer.echo(f"{name}/{number}  {digests}{'' if added else ' (there already)'}{beside}")
    if Path(repository).is_dir():
        flags = "--model-control-mode=explicit --load-model='*' --strict-readiness=false"
        typer.echo(f"tritonserver --model-repository={repository} {flags}")


def _chosen(only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in MODELS:
            raise InvalidInputError(
                FieldViolation("--only", f"is {name!r}, must be one of {', '.join(MODELS)}")
            )
    return [name for name in MODELS if not only or name in only]


def _settings(given: list[str] | None, chosen: list[str]) -> Mapping[str, dict[str, str]]:
    """What --set says, by model."""
    settings: dict[str, dict[str, str]] = {name: {} for name in MODELS}
    for text in given or ():
        name, equals, value = text.partition("=")
        model, dot, key = name.partition(".")
        if not (equals and dot and key) or model not in chosen:
            raise InvalidInputError(
                FieldViolation(
                    "--set", f"is {text!r}, must be MODEL.NAME=VALUE, MODEL of {', '.join(chosen)}"
                )
            )
        settings[model][key] = value
    return settings
