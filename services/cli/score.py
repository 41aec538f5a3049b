"""`milonga score`: score clips by CLAP models and a reward model, in this process or through services."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from services import client
from services.api.scoring import Scorers
from services.audio.clips import check_prompt
from services.audio.decoding import AudioBounds, decode
from services.cli.audio_files import AudioFile, batches, printable
from services.cli.making import warn
from services.cli.options import given_options, grouped
from services.cli.outputs import Cell, is_terminal, print_lines, print_table
from services.cli.progress import ProgressView
from services.cli.scorers import (
    MAX_BATCH,
    PANEL,
    ScorerOptions,
    ScorerSources,
    name_clips,
    refuse,
)
from services.client import ServiceOptions
from services.errors import FieldViolation, InvalidInputError, invalid
from services.lists import EmbeddedClip, find_clip, read_list, shortened


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair(AudioFile):
    """A prompt, and the audio file to score for it."""

    prompt: str
    """The prompt."""
    embedded: EmbeddedClip | None = None
    """The clip, if it is in a Parquet file."""

    def read(self) -> bytes:
        """Return the file's content. Raises as `AudioFile.read` does."""
        if self.embedded is None:
            return AudioFile.read(self)
        try:
            return self.embedded.read_bytes(self.path.parent)
        except (OSError, ValueError) as error:
            raise invalid(self.place, f"the clip can't be read: {error}") from error


@grouped
def score(
    prompt: Annotated[
        str | None,
        typer.Argument(help="Prompt of the clips.", show_default=False, metavar="PROMPT"),
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Argument(help="Audio files (WAV, FLAC, OGG, MP3, AIFF).", show_default=False, metavar="CLIP"),
    ] = None,
    pair_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="List of clips and their prompts, instead of PROMPT and CLIP: CSV, TSV, JSON or Parquet "
            "with a prompt and a location per row, as in the index.jsonl of `milonga generate --prompts`. "
            "- is standard input.",
        ),
    ] = None,
    no_reward: Annotated[
        bool, typer.Option("--no-reward", help="Use CLAP scorers only.", rich_help_panel=PANEL)
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of the models in this process: auto, cpu, cuda, cuda:1, mps.",
            show_default="auto",
            rich_help_panel=PANEL,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per clip on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    *,
    connection: ServiceOptions,
    scorer_options: ScorerOptions,
) -> None:
    """Score how well clips match their prompts.

    Prints one row per clip: its CLAP score by each scorer (a cosine similarity), its reward (a logit), and
    the probability that a listener calls it right.

    Columns are aligned on a terminal, otherwise separated by tabs. If any clip is invalid, nothing is scored.
    """
    if pair_file is None:
        if prompt is None or not clips:
            refuse("PROMPT, CLIP", "give a prompt and its clips, or a file of them with --prompts")
        pairs = tuple(
            Pair(prompt=prompt, path=Path(clip), location=name, place=name)
            for clip, name in zip(clips, map(printable, clips), strict=True)
        )
    else:
        if prompt is not None:
            refuse("PROMPT, CLIP", "come from the file with --prompts; leave one of the two out")
        pairs = read_pair_file(pair_file)
    sources = scorer_options.choose(connection, device=device, no_reward=no_reward)
    if connection.given and not scorer_options.given("scoring", "reward_server"):
        refuse(
            given_options(connection),
            "is for calls to a service; give --scoring or --reward-server as well",
        )
    if device is not None and not sources.are_here:
        refuse("--device", "is set by the services; leave it out if no model runs in this process")
    report = _Report(as_json=as_json, with_prompts=pair_file is not None)
    try:
        with ProgressView(jobs=len(pairs), quiet=quiet) as view:
            view.stage("reading the clips")
            sizes = check_pairs(pairs, single_prompt=pair_file is None)
            view.stage("loading the models" if sources.are_here else "connecting")
            with contextlib.closing(sources.open()) as scorers:
                view.stage("scoring")
                for batch in batches(pairs, sizes, MAX_BATCH):
                    report.add(score_batch(batch, sources, scorers))
                    for pair in batch:
                        view.done(pair.location)
    finally:
        # After the progress bar has gone. Scores are printed even if a later batch failed.
        report.close()


def read_pair_file(path: Path) -> tuple[Pair, ...]:
    """Return the pairs of a list: each row's prompts and its clip, which is relative to the list's folder.

    Other fields are ignored, so a data set's index will do.

    Raises:
        InvalidInputError: the list can't be read, or rows are invalid; names the first few, counts the rest.
    """
    pairs = []
    for entry in read_list(path, "--prompts", clip="needed", embedded=True, checked=False):
        file = path if entry.embedded else find_clip(entry, path.parent)
        location = entry.place if entry.embedded else entry.location or file.name
        pairs.append(
            Pair(
                prompt=entry.prompt, path=file, location=location, place=entry.place, embedded=entry.embedded
            )
        )
    return tuple(pairs)


