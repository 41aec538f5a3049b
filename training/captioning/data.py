"""Examples of a captioner's training: captioned clips of lists and folders, and scenes of the sound world."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from services.errors import invalid
from services.files import sha256_of
from training.data.captions import CaptionExample, read_examples
from training.data.examples import Clip, FileClip
from training.data.recordings import list_files
from training.data.scenes import GAIN, SceneClip, paraphrase
from training.loop.checks import Natural, Parallel, Seed, Share, check_ranges
from training.soundworld.captions import plain_caption
from training.soundworld.scenes import SceneConfig, Split, draw_truth

SHORT = SceneConfig(single=0.2, sequence=0.55)
LONG = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.35)
_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldClips:
    """Scenes of the sound world."""

    scenes: Natural = 0
    """Scenes of the training split; 0: none."""
    held_out: Natural = 200
    """Scenes of the validation split."""
    long: Share = 0.2
    """Share of scenes of 5.12 s; the others are of 2.56 s."""
    rebuilt: Share = 0.3
    """Share of scenes after `model`'s autoencoder and vocoder."""
    model: str = "mini"
    """Model of the mini family that rebuilds them."""
    wording: Literal["grammar", "plain"] = "grammar"
    """``grammar``: captions of all wordings, another at each use. ``plain``: the one wording of each event
    that `mini:captioner` knows; its frozen language model can't learn other words."""
    seed: Seed = 1_313
    """Random seed; not one that the mini captioner was trained with."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionData:
    """Sources of the examples."""

    train: tuple[Path, ...] = ()
    """Lists and folders."""
    validation: tuple[Path, ...] = ()
    """Lists and folders; none: a part of the clips of `train`, by their names."""
    held_out: Share = 0.05
    """That part."""
    audio_root: Path | None = None
    """Folder that relative paths of clips start from; None: each list's own folder."""
    world: WorldClips = field(default_factory=WorldClips)
    """Scenes of the sound world, in addition."""
    max_unreadable: Share = 0.05
    """Maximum share of unreadable clips; above it, training is refused."""
    workers: Parallel = 4
    """Threads that decode clips."""
    cached: Natural = 2_048
    """Mels that are kept in memory, of 0.3 MB each at 10 s."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def digests(self) -> dict[str, str]:
        """Return the digests of all lists, by path. Raises `InvalidInputError`."""
        try:
            return {
                str(path): sha256_of(path)
                for given in (*self.train, *self.validation)
                for path in list_files(given)
            }
        except OSError as error:
            raise invalid("data", f"{error.filename} can't be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSplits:
    """The examples of training and of validation, no clip in both."""

    train: tuple[CaptionExample, ...]
    validation: tuple[CaptionExample, ...]

    def clips(self) -> list[Clip]:
        """Return the distinct clips."""
        return list(dict.fromkeys(example.clip for example in (*self.train, *self.validation)))

    def without(self, clips: set[Clip]) -> "CaptionSplits":
        """Return the examples whose clip is none of `clips`."""
        left = (
            tuple(example for example in part if example.clip not in clips)
            for part in (self.train, self.validation)
        )
        return CaptionSplits(train=next(left), validation=next(left))


def load_examples(config: CaptionData, unusable: dict[str, str]) -> CaptionSplits:
    """Return the examples of all sources.

    `unusable` gets the place of each unusable caption, with the reason. Raises `InvalidInputError` if a
    source can't be read, or a split would be empty.
    """
    root = config.audio_root
    train = [one for path in config.train for one in read_examples(path, root, unusable)]
    validation = [one for path in config.validation for one in read_examples(path, root, unusable)]
    if not config.validation:
        held = {example.clip: _is_held_out(example.clip, config.held_out) for example in train}
        validation = [example for example in train if held[example.clip]]
        train = [example for example in train if not held[example.clip]]
    train += world_examples(config.world, "train")
    validation += world_examples(config.world, "validation")
    if both := {example.clip for example in train} & {example.clip for example in validation}:
        names = ", ".join(sorted(clip.name for clip in both)[:_LISTED])
        raise invalid(
            "data.validation", f"has {len(both)} clips of data.train, among them {names}; leave them out"
        )
    for name, part in (("train", train), ("validation", validation)):
        if not part:
            raise invalid(
                "data", f"has no example for {name}; give data.{name}, data.world.scenes, or more clips"
            )
    return CaptionSplits(train=tuple(train), validation=tuple(validation))


def world_examples(config: WorldClips, split: Split) -> list[CaptionExample]:
    """Return the scenes of a split, each with a caption: of that split, unless it is a plain one."""
    count = 0 if not config.scenes else config.scenes if split == "train" else config.held_out
    examples = []
    for index in range(count):
        numbers = (config.seed, int(split != "train"), index)
        rng = np.random.default_rng(numbers)
        scenes = LONG if rng.uniform() < config.long else SHORT
        rebuilt = rng.uniform() < config.rebuilt
        while (caption := paraphrase(truth := draw_truth(rng, scenes), rng, split)) is None:
            pass
        plain = config.wording == "plain"
        clip = SceneClip(
            truth=truth, seed=numbers, duration=scenes.duration, gain=float(rng.uniform(*GAIN)),
            model=config.model if rebuilt else None,
        )  # fmt: skip
        examples.append(
            CaptionExample(clip=clip, caption=plain_caption(truth))
            if plain
            else CaptionExample(clip=clip, caption=caption, truth=truth)
        )
    return examples


def _is_held_out(clip: Clip, share: float) -> bool:
    """Return whether a clip belongs to the held-out part, by its file's name alone."""
    name = clip.path.name if isinstance(clip, FileClip) else clip.name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32
