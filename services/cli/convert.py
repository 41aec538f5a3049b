"""`milonga convert`: convert a released Tango or Tango 2 checkpoint to a model folder."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a released checkpoint: main_config.json, vae_config.json, stft_config.json and "
            "pytorch_model_{main,vae,stft}.bin.",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    text_encoder: Annotated[
        str,
        typer.Option(
            help="FLAN-T5's tokenizer and config, which the checkpoint lacks: a folder, or "
            "hf:google/flan-t5-large.",
            show_default=False,
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
) -> None:
    """Convert a released Tango or Tango 2 checkpoint to a model folder of safetensors.

    Serve it with: milonga serve generation --model file:TARGET. The checkpoint's own licence still applies.
    """
    from services.models.tango.checkpoint import convert_checkpoint

    def report(message: str) -> None:
        if not quiet:
            typer.echo(message, err=True)

    typer.echo(convert_checkpoint(source, target, text_encoder=text_encoder, progress=report))
