"""Clips of the same prompts to listen to, one after another: recordings, and what models make.

    listen(Listening(recordings=Path("my-sounds")), ["before=mini-base", "after=mini"], Path("build/clips"))

Nothing is chosen: the prompts are the first ones of the held-out part of a data set, or of the sound world's
test split, in their order, and the seed of a clip depends on its prompt alone.

Shape legend: N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.api.generation import at_loudness
from services.errors import invalid
from services.models.architectures import architecture_of
from training.data.examples import Clip, FileClip, short_message
from training.data.recordings import read_recordings
from training.data.splits import SplitConfig, split_recordings
from training.evaluation.config import EvaluationConfig, Sampling
from training.evaluation.prompts import Prompt, world_prompts
from training.evaluation.sources import ModelSource, PlannedClip, clip_seed, open_source, prepare_clips
from training.loop.checks import Count, Parallel, Seed, check_ranges
from training.runs.adapt import examples_of

LOUDNESS: Final = -20.0
"""Level of every clip, in dB (`at_loudness`)."""
RECORDING: Final = "recording"
"""Title of the clips of a data set."""
SCENE: Final = "sound world"
"""Title of the clips of the procedural world."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listening:
    """What is listened to."""

    recordings: Path | None = None
    """Recordings with captions or classes (`training.data.recordings`); None: the sound world."""
    audio_root: Path | None = None
    """Folder that a list's clips start from; None: the list's own."""
    everything: bool = False
    """Take all recordings, not only those that a training holds out."""
    split: SplitConfig = field(default_factory=SplitConfig)
    count: Count = 12
    """Number of prompts."""
    seed: Seed = 0
    """Another number, other clips."""
    sampling: Sampling = field(default_factory=Sampling)
    batch: Parallel = 4
    device: str = "auto"
    dtype: str = "float32"
    """Data type of text encoder and denoiser: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sound:
    """A clip to play."""

    title: str
    """What it is: of a model its name."""
    waveform_N: NDArray[np.float32]
    sampling_rate: int
    """Hertz."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listened:
    """The clips, by prompt."""

    prompts: tuple[tuple[str, tuple[Sound, ...]], ...]
    """Each prompt with its recording, if there is one, and the clip of each model."""
    rule: str
    """Where the prompts are from."""
    models: tuple[tuple[str, dict[str, Any]], ...]
    """Names, and versions as `ModelVersion` has them."""


def listen(config: Listening, sources: Sequence[str], cache: Path) -> Listened:
    """Return the clips of each source, [NAME=]URI, for the same prompts; those that are missing are made.

    Raises:
        InvalidInputError: a source is no model, two have one name, or there is no prompt.
        ModelError: a model can't be loaded.
        OutputError: `cache` can't be written.
    """
    models = _models(sources)
    seconds = config.sampling.duration or max(
        architecture_of(one.model.folder).default_duration(one.model.folder) for one in models
    )
    prompts, rule = _prompts(config, seconds)
    plan = [PlannedClip(prompt=one, seed=clip_seed(one.text, config.seed)) for one in prompts]
    # A recording that can't be read is reported before the models work.
    columns = [[_recorded(one, seconds) for one in prompts]]
    settings = EvaluationConfig(
        sampling=config.sampling, batch=config.batch, device=config.device, dtype=config.dtype
    )
    for model in models:
        files = prepare_clips(model, plan, settings, cache).files
        columns.append([_sound(FileClip(path=file), model.name, None) for file in files])
    return Listened(
        prompts=tuple(
            (prompt.text, tuple(sound for sound in row if sound is not None))
            for prompt, row in zip(prompts, zip(*columns, strict=True), strict=True)
        ),
        rule=rule,
        models=tuple(
            (one.name, {name: getattr(one.model.identity, name) for name in ("name", "version", "digest")})
            for one in models
        ),
    )


def _models(sources: Sequence[str]) -> list[ModelSource]:
    found = []
    for text in sources:
        source = open_source(text)
        if not isinstance(source, ModelSource):
            raise invalid("SOURCE", f"{text} is a folder of clips; give the URI of a model")
        architecture_of(source.model.folder).check(source.model.folder)
        found.append(source)
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise invalid("SOURCE", f"{twice[0]} is the name of two models; give NAME=URI")
    return found


def _prompts(config: Listening, seconds: float) -> tuple[tuple[Prompt, ...], str]:
    """Return the first prompts, and where they are from."""
    if config.recordings is None:
        found = world_prompts(config.count, "test", config.sampling.duration)
        return found, "the test split of the sound world"
    recordings = read_recordings(config.recordings, config.audio_root, {})
    if config.everything:
        part, rule = tuple(recordings), config.recordings.name
    else:
        splits = split_recordings(recordings, config.split)
        part, rule = splits.held_out, f"{config.recordings.name}, of what is held out: {splits.rule}"
    first: dict[str, Clip] = {}
    for one in examples_of(part, seconds, one_caption=True):
        first.setdefault(one.caption, one.clip)
    if not first:
        raise invalid(
            "--recordings",
            f"{config.recordings} has no held-out clip with a caption; give --everything, or state folds",
        )
    prompts = list(first.items())[: config.count]
    return tuple(Prompt(text=text, reference=clip) for text, clip in prompts), rule


def _recorded(prompt: Prompt, seconds: float) -> Sound | None:
    if prompt.reference is None:
        return None
    title = RECORDING if prompt.reference.domain == "recorded" else SCENE
    try:
        return _sound(prompt.reference, title, seconds)
    except (OSError, ValueError) as error:
        raise invalid(
            "--recordings", f"{prompt.reference.name} can't be read: {short_message(error)}"
        ) from error


def _sound(clip: Clip, title: str, seconds: float | None) -> Sound:
    waveform, rate = clip.read()
    mono_N = np.atleast_2d(waveform).mean(axis=0).astype(np.float32)
    cut_N = mono_N if seconds is None else mono_N[: round(seconds * rate)]
    return Sound(title=title, waveform_N=at_loudness(cut_N, LOUDNESS), sampling_rate=rate)
