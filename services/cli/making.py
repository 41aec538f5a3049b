"""Making the clips of a prompt: where they come from, the best of several candidates, what is recorded."""

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

from services import client
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
from services.cli.scorers import MAX_BATCH, Connection, ScorerSources, name_clips, refuse
from services.errors import FieldViolation, InvalidInputError, QueueFullError, RequestCancelledError

T = TypeVar("T")

_MAX_TRIES = 100
"""How often a full queue is come back to."""

_FLAGS = {
    "prompt": "PROMPT",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "clip_count": "--clips",
    "sample_rate_hertz": "--sample-rate",
}
"""How the command spells a field of the wire, where it is not just ``--field-name``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOf:
    """Make more clips than are wanted, and keep those with the highest scores."""

    candidates: int
    """Clips to make of a prompt."""
    rank_by: RankBy
    """The reward, or the mean of the scorers' CLAP scores."""
    scorers: ScorerSources
    """What scores them; no others than `rank_by` needs."""

    def settings(self) -> dict[str, Any]:
        """Return what a record keeps of it: other candidates are other clips."""
        return {"candidates": self.candidates, "rank_by": self.rank_by, "judge": self.scorers.source}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where clips are made and scored: in this process, or by services."""

    model: str | None
    """Model URI of the engine."""
    device: str | None
    dtype: str | None
    server: str | None
    """Address of the generation service that makes them instead."""
    connection: Connection
    """How to reach services."""
    best_of: BestOf | None = None
    """None: every clip that is made is kept."""

    def __post_init__(self) -> None:
        if self.server == "":
            refuse("--server", "is empty; give HOST:PORT")
        if self.server is not None and (self.model or self.device or self.dtype):
            refuse("--model, --device, --dtype", "are the service's to choose; leave them out with --server")

    @property
    def name(self) -> str:
        """The service's address, or the model URI."""
        return self.server or self.model or "mini"

    @property
    def first_stage(self) -> str:
        """What takes time before the first clip is under way."""
        scorers_here = self.best_of is not None and self.best_of.scorers.are_here
        return "loading the models" if self.server is None or scorers_here else "connecting"

    def open(self, *, batch: int | None = None) -> "Maker":
        """Connect to the services, or load the models.

        With `batch`, the engine's denoiser calls have that one shape: no clip depends on its companions.

        Raises:
            InvalidInputError: no model URI, no such device; in the words of the flag.
            ModelError: a model was refused.
        """
        with contextlib.ExitStack() as stack:
            try:
                # The scorers first: they may be refused too, and are loaded sooner.
                scorers = None if self.best_of is None else self.best_of.scorers.open()
                if scorers is not None:
                    stack.callback(scorers.close)
                clips = self._open_clip_maker(batch)
            except InvalidInputError as error:
                raise in_flags(error, self.best_of) from None
            stack.pop_all()
            return Maker(clips, self.best_of, scorers)

    def _open_clip_maker(self, batch: int | None) -> StreamingClipMaker:
        if self.server is not None:
            return client.AudioClient(self.server, tls=self.connection.files, timeout=self.connection.seconds)
        # Torch is seconds of import: only where the engine is wanted.
        from services.engine import EngineConfig
        from services.local import open_clip_maker
        from services.weights.uri import resolve

        config = EngineConfig() if batch is None else EngineConfig(batch_shapes=(batch,), exact=True)
        model = resolve(self.name)
        return open_clip_maker(
            model, device=self.device or "auto", dtype=self.dtype or "float32", config=config
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedClips:
    """The clips of one prompt."""

    clips: tuple[Clip, ...]
    """Those to keep: in the order of their indices, or best first."""
    generation: Generation
    """How all were made."""
    best: Best | None = None
    """All candidates, best first, where the best of them were to be kept."""


class Maker:
    """Makes the clips of prompts, and keeps the best where that is wanted. Thread-safe."""

    def __init__(
        self, clips: StreamingClipMaker, best_of: BestOf | None = None, scorers: Scorers | None = None
    ) -> None:
        """Take over `clips` and `scorers`: closing the maker closes them."""
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
        """Make the clips of one prompt; of candidates keep the best `count`.

        Candidates are those of `AudioClient.generate_best`: the same seed gives the same. With `stop`, a full
        queue is waited for, and setting `stop` cancels between two steps.
        """
        if self._best_of is None or self._scorers is None:
            generation = _patiently(lambda: self._stream(prompt, options, on_update, stop), stop)
            return GeneratedClips(clips=generation.clips, generation=generation)
        wanted, rank_by = self._best_of.candidates, self._best_of.rank_by
        done = 0

        async def generate(part: GenerationOptions) -> Generation:
            nonlocal done
            size = part["clip_count"] or 1
            update = _share(on_update, done, size, wanted)
            generation = _patiently(lambda: self._stream(prompt, part, update, stop), stop)
            done += size
            return generation

        numbers = itertools.count(1)

        async def score(clips: Sequence[Clip]) -> ScoredClips:
            names = [f"candidate {number}" for number, _ in zip(numbers, clips, strict=False)]
            return _patiently(lambda: self._score(prompt, clips, names), stop)

        most = self._clips.get_model().limits.max_clip_count
        generation = run(generate_candidates(wanted, most, options, generate))
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
        """Close the clip maker and the scorers; what is under way is cancelled."""
        self._clips.close()
        if self._scorers is not None:
            self._scorers.close()


def _share(on_update: Callable[[Update], None], done: int, size: int, count: int) -> Callable[[Update], None]:
    """Return `on_update` with progress over all of `count` candidates, of which `done` are made."""

    def update_of_all(update: Update) -> None:
        if isinstance(update, Progress):
            fraction = (done + update.fraction * size) / count
            left = None if size < count else update.seconds_left
            update = dataclasses.replace(update, fraction=fraction, seconds_left=left)
        on_update(update)

    return update_of_all


def _patiently(call: Callable[[], T], stop: threading.Event | None) -> T:
    """Return what `call` returns; with `stop`, try again as often as a full queue asks for it."""
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
    """Spell the fields as the command line does."""
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
    """Print warnings on stderr; `name` says whose."""
    for warning in warnings:
        typer.echo(f"warning: {name}{warning}", err=True)


def record_of(made: GeneratedClips, paths: Sequence[Path]) -> dict[str, Any]:
    """Return what was made, for machines and for the record beside the clips."""
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
        "warnings": list(made.generation.warnings),
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
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False)
