"""Examples of captioning: a clip with one of its captions, from lists, from folders and of the sound world.

A list is what `services.lists` reads: SLAM-AAC's lines ``{"key", "source", "target"}``, Clotho's CSV with
five captions a clip, AudioCaps' CSV, whose clips are found by ``youtube_id``. A folder has one list, or a
text file next to each clip (``dog.wav``, ``dog.txt``).
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from services.errors import invalid
from services.files import sha256_of
from services.lists import Entry, caption_fault, find_audio, read_list
from training.data.examples import Clip, FileClip
from training.data.scenes import GAIN, SceneClip, paraphrase
from training.loop.checks import check_minimum, check_share
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import SceneConfig, Split, draw_truth

AUDIO_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
LIST_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SHORT = SceneConfig(single=0.2, sequence=0.55)
LONG = SceneConfig(duration=5.12, single=0.15, sequence=0.6, three=0.35)
_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldClips:
    """Scenes of the sound world."""

    scenes: int = 0
    """Scenes of the training split; 0: none."""
    held_out: int = 200
    """Scenes of the validation split."""
    long: float = 0.2
    """Share of scenes of 5.12 s; the others are of 2.56 s."""
    rebuilt: float = 0.3
    """Share of scenes after `model`'s autoencoder and vocoder."""
    model: str = "mini"
    """Model of the mini family that rebuilds them."""
    seed: int = 1_313
    """Random seed; not one that the mini captioner was trained with."""

    def __post_init__(self) -> None:
        check_minimum(self, 0, "scenes", "held_out", "seed")
        check_share(self, "long", "rebuilt")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionData:
    """Sources of the examples."""

    train: tuple[Path, ...] = ()
    """Lists and folders."""
    validation: tuple[Path, ...] = ()
    """Lists and folders; none: a part of the clips of `train`, by their names."""
    held_out: float = 0.05
    """That part."""
    audio_root: Path | None = None
    """Folder that relative paths of clips start from; None: each list's own folder."""
    world: WorldClips = field(default_factory=WorldClips)
    """Scenes of the sound world, in addition."""
    max_unreadable: float = 0.05
    """Maximum share of unreadable clips; above it, training is refused."""
    workers: int = 4
    """Threads that decode clips."""
    cached: int = 2_048
    """Mels that are kept in memory, of 0.3 MB each at 10 s."""

    def __post_init__(self) -> None:
        check_share(self, "held_out", "max_unreadable")
        check_minimum(self, 1, "workers")
        check_minimum(self, 0, "cached")

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
class CaptionExample:
    """A clip and one of its captions."""

    clip: Clip
    caption: str
    truth: CaptionTruth | None = None
    """The events of the clip, if known; the grammar then words it in other ways."""


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


def read_examples(
    path: Path, audio_root: Path | None = None, unusable: dict[str, str] | None = None
) -> list[CaptionExample]:
    """Read a list or a folder, one example per caption.

    Args:
        path: the list or the folder.
        audio_root: folder that clips start from; None: the list's folder.
        unusable: gets the place of each unusable caption, with the reason; None: they are refused.

    Raises:
        InvalidInputError: it can't be read, has another format, or names no clips.
    """
    if path.is_dir():
        lists = lists_of(path)
        return (
            read_examples(lists[0], audio_root, unusable) if len(lists) == 1 else _read_folder(path, unusable)
        )
    root = audio_root or path.parent
    examples = []
    for entry in read_list(path, "data", keep_unusable=unusable is not None):
        if entry.fault is not None and unusable is not None:
            unusable[entry.place] = entry.fault
            continue
        examples.append(CaptionExample(clip=FileClip(path=find_clip(entry, root)), caption=entry.prompt))
    return examples


def list_files(path: Path) -> list[Path]:
    """Return the file of a list, or that of a folder, if it has one. Raises `InvalidInputError`."""
    return lists_of(path) if path.is_dir() else [path]


def lists_of(folder: Path) -> list[Path]:
    """Return the list of a folder; none if its captions are in text files next to the clips.

    Raises `InvalidInputError` if there are several lists.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in LIST_SUFFIXES)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:_LISTED])
        raise invalid("data", f"{folder} has {len(found)} lists ({names}); give the path of one")
    return found


def world_examples(config: WorldClips, split: Split) -> list[CaptionExample]:
    """Return the scenes of a split, each with a caption of that split."""
    count = 0 if not config.scenes else config.scenes if split == "train" else config.held_out
    examples = []
    for index in range(count):
        numbers = (config.seed, int(split != "train"), index)
        rng = np.random.default_rng(numbers)
        scenes = LONG if rng.uniform() < config.long else SHORT
        rebuilt = rng.uniform() < config.rebuilt
        while (caption := paraphrase(truth := draw_truth(rng, scenes), rng, split)) is None:
            pass
        clip = SceneClip(
            truth=truth, seed=numbers, duration=scenes.duration, gain=float(rng.uniform(*GAIN)),
            model=config.model if rebuilt else None,
        )  # fmt: skip
        examples.append(CaptionExample(clip=clip, caption=caption, truth=truth))
    return examples


def find_clip(entry: Entry, root: Path) -> Path:
    """Return the path of a row's clip: as the row names it, or as AudioCaps' clips are usually named."""
    if entry.location is not None:
        return find_audio(entry.location, root)
    if "youtube_id" not in entry.fields:
        raise invalid(entry.place, "names no clip; give a column source, audio, file_name or youtube_id")
    video, start = str(entry.fields["youtube_id"]), str(entry.fields.get("start_time", "")).removesuffix(".0")
    stems = (
        f"Y{video}",
        video,
        f"{video}_{start}",
        f"{video}_{start}000",
        str(entry.fields.get("audiocap_id", "")),
    )
    names = [f"{stem}{suffix}" for stem in filter(None, stems) for suffix in AUDIO_SUFFIXES]
    return next((root / name for name in names if (root / name).exists()), root / names[0])


def _read_folder(folder: Path, unusable: dict[str, str] | None) -> list[CaptionExample]:
    """Read the clips of a folder, each with the captions in a text file next to it, one a line."""
    clips = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    examples: list[CaptionExample] = []
    without: list[str] = []
    for path in clips:
        text = path.with_suffix(".txt")
        if not text.exists():
            without.append(path.name)
            continue
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise invalid("data", f"{text} is no UTF-8 text: {error}") from error
        for number, line in enumerate(filter(str.strip, lines), start=1):
            caption, fault = caption_fault(line)
            if fault is None:
                examples.append(CaptionExample(clip=FileClip(path=path), caption=caption))
            elif unusable is None:
                raise invalid(f"{text.name}:{number}", fault)
            else:
                unusable[f"{text.name}:{number}"] = fault
    if without or not clips:
        listed = ", ".join(without[:_LISTED]) + (", …" if len(without) > _LISTED else "")
        found = f"{len(without)} of {len(clips)} clips of {folder} have no text file with captions ({listed})"
        raise invalid(
            "data",
            f"{found if clips else f'{folder} has no clips'}; write them, or `milonga caption --folder`",
        )
    return examples


def _is_held_out(clip: Clip, share: float) -> bool:
    """Return whether a clip belongs to the held-out part, by its file's name alone."""
    name = clip.path.name if isinstance(clip, FileClip) else clip.name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < share * 2**32
