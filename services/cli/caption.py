"""`milonga caption`: describe clips in sentences, in this process or through a service."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from services import client
from services.api.captioning import ClipCaptioner
from services.catalogue import EMBEDDED_CAPTIONER, EMBEDDED_CLAP, captioner_uri
from services.cli.audio_files import AudioFile, batches, printable
from services.cli.caption_list import CaptionList, find_clips
from services.cli.making import warn
from services.cli.options import URI_FORMS, check_address, given_options, grouped
from services.cli.outputs import Cell, is_terminal, print_lines, print_table
from services.cli.progress import ProgressView
from services.cli.scorers import naming_option, refuse
from services.client import ServiceOptions
from services.errors import (
    FieldViolation,
    InvalidInputError,
    NotFiniteError,
    TooLargeError,
    invalid,
)

PANEL = "Captioner"
"""Panel of these options in the help."""
MAX_BATCH = 16
"""Maximum number of clips in one call."""

_CLIP = re.compile(r"clips\[(\d+)\](?:\.(\w+))?")
_FLAGS = {"beams": "--beams", "max_new_tokens": "--max-new-tokens", "refine": "--no-refine"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerOptions:
    """Options that choose the captioner, and what chooses among its candidates."""

    server: Annotated[
        str | None,
        typer.Option(
            help="Address of a captioning service, instead of a captioner in this process.",
            metavar="ADDR",
            rich_help_panel=PANEL,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Captioner in this process: mini, {URI_FORMS}.",
            metavar="URI",
            show_default=EMBEDDED_CAPTIONER,
            rich_help_panel=PANEL,
        ),
    ] = None
    clap: Annotated[
        str | None,
        typer.Option(
            help="CLAP model in this process that chooses among the candidates.",
            metavar="URI",
            show_default=f"{EMBEDDED_CLAP} with {EMBEDDED_CAPTIONER}, otherwise none",
            rich_help_panel=PANEL,
        ),
    ] = None
    scoring: Annotated[
        str | None,
        typer.Option(
            help="Address of a scoring service that chooses instead.", metavar="ADDR", rich_help_panel=PANEL
        ),
    ] = None
    no_refine: Annotated[
        bool,
        typer.Option(
            "--no-refine",
            help="Take the candidate that the language model finds most probable.",
            rich_help_panel=PANEL,
        ),
    ] = False
    beams: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of beams, which gives one candidate. Can be repeated. Default: the model's, such "
            "as 2 to 8; with --no-refine 4.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of a candidate. Default: the model's.",
            min=1,
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of the models in this process: auto, cpu, cuda, cuda:1, mps.",
            show_default="auto",
            rich_help_panel=PANEL,
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the language model in this process: float32, bfloat16 or float16.",
            show_default="float32",
            rich_help_panel=PANEL,
        ),
    ] = None

    def check(self, connection: ServiceOptions) -> None:
        """Raise `InvalidInputError` if options contradict each other."""
        check_address("--server", self.server)
        check_address("--scoring", self.scoring)
        here = ("model", "clap", "scoring", "device", "dtype")
        if self.server is not None and any(getattr(self, name) is not None for name in here):
            flags = ", ".join(f"--{name}" for name in here)
            refuse(flags, "are set by the service; leave them out with --server")
        if self.no_refine and (self.clap or self.scoring):
            refuse("--no-refine", "can't be combined with --clap or --scoring; leave them out")
        if self.clap and self.scoring:
            refuse("--clap, --scoring", "each choose among the candidates; give one of them")
        if connection.given and not (self.server or self.scoring):
            refuse(given_options(connection), "is for calls to a service; give --server or --scoring as well")

    def options(self) -> client.CaptionOptions:
        """Return the options of a call."""
        found: client.CaptionOptions = {"beams": self.beams, "max_new_tokens": self.max_new_tokens}
        return {**found, "refine": False} if self.no_refine else found

    def open(self, connection: ServiceOptions) -> ClipCaptioner:
        """Load the models, or connect to the service.

        Raises:
            InvalidInputError: a model URI is invalid; names the option.
            ModelError: a model was refused.
        """
        if self.server is not None:
            return connection.open(captioning=self.server)
        # Imported here: importing torch takes seconds, and only models in this process need it.
        from services.local_captioner import open_captioner
        from services.weights.uri import resolve

        with naming_option("--model"):
            captioner = resolve(captioner_uri(self.model or EMBEDDED_CAPTIONER))
        with naming_option("--clap"):
            clap = resolve(uri) if (uri := self._clap()) else None
        scoring = None if self.scoring is None else connection.open(scoring=self.scoring)
        with naming_option("--model"):
            return open_captioner(
                captioner,
                clap=clap,
                scoring=scoring,
                device=self.device or "auto",
                dtype=self.dtype or "float32",
            )

    def _clap(self) -> str | None:
        """Return the URI of the CLAP model in this process; None if there is none."""
        if self.no_refine or self.scoring is not None:
            return None
        # The embedded CLAP model knows the words of the embedded captioner only.
        is_embedded = captioner_uri(self.model or "mini").partition("#")[0] == EMBEDDED_CAPTIONER
        return self.clap or (EMBEDDED_CLAP if is_embedded else None)


@grouped
def caption(
    clips: Annotated[
        list[str] | None,
        typer.Argument(help="Audio files (WAV, FLAC, OGG, MP3, AIFF).", show_default=False, metavar="CLIP"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder whose audio files are described, those in its folders included."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="List to write: a JSON object with key, source and target per line. Clips that it has are "
            "not described again.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        bool,
        typer.Option("--candidates", help="Print every candidate with its scores; * is the caption."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per clip on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    *,
    where: CaptionerOptions,
    connection: ServiceOptions,
) -> None:
    """Describe clips, each in a sentence.

    Columns are aligned on a terminal, otherwise separated by tabs. Clips that are invalid are listed at the
    end, with exit code 2; the others are described.
    """
    if bool(clips) == (folder is not None):
        refuse("CLIP", "give audio files, or a folder of them with --folder; one of the two")
    where.check(connection)
    files = _named(clips) if clips else _files_of(folder or Path())
    captions = None if output is None else CaptionList(output)
    todo = [file for file in files if captions is None or not captions.has(file.path)]
    report = _Report(as_json=as_json, candidates=candidates, silent=output is not None and not candidates)
    faults: list[FieldViolation] = []
    try:
        with ProgressView(jobs=len(todo), quiet=quiet) as view:
            faults = _describe_all(todo, where, connection, captions, report, view)
    finally:
        # After the progress bar has gone. Captions are printed even if a later batch failed.
        report.close()
    for fault in faults:
        typer.echo(f"{fault.field}: {fault.description}", err=True)
    if output is not None and not as_json:
        made, kept = len(todo) - len(faults), len(files) - len(todo)
        typer.echo(f"{made} described, {kept} there already, {len(faults)} refused", err=True)
        typer.echo(output)
    if faults:
        raise invalid("CLIP" if clips else "--folder", f"{len(faults)} of {len(todo)} clips were refused")


def _named(clips: Sequence[str]) -> list[AudioFile]:
    names = map(printable, clips)
    return [AudioFile(path=Path(clip), location=n, place=n) for clip, n in zip(clips, names, strict=True)]


def _files_of(folder: Path) -> list[AudioFile]:
    """Return the audio files of a folder, named by their path in it."""
    found = [(path, printable(path.relative_to(folder).as_posix())) for path in find_clips(folder)]
    return [AudioFile(path=path, location=name, place=name) for path, name in found]


def _describe_all(
    files: Sequence[AudioFile],
    where: CaptionerOptions,
    connection: ServiceOptions,
    captions: CaptionList | None,
    report: "_Report",
    view: ProgressView,
) -> list[FieldViolation]:
    """Describe clips batch by batch; return the violations of those that were refused, one of each."""
    faults: list[FieldViolation] = []
    if not files:
        return faults
    view.stage("connecting" if where.server else "loading the models")
    with contextlib.closing(where.open(connection)) as captioner:
        view.stage("describing")
        for batch in batches(files, [_size(file) for file in files], MAX_BATCH):
            for described, answer in describe(batch, captioner, where.options(), faults):
                if captions is not None:
                    pairs = zip(described, answer.captions, strict=True)
                    captions.add((file.location, file.path, one.text) for file, one in pairs)
                report.add(described, answer)
            for file in batch:
                view.done(file.location)
    return faults


def _size(file: AudioFile) -> int:
    with contextlib.suppress(OSError, ValueError):
        return file.path.stat().st_size
    return 0


def describe(
    files: Sequence[AudioFile],
    captioner: ClipCaptioner,
    options: client.CaptionOptions,
    faults: list[FieldViolation],
) -> Iterator[tuple[Sequence[AudioFile], client.Captions]]:
    """Yield the files of a batch with their captions; append the violations of the others to `faults`.

    Raises:
        InvalidInputError: an option is invalid, which is no fault of a clip.
        MilongaError: the captioner can't be reached, or has failed.
    """
    read: list[tuple[AudioFile, bytes]] = []
    for file in files:
        try:
            read.append((file, file.read()))
        except InvalidInputError as error:
            faults += error.violations
    while read:
        named = [file for file, _ in read]
        try:
            yield named, captioner.caption_audio([content for _, content in read], **options)
            return
        except InvalidInputError as error:
            refused = _refused(error, named)
            faults += refused.values()
            read = [one for index, one in enumerate(read) if index not in refused]
        except (TooLargeError, NotFiniteError) as error:
            if len(read) == 1:
                faults.append(FieldViolation(named[0].place, str(error)))
                return
            for file in named:  # one by one, so that only the one at fault fails
                yield from describe([file], captioner, options, faults)
            return


def _refused(error: InvalidInputError, files: Sequence[AudioFile]) -> dict[int, FieldViolation]:
    """Return the first violation of each clip, by its index. Raises `InvalidInputError` for options."""
    refused: dict[int, FieldViolation] = {}
    others: list[FieldViolation] = []
    for one in error.violations:
        found = _CLIP.fullmatch(one.field)
        if found is None or int(found[1]) >= len(files):
            others.append(FieldViolation(_flag_of(one.field), one.description))
            continue
        what = "" if found[2] in (None, "audio") else f"{found[2]} "
        index = int(found[1])
        refused.setdefault(index, FieldViolation(files[index].place, f"{what}{one.description}"))
    if others or not refused:
        raise InvalidInputError(*(others or error.violations)) from error
    return refused


def _flag_of(field: str) -> str:
    return _FLAGS.get(field.partition("[")[0], field)


class _Report:
    """Prints captions: as one table at the end on a terminal, otherwise batch by batch."""

    def __init__(self, *, as_json: bool, candidates: bool, silent: bool) -> None:
        """`silent`: print no table."""
        self._as_json, self._candidates, self._silent = as_json, candidates, silent
        self._aligned = is_terminal() and not as_json
        self._header: list[str] = []
        self._rows: list[list[Cell]] = []

    def add(self, files: Sequence[AudioFile], answer: client.Captions) -> None:
        """Print the captions of files."""
        for file, one in zip(files, answer.captions, strict=True):
            warn(one.warnings, f"{file.place}: ")
        if self._as_json:
            for file, one in zip(files, answer.captions, strict=True):
                typer.echo(json.dumps(_record(file, one, answer), ensure_ascii=False))
            return
        if self._silent:
            return
        first = not self._header
        self._header = ["clip", "", "beams", "clap", "log prob", "caption"] if self._candidates else []
        self._header = self._header or ["clip", "caption"]
        rows = [
            row
            for file, one in zip(files, answer.captions, strict=True)
            for row in self._rows_of(file.location, one)
        ]
        if self._aligned:
            self._rows.extend(rows)
        else:
            print_lines(self._header if first else (), rows)

    def close(self) -> None:
        """Print the table on a terminal."""
        if self._rows:
            print_table(self._header, self._rows)

    def _rows_of(self, location: str, caption: client.Caption) -> Iterator[list[Cell]]:
        if not self._candidates:
            yield [location, caption.text]
            return
        for index, one in enumerate(caption.candidates):
            chosen = "*" if index == 0 else ""
            score: Cell = "-" if one.clap_score is None else one.clap_score
            yield [location, chosen, str(one.beams), score, one.log_probability, one.text]


def _record(file: AudioFile, caption: client.Caption, answer: client.Captions) -> dict[str, Any]:
    """Return a clip's captions as a JSON object."""
    record: dict[str, Any] = {
        "location": file.location,
        "caption": caption.text,
        "candidates": [dataclasses.asdict(one) for one in caption.candidates],
        "model": dataclasses.asdict(answer.model),
    }
    if answer.scorer is not None:
        record["scorer"] = {"name": answer.scorer.name, "model": dataclasses.asdict(answer.scorer.model)}
    if caption.warnings:
        record["warnings"] = list(caption.warnings)
    return record
