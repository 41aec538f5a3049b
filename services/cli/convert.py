"""`milonga convert`, `convert-captioner`, `convert-audiogen`: released checkpoints to model folders."""

from collections.abc import Callable
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

    typer.echo(convert_checkpoint(source, target, text_encoder=text_encoder, progress=_reporter(quiet)))


def convert_captioner(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="EAT MODEL [PEFT_FOLDER] TARGET",
            help="EAT's checkpoint (.pt of fairseq, or a folder of the Hugging Face layout); SLAM-AAC's "
            "model.pt; the folder with the LoRA adapters, unless they are in model.pt; the folder to make.",
            show_default=False,
        ),
    ],
    language_model: Annotated[
        str,
        typer.Option(
            help="The language model and its tokenizer: a folder, or hf:lmsys/vicuna-7b-v1.5.",
            show_default=False,
        ),
    ],
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of EAT. Default: one per 64 of its width, as EAT-base."),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Alpha of LoRA adapters in model.pt, which does not state it. Default: 32."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
) -> None:
    """Convert a released SLAM-AAC captioner to a model folder of safetensors.

    Serve it with: milonga serve captioning --model file:TARGET. The licences of the parts still apply.
    """
    from services.errors import invalid
    from services.models.captioner.checkpoint import convert_captioner as convert

    match paths:
        case [eat, model, target]:
            peft = None
        case [eat, model, peft, target]:
            pass
        case _:
            raise invalid("paths", f"has {len(paths)} paths; give EAT, MODEL, maybe PEFT_FOLDER, and TARGET")
    made = convert(
        eat,
        model,
        target,
        peft=peft,
        language_model=language_model,
        heads=heads,
        lora_alpha=lora_alpha,
        progress=_reporter(quiet),
    )
    typer.echo(made)


def convert_audiogen(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a released checkpoint: state_dict.bin and compression_state_dict.bin.",
            show_default=False,
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    text_encoder: Annotated[
        str,
        typer.Option(
            help="T5's weights and tokenizer, which the checkpoint lacks: a folder, or hf:t5-large.",
            show_default=False,
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
) -> None:
    """Convert a released AudioGen checkpoint to a model folder of safetensors.

    Serve it with: milonga serve generation --model file:TARGET. The checkpoint's own licence still applies.
    """
    from services.models.audiogen.checkpoint import convert_audiogen as convert

    typer.echo(convert(source, target, text_encoder=text_encoder, progress=_reporter(quiet)))


def _reporter(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints stages to stderr, or nothing."""
    return lambda message: None if quiet else typer.echo(message, err=True)
