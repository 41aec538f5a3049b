"""`milonga generate`: clips from one prompt or a file of them, in this process or through a service."""

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, Unpack

import typer

from services import client
from services.cli import prompts
from services.cli.outputs import check_writable, encoding_of, make_folder, numbered, write_atomically
from services.cli.progress import ProgressView
from services.errors import (
    FieldViolation,
    InvalidInputError,
    MilongaError,
    QueueFullError,
    RequestCancelledError,
)

_FLAGS = {
    "prompt": "PROMPT",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "clip_count": "--clips",
    "sample_rate_hertz": "--sample-rate",
}
"""How the command spells a field of the wire, where it is not just ``--field-name``."""
_MAX_TRIES = 100
_PARALLEL = 4


class Source(Protocol):
    """Where clips come from: `AudioClient`, or an engine in this process (`services.cli.local`)."""

    def stream(self, prompt: str, **options: Unpack[client.GenerationOptions]) -> Iterator[client.Update]:
        """Make the clips of a prompt, telling what happens on the way."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """The clips of one prompt."""

    clips: tuple[client.Clip, ...]
    finished: client.Finished


def make(
    source: Source,
    prompt: str,
    options: client.GenerationOptions,
    on_update: Callable[[client.Update], None],
    stop: threading.Event | None = None,
) -> Made:
    """Make the clips of one prompt; `stop` gives it up between two steps."""
    clips: list[client.Clip] = []
    for update in source.stream(prompt, **options):
        on_update(update)
        if isinstance(update, client.Clip):
            clips.append(update)
        if isinstance(update, client.Finished):
            return Made(clips=tuple(sorted(clips, key=lambda clip: clip.index)), finished=update)
        if stop is not None and stop.is_set():
            raise RequestCancelledError("stopped")
    raise MilongaError("the stream ended before the clips were finished")


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to hear.", show_default=False, metavar="PROMPT")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write (.wav, .flac, .ogg); the folder of clips with --prompts. "
            "Default: clip.wav. With several clips: clip-1.wav, clip-2.wav, …",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='File of prompts, one JSON object a line: {"prompt": …}, optionally with id, seed, '
            "num_inference_steps, … What is made already is not made again.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Where the noise starts. Default: drawn, and told.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps. Default: the model's.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance. Default: the model's.", show_default=False),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to hear.", show_default=False)] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds. Default: the model's.", show_default=False)
    ] = None,
    clips: Annotated[int | None, typer.Option(help="Different clips a prompt.", show_default="1")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddpm, ddim, dpmsolver++ or unipc. Default: the model's.", show_default=False),
    ] = None,
    sample_rate: Annotated[
        int | None, typer.Option(help="Hertz of the file. Default: the model's.", show_default=False)
    ] = None,
    spectrogram: Annotated[
        Path | None, typer.Option(help="Draw the clip's spectrogram here too (PNG).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model URI: mini, mini-base, file:PATH, hf:OWNER/NAME, each also with #sha256:HEX.",
            show_default="mini",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Address of a generation service, instead of an engine in here.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS to --server.")] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authorities (PEM) that the server's certificate must come from.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Client certificate (PEM), for mTLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="With --server: seconds that a prompt may take, waiting included.",
            show_default=f"{client.DEFAULT_TIMEOUT_SECONDS:g}",
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            help="With --prompts: prompts under way at once.",
            min=1,
            max=64,
            show_default=str(_PARALLEL),
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --prompts: make again what exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a prompt on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Make sound from a sentence, or from a file of them.

    Prints the names of the files that were written, one a line; progress, warnings and errors go to stderr.
    """
    if (prompt is None) == (prompt_file is None):
        _refuse("PROMPT", "give a prompt, or a file of them with --prompts; one of the two")
    options: client.GenerationOptions = {
        "negative_prompt": negative_prompt,
        "duration": duration,
        "clip_count": clips,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "scheduler": scheduler,
        "sampling_rate": sample_rate,
    }
    place = _Place(
        model=model, device=device, dtype=dtype, server=server, timeout=timeout,
        tls=client.TLS(ca_file=tls_ca, cert_file=tls_cert, key_file=tls_key)
        if tls or tls_ca or tls_cert or tls_key
        else None,
    )  # fmt: skip
    if prompt is not None:
        if overwrite or parallel is not None:
            _refuse("--overwrite, --parallel", "go with --prompts only; a single output is always written")
        _generate_one(
            place, prompt, options, output or Path("clip.wav"), spectrogram, as_json=as_json, quiet=quiet
        )
    elif prompt_file is not None:
        if spectrogram is not None:
            _refuse("--spectrogram", "draws the clip of one PROMPT; leave it out with --prompts")
        if output is None:
            _refuse("--output", "must name the folder of clips with --prompts")
        jobs = prompts.read_jobs(prompt_file, options)
        run = _Folder(folder=output, jobs=jobs, place=place, as_json=as_json)
        run.generate(parallel=parallel or _PARALLEL, overwrite=overwrite, quiet=quiet)


