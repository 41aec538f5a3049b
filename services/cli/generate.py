"""`milonga generate`: clips from one prompt or a file of them, in this process or through a service."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services import client
from services.cli import prompts
from services.cli.check import Checker, CheckOptions
from services.cli.folder import Folder
from services.cli.making import BestOf, GeneratedClips, Place, in_flags, record_of, to_json, warn
from services.cli.options import ModelOptions, SamplingOptions, given_options, grouped
from services.cli.outputs import Cell, check_writable, encoding_of, numbered, print_table
from services.cli.progress import ProgressView
from services.cli.scorers import PANEL, ScorerOptions, refuse
from services.cli.signing import SigningOptions, signed
from services.client import ServiceOptions
from services.errors import InvalidInputError
from services.files import write_atomically
from services.provenance import check_signable

if TYPE_CHECKING:
    from services.provenance.signing import ClipSigner

_PARALLEL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipOptions(SamplingOptions):
    """The options of a generation."""

    clips: Annotated[int | None, typer.Option(help="Different clips per prompt.", show_default="1")] = None
    sample_rate: Annotated[
        int | None, typer.Option(help="Hertz of the file. Default: the model's.", show_default=False)
    ] = None
    loudness: Annotated[
        float | None,
        typer.Option(
            help="Bring each clip to this root mean square, in dB relative to full scale (-60 to -6).",
            show_default=False,
        ),
    ] = None

    adapter: Annotated[
        str | None,
        typer.Option(
            help="Low-rank adapter: its model URI, or NAME@VERSION of the registry; with --server one of the "
            "service's.",
            show_default=False,
        ),
    ] = None

    def generation(self) -> client.GenerationOptions:
        """Return them by the client's names."""
        return {
            **self.sampling(),
            "clip_count": self.clips,
            "sampling_rate": self.sample_rate,
            "loudness": self.loudness,
            "adapter": self.adapter,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateOptions:
    """The options that say how the best of several candidates are chosen."""

    candidates: Annotated[
        int | None,
        typer.Option(
            help="Make this many clips per prompt, and keep the best --clips of them.",
            min=1,
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    rank_by: Annotated[
        client.RankBy | None,
        typer.Option(
            help="Rank by the reward, or by the mean of the scorers' CLAP scores.",
            show_default="reward",
            rich_help_panel=PANEL,
        ),
    ] = None


@grouped
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What the clip should sound like.", show_default=False, metavar="PROMPT"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write (.wav, .flac, .ogg, .mp3, .opus); the folder of clips with --prompts. "
            "Default: clip.wav. With several clips: clip-1.wav, clip-2.wav, …",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="List of prompts: CSV, TSV, JSON or Parquet with a prompt per row, optionally with id, "
            "seed, num_inference_steps, … Clips that exist are not made again. - is standard input.",
        ),
    ] = None,
    spectrogram: Annotated[Path | None, typer.Option(help="Also write the clip's spectrogram (PNG).")] = None,
    parallel: Annotated[
        int | None,
        typer.Option(help="With --prompts: prompts at a time.", min=1, max=64, show_default=str(_PARALLEL)),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --prompts: make clips that exist again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bar, no table of candidates.")
    ] = False,
    *,
    clip_options: ClipOptions,
    where: ModelOptions,
    connection: ServiceOptions,
    choice: CandidateOptions,
    scorers: ScorerOptions,
    checking: CheckOptions,
    signing: SigningOptions,
) -> None:
    """Generate sound from a prompt, or from a file of prompts.

    Prints the names of the files that were written, one per line; progress, warnings and errors go to stderr.
    """
    if (prompt is None) == (prompt_file is None):
        refuse("PROMPT", "give a prompt, or a file of them with --prompts; one of the two")
    if connection.given and not (where.server or scorers.given("scoring", "reward_server")):
        refuse(given_options(connection), "is for calls to a service; give --server as well")
    best_of = best_of_options(choice, scorers, clip_options.clips, where, connection)
    place = Place(
        model=where.model, device=where.device, dtype=where.dtype, server=where.server,
        connection=connection, best_of=best_of, watermark=signing.watermark,
    )  # fmt: skip
    if prompt is not None:
        if overwrite or parallel is not None:
            refuse("--overwrite, --parallel", "go with --prompts only; a single output is always written")
        options, path = clip_options.generation(), output or Path("clip.wav")
        checker = checking.open(where.device)
        _generate_one(
            place, prompt, options, path, spectrogram, checker, signing.open(), as_json=as_json, quiet=quiet
        )
    elif prompt_file is not None:
        if spectrogram is not None:
            refuse("--spectrogram", "draws the clip of one PROMPT; leave it out with --prompts")
        if checking.check:
            refuse(
                "--check",
                "is for one PROMPT; for many, use milonga train evaluate, or milonga caption --folder",
            )
        checking.open(None)
        if output is None:
            refuse("--output", "must name the folder of clips with --prompts")
        jobs = prompts.read_jobs(prompt_file, clip_options.generation(), place.settings)
        run = Folder(folder=output, jobs=jobs, place=place, as_json=as_json, signer=signing.open())
        run.generate(parallel=parallel or _PARALLEL, overwrite=overwrite, quiet=quiet)


