"""`milonga generate`: clips from one prompt or a file of them, in this process or through a service."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from services import client
from services.cli import judging, prompts
from services.cli.folder import Folder
from services.cli.judging import refuse
from services.cli.making import BestOf, GeneratedClips, Place, in_flags, record_of, to_json, warn
from services.cli.outputs import Cell, check_writable, encoding_of, numbered, print_table
from services.cli.progress import ProgressView
from services.errors import InvalidInputError
from services.files import write_atomically

_PARALLEL = 4


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
    tls: judging.TLSOption = False,
    tls_ca: judging.TLSCAOption = None,
    tls_cert: judging.TLSCertOption = None,
    tls_key: judging.TLSKeyOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="With a service: seconds that a call may take, waiting included.",
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
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Make so many clips a prompt, and keep the best --clips of them.",
            min=1,
            show_default=False,
            rich_help_panel=judging.JUDGES,
        ),
    ] = None,
    rank_by: Annotated[
        client.RankBy | None,
        typer.Option(
            help="What best means: the reward, or the mean of the scorers' CLAP scores.",
            show_default="reward",
            rich_help_panel=judging.JUDGES,
        ),
    ] = None,
    reward: judging.RewardOption = None,
    clap: judging.ClapOption = None,
    scorer: judging.ScorerOption = None,
    reward_server: judging.RewardServerOption = None,
    scoring: judging.ScoringOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a prompt on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bar, no table of candidates.")
    ] = False,
) -> None:
    """Make sound from a sentence, or from a file of them.

    Prints the names of the files that were written, one a line; progress, warnings and errors go to stderr.
    """
    if (prompt is None) == (prompt_file is None):
        refuse("PROMPT", "give a prompt, or a file of them with --prompts; one of the two")
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
    connection = judging.Connection.of_flags(tls=tls, ca=tls_ca, cert=tls_cert, key=tls_key, timeout=timeout)
    if not connection.is_default and server is None and scoring is None and reward_server is None:
        refuse("--tls, --timeout", "are for a connection; give --server as well")
    judges = JudgeFlags(
        rank_by=rank_by, reward=reward, clap=clap, scorer=scorer, reward_server=reward_server, scoring=scoring
    )
    place = Place(
        model=model, device=device, dtype=dtype, server=server, connection=connection,
        best_of=judges.best_of(candidates, clips, server=server, device=device, connection=connection),
    )  # fmt: skip
    if prompt is not None:
        if overwrite or parallel is not None:
            refuse("--overwrite, --parallel", "go with --prompts only; a single output is always written")
        _generate_one(
            place, prompt, options, output or Path("clip.wav"), spectrogram, as_json=as_json, quiet=quiet
        )
    elif prompt_file is not None:
        if spectrogram is not None:
            refuse("--spectrogram", "draws the clip of one PROMPT; leave it out with --prompts")
        if output is None:
            refuse("--output", "must name the folder of clips with --prompts")
        judging_settings = {} if place.best_of is None else place.best_of.settings()
        jobs = prompts.read_jobs(prompt_file, options, judging_settings)
        run = Folder(folder=output, jobs=jobs, place=place, as_json=as_json)
        run.generate(parallel=parallel or _PARALLEL, overwrite=overwrite, quiet=quiet)


def _generate_one(
    place: Place,
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
        refuse("--spectrogram", f"is {spectrogram}, which must end in .png")
    for path in (output, spectrogram):
        if path is not None:
            check_writable(path)
    made = _make(place, prompt, options, quiet=quiet)
    count = len(made.clips)
    paths = [numbered(output, index, count) for index in range(count)]
    pictures = [numbered(spectrogram, index, count) for index in range(count)] if spectrogram else []
    for clip, path in zip(made.clips, paths, strict=True):
        write_atomically(path, clip.audio)
    for clip, path in zip(made.clips, pictures, strict=False):
        _write_spectrogram(path, clip, prompt)
    warn(made.generation.warnings)
    if as_json:
        record = record_of(made, paths)
        typer.echo(to_json({"prompt": prompt, **record, "spectrograms": [str(path) for path in pictures]}))
        return
    if made.best is not None and not quiet:
        _show_candidates(made.best, len(made.clips))
    for written in [*paths, *pictures]:
        typer.echo(written)


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JudgeFlags:
    """What the flags say about who chooses among candidates."""

    rank_by: client.RankBy | None
    reward: str | None
    clap: str | None
    scorer: list[str] | None
    reward_server: str | None
    scoring: str | None

    def best_of(
        self,
        candidates: int | None,
        clips: int | None,
        *,
        server: str | None,
        device: str | None,
        connection: judging.Connection,
    ) -> BestOf | None:
        """Return how the best of `candidates` are chosen; None where all clips are kept.

        Raises:
            InvalidInputError: flags that contradict each other, or that `rank_by` does not use.
        """
        if candidates is None:
            if given := self._given("rank_by", "reward", "clap", "scorer", "reward_server", "scoring"):
                refuse(given, "chooses among candidates; give --candidates as well")
            return None
        if not 1 <= (clips or 1) <= candidates:
            refuse(
                "--clips", f"is {clips}, must be between 1 and --candidates ({candidates}), which it keeps"
            )
        by_reward = (self.rank_by or "reward") == "reward"
        if (
            given := self._given("scorer", "scoring")
            if by_reward
            else self._given("reward", "clap", "reward_server")
        ):
            other = "clap" if by_reward else "reward"
            refuse(given, f"is not asked; leave it out, or give --rank-by {other}")
        if server is not None and not self._given("reward", "scorer", "reward_server", "scoring"):
            flag = "--reward-server" if by_reward else "--scoring"
            refuse(flag, "is needed with --server: the address of the service that judges candidates")
        judges = judging.choose_judges(
            scorer=self.scorer, reward=self.reward, no_reward=not by_reward, clap=self.clap,
            scoring=self.scoring, reward_server=self.reward_server, device=device, connection=connection,
        )  # fmt: skip
        if by_reward:
            judges = dataclasses.replace(judges, scorers={})
        return BestOf(candidates=candidates, rank_by="reward" if by_reward else "clap", judges=judges)

    def _given(self, *names: str) -> str:
        """The first of the flags that was given; empty if none was."""
        given = (f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None)
        return next(given, "")
