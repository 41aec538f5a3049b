"""`milonga score`: what CLAP scorers and a reward model say of clips, in this process or through services."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from milonga.v1 import audio_pb2
from services import client
from services.api.scoring import Scorers
from services.audio.clips import AudioBounds, check_prompt, read_clip
from services.cli import prompts
from services.cli.options import grouped
from services.cli.outputs import Cell, is_terminal, print_lines, print_table
from services.cli.progress import ProgressView
from services.cli.scorers import (
    MAX_BATCH,
    PANEL,
    Connection,
    ScorerOptions,
    ScorerSources,
    name_clips,
    refuse,
)
from services.errors import FieldViolation, InvalidInputError

_MAX_BATCH_BYTES = 128 * 2**20
"""Bytes of the clips that a call of a judge takes, as files or decoded, unless a single one is larger."""
_MAX_FILE_BYTES = 192 * 2**20
"""Largest file that is read: a minute of the widest that is taken. A service's message fits it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A sentence, and the file that should sound like it."""

    prompt: str
    """The sentence."""
    path: Path
    """Where the file is."""
    location: str
    """What it was called, and is called in the results."""
    place: str
    """What an error calls it: the file, or the line that named it."""

    def read(self) -> bytes:
        """The file's content.

        Raises:
            InvalidInputError: it can't be read, or is no file, or too large for any clip.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                refuse(self.place, self._about("is no file; give a file of sound"))
            size = self.path.stat().st_size
            if size > _MAX_FILE_BYTES:
                refuse(
                    self.place,
                    self._about(
                        f"has {size / 2**20:.0f} MiB, the limit is {_MAX_FILE_BYTES / 2**20:.0f}; cut it"
                    ),
                )
            return self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            reason = getattr(error, "strerror", None) or error
            raise InvalidInputError(
                FieldViolation(self.place, self._about(f"can't be read: {reason}"))
            ) from error

    def _about(self, description: str) -> str:
        return description if self.place == self.location else f"location {self.location} {description}"


@grouped
def score(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What the clips should sound like.", show_default=False, metavar="PROMPT"),
    ] = None,
    clips: Annotated[
        list[str] | None,
        typer.Argument(help="Files of sound (WAV, FLAC, OGG).", show_default=False, metavar="CLIP"),
    ] = None,
    pair_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="File of clips with their prompts, instead of PROMPT and CLIP; one JSON object a line: "
            '{"prompt": …, "location": …}, as in the index.jsonl of `milonga generate --prompts`.',
        ),
    ] = None,
    no_reward: Annotated[
        bool, typer.Option("--no-reward", help="Use scorers only.", rich_help_panel=PANEL)
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of the models in this process: auto, cpu, cuda, cuda:1, mps.",
            show_default="auto",
            rich_help_panel=PANEL,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a clip on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    *,
    connection: Connection,
    scorer_options: ScorerOptions,
) -> None:
    """Score how well clips match their prompts.

    One row a clip: its CLAP score by each scorer (a cosine), its reward (a logit), and the probability that a
    listener calls it right.

    Aligned on a terminal, otherwise separated by tabs. Nothing is scored unless every clip can be.
    """
    if pair_file is None:
        if prompt is None or not clips:
            refuse("PROMPT, CLIP", "give a prompt and its clips, or a file of them with --prompts")
        pairs = tuple(
            Pair(prompt=prompt, path=Path(clip), location=name, place=name)
            for clip, name in zip(clips, map(_printable, clips), strict=True)
        )
    else:
        if prompt is not None:
            refuse("PROMPT, CLIP", "come from the file with --prompts; leave one of the two out")
        pairs = read_pair_file(pair_file)
    sources = scorer_options.choose(connection, device=device, no_reward=no_reward)
    if not connection.is_default and not scorer_options.given("scoring", "reward_server"):
        refuse("--tls, --timeout", "are for a connection; give --scoring or --reward-server as well")
    if device is not None and not sources.are_here:
        refuse("--device", "is the services' to choose; leave it out where no model runs in this process")
    report = _Report(as_json=as_json, with_prompts=pair_file is not None)
    try:
        with ProgressView(jobs=len(pairs), quiet=quiet) as view:
            view.stage("reading the clips")
            sizes = check_pairs(pairs, single_prompt=pair_file is None)
            view.stage("loading the models" if sources.are_here else "connecting")
            with contextlib.closing(sources.open()) as scorers:
                view.stage("scoring")
                for batch in batches(pairs, sizes):
                    report.add(score_batch(batch, sources, scorers))
                    for pair in batch:
                        view.done(pair.location)
    finally:
        # Below where the bar was. Scores are shown even if a later batch failed.
        report.close()


def _printable(name: str) -> str:
    """A file's name where it is not UTF-8, which a file's name need not be."""
    return os.fsencode(name).decode("utf-8", "replace")


def read_pair_file(path: Path) -> tuple[Pair, ...]:
    """Return the pairs of a file: each line's `prompt` (or `captions`) and `location`.

    Locations start from the file's folder. Other fields are passed over: the line may be one of a data set.

    Raises:
        InvalidInputError: the file can't be read, or lines are wrong: the first few are named, the rest
            counted.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InvalidInputError(FieldViolation("--prompts", f"{path} can't be read: {reason}")) from error
    pairs: list[Pair] = []
    faults: list[FieldViolation] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        found = _parse(line)
        if isinstance(found, str):
            faults.append(FieldViolation(place, found))
            continue
        prompt, location = found
        pairs.append(Pair(prompt=prompt, path=path.parent / location, location=location, place=place))
    if not pairs and not faults:
        faults.append(
            FieldViolation(
                "--prompts", f'{path} names no clip; write one a line: {{"prompt": "…", "location": "…"}}'
            )
        )
    if faults:
        raise InvalidInputError(*prompts.shortened(faults))
    return tuple(pairs)