def _generate_one(
    place: Place,
    prompt: str,
    options: client.GenerationOptions,
    output: Path,
    spectrogram: Path | None,
    checker: Checker | None,
    signer: "ClipSigner | None",
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the clips of one prompt and write them."""
    options["encoding"] = encoding_of(output)
    if signer is not None:
        check_signable("--output", str(output), encoding_of(output))
    if spectrogram is not None and spectrogram.suffix.lower() != ".png":
        refuse("--spectrogram", f"is {spectrogram}, which must end in .png")
    for path in (output, spectrogram):
        if path is not None:
            check_writable(path)
    made = signed(_make(place, prompt, options, quiet=quiet), prompt, signer)
    count = len(made.clips)
    paths = [numbered(output, index, count) for index in range(count)]
    pictures = [numbered(spectrogram, index, count) for index in range(count)] if spectrogram else []
    for clip, path in zip(made.clips, paths, strict=True):
        write_atomically(path, clip.audio)
    for clip, path in zip(made.clips, pictures, strict=False):
        _write_spectrogram(path, clip, prompt)
    warn(made.warnings)
    checks = [] if checker is None else checker.check(prompt, made.clips)
    if as_json:
        record = record_of(made, paths)
        record |= {"spectrograms": [str(path) for path in pictures]}
        record |= {"checks": [check.record() for check in checks]} if checker is not None else {}
        typer.echo(to_json({"prompt": prompt, **record}))
        return
    if made.best is not None and not quiet:
        _show_candidates(made.best, len(made.clips))
    for written in [*paths, *pictures]:
        typer.echo(written)
    for path, check in zip(paths, checks, strict=False):
        typer.echo(f"{path.name} {check.line()}", err=True)


def _make(place: Place, prompt: str, options: client.GenerationOptions, *, quiet: bool) -> GeneratedClips:
    """Make the clips of one prompt, and choose among them."""
    with ProgressView(jobs=1, quiet=quiet) as view:
        view.stage(place.first_stage)
        maker = place.open()
        try:
            count = options.get("clip_count") or 1
            update = partial(view.update, prompt)
            return maker.make(prompt, options, count, update, on_stage=view.stage)
        except InvalidInputError as error:
            raise in_flags(error, place.best_of) from None
        finally:
            maker.close()


def _write_spectrogram(path: Path, clip: client.Clip, prompt: str) -> None:
    from services.audio.spectrogram import spectrogram_png

    # A clip's waveform comes at the rate of its file, which is what was written.
    write_atomically(path, spectrogram_png(clip.waveform(), clip.sampling_rate, title=prompt[:90]))


def _show_candidates(best: client.Best, kept: int) -> None:
    """Print every candidate on stderr, best first."""
    header = ["candidate", "seed", "reward" if best.rank_by == "reward" else "mean CLAP score"]
    rows: list[list[Cell]] = [
        [
            f"{candidate.number}",
            f"{candidate.clip.seed}",
            candidate.value,
            *candidate.details.values(),
            "kept" if place < kept else "",
        ]
        for place, candidate in enumerate(best.candidates)
    ]
    print_table([*header, *best.candidates[0].details, ""], rows, stderr=True)


def best_of_options(
    choice: CandidateOptions,
    scorers: ScorerOptions,
    clips: int | None,
    where: ModelOptions,
    connection: ServiceOptions,
) -> BestOf | None:
    """Return how the best of several candidates are chosen; None if all clips are kept.

    Raises:
        InvalidInputError: options that contradict each other, or that `rank_by` does not use.
    """
    if choice.candidates is None:
        given = "--rank-by" if choice.rank_by else ""
        given = given or scorers.given("reward", "clap", "scorer", "reward_server", "scoring")
        if given:
            refuse(given, "chooses among candidates; give --candidates as well")
        return None
    if not 1 <= (clips or 1) <= choice.candidates:
        refuse(
            "--clips", f"is {clips}, must be between 1 and --candidates ({choice.candidates}), which it keeps"
        )
    rank_by = choice.rank_by or "reward"
    unused = ("scorer", "scoring") if rank_by == "reward" else ("reward", "clap", "reward_server")
    if given := scorers.given(*unused):
        other = "clap" if rank_by == "reward" else "reward"
        refuse(given, f"is not used; leave it out, or give --rank-by {other}")
    if where.server is not None and not scorers.given("reward", "scorer", "reward_server", "scoring"):
        flag = "--reward-server" if rank_by == "reward" else "--scoring"
        refuse(flag, "is needed with --server: the address of the service that scores candidates")
    sources = scorers.choose(connection, device=where.device, no_reward=rank_by != "reward")
    if rank_by == "reward":
        sources = replace(sources, scorers={})
    return BestOf(candidates=choice.candidates, rank_by=rank_by, scorers=sources)
