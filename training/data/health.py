"""What is wrong with a data set, before it costs a training: `check_data`.

Every clip is decoded once. A clip is usable if it can be read, sounds, is no copy of an earlier one and has a
usable caption.

Shape legend: N samples.
"""

import hashlib
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from services.audio.levels import has_sound, is_silent
from services.files import side_by_side
from services.models.folders import read_json
from services.models.words import is_readable, load_tokenizer
from training.data.examples import Clip, FileClip, ParquetClip, decode_clip, short_message
from training.data.recordings import Recording
from training.data.splits import SplitConfig, split_recordings
from training.data.usable import language_warning
from training.loop.progress import progress

Kind = Literal[
    "unreadable", "cut", "silent", "quiet", "clipped", "changed", "duplicate", "no caption", "unknown words"
]
KINDS: Final[Mapping[Kind, str]] = {
    "unreadable": "can't be read",
    "cut": "is cut short or damaged",
    "silent": "is silent: nothing above -80 dB",
    "duplicate": "has the same samples as an earlier clip",
    "no caption": "has no usable caption",
    "unknown words": "has no caption with a word for a sound that the text encoder knows",
    "clipped": "is clipped: its peaks are flat",
    "quiet": "is quiet: its peak is below -40 dB",
    "changed": "is changed when it is read",
}
"""What may be wrong with a clip, and what that means."""
UNUSABLE: Final[tuple[Kind, ...]] = (
    "unreadable", "cut", "silent", "duplicate", "no caption", "unknown words",
)  # fmt: skip
"""Kinds that make a clip unusable; the others are worth a look."""

