"""Making the clips of a prompt: where they come from, the best of several candidates, what is recorded."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Unpack

import typer

from milonga.v1 import generation_pb2
from services import client
from services.cli.judging import MAX_BATCH, Connection, Judges, Panel, name_clips, refuse
from services.client.best import merge, next_seed, portions, same
from services.errors import FieldViolation, InvalidInputError, MilongaError, RequestCancelledError

_FLAGS = {
    "prompt": "PROMPT",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "clip_count": "--clips",
    "sample_rate_hertz": "--sample-rate",
}
"""How the command spells a field of the wire, where it is not just ``--field-name``."""


class Source(Protocol):
    """Where clips come from: `AudioClient`, or an engine in this process (`services.local`)."""

    def stream(self, prompt: str, **options: Unpack[client.GenerationOptions]) -> Iterator[client.Update]:
        """Make the clips of a prompt, telling what happens on the way."""
        ...

    def get_model(self) -> generation_pb2.GetModelResponse:
        """Which model it is, with its limits."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOf:
    """Make more clips than are wanted, and keep those that a judge likes best."""

    candidates: int
    """Clips to make of a prompt."""
    rank_by: client.RankBy
    """The reward, or the mean of the scorers' CLAP scores."""
    judges: Judges
    """Who judges; no others than `rank_by` needs."""

    def settings(self) -> dict[str, Any]:
        """What a record keeps of it: who asks for other candidates asks for other clips."""
        return {"candidates": self.candidates, "rank_by": self.rank_by, "judge": self.judges.source}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where clips are made and judged: an engine and judges in this process, or services."""

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
        judges_here = self.best_of is not None and self.best_of.judges.are_here
        return "loading the models" if self.server is None or judges_here else "connecting"

    def open(self, *, batch: int | None = None) -> "Maker":
        """Connect to the services, or load the models: `batch` as in `services.local.open_local`.

        Raises:
            InvalidInputError: no model URI, no such device; in the words of the flag.
            ModelError: a model was refused.
        """
        with contextlib.ExitStack() as stack:
            try:
                # The judges first: they may be refused too, and are loaded sooner.
                panel = None if self.best_of is None else self.best_of.judges.open()
                if panel is not None:
                    stack.callback(panel.close)
                source = self._open_source(batch)
            except InvalidInputError as error:
                raise in_flags(error, self.best_of) from None
            stack.pop_all()
            return Maker(source, self.best_of, panel)

    def _open_source(self, batch: int | None) -> Source:
        if self.server is not None:
            return client.AudioClient(self.server, tls=self.connection.tls, timeout=self.connection.seconds)
        # Torch is seconds of import: only where the engine is wanted.
        from services.local import open_local

        return open_local(self.name, device=self.device or "auto", dtype=self.dtype or "float32", batch=batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A clip, and what it is worth."""

    clip: client.Clip
    number: int
    """From 1, in the order in which they were made."""
    value: float
    """The reward (its logit), or the mean CLAP score."""
    details: Mapping[str, float]
    """`probability`, or the CLAP score by scorer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """The clips of one prompt."""

    clips: tuple[client.Clip, ...]
    """Those to keep: in the order of their indices, or best first."""
    generation: client.Generation
    """How all were made."""
    candidates: tuple[Candidate, ...] = ()
    """Where the best of them were to be kept: all, best first."""
    judges: tuple[client.ModelVersion, ...] = ()
    """Which weights judged."""


class Maker:
    """Makes the clips of prompts, and chooses among them where the best are wanted. Thread-safe."""

    def __init__(self, source: Source, best_of: BestOf | None = None, panel: Panel | None = None) -> None:
        """Take over `source` and `panel`: closing the maker closes them."""
        self._source, self._best_of, self._panel = source, best_of, panel

    def make(
        self,
        prompt: str,
        options: client.GenerationOptions,
        on_update: Callable[[client.Update], None],
        stop: threading.Event | None = None,
    ) -> Made:
        """Make the clips of one prompt, or all its candidates; `stop` gives it up between two steps.

        Candidates are those of `AudioClient.generate_best`: the same seed gives the same.
        """
        if self._best_of is None:
            generation = self._stream(prompt, options, on_update, stop)
            return Made(clips=generation.clips, generation=generation)
        count = self._best_of.candidates
        done = 0
        generations: list[client.Generation] = []

        def update_of_all(update: client.Update) -> None:
            if isinstance(update, client.Progress):
                fraction = (done + update.fraction * portion) / count
                left = None if portion < count else update.seconds_left
                update = dataclasses.replace(update, fraction=fraction, seconds_left=left)
            on_update(update)

        for portion in portions(count, self._source.get_model().limits.max_clip_count):
            part: client.GenerationOptions = {**options, "clip_count": portion}
            if generations:
                part["seed"] = next_seed([generation.seed for generation in generations])
            generations.append(self._stream(prompt, part, update_of_all, stop))
            done += portion
        generation = merge(generations)
        return Made(clips=generation.clips, generation=generation)

    def _stream(
        self,
        prompt: str,
        options: client.GenerationOptions,
        on_update: Callable[[client.Update], None],
        stop: threading.Event | None,
    ) -> client.Generation:
        clips: list[client.Clip] = []
        for update in self._source.stream(prompt, **options):
            on_update(update)
            if isinstance(update, client.Clip):
                clips.append(update)
            if isinstance(update, client.Finished):
                return client.Generation(
                    clips=tuple(sorted(clips, key=lambda clip: clip.index)),
                    seed=clips[0].seed if clips else 0,
                    model=update.model,
                    warnings=update.warnings,
                    timings=update.timings,
                )
            if stop is not None and stop.is_set():
                raise RequestCancelledError("stopped")
        raise MilongaError("the stream ended before the clips were finished")

    def choose(self, prompt: str, made: Made, count: int) -> Made:
        """Keep the best `count` of the candidates that `make` made; without judges, all."""
        if self._best_of is None or self._panel is None:
            return made
        candidates: list[Candidate] = []
        judges: list[tuple[client.ModelVersion, ...]] = []
        for start in range(0, len(made.clips), MAX_BATCH):
            clips = made.clips[start : start + MAX_BATCH]
            judged, models = _judge(prompt, clips, start + 1, self._panel, self._best_of.rank_by)
            candidates += judged
            judges.append(models)
        # Sorting is stable: equal candidates stay in the order they were made in.
        candidates.sort(key=lambda candidate: -candidate.value)
        return dataclasses.replace(
            made,
            clips=tuple(candidate.clip for candidate in candidates[:count]),
            candidates=tuple(candidates),
            judges=same(judges),
        )

    def close(self) -> None:
        """Close the source and the judges; what is under way is given up."""
        self._source.close()
        if self._panel is not None:
            self._panel.close()


def _judge(
    prompt: str, clips: Sequence[client.Clip], first: int, panel: Panel, rank_by: client.RankBy
) -> tuple[list[Candidate], tuple[client.ModelVersion, ...]]:
    """Return what each of `clips` is worth, in order and numbered from `first`, and which weights say so."""
    pairs = [(prompt, clip.audio) for clip in clips]
    try:
        rewards = panel.rewards(pairs) if rank_by == "reward" else None
        scores = panel.scores(pairs) if rank_by == "clap" else None
    except InvalidInputError as error:
        raise name_clips(error, [f"candidate {first + index}" for index in range(len(clips))]) from None
    if rewards is not None:
        values = [reward.logit for reward in rewards.rewards]
        details = [{"probability": reward.probability} for reward in rewards.rewards]
        judges: tuple[client.ModelVersion, ...] = (rewards.model,)
    else:
        assert scores is not None
        values = [float(values_S.mean()) for values_S in scores.values]
        names = [scorer.name for scorer in scores.scorers]
        details = [dict(zip(names, map(float, values_S), strict=True)) for values_S in scores.values]
        judges = tuple(scorer.model for scorer in scores.scorers)
    return [
        Candidate(clip=clip, number=number, value=value, details=detail)
        for number, (clip, value, detail) in enumerate(zip(clips, values, details, strict=True), start=first)
    ], judges


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


def record_of(made: Made, paths: Sequence[Path], best_of: BestOf | None) -> dict[str, Any]:
    """What was made, for machines and for the record beside the clips."""
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
    if best_of is not None:
        record["rank_by"] = best_of.rank_by
        record["candidates"] = [
            {
                "candidate": candidate.number,
                "clip_index": candidate.clip.index,
                "seed": candidate.clip.seed,
                "value": candidate.value,
                **({"scores": dict(candidate.details)} if best_of.rank_by == "clap" else candidate.details),
                "kept": rank < len(made.clips),
            }
            for rank, candidate in enumerate(made.candidates)
        ]
        record["judges"] = [dataclasses.asdict(model) for model in made.judges]
    return record


def to_json(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False)
