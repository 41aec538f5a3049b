"""Clips with captions, from lists and folders.

A list is what `services.lists` reads: SLAM-AAC's lines ``{"key", "source", "target"}``, Clotho's CSV with
five captions a clip, AudioCaps' CSV, whose clips are found by ``youtube_id``. A folder has one list, or a
text file next to each clip (``dog.wav``, ``dog.txt``).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.errors import invalid
from services.lists import Entry, caption_fault, find_audio, read_list
from training.data.examples import Clip, FileClip
from training.soundworld.captions import CaptionTruth

AUDIO_SUFFIXES: Final = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
LIST_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_LISTED = 5


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
        clip = FileClip(path=find_clip(entry, root))
        examples.append(CaptionExample(clip=clip, caption=entry.prompt, place=entry.place))
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