FLAT_RUN: Final = 5
"""Equal samples in a row at the peak that count as one flat peak."""
FLAT_RUNS: Final = 3
"""Flat peaks that make a clip clipped."""
_STEP = 2**-15
_LATIN: Final = re.compile("[A-Za-z]")
_LEAST_CLASSES = 2
_FEW_CLIPS = 20
"""Usable clips below which a data set is called small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipHealth:
    """What was found about one clip."""

    name: str
    """File, without the folder of the data set."""
    place: str
    """Row of the list; empty if it is of none."""
    sound: str | None
    problems: Mapping[Kind, str]
    """Kinds of what is wrong, each with a detail, which may be empty."""
    seconds: float | None = None
    sampling_rate: int | None = None
    """Hertz."""
    channels: int | None = None
    peak_db: float | None = None
    """Level of the highest sample, in dB below full scale; None of silence."""
    digest: str | None = None
    """SHA-256 of the decoded samples."""

    @property
    def usable(self) -> bool:
        """Return whether a training can use the clip."""
        return self.problems.keys().isdisjoint(UNUSABLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataHealth:
    """What was found about a data set."""

    source: str
    clips: tuple[ClipHealth, ...]
    captions: int
    """Distinct usable captions."""
    unusable_captions: Mapping[str, str]
    """The reason by the row."""
    warnings: tuple[str, ...]
    """Sentences on the data set as a whole, each with a remedy."""
    held_out: int
    """Usable clips that a training holds out."""
    rule: str
    """How they are chosen."""

    @property
    def usable(self) -> int:
        """Return the number of usable clips."""
        return sum(clip.usable for clip in self.clips)

    @property
    def problems(self) -> dict[Kind, int]:
        """Return the number of clips with each problem, in the order of `KINDS`."""
        counts = Counter(kind for clip in self.clips for kind in clip.problems)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    @property
    def classes(self) -> dict[str, int]:
        """Return the number of usable clips of each class."""
        return dict(sorted(Counter(clip.sound for clip in self.clips if clip.sound and clip.usable).items()))

    def summary(self) -> list[tuple[str, str]]:
        """Return names and values of the data set's figures."""
        read = [clip for clip in self.clips if clip.seconds is not None]
        seconds = sorted(clip.seconds for clip in read if clip.seconds is not None)
        rates = Counter(clip.sampling_rate for clip in read)
        channels = Counter(clip.channels for clip in read)
        rows = [
            ("clips", f"{len(self.clips)}, usable {self.usable}"),
            ("captions", f"{self.captions} different, unusable {len(self.unusable_captions)}"),
        ]
        if self.classes:
            rows.append(("classes", ", ".join(f"{name} {count}" for name, count in self.classes.items())))
        if seconds:
            rows += [
                (
                    "length",
                    f"{seconds[0]:.2f} to {seconds[-1]:.2f} s, median {statistics.median(seconds):.2f} s, "
                    f"{sum(seconds) / 60:.1f} min in all",
                ),
                ("sampling rate", ", ".join(f"{rate} Hz: {count}" for rate, count in rates.most_common())),
                ("channels", ", ".join(f"{number}: {count}" for number, count in channels.most_common())),
            ]
        return [*rows, ("held out", f"{self.held_out} of {self.usable} usable clips: {self.rule}")]

    def record(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return {
            "source": self.source,
            "clips": len(self.clips),
            "usable": self.usable,
            "captions": self.captions,
            "unusable_captions": dict(self.unusable_captions),
            "classes": self.classes,
            "held_out": self.held_out,
            "split": self.rule,
            "problems": self.problems,
            "warnings": list(self.warnings),
            "details": [asdict(clip) | {"usable": clip.usable} for clip in self.clips],
        }


def check_data(
    source: Path,
    recordings: Sequence[Recording],
    unusable: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: SplitConfig | None = None,
    jobs: int | None = None,
) -> DataHealth:
    """Decode the clips of a data set and report what is wrong with them.

    Args:
        source: the data set, for the report.
        recordings: what `read_recordings` returned.
        unusable: the unusable captions that it named.
        tokenizer: of the text encoder that should know the captions (`tokenizer_of`); None: not checked.
        split: how a training divides the clips.
        jobs: threads that decode; None: one for each core.
    """
    folder = source if source.is_dir() else source.parent
    found: dict[Clip, ClipHealth] = {}
    with progress(total=len(recordings), desc="clips", unit="clip") as bar:
        for recording, clip in side_by_side(_examine, recordings, jobs or os.cpu_count() or 1):
            found[recording.clip] = replace(clip, name=clip.name.removeprefix(f"{folder}/"))
            bar.update()
    knows = None if tokenizer is None else partial(is_readable, tokenizer)
    clips = [_with_captions(found[one.clip], one, knows) for one in recordings]
    clips = _with_duplicates(clips)
    usable = [one for one, clip in zip(recordings, clips, strict=True) if clip.usable]
    splits = split_recordings(usable, split or SplitConfig())
    warnings = _warnings(usable, [clip for clip in clips if clip.usable])
    if tokenizer is not None:
        language = language_warning(tokenizer, (text for one in usable for text in one.captions))
        warnings += [] if language is None else [language]
    return DataHealth(
        source=str(source),
        clips=tuple(clips),
        captions=len({caption for one in recordings for caption in one.captions}),
        unusable_captions=dict(unusable),
        warnings=tuple(warnings),
        held_out=len(splits.held_out),
        rule=splits.rule,
    )


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the generator in `folder`. Raises `ModelError`."""
    vocabulary = int(read_json(folder / "text_encoder" / "config.json")["vocab_size"])
    return load_tokenizer(folder / "tokenizer", vocabulary)


def flat_peaks(waveform_N: NDArray[np.float32]) -> int:
    """Return how often `FLAT_RUN` samples in a row stay at the clip's highest level."""
    magnitude = np.abs(waveform_N)
    peak = float(magnitude.max(initial=0.0))
    top = (magnitude >= peak - _STEP).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], top, [0]])))
    return int((edges[1::2] - edges[::2] >= FLAT_RUN).sum())


