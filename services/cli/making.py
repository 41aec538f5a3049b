"""Make the clips of a prompt, keep the best of several candidates, and record how they were made."""

import contextlib
import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer

from services.api.best import Best, RankBy, ScoredClips, generate_candidates, rank, run
from services.api.generation import (
    Clip,
    Generation,
    GenerationOptions,
    Progress,
    StreamingClipMaker,
    Update,
    collect,
)
from services.api.scoring import Scorers
from services.cli.options import check_address
from services.cli.scorers import (
    MAX_BATCH,
    ScorerSources,
    name_clips,
    refuse,
)
from services.client import ServiceOptions
from services.errors import FieldViolation, InvalidInputError, QueueFullError, RequestCancelledError

T = TypeVar("T")

_MAX_TRIES = 100
"""Attempts to submit a request to a full queue."""

_FLAGS = {
    "prompt": "PROMPT",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "clip_count": "--clips",
    "sample_rate_hertz": "--sample-rate",
}
"""Options of wire fields, where the option is not ``--field-name``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOf:
    """Best-of-n: generate candidates, and keep those with the highest scores."""

    candidates: int
    """Clips to generate per prompt."""
    rank_by: RankBy
    """Rank by the reward, or by the mean of the scorers' CLAP scores."""
    scorers: ScorerSources
    """The scorers, or the reward model, that `rank_by` needs."""

    def settings(self) -> dict[str, Any]:
        """Return the settings for a clip's record: they determine which clips are kept."""
        return {"candidates": self.candidates, "rank_by": self.rank_by, "judge": self.scorers.source}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The generator and the scorers: in this process, or services."""

    model: str | None
    """Model URI of the engine in this process; None: the embedded model."""
    device: str | None
    dtype: str | None
    server: str | None
    """Address of a generation service; None: generate in this process."""
    connection: ServiceOptions
    """How to reach services."""
    best_of: BestOf | None = None
    """None: keep every clip."""
    watermark: Path | None = None
    """Checkpoint of a watermark for the engine in this process; None: clips are not marked."""

    def __post_init__(self) -> None:
        check_address("--server", self.server)
        if self.server is not None and (self.model or self.device or self.dtype):
            refuse("--model, --device, --dtype", "are set by the service; leave them out with --server")
        if self.server is not None and self.watermark is not None:
            refuse(
                "--watermark", "is set by the service (milonga serve generation); leave it out with --server"
            )

    @property
    def name(self) -> str:
        """Return the service's address, or the model URI."""
        return self.server or self.model or "mini"

    @property
    def settings(self) -> dict[str, Any]:
        """Return further settings for a clip's record: they determine which clips are kept, and how."""
        mark = {} if self.watermark is None else {"watermark": str(self.watermark)}
        return mark if self.best_of is None else {**self.best_of.settings(), **mark}

    @property
    def first_stage(self) -> str:
        """Return the progress bar's text until the first clip is being generated."""
        scorers_here = self.best_of is not None and self.best_of.scorers.are_here
        return "loading the models" if self.server is None or scorers_here else "connecting"

    def open(self, *, batch: int | None = None) -> "Maker":
        """Connect to the services, or load the models.

        With `batch`, every denoiser call of the engine has exactly that batch size, so that no clip depends
        on the other clips of its batch.

        Raises:
            InvalidInputError: a model URI or a device is invalid; names the option.
            ModelError: a model was refused.
        """
        with contextlib.ExitStack() as stack:
            try:
                # Scorers first: they load faster, so a refusal is reported sooner.
                scorers = None if self.best_of is None else self.best_of.scorers.open()
                if scorers is not None:
                    stack.callback(scorers.close)
                    # Otherwise an absent service would be reported only after the candidates are made.
                    scorers.versions()
                clips = self._open_clip_maker(batch)
            except InvalidInputError as error:
                raise in_flags(error, self.best_of) from None
            stack.pop_all()
            return Maker(clips, self.best_of, scorers)

    def _open_clip_maker(self, batch: int | None) -> StreamingClipMaker:
        if self.server is not None:
            return self.connection.open(self.server)
        # Imported here: importing torch takes seconds, and only the engine needs it.
        from services.engine import EngineConfig
        from services.local import open_clip_maker
        from services.weights.uri import resolve

        config = EngineConfig() if batch is None else EngineConfig(batch_shapes=(batch,), exact=True)
        model = resolve(self.name)
        return open_clip_maker(
            model,
            device=self.device or "auto",
            dtype=self.dtype or "float32",
            config=config,
            watermark=self.watermark,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedClips:
    """The clips of one prompt."""

    clips: tuple[Clip, ...]
    """The clips to keep: by index, or best first with `best`."""
    generation: Generation
    """The generation of all clips, those that are not kept included."""
    best: Best | None = None
    """All candidates, best first; None without best-of-n."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the generation and, with best-of-n, of the scorers."""
        return self.generation.warnings if self.best is None else self.best.warnings


class Maker:
    """Makes the clips of prompts, with best-of-n if `best_of` is given. Thread-safe."""

    def __init__(
        self, clips: StreamingClipMaker, best_of: BestOf | None = None, scorers: Scorers | None = None
    ) -> None:
        """Own `clips` and `scorers`: `close` closes them."""
        self._clips, self._best_of, self._scorers = clips, best_of, scorers

    def make(
        self,
        prompt: str,
        options: GenerationOptions,
        count: int,
        on_update: Callable[[Update], None],
        *,
        on_stage: Callable[[str], None] = lambda _: None,
        stop: threading.Event | None = None,
    ) -> GeneratedClips:
        """Make the clips of one prompt; with best-of-n, keep the best `count` candidates.

        Candidates equal those of `AudioClient.generate_best` with the same seed.

        Args:
            prompt: the text.
            options: options of the request.
            count: clips to keep with best-of-n.
            on_update: called with every update of the generation.
            on_stage: called with the name of a new stage.
            stop: retry while a queue is full, and cancel between two steps once it is set. None: no retries.

        Raises:
            QueueFullError: a queue is full, without `stop` or after the last attempt.
            RequestCancelledError: `stop` was set.
            MilongaError: any other error of the generation or of the scorers.
        """
        if self._best_of is None or self._scorers is None:
            generation = _retry_while_full(lambda: self._stream(prompt, options, on_update, stop), stop)
            return GeneratedClips(clips=generation.clips, generation=generation)
        candidates, rank_by = self._best_of.candidates, self._best_of.rank_by
        done = 0

        async def generate(part: GenerationOptions) -> Generation:
            nonlocal done
            size = part["clip_count"] or 1
            update = _scale_progress(on_update, done, size, candidates)
            generation = _retry_while_full(lambda: self._stream(prompt, part, update, stop), stop)
            done += size
            return generation

        numbers = itertools.count(1)

        async def score(clips: Sequence[Clip]) -> ScoredClips:
            names = [f"candidate {number}" for number, _ in zip(numbers, clips, strict=False)]
            return _retry_while_full(lambda: self._score(prompt, clips, names), stop)

        most = self._clips.get_model().limits.max_clip_count
        generation = run(generate_candidates(candidates, most, options, generate))
        on_stage("scoring")
        best = run(rank(generation, rank_by, MAX_BATCH, score))
        return GeneratedClips(clips=best.clips[:count], generation=generation, best=best)

    def _stream(
        self,
        prompt: str,
        options: GenerationOptions,
        on_update: Callable[[Update], None],
        stop: threading.Event | None,
    ) -> Generation:
        def events() -> Iterator[Update]:
            for update in self._clips.stream(prompt, **options):
                on_update(update)
                yield update
                if stop is not None and stop.is_set():
                    raise RequestCancelledError("stopped")

        return collect(events())

    def _score(self, prompt: str, clips: Sequence[Clip], names: Sequence[str]) -> ScoredClips:
        assert self._best_of is not None
        assert self._scorers is not None
        pairs = [(prompt, clip.audio) for clip in clips]
        try:
            if self._best_of.rank_by == "reward":
                return ScoredClips.by_reward(self._scorers.compute_rewards(pairs))
            names_of = self._best_of.scorers.names or None
            return ScoredClips.by_clap(self._scorers.score_audio(pairs, scorers=names_of))
        except InvalidInputError as error:
            raise name_clips(error, names) from None

    def close(self) -> None:
        """Close the clip maker and the scorers; running requests are cancelled."""
        self._clips.close()
        if self._scorers is not None:
            self._scorers.close()


def _scale_progress(
    on_update: Callable[[Update], None], done: int, size: int, count: int
) -> Callable[[Update], None]:
    """Return `on_update` with progress over all `count` candidates, for `size` of them after `done`."""

    def update_of_all(update: Update) -> None:
        if isinstance(update, Progress):
            fraction = (done + update.fraction * size) / count
            left = None if size < count else update.seconds_left
            update = dataclasses.replace(update, fraction=fraction, seconds_left=left)
        on_update(update)

    return update_of_all


def _retry_while_full(call: Callable[[], T], stop: threading.Event | None) -> T:
    """Return the result of `call`; with `stop`, retry after `QueueFullError.retry_after` seconds."""
    if stop is None:
        return call()
    for left in reversed(range(_MAX_TRIES)):
        if stop.is_set():
            break
        try:
            return call()
        except QueueFullError as error:
            if not left:
                raise
            stop.wait(error.retry_after)
    raise RequestCancelledError("stopped")


def in_flags(error: InvalidInputError, best_of: BestOf | None) -> InvalidInputError:
    """Return `error` with the command's options in place of wire fields."""
    flags = _FLAGS if best_of is None else {**_FLAGS, "clip_count": "--candidates"}
    return InvalidInputError(
        *(
            FieldViolation(flags.get(v.field, f"--{v.field.replace('_', '-')}"), v.description)
            if not v.field.startswith("-") and v.field.isidentifier()
            else v
            for v in error.violations
        )
    )


def warn(warnings: Sequence[str], name: str = "") -> None:
    """Print warnings on stderr, each with the prefix `name`."""
    for warning in warnings:
        typer.echo(f"warning: {name}{warning}", err=True)


def record_of(made: GeneratedClips, paths: Sequence[Path]) -> dict[str, Any]:
    """Return the record of a prompt's clips as JSON: for ``--json``, and for the file next to the clips."""
    record: dict[str, Any] = {
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
        "model": dataclasses.asdict(made.generation.model),
        **({"adapter": dataclasses.asdict(adapter)} if (adapter := made.generation.adapter) else {}),
        "warnings": list(made.warnings),
        "timings": {
            name: round(value, 4) for name, value in dataclasses.asdict(made.generation.timings).items()
        },
    }
    if made.best is not None:
        record["rank_by"] = made.best.rank_by
        record["candidates"] = [
            {
                "candidate": candidate.number,
                "clip_index": candidate.clip.index,
                "seed": candidate.clip.seed,
                "value": candidate.value,
                **({"scores": dict(candidate.details)} if made.best.rank_by == "clap" else candidate.details),
                "kept": place < len(made.clips),
            }
            for place, candidate in enumerate(made.best.candidates)
        ]
        record["judges"] = [dataclasses.asdict(model) for model in made.best.scorers]
    return record


def to_json(value: Any) -> str:
    """Return `value` as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)
