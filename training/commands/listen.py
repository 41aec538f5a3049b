"""`milonga train listen`: a page of recordings and of what models make of the same prompts.

milonga train listen before=mini-base after=mini -o listening.html
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from services.errors import invalid
from training.commands.data import AudioRoot, Folds
from training.commands.options import Settings


def listen(
    sources: Annotated[
        list[str],
        typer.Argument(help="Model URIs, each perhaps as NAME=URI.", metavar="SOURCE", show_default=False),
    ],
    recordings: Annotated[
        Path | None,
        typer.Option(
            help="Recordings with captions or classes; prompts are the first ones that are held out.",
            show_default="the sound world's test split",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Take all recordings, not only those held out.")
    ] = False,
    audio_root: AudioRoot = None,
    folds: Folds = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=200, help="Number of prompts.")] = 12,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", show_default="each model's")
    ] = None,
    settings: Settings = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("listening.html"),
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder of generated clips, which later pages reuse.")
    ] = Path("build/listening"),
) -> None:
    """Write a page to listen to: recordings and models' clips of the same prompts, none of them chosen."""
    from services.cli.outputs import check_writable
    from services.files import write_atomically
    from training.commands.listening_page import html_page
    from training.loop.config import override
    from training.runs.listening import Listening
    from training.runs.listening import listen as run

    if output.suffix.lower() not in (".html", ".htm"):
        raise invalid("--output", f"{output} must end in .html")
    check_writable(output)
    config = Listening(recordings=recordings, audio_root=audio_root, everything=everything, count=count)
    if folds:
        config = replace(config, split=replace(config.split, folds=tuple(folds)))
    if steps is not None:
        config = replace(config, sampling=replace(config.sampling, num_inference_steps=steps))
    found = run(override(config, settings or []), sources, cache)
    content = html_page(found)
    write_atomically(output, content)
    typer.echo(f"{output}: {len(found.prompts)} prompts, {len(content) / 1e6:.1f} MB")