def _examine(recording: Recording) -> ClipHealth:
    """Decode a clip and examine its sound."""
    place = recording.places[0] if recording.places else ""
    clip = ClipHealth(name=recording.clip.name, place=place, sound=recording.sound, problems={})
    assert isinstance(recording.clip, FileClip | ParquetClip)
    try:
        read = decode_clip(recording.clip.content())
    except (OSError, ValueError) as error:
        reason = short_message(error)
        kind: Kind = "cut" if "cut short" in reason else "unreadable"
        return replace(clip, problems={kind: reason})
    mono_N = read.waveform.mean(axis=0)
    problems: dict[Kind, str] = {}
    if not has_sound(mono_N):
        problems["silent"] = ""
    elif is_silent(mono_N):
        problems["quiet"] = ""
    elif max(flat_peaks(channel) for channel in read.waveform) >= FLAT_RUNS:
        problems["clipped"] = ""
    if read.warnings:
        problems["changed"] = "; ".join(read.warnings)
    peak = float(np.abs(read.waveform).max(initial=0.0))
    return replace(
        clip,
        problems=problems,
        seconds=read.seconds,
        sampling_rate=read.sampling_rate,
        channels=len(read.waveform),
        peak_db=round(20 * float(np.log10(peak)), 1) + 0.0 if peak else None,
        digest=hashlib.sha256(read.waveform.tobytes() + read.sampling_rate.to_bytes(4)).hexdigest(),
    )


def _with_captions(clip: ClipHealth, recording: Recording, knows: Callable[[str], bool] | None) -> ClipHealth:
    if not recording.captions:
        return replace(clip, problems={**clip.problems, "no caption": ""})
    if knows is not None and not any(map(knows, recording.captions)):
        return replace(clip, problems={**clip.problems, "unknown words": recording.captions[0]})
    return clip


def _with_duplicates(clips: Sequence[ClipHealth]) -> list[ClipHealth]:
    first: dict[str, str] = {}
    found = []
    for clip in clips:
        original = first.setdefault(clip.digest, clip.name) if clip.digest else clip.name
        is_copy = original != clip.name and "silent" not in clip.problems
        found.append(replace(clip, problems={**clip.problems, "duplicate": original}) if is_copy else clip)
    return found


def _warnings(recordings: Sequence[Recording], clips: Sequence[ClipHealth]) -> list[str]:
    """Return what is wrong with the usable clips as a whole."""
    if not recordings:
        return ["no clip is usable: nothing can be trained on this data"]
    found = []
    sounds = Counter(one.sound for one in recordings)
    if len(recordings) < _FEW_CLIPS:
        found.append(
            f"{len(recordings)} usable clips are few: a model learns them by heart; give {_FEW_CLIPS} or more"
        )
    if len(sounds) < _LEAST_CLASSES and None not in sounds:
        found.append(
            f"all clips are of the class {next(iter(sounds))}: a model can't learn from them to tell sounds "
            "apart, and there are no scenes of two sounds; add another class, or captions"
        )
    most, least = max(sounds.values()), min(sounds.values())
    if None not in sounds and most > 10 * least:
        rare = ", ".join(str(sound) for sound, count in sounds.items() if count * 10 < most)
        found.append(f"classes are uneven, from {least} to {most} clips; add recordings of {rare}")
    texts = {caption for one in recordings for caption in one.captions}
    if foreign := [text for text in sorted(texts) if not _LATIN.search(text)]:
        found.append(
            f"{len(foreign)} of {len(texts)} captions have no Latin letter ({foreign[0][:40]!r}): most text "
            "encoders read English alone; translate them, or see with --model what yours reads"
        )
    rates = [clip.sampling_rate for clip in clips if clip.sampling_rate is not None]
    if rates and min(rates) < max(rates):
        found.append(
            f"sampling rates differ, from {min(rates)} to {max(rates)} Hz: the lower ones have no treble, "
            "which a model may learn as a property of their sounds"
        )
    return found