def _parse(line: str) -> tuple[str, str] | str:
    """The prompt and the location of a line, or what is wrong with it."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        return f"is no JSON: {error}"
    if not isinstance(fields, dict):
        return f'must be an object: {{"prompt": "…", "location": "…"}}, found {line.strip()[:40]!r}'
    prompt, location = fields.get("prompt", fields.get("captions")), fields.get("location")
    for name, value in (("prompt", prompt), ("location", location)):
        if value is None:
            return f"has no {name}"
        if not isinstance(value, str):
            return f"{name} is {str(value)[:40]!r}, must be str"
    return str(prompt), str(location)


def check_pairs(pairs: Sequence[Pair], *, single_prompt: bool) -> list[int]:
    """Read every file and prompt as a service would; return the bytes of each, as a file or decoded.

    Raises:
        InvalidInputError: with every prompt and clip that no judge takes. Where each pair has a prompt of its
            own, the first few are named and the rest counted.
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
            # Decoded again when its turn comes: all of them together may be more than the memory.
            clip = read_clip(audio_pb2.Clip(audio=content), "pairs[0].clip", bounds)
            sizes.append(max(len(content), clip.waveform.nbytes))
        except InvalidInputError as error:
            faults.extend(name_clips(error, [pair.place]).violations)
    if faults:
        raise InvalidInputError(*(faults if single_prompt else prompts.shortened(faults)))
    return sizes


def batches(pairs: Sequence[Pair], sizes: Sequence[int]) -> Iterator[Sequence[Pair]]:
    """Cut `pairs` into calls of `MAX_BATCH` clips and `_MAX_BATCH_BYTES` at most."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == MAX_BATCH or total + size > _MAX_BATCH_BYTES):
            yield pairs[start:index]
            start, total = index, 0
        total += size
    yield pairs[start:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the judges say of one pair."""

    pair: Pair
    scores: dict[str, float]
    """CLAP score by scorer."""
    scorers: dict[str, client.ModelVersion]
    """Which weights each scorer is."""
    reward: client.Reward | None
    """None where no reward model was asked."""
    reward_model: client.ModelVersion | None

    def record(self) -> dict[str, Any]:
        """The verdict for machines."""
        scores = {
            name: {"score": value, "model": dataclasses.asdict(self.scorers[name])}
            for name, value in self.scores.items()
        }
        record: dict[str, Any] = {"location": self.pair.location, "prompt": self.pair.prompt}
        if scores:
            record["scores"] = scores
        if self.reward is not None and self.reward_model is not None:
            record["reward"] = {
                "logit": self.reward.logit,
                "probability": self.reward.probability,
                "model": dataclasses.asdict(self.reward_model),
            }
        return record


def score_batch(batch: Sequence[Pair], sources: ScorerSources, scorers: Scorers) -> list[Verdict]:
    """Score a batch by every scorer and the reward model.

    Raises:
        InvalidInputError: a file changed since it was checked, or a service takes less than others.
    """
    sounds = [(pair.prompt, pair.read()) for pair in batch]
    try:
        scores = scorers.score_audio(sounds, scorers=sources.names or None) if sources.by_clap else None
        rewards = scorers.compute_rewards(sounds) if sources.by_reward else None
    except InvalidInputError as error:
        raise name_clips(error, [pair.place for pair in batch]) from None
    columns = () if scores is None else scores.scorers
    return [
        Verdict(
            pair=pair,
            scores={}
            if scores is None
            else {one.name: float(value) for one, value in zip(columns, scores.values[row], strict=True)},
            scorers={one.name: one.model for one in columns},
            reward=None if rewards is None else rewards.rewards[row],
            reward_model=None if rewards is None else rewards.model,
        )
        for row, pair in enumerate(batch)
    ]


class _Report:
    """Prints verdicts: at once where a program reads them, as one table where a person does."""

    def __init__(self, *, as_json: bool, with_prompts: bool) -> None:
        self._as_json, self._with_prompts = as_json, with_prompts
        self._aligned = is_terminal() and not as_json
        self._header: list[str] = []
        self._rows: list[list[Cell]] = []

    def add(self, verdicts: Sequence[Verdict]) -> None:
        if self._as_json:
            for verdict in verdicts:
                typer.echo(json.dumps(verdict.record(), ensure_ascii=False))
            return
        is_first = not self._header
        if is_first:
            self._header = self._columns(verdicts[0])
        rows = [self._row(verdict) for verdict in verdicts]
        if self._aligned:
            self._rows.extend(rows)
        else:
            print_lines(self._header if is_first else (), rows)

    def close(self) -> None:
        """Print the table, where it was not printed row by row."""
        if self._rows:
            print_table(self._header, self._rows)

    def _columns(self, verdict: Verdict) -> list[str]:
        reward = [] if verdict.reward is None else ["reward", "probability"]
        return ["clip", *verdict.scores, *reward, *(["prompt"] if self._with_prompts else [])]

    def _row(self, verdict: Verdict) -> list[Cell]:
        reward = [] if verdict.reward is None else [verdict.reward.logit, verdict.reward.probability]
        prompt = [verdict.pair.prompt] if self._with_prompts else []
        return [verdict.pair.location, *verdict.scores.values(), *reward, *prompt]
