"""`milonga data`: look at recordings, and make scenes of them, before a training.

milonga data check my-sounds/ -o report.html
milonga data scenes my-sounds/ -o scenes/ --count 2000
"""

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.outputs import check_writable, is_terminal, print_lines, print_table
from services.errors import InvalidInputError, invalid
from services.files import write_atomically

if TYPE_CHECKING:
    from training.data.health import DataHealth

_SHOWN = 5
_UNREADABLE = 0.05
"""Share of unreadable recordings above which no scenes are made."""
_MISSING_FILE = os.strerror(errno.ENOENT)

data = typer.Typer(help="Look at recordings, and make scenes of them.", no_args_is_help=True)

Source = Annotated[
    Path,
    typer.Argument(
        help="Folder with a folder for each class or a text file for each clip, or a list (CSV, JSON, …).",
        show_default=False,
    ),
]
AudioRoot = Annotated[
    Path | None,
    typer.Option("--audio-root", help="Folder that the list's clips start from.", show_default="the list's"),
]
Folds = Annotated[
    list[str] | None,
    typer.Option(
        "--held-out-fold",
        help="Fold to hold out; repeatable. none: by a hash of the recordings.",
        show_default="validation, test, or the last of numbered folds",
    ),
]


@data.callback()
def _data() -> None:
    pass


@data.command()
def check(
    source: Source,
    audio_root: AudioRoot = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model URI: report captions without a word that its text encoder knows.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page with spectrograms of suspicious clips, e.g. report.html."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as a JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if anything is wrong.")] = False,
    folds: Folds = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode.", show_default="one for each core")
    ] = None,
) -> None:
    """Report what is wrong with recordings and captions: unreadable, cut, silent, clipped, double, unread.

    Exit code 2 if nothing is usable, or with --strict if anything is wrong.
    """
    from services.weights.uri import resolve
    from training.data.health import check_data, tokenizer_of
    from training.data.recordings import read_recordings
    from training.data.splits import SplitConfig

    if output is not None:
        if output.suffix.lower() not in (".html", ".htm"):
            raise invalid("--output", f"{output} must end in .html")
        check_writable(output)
    unusable: dict[str, str] = {}
    recordings = read_recordings(source, audio_root, unusable)
    health = check_data(
        source,
        recordings,
        unusable,
        tokenizer=None if model is None else tokenizer_of(resolve(model).folder),
        split=SplitConfig(folds=tuple(folds or ())),
        jobs=jobs,
    )
    if output is not None:
        from training.commands.data_page import html_page

        write_atomically(output, html_page(health, [one.clip for one in recordings]))
    if as_json:
        typer.echo(json.dumps(health.record(), ensure_ascii=False))
    else:
        _print(health, output)
    if not health.usable:
        raise invalid("data", f"{source} has no usable clip of {len(health.clips)}; {_first_problem(health)}")
    if strict and (health.problems or health.unusable_captions or health.warnings):
        raise invalid("--strict", f"{source} has faults: {_counts(health)}")


@data.command()
def scenes(
    source: Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for FLAC files and scenes.jsonl; made if missing.")
    ],
    audio_root: AudioRoot = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Scenes of the training part.")] = 1_000,
    held_out: Annotated[int, typer.Option(min=0, help="Scenes of the held-out recordings.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same scenes.")] = 0,
    duration: Annotated[float, typer.Option(help="Seconds a scene.")] = 5.12,
    rate: Annotated[int, typer.Option(help="Sampling rate in hertz.")] = 22_050,
    single: Annotated[float, typer.Option(min=0, max=1, help="Share of scenes with one sound.")] = 0.2,
    sequence: Annotated[float, typer.Option(min=0, max=1, help="Share with one sound after another.")] = 0.5,
    three: Annotated[float, typer.Option(min=0, max=1, help="Share of these with three sounds.")] = 0.0,
    folds: Folds = None,
) -> None:
    """Mix recordings to scenes, one sound after another or at once, with captions and the sounds' times.

    The list scenes.jsonl is a data set of its own; its column split says which recordings a scene is made of.
    """
    from training.data.recorded_scenes import (
        RecordedSceneConfig,
        RecordedScenes,
        export_recorded_scenes,
        write_index,
    )
    from training.data.recordings import read_recordings
    from training.data.splits import SplitConfig, split_recordings
    from training.data.usable import readable_recordings
    from training.loop.progress import progress

    try:
        config = RecordedSceneConfig(
            duration=duration, sampling_rate=rate, single=single, sequence=sequence, three=three, seed=seed
        )
    except ValueError as error:
        raise invalid("--duration, --rate, --single or --sequence", str(error)) from error
    readable = readable_recordings(read_recordings(source, audio_root, {}), _UNREADABLE)
    splits = split_recordings(readable.recordings, SplitConfig(folds=tuple(folds or ())))
    parts = []
    for split, recordings, number in (
        ("train", splits.train, count),
        ("validation", splits.held_out, held_out),
    ):
        try:
            # Before anything is written.
            parts += [(split, RecordedScenes(recordings, config), number)] if number else []
        except InvalidInputError as error:
            raise invalid("data", f"{split} part: {error.violations[0].description}") from error
    rows = []
    with progress(total=count + held_out, desc="scenes", unit="scene") as bar:
        for split, made, number in parts:
            for row in export_recorded_scenes(made, output, number, split):
                rows.append(row)
                bar.update()
    typer.echo(f"{len(rows)} scenes: {write_index(output, rows)}")


def _print(health: "DataHealth", output: Path | None) -> None:
    """Print the report: tables on a terminal, tab-separated lines elsewhere."""
    from training.data.health import KINDS, UNUSABLE

    show = print_table if is_terminal() else print_lines
    show(("data", str(health.source)), health.summary())
    if health.problems:
        typer.echo()
        rows = []
        for kind, count in health.problems.items():
            first = next(clip for clip in health.clips if kind in clip.problems)
            where = f"{first.place}: {first.name}" if first.place else first.name
            detail = f": {first.problems[kind]}" if first.problems[kind] else ""
            effect = "unusable" if kind in UNUSABLE else "usable"
            rows.append((kind, str(count), effect, KINDS[kind], f"{where}{detail}"))
        show(("what is wrong", "clips", "", "", "the first"), rows)
    for place, reason in list(health.unusable_captions.items())[:_SHOWN]:
        typer.echo(f"{place}: {reason}")
    if len(health.unusable_captions) > _SHOWN:
        typer.echo(f"and {len(health.unusable_captions) - _SHOWN} more unusable captions")
    for warning in health.warnings:
        typer.echo(f"warning: {warning}")
    if output is not None:
        typer.echo(f"{output}")


def _first_problem(health: "DataHealth") -> str:
    clip = health.clips[0]
    kind, detail = next(iter(clip.problems.items()))
    if _MISSING_FILE in detail:
        detail += f" ({clip.name}); give the folder of the clips by --audio-root"
    return f"{clip.place or clip.name}: {kind}{f', {detail}' if detail else ''}"


def _counts(health: "DataHealth") -> str:
    counts = [f"{kind} {count}" for kind, count in health.problems.items()]
    captions = [f"unusable captions {len(health.unusable_captions)}"] if health.unusable_captions else []
    return "; ".join([*counts, *captions, *health.warnings])
