"""Data sets of recordings as people have them: one reader for every training.

A data set is a list (`services.lists`: AudioCaps' and Clotho's CSV, WavCaps' JSON, Tango's JSON Lines,
SLAM-AAC's lines, Parquet with embedded clips, Audio-alpaca) or a folder: with one list, with a text file next
to each clip (``dog.wav``, ``dog.txt``), or with a folder for each class. Captions of classes are written from
their names; ``captions.json`` or ``captions.csv`` in the folder gives others (`services.lists.wordings`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from services.errors import invalid
from services.lists import (
    AUDIO_SUFFIXES,
    FOLD_NAMES,
    SOURCE_NAMES,
    caption_fault,
    read_list,
    read_wordings,
)
from training.data.examples import Clip, FileClip, clip_of

LIST_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TRAINING_FOLDS: Final = ("train", "training", "development")
HELD_OUT_FOLDS: Final = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
"""Names of folds, in lower case, that are for training, and that are held out."""
_LISTED = 5
_NO_SOUNDS: Final = (".txt", ".md", ".pdf", ".html", ".png", ".jpg", ".py", ".yaml", ".toml", *LIST_SUFFIXES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A clip of a data set, and what the data set states about it."""

    clip: Clip
    captions: tuple[str, ...]
    """Its usable captions; none if all of them are unusable."""
    places: tuple[str, ...] = field(default=(), compare=False)
    """File and row of each caption, for messages; empty texts if it is of no list."""
    sound: str | None = None
    """Its class, as the data set names it."""
    source: str | None = None
    """The recording that the clip is a piece of; None if the data set does not say."""
    fold: str | None = None
    """The part of the data set that it belongs to."""
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else its first row states: licence, author, …"""


class ClipRow(NamedTuple):
    """A clip and one of its captions."""

    clip: Clip
    caption: str | None
    """None: unusable."""
    place: str
    sound: str | None
    fold: str | None
    fields: Mapping[str, Any]


def read_recordings(
    path: Path, audio_root: Path | None = None, unusable: dict[str, str] | None = None
) -> list[Recording]:
    """Read a data set: each clip once, with all its captions, in the order of the list. No clip is decoded.

    Args:
        path: the list or the folder.
        audio_root: folder that clips start from; None: the list's folder.
        unusable: gets the place of each unusable caption, with the reason; None: they are refused.

    Raises:
        InvalidInputError: it can't be read, has another format, or names no clips.
    """
    by_clip: dict[Clip, list[ClipRow]] = {}
    for row in read_clip_rows(path, audio_root, unusable):
        by_clip.setdefault(row.clip, []).append(row)
    recordings = []
    for clip, rows in by_clip.items():
        captions = {row.caption: row.place for row in reversed(rows) if row.caption is not None}
        first = rows[0]
        recordings.append(
            Recording(
                clip=clip,
                captions=tuple(reversed(captions)),
                places=tuple(reversed(captions.values())),
                sound=first.sound,
                source=_first(first.fields, SOURCE_NAMES),
                fold=first.fold,
                fields=first.fields,
            )
        )
    return recordings


def read_clip_rows(
    path: Path, audio_root: Path | None = None, unusable: dict[str, str] | None = None
) -> list[ClipRow]:
    """Read a data set, one row per caption. Arguments and errors are those of `read_recordings`."""
    if not path.is_dir():
        return _read_list(path, audio_root or path.parent, unusable)
    if lists := lists_of(path):
        return _read_list(lists[0], audio_root or path, unusable)
    return _read_folder(path, unusable)


def list_files(path: Path) -> list[Path]:
    """Return the file of a list, or those of a folder that state captions. Raises `InvalidInputError`."""
    wordings = read_wordings(path if path.is_dir() else path.parent).path
    lists = lists_of(path) if path.is_dir() else [path]
    return [*lists, *([wordings] if wordings is not None and wordings not in lists else [])]


def lists_of(folder: Path) -> list[Path]:
    """Return the list of a folder; none if its captions are in other files, or are those of classes.

    Raises `InvalidInputError` if there are several lists.
    """
    wordings = read_wordings(folder).path
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in LIST_SUFFIXES and p != wordings)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:_LISTED])
        raise invalid("data", f"{folder} has {len(found)} lists ({names}); give the path of one")
    return found


def _read_list(path: Path, root: Path, unusable: dict[str, str] | None) -> list[ClipRow]:
    rows = []
    for entry in read_list(path, "data", embedded=True, keep_unusable=unusable is not None):
        if entry.fault is not None and unusable is not None:
            unusable[entry.place] = entry.fault
        rows.append(
            ClipRow(
                clip=clip_of(entry, root),
                caption=entry.prompt if entry.fault is None else None,
                place=entry.place,
                sound=entry.sound,
                fold=_first(entry.fields, FOLD_NAMES),
                fields=entry.fields,
            )
        )
    read_wordings(path.parent).check(row.sound for row in rows if row.sound is not None)
    return rows


def _read_folder(folder: Path, unusable: dict[str, str] | None) -> list[ClipRow]:
    """Read the clips of a folder, with text files next to them, or in a folder for each class."""
    clips = _clips_of(folder)
    texts = {clip: text for clip in clips if (text := clip.with_suffix(".txt")).exists()}
    if texts:
        if without := [clip for clip in clips if clip not in texts]:
            raise invalid(
                "data",
                f"{len(without)} of {len(clips)} clips of {folder} have no text file with captions "
                f"({_names(without)}); write them, or `milonga caption --folder`",
            )
        return [row for clip, text in texts.items() for row in _read_text(clip, text, unusable)]
    inside = [clip.relative_to(folder).parts[:-1] for clip in clips]
    if loose := [clip for clip, parts in zip(clips, inside, strict=True) if not parts]:
        raise invalid(
            "data",
            f"{len(loose)} of {len(clips)} clips of {folder} have no caption: no list, no text file next to "
            f"them, no class's folder around them ({_names(loose)}); move the clips of a class into a folder "
            f"of its name, give the folder above if {folder.name} is a class, or run `milonga caption`",
        )
    by_fold = all(len(parts) > 1 and _is_fold(parts[0]) for parts in inside)
    wordings = read_wordings(folder)
    rows = [
        ClipRow(FileClip(path=clip), caption, "", parts[by_fold], parts[0] if by_fold else None, {})
        for clip, parts in zip(clips, inside, strict=True)
        for caption in wordings.of(parts[by_fold])
    ]
    wordings.check(row.sound for row in rows if row.sound is not None)
    return rows


def _read_text(clip: Path, text: Path, unusable: dict[str, str] | None) -> Iterator[ClipRow]:
    """Yield the captions in a text file, one a line."""
    try:
        lines = text.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("data", f"{text} is no UTF-8 text: {error}") from error
    written = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in written or [(1, "")]:
        caption, fault = caption_fault(line)
        place = f"{text.name}:{number}"
        if fault is not None and unusable is None:
            raise invalid(place, fault)
        if fault is not None and unusable is not None:
            unusable[place] = fault
        yield ClipRow(FileClip(path=clip), None if fault else caption, place, None, None, {})


def _clips_of(folder: Path) -> list[Path]:
    """Return the sound files below a folder. Raises `InvalidInputError` if there is none."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith((".", "__MACOSX")) for p in path.relative_to(folder).parts)
    ]
    clips = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    if not clips:
        suffixes = Counter(p.suffix.lower() for p in files if p.suffix.lower() not in ("", *_NO_SOUNDS))
        others = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(3))
        raise invalid(
            "data",
            f"{folder} has no clips ({', '.join(AUDIO_SUFFIXES)})"
            + (f", it has {others}; convert them, e.g. `ffmpeg -i clip.m4a clip.wav`" if others else "")
            + ("; give the folder that holds them" if not others else ""),
        )
    return clips


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:_LISTED]) + (", …" if len(paths) > _LISTED else "")


def _is_fold(name: str) -> bool:
    return name.lower() in (*TRAINING_FOLDS, *HELD_OUT_FOLDS)


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of the fields `names`, whatever their case, as text."""
    lowered = {name.lower(): value for name, value in fields.items()}
    found = next((lowered[name] for name in names if lowered.get(name) not in (None, "")), None)
    return None if found is None else str(found)
