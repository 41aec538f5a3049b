"""`milonga explain`: which word of a prompt made which sound, in this process or through a service."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from services import client
from services.api.explanation import ClipExplainer, Explanation, ExplanationUpdate
from services.cli.making import in_flags, to_json, warn
from services.cli.options import ModelOptions, SamplingOptions, check_address, given_options, grouped
from services.cli.outputs import Cell, check_writable, encoding_of, print_table
from services.cli.progress import ProgressView
from services.cli.scorers import naming_option, refuse
from services.client import ServiceOptions
from services.errors import FieldViolation, InvalidInputError
from services.explanation_page import WRITERS, written
from services.files import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedOptions(SamplingOptions):
    """The options of the clip that is explained, and of its explanation."""

    clip: Annotated[
        Path | None,
        typer.Option(
            help="Explain this clip, which the prompt describes, rather than make one; --seed is of the "
            "noise that is added to it."
        ),
    ] = None
    without: Annotated[
        str | None,
        typer.Option(help="Also make the clip without these words, from the same seed.", metavar="WORDS"),
    ] = None
    replace_by: Annotated[str | None, typer.Option(help="Words to take instead.", metavar="WORDS")] = None
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Most iterations of a method that learns. Default: the model's.", min=1, show_default=False
        ),
    ] = None

    def options(self) -> client.ExplanationOptions:
        """Return them by the client's names."""
        return {
            **self.sampling(),
            "method": None,  # one call per method
            "encoding": "float32",
            "clip": self.clip,
            "without": self.without,
            "replacement": self.replace_by,
            "iterations": self.iterations,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerOptions(ModelOptions):
    """The options that say which model is explained, and where it runs."""

    def check(self, connection: ServiceOptions) -> None:
        """Raise `InvalidInputError` if options contradict each other."""
        check_address("--server", self.server)
        if self.server is not None and (self.model or self.device or self.dtype):
            refuse("--model, --device, --dtype", "are set by the service; leave them out with --server")
        if connection.given and self.server is None:
            refuse(given_options(connection), "is for calls to a service; give --server as well")

    def open(self, connection: ServiceOptions) -> ClipExplainer:
        """Load the model, or connect to the service."""
        if self.server is not None:
            return connection.open(explanation=self.server)
        # Imported here: importing torch takes seconds, and only a model in this process needs it.
        from services.local_explainer import open_explainer
        from services.weights.uri import resolve

        with naming_option("--model"):
            model = resolve(self.model or "mini")
            return open_explainer(model, device=self.device or "auto", dtype=self.dtype or "float32")


@grouped
def explain(
    prompt: Annotated[
        str, typer.Argument(help="What the clip sounds like.", show_default=False, metavar="PROMPT")
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .html (a page with player, spectrogram and a band per word), .png (a "
            "picture), .npz or .json (numbers). Can be repeated. Default: why.html.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="occlusion (how much changes without the word), attention (where the model looks), mask "
            "(what a frame needs, learned); of AudioGen audiogenx. Can be repeated. Default: the model's "
            "first.",
            show_default=False,
        ),
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Also write the explained clip (.wav, .flac, .ogg).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table.")] = False,
    *,
    clip_options: ExplainedOptions,
    where: ExplainerOptions,
    connection: ServiceOptions,
) -> None:
    """Explain which word of the prompt made which sound of a clip.

    Prints the names of the files that were written, one per line; a table, progress, warnings and errors go
    to stderr.
    """
    where.check(connection)
    paths = output or [Path("why.html")]
    for path in paths:
        if path.suffix.lower() not in WRITERS:
            refuse("--output", f"{path} must end in one of {', '.join(WRITERS)}")
    methods: list[str | None] = list(dict.fromkeys(method)) if method else [None]
    encoding = None if audio is None else encoding_of(audio)
    for path in (*paths, *filter(None, [audio])):
        check_writable(path)
    found = _explain_all(prompt, methods, clip_options.options(), where, connection, quiet=quiet)
    # All are made before any is written.
    contents = [(path, written(found, path)) for path in paths]
    if audio is not None and encoding is not None:
        contents.append((audio, found[0].clip.encoded(encoding, found[0].clip.sampling_rate).audio))
    for path, content in contents:
        write_atomically(path, content)
    warn(list(dict.fromkeys(warning for one in found for warning in one.warnings)))
    if as_json:
        typer.echo(to_json(_record(found, [path for path, _ in contents])))
        return
    if not quiet:
        _show(found)
    for path, _ in contents:
        typer.echo(path)


def _explain_all(
    prompt: str,
    methods: Sequence[str | None],
    options: client.ExplanationOptions,
    where: ExplainerOptions,
    connection: ServiceOptions,
    *,
    quiet: bool,
) -> list[Explanation]:
    """Return an explanation by each method, all of the same clip."""
    found: list[Explanation] = []
    with ProgressView(jobs=len(methods), quiet=quiet) as view:
        view.stage("connecting" if where.server else "loading the model")
        with contextlib.closing(where.open(connection)) as explainer:
            for name in methods:
                own: client.ExplanationOptions = {**options, "method": name}
                if found:
                    # The seed may have been drawn, and one clip without the words is enough.
                    own |= {"seed": found[0].seed, "without": None, "replacement": None}
                try:
                    found.append(explainer.explain_audio(prompt, on_update=_shown(view, name), **own))
                except InvalidInputError as error:
                    raise _in_flags(error) from None
                view.done(str(name))
    return found


def _shown(view: ProgressView, method: str | None) -> Callable[[ExplanationUpdate], None]:
    """Return what shows the updates of a method."""

    def show(update: ExplanationUpdate) -> None:
        match update:
            case client.Queued(position=position):
                view.stage(f"queued behind {position}" if position else "next in the queue")
            case client.ExplanationProgress():
                view.fraction(str(method), update.fraction, _STAGES.get(update.stage, update.stage))

    return show


_STAGES = {"denoise": "making the clip", "explain": "explaining", "variant": "making it without"}


def _in_flags(error: InvalidInputError) -> InvalidInputError:
    """Return `error` with the command's options in place of wire fields."""
    own = {"replacement": "--replace-by"}
    named = [
        FieldViolation(
            own.get(one.field, "--clip" if one.field.startswith("clip.") else one.field), one.description
        )
        for one in error.violations
    ]
    return in_flags(InvalidInputError(*named), None)


def _record(found: Sequence[Explanation], paths: Sequence[Path]) -> dict[str, object]:
    first = found[0]
    return {
        "prompt": first.prompt,
        "seed": first.seed,
        "model": {"name": first.model.name, "version": first.model.version, "digest": first.model.digest},
        "files": [str(path) for path in paths],
        "words": first.words,
        "explanations": [
            {
                "method": one.method,
                "means": [round(float(row.mean()), 7) for row in one.matrix_WT],
                "peaks": [round(second, 4) for second in one.peaks()],
                "mask_size": one.mask_size,
                "iterations": one.iterations,
                "seconds": round(one.seconds, 3),
            }
            for one in found
        ],
        "warnings": list(dict.fromkeys(warning for one in found for warning in one.warnings)),
    }


def _show(found: Sequence[Explanation]) -> None:
    """Print for each word its share of each explanation, and when it is strongest, on stderr."""
    header = ["word"]
    columns: list[list[Cell]] = [list(found[0].words)]
    for one in found:
        total = max(float(one.matrix_WT.sum()), 1e-30)
        header += [f"{one.method}: share", "at"]
        columns.append([float(row.sum()) / total for row in one.matrix_WT])
        columns.append([f"{second:.2f} s" for second in one.peaks()])
    print_table(header, [list(row) for row in zip(*columns, strict=True)], stderr=True)
    typer.echo(f"seed {found[0].seed}", err=True)
