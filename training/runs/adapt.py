"""Fine-tune a generator on one's own recordings: supervised, by low-rank adapters or in full.

    milonga train adapt my-sounds/ --start file:tango2 --name my-model

The recordings are divided (`training.data.splits`), the training part is learned by `train_sft`, together
with scenes of two sounds, and the denoising error on the held-out part is compared before and after.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from services.errors import invalid
from services.files import write_atomically
from services.models.architectures import architecture_of
from services.models.words import is_readable
from services.weights.uri import resolve
from training.data.captions import CaptionExample
from training.data.examples import FileClip
from training.data.health import tokenizer_of
from training.data.latents import LatentConfig
from training.data.recorded_scenes import LoudestPart, RecordedSceneConfig, RecordedScenes
from training.data.recordings import Recording, read_recordings
from training.data.splits import SplitConfig, Splits, describe_splits, split_recordings
from training.data.store import digest_of_value
from training.data.usable import known_captions, language_warning, readable_recordings
from training.finetuning.session import LoraConfig
from training.finetuning.sft import Captioned, SftTraining, train_sft
from training.loop.checks import Count, Natural, check_ranges
from training.loop.fit import LoopConfig
from training.loop.progress import say
from training.objectives.noising import NoisingConfig

HELD_OUT: Final = "held-out.jsonl"
"""List of the held-out clips, in the run's folder, for `milonga train evaluate --prompts`."""
SCENES_SECONDS: Final = 10.24
"""Longest scene: events of a longer one would be far apart."""
_REMEDY: Final = (
    "write English captions with words that it knows (of classes: captions.json), or train a model with "
    "words of its own: `milonga train new`"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """A fine-tuning on one's own recordings."""

    data: Path
    """The recordings: a folder or a list (`training.data.recordings`)."""
    audio_root: Path | None = None
    """Folder that a list's clips start from; none: the list's own."""
    split: SplitConfig = field(default_factory=SplitConfig)
    scenes: Natural | None = None
    """Scenes of two sounds to learn too; none: as many as clips, if there are two classes or more."""
    least_clips: Count = 10
    """Recordings to learn below which the training is refused."""
    training: SftTraining

    def __post_init__(self) -> None:
        check_ranges(self)


def adaptation(data: Path, name: str, start: str, *, full: bool = False) -> Adaptation:
    """Return the settings of an adaptation: low-rank adapters, or with `full` all of the denoiser.

    A full one learns at a rate ten times lower. Clips are brought to a peak of 1/2, as Tango's training does:
    recordings differ in level by far more than the clips that generators learned from.
    """
    return Adaptation(
        data=data,
        training=SftTraining(
            name=name,
            start=start,
            loop=LoopConfig(
                steps=300, batch=16, learning_rate=1e-4 if full else 1e-3, warmup=20, decay=0.9,
                mixed_precision="bf16",
            ),
            lora=LoraConfig(rank=0 if full else 8),
            latents=LatentConfig(normalise=True),
            noising=NoisingConfig(condition_dropout=0.1),
        ),
    )  # fmt: skip


def adapt(config: Adaptation, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Run the whole program; `output` is then a generator's folder. Returns the report in its training.json.

    Resumes as `train_sft` does. `HELD_OUT` in the run's folder lists the held-out clips.

    Raises:
        InvalidInputError: settings or data are wrong, there are too few recordings, the start's text encoder
            knows none of the captions, or the run that is there has other settings.
        ModelError: the start was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    unusable: dict[str, str] = {}
    recordings = read_recordings(config.data, config.audio_root, unusable)
    check_count(config, recordings)
    start = resolve(config.training.start)
    architecture = architecture_of(start.folder)
    architecture.check(start.folder)
    readable, unreadable = readable_recordings(recordings, config.training.data.max_unreadable)
    tokenizer = tokenizer_of(start.folder)
    known = known_captions(readable, partial(is_readable, tokenizer), start.identity.name, _REMEDY)
    if warning := language_warning(tokenizer, (text for one in known for text in one.captions)):
        say(f"warning: {warning}")
    check_count(config, known)
    splits = split_recordings(known, config.split)
    check_count(config, splits.train)
    seconds = config.training.latents.duration or architecture.default_duration(start.folder)
    learned = [*examples_of(splits.train, seconds), *scene_examples(config, splits.train, seconds)]
    held_out = examples_of(splits.held_out, seconds, one_caption=True)
    captioned = Captioned(
        examples=tuple(learned),
        held_out=tuple(held_out),
        digest=digest_of_value([[one.clip.name, one.caption] for one in (*learned, *held_out)]),
        unusable=unusable,
        about={
            **describe_splits(config.data.name, splits),
            "unreadable": {clip.name: why for clip, why in unreadable.items()},
        },
    )
    report = train_sft(config.training, output, fresh=fresh, captioned=captioned)
    write_held_out(output.with_name(f"{output.name}.run") / HELD_OUT, splits)
    return report


def check_count(config: Adaptation, recordings: Sequence[Recording]) -> None:
    """Raise `InvalidInputError` if there are too few recordings."""
    if len(recordings) < config.least_clips:
        raise invalid(
            "data",
            f"{config.data} has {len(recordings)} recordings to learn from, and {config.least_clips} are "
            "needed, without those that are held out: a model would learn so few by heart; add recordings "
            f"(`milonga data check {config.data}` shows which are usable)",
        )


def examples_of(
    recordings: Sequence[Recording], seconds: float, *, one_caption: bool = False
) -> list[CaptionExample]:
    """Return an example for each caption of each recording, or for the first of each.

    Of a recording that is longer than the model's clips and has a class, the loudest part is taken; one with
    a caption of its own is cut, as its caption tells what happens from its beginning.
    """
    found = []
    for one in recordings:
        clip = one.clip if one.sound is None else LoudestPart(clip=one.clip, seconds=seconds)
        captions = list(zip(one.captions, one.places, strict=True))
        found += [
            CaptionExample(clip=clip, caption=caption, place=place)
            for caption, place in (captions[:1] if one_caption else captions)
        ]
    return found


def scene_examples(
    config: Adaptation, recordings: Sequence[Recording], seconds: float
) -> list[CaptionExample]:
    """Return examples of scenes of two of the recordings. Raises `InvalidInputError` if there can be none."""
    sounds = {one.sound for one in recordings}
    count = config.scenes
    if count is None:
        count = len(recordings) if len(sounds - {None}) > 1 else 0
    if not count:
        return []
    scenes = RecordedScenes(
        recordings,
        RecordedSceneConfig(
            duration=max(1.0, min(seconds, SCENES_SECONDS)), sampling_rate=44_100, single=0.0, sequence=0.6,
            seed=config.training.loop.seed,
        ),
    )  # fmt: skip
    drawn = [scenes.scene(index) for index in range(count)]
    return [CaptionExample(clip=one.clip, caption=one.caption) for one in drawn]


def write_held_out(path: Path, splits: Splits) -> None:
    """Write the list of held-out files with a caption each; clips in Parquet files are left out."""
    rows = [
        {"location": str(one.clip.path.resolve()), "caption": one.captions[0], "class": one.sound}
        for one in splits.held_out
        if isinstance(one.clip, FileClip)
    ]
    if rows:
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