def _refuse(field: str, description: str) -> NoReturn:
    raise InvalidInputError(FieldViolation(field, description))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where to make the clips: an engine in this process, or a service."""

    model: str | None
    device: str | None
    dtype: str | None
    server: str | None
    timeout: float | None
    tls: client.TLS | None

    def __post_init__(self) -> None:
        if self.server == "":
            _refuse("--server", "is empty; give HOST:PORT")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            _refuse("--timeout", f"is {self.timeout:g}, must be seconds above 0")
        if self.server is None and (self.tls is not None or self.timeout is not None):
            _refuse("--tls, --timeout", "are for a connection; give --server as well")
        if self.server is not None and (self.model or self.device or self.dtype):
            _refuse("--model, --device, --dtype", "are the service's to choose; leave them out with --server")

    @property
    def name(self) -> str:
        return self.server or self.model or "mini"

    def open(self, *, batch: int | None = None) -> Source:
        """Connect to the service, or load the model: `batch` as in `services.cli.local.open_local`."""
        if self.server is not None:
            timeout = client.DEFAULT_TIMEOUT_SECONDS if self.timeout is None else self.timeout
            return client.AudioClient(self.server, tls=self.tls, timeout=timeout)
        # Torch is seconds of import: only where the engine is wanted.
        from services.cli.local import open_local

        return open_local(self.name, device=self.device or "auto", dtype=self.dtype or "float32", batch=batch)


def _generate_one(
    place: _Place,
    prompt: str,
    options: client.GenerationOptions,
    output: Path,
    spectrogram: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the clips of one prompt and write them."""
    options["encoding"] = encoding_of(output)
    if spectrogram is not None and spectrogram.suffix.lower() != ".png":
        _refuse("--spectrogram", f"is {spectrogram}, which must end in .png")
    for path in (output, spectrogram):
        if path is not None:
            check_writable(path)
    with ProgressView(jobs=1, quiet=quiet) as view:
        view.stage("loading the model" if place.server is None else "connecting")
        source = place.open()
        try:
            made = make(source, prompt, options, lambda update: view.update(prompt, update))
        except InvalidInputError as error:
            raise _in_flags(error) from None
        finally:
            source.close()
    count = len(made.clips)
    paths = [numbered(output, clip.index, count) for clip in made.clips]
    pictures = [numbered(spectrogram, clip.index, count) for clip in made.clips] if spectrogram else []
    for clip, path in zip(made.clips, paths, strict=True):
        write_atomically(path, clip.audio)
    for clip, path in zip(made.clips, pictures, strict=False):
        _write_spectrogram(path, clip, prompt)
    _warn(made.finished.warnings)
    if as_json:
        record = _record(made, paths)
        typer.echo(_json({"prompt": prompt, **record, "spectrograms": [str(path) for path in pictures]}))
    else:
        for written in [*paths, *pictures]:
            typer.echo(written)


def _in_flags(error: InvalidInputError) -> InvalidInputError:
    """Spell the fields as the command line does."""
    return InvalidInputError(
        *(
            FieldViolation(_FLAGS.get(v.field, f"--{v.field.replace('_', '-')}"), v.description)
            if not v.field.startswith("-") and v.field.isidentifier()
            else v
            for v in error.violations
        )
    )


def _write_spectrogram(path: Path, clip: client.Clip, prompt: str) -> None:
    from services.spectrogram import spectrogram_png

    # A clip's waveform comes at the rate of its file, which is what was written.
    write_atomically(path, spectrogram_png(clip.waveform(), clip.sampling_rate, title=prompt[:90]))