def check_pairs(pairs: Sequence[Pair], *, single_prompt: bool) -> list[int]:
    """Check every file and prompt as a service would; return each clip's bytes, as a file or decoded.

    Raises:
        InvalidInputError: prompts or clips are invalid. With a single prompt, lists all of them; otherwise
            names the first few and counts the rest.
    """
    bounds = AudioBounds()
    faults: list[FieldViolation] = []
    sizes: list[int] = []
    if single_prompt:
        faults.extend(check_prompt(pairs[0].prompt, "PROMPT", bounds))
    for pair in pairs:
        if not single_prompt:
            found = check_prompt(pair.prompt, pair.place, bounds)
            faults.extend(FieldViolation(pair.place, f"prompt {fault.description}") for fault in found)
        try:
            content = pair.read()
            # Decoded again when it is scored: all decoded clips together may not fit into memory.
            clip = decode(content, pair.place, bounds)
            sizes.append(max(len(content), clip.waveform.nbytes))
        except InvalidInputError as error:
            faults.extend(error.violations)
    if faults:
        raise InvalidInputError(*(faults if single_prompt else shortened(faults)))
    return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """The scores of one pair."""

    pair: Pair
    scores: dict[str, float | None]
    """CLAP score by scorer; None of one that can't read the prompt."""
    scorers: dict[str, client.ModelVersion]
    """Weights of each scorer."""
    reward: client.Reward | None
    """Reward of the clip; None without a reward model."""
    reward_model: client.ModelVersion | None
    warnings: tuple[str, ...]
    """What the scorers and the reward model warn of, each once."""

    def record(self) -> dict[str, Any]:
        """Return the scores as a JSON object."""
        scores = {
            name: {"score": value, "model": dataclasses.asdict(self.scorers[name])}
            for name, value in self.scores.items()
        }
        record: dict[str, Any] = {"location": self.pair.location, "prompt": self.pair.prompt}
        if scores:
            record["scores"] = scores
        if self.reward is not None and self.reward_model is not None:
            record["reward"] = {
                "logit": self.reward.logit if self.reward.readable else None,
                "probability": self.reward.probability if self.reward.readable else None,
                "model": dataclasses.asdict(self.reward_model),
            }
        if self.warnings:
            record["warnings"] = list(self.warnings)
        return record


def score_batch(batch: Sequence[Pair], sources: ScorerSources, scorers: Scorers) -> list[PairScores]:
    """Score a batch by every CLAP scorer and the reward model.

    Raises:
        InvalidInputError: a file changed since `check_pairs`, or a service has narrower limits.
    """
    clips = [(pair.prompt, pair.read()) for pair in batch]
    try:
        scores = scorers.score_audio(clips, scorers=sources.names or None) if sources.by_clap else None
        rewards = scorers.compute_rewards(clips) if sources.by_reward else None
    except InvalidInputError as error:
        raise name_clips(error, [pair.place for pair in batch]) from None
    columns = () if scores is None else scores.scorers
    return [
        PairScores(
            pair=pair,
            scores={}
            if scores is None
            else {
                one.name: float(value) if readable else None
                for one, value, readable in zip(
                    columns, scores.values[row], scores.readable[row], strict=True
                )
            },
            scorers={one.name: one.model for one in columns},
            reward=None if rewards is None else rewards.rewards[row],
            reward_model=None if rewards is None else rewards.model,
            warnings=tuple(
                dict.fromkeys(
                    [
                        *(() if scores is None else scores.warnings[row]),
                        *(() if rewards is None else rewards.rewards[row].warnings),
                    ]
                )
            ),
        )
        for row, pair in enumerate(batch)
    ]


class _Report:
    """Prints scores: as one table at the end on a terminal, otherwise batch by batch."""

    def __init__(self, *, as_json: bool, with_prompts: bool) -> None:
        self._as_json, self._with_prompts = as_json, with_prompts
        self._aligned = is_terminal() and not as_json
        self._warned: set[str] = set()
        self._header: list[str] = []
        self._rows: list[list[Cell]] = []

    def add(self, batch: Sequence[PairScores]) -> None:
        for scored in batch:
            self._warn(scored)
        if self._as_json:
            for scored in batch:
                typer.echo(json.dumps(scored.record(), ensure_ascii=False))
            return
        is_first = not self._header
        if is_first:
            self._header = self._columns(batch[0])
        rows = [self._row(scored) for scored in batch]
        if self._aligned:
            self._rows.extend(rows)
        else:
            print_lines(self._header if is_first else (), rows)

    def close(self) -> None:
        """Print the table on a terminal."""
        if self._rows:
            print_table(self._header, self._rows)

    def _warn(self, scored: PairScores) -> None:
        """Print a pair's warnings; of the only prompt, those on it once for all clips."""
        for warning in scored.warnings:
            if self._with_prompts or not warning.startswith("prompt "):
                warn([warning], f"{scored.pair.place}: ")
            elif warning not in self._warned:
                self._warned.add(warning)
                warn([warning])

    def _columns(self, scored: PairScores) -> list[str]:
        reward = [] if scored.reward is None else ["reward", "probability"]
        return ["clip", *scored.scores, *reward, *(["prompt"] if self._with_prompts else [])]

    def _row(self, scored: PairScores) -> list[Cell]:
        reward: list[float | None] = []
        if scored.reward is not None:
            values = scored.reward.logit, scored.reward.probability
            reward = list(values) if scored.reward.readable else [None, None]
        prompt = [scored.pair.prompt] if self._with_prompts else []
        figures = ["unread" if value is None else value for value in (*scored.scores.values(), *reward)]
        return [scored.pair.location, *figures, *prompt]
