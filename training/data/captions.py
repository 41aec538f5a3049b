"""Clips with captions, one example per caption, from the data sets that `training.data.recordings` reads."""

from dataclasses import dataclass, field
from pathlib import Path

from training.data.examples import Clip
from training.data.recordings import read_clip_rows
from training.soundworld.captions import CaptionTruth


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionExample:
    """A clip and one of its captions."""

    clip: Clip
    caption: str
    truth: CaptionTruth | None = None
    """The events of the clip, if known; the grammar then words it in other ways."""
    place: str = field(default="", compare=False)
    """File and row, for messages; empty if it is of no list."""

    @property
    def prompt(self) -> str:
        """The caption, where it is the prompt of a generator."""
        return self.caption


def read_examples(
    path: Path, audio_root: Path | None = None, unusable: dict[str, str] | None = None
) -> list[CaptionExample]:
    """Read a data set, one example per caption. Arguments and errors are those of `read_recordings`."""
    return [
        CaptionExample(clip=row.clip, caption=row.caption, place=row.place)
        for row in read_clip_rows(path, audio_root, unusable)
        if row.caption is not None
    ]