def _warn(warnings: tuple[str, ...], name: str = "") -> None:
    for warning in warnings:
        typer.echo(f"warning: {name}{warning}", err=True)


def _record(made: Made, paths: Sequence[Path]) -> dict[str, Any]:
    """What was made, for machines and for the record beside the clips."""
    return {
        "clips": [
            {
                "location": str(path),
                "clip_index": clip.index,
                "seed": clip.seed,
                "duration": round(clip.duration, 6),
                "sampling_rate": clip.sampling_rate,
            }
            for clip, path in zip(made.clips, paths, strict=True)
        ],
        "model": dataclasses.asdict(made.finished.model),
        "warnings": list(made.finished.warnings),
        "timings": {
            name: round(value, 4) for name, value in dataclasses.asdict(made.finished.timings).items()
        },
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Folder:
    """A folder of clips being made from a file of prompts."""

    folder: Path
    jobs: tuple[prompts.Job, ...]
    place: _Place
    as_json: bool

    def generate(self, *, parallel: int, overwrite: bool, quiet: bool) -> None:
        """Make what is missing. A prompt that the model refuses is told at the end; the others go on.

        Raises:
            InvalidInputError: prompts were refused; all others are made.
            MilongaError: the service went away, or the folder is full: what was made stays.
        """
        make_folder(self.folder)
        todo = [
            job for job in self.jobs if overwrite or not prompts.is_done(self.folder, job, self.place.name)
        ]
        refused: list[FieldViolation] = []
        try:
            if todo:
                refused = self._make_all(todo, parallel, quiet)
        finally:
            prompts.write_index(self.folder, self.jobs)
        if not self.as_json:
            made, kept = len(todo) - len(refused), len(self.jobs) - len(todo)
            typer.echo(f"{made} made, {kept} there already, {len(refused)} refused", err=True)
            typer.echo(self.folder / prompts.INDEX)
        if refused:
            raise InvalidInputError(*prompts.shortened(refused))

    def _make_all(self, todo: list[prompts.Job], parallel: int, quiet: bool) -> list[FieldViolation]:
        """Make `todo`, several at a time. Returns what was refused."""
        refused: list[FieldViolation] = []
        stop = threading.Event()
        with ProgressView(jobs=len(todo), quiet=quiet) as view, ThreadPoolExecutor(parallel) as pool:
            view.stage("loading the model" if self.place.server is None else "connecting")
            source = self.place.open(batch=parallel)
            try:
                pending: dict[Future[Made], prompts.Job] = {
                    pool.submit(_patiently, source, job, view, stop): job for job in todo
                }
                while pending:
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        job = pending.pop(future)
                        try:
                            self._write(job, future.result())
                        except InvalidInputError as error:
                            refused.append(FieldViolation(job.name, str(error)))
                        view.done(job.name)
            finally:
                # Reached with jobs under way only when something failed, or on Ctrl-C. Closing the source
                # ends them at once: they may be waiting for a service that says nothing.
                stop.set()
                source.close()
                pool.shutdown(wait=True, cancel_futures=True)
        return refused

    def _write(self, job: prompts.Job, made: Made) -> None:
        """Write the clips, then the record that makes them count."""
        for clip, file in zip(made.clips, job.files, strict=True):
            write_atomically(self.folder / file, clip.audio)
        record = {"request": prompts.request_record(job, self.place.name), **_record(made, job.files)}
        write_atomically(self.folder / f"{job.name}.json", (_json(record) + "\n").encode())
        _warn(made.finished.warnings, f"{job.name}: ")
        if self.as_json:
            typer.echo(_json({"id": job.name, "prompt": job.prompt, **record}))


def _patiently(source: Source, job: prompts.Job, view: ProgressView, stop: threading.Event) -> Made:
    """`make`, coming back as often as a full queue asks for it."""
    for left in reversed(range(_MAX_TRIES)):
        if stop.is_set():
            break
        try:
            return make(source, job.prompt, job.options, lambda update: view.update(job.name, update), stop)
        except QueueFullError as error:
            if not left:
                raise
            stop.wait(error.retry_after)
    raise RequestCancelledError("stopped")
