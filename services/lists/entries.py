"""Read the captions and clips of a list.

A row may have several captions: ``caption_1``, ``caption_2``, … (Clotho), or a list. A list without captions
that has classes gets the captions of the classes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.errors import FieldViolation, InvalidInputError, invalid
from services.lists.captions import caption_fault, is_filled
from services.lists.clips import AUDIO_SUFFIXES, EmbeddedClip, exists, find_audio
from services.lists.columns import AUDIO_NAMES, CLASS_NAMES, PROMPT_NAMES
from services.lists.rows import STANDARD_INPUT, Row, called, read_rows
from services.lists.wordings import Wordings, read_wordings

_MAX_SHOWN = 5
_VIDEO = "youtube_id"  # names a clip of AudioCaps, see `find_clip`


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One caption of a list."""

    place: str
    """File and line, or row of a Parquet file counted from 0, for messages: ``captions.csv:3``."""
    number: int
    """The row's line, or its position in an array or a Parquet file, from 1."""
    caption: int
    """Number of the caption among several of its row, from 1; 0 if it is the only one."""
    prompt: str
    """The caption. White space, line breaks included, is single spaces."""
    fault: str | None
    """Why the caption is unusable: missing, no text, blank, too long, or with control characters."""
    location: str | None
    """The clip as the list names it; None if the row names none."""
    embedded: EmbeddedClip | None
    """The clip, if a Parquet file embeds it."""
    sound: str | None
    """The clip's class as the list names it; None if the row names none."""
    fields: Mapping[str, Any]
    """The other fields of the row that are not null; in a table, the other cells that are not empty."""


def read_list(
    path: Path,
    field: str,
    *,
    prompts: Sequence[str] = PROMPT_NAMES,
    clips: Sequence[str] = AUDIO_NAMES,
    clip: Literal["needed", "optional", "ignored"] = "optional",
    embedded: bool = False,
    keep_unusable: bool = False,
    checked: bool = True,
) -> list[Entry]:
    """Return the captions of a file, or of standard input (``-``), in order.

    Args:
        path: the file.
        field: what errors about the whole file name.
        prompts: columns of captions, by preference; also followed by a number: ``caption_1``.
        clips: columns of clips, by preference; a single one must be there.
        clip: whether rows without a clip are refused, or clips are not read.
        embedded: whether the caller reads clips that Parquet embeds; otherwise they are refused.
        keep_unusable: return unusable captions, with their fault, instead of refusing the file.
        checked: blank and overlong captions, and those with control characters, are unusable. Otherwise only
            missing ones, and the caller checks the others.

    Raises:
        InvalidInputError: the file can't be read, has no rows or none of the columns, or rows are invalid:
            names the first few by line, counts the rest.
    """
    known = (*prompts, *clips, *CLASS_NAMES)
    rows = [
        row._replace(content=_known_names(row.content, known))
        for row in read_rows(path, field, prompts, () if clip == "ignored" else clips)
    ]
    columns = _Columns.of(rows, prompts, clips)
    columns.check(path, field, needs_clip=clip == "needed" or len(clips) == 1)
    wordings = read_wordings(path.parent) if columns.by_class and path != STANDARD_INPUT else Wordings()
    faults: list[FieldViolation] = []
    entries: list[Entry] = []
    for place, row_number, content in rows:
        if isinstance(content, str):
            faults.append(FieldViolation(place, content))
            continue
        used = next((name for name in clips if content.get(name) is not None), None)
        location = content[used] if used else None
        named = _class_column(content)
        sound = " ".join(content[named].split()) if named else None
        captions = columns.captions(content, wordings, sound)
        read = {used, *(clips if clip == "ignored" else ()), named if columns.by_class else None}
        fields = columns.others(content, read)
        for number, caption in enumerate(captions, start=1):
            prompt, fault = caption_fault(caption, checked=checked)
            if fault is not None and not keep_unusable:
                faults.append(FieldViolation(place, fault))
            elif location is None and clip == "needed" and _VIDEO not in content:
                faults.append(FieldViolation(place, f"has no location; it has {', '.join(content)[:200]}"))
            elif isinstance(location, EmbeddedClip) and not embedded:
                name = location.column
                raise invalid(
                    field, f"the column {name} of {path} embeds its clips; give a column of their paths"
                )
            elif location is not None and not isinstance(location, str | EmbeddedClip):
                faults.append(FieldViolation(place, f"location is {str(location)[:40]!r}, must be str"))
            else:
                entries.append(
                    Entry(
                        place=place, number=row_number, caption=number if len(captions) > 1 else 0,
                        prompt=prompt, fault=fault, location=location if isinstance(location, str) else None,
                        embedded=location if isinstance(location, EmbeddedClip) else None,
                        sound=sound, fields=fields,
                    )
                )  # fmt: skip
    if faults:
        raise InvalidInputError(*shortened(faults))
    if not entries:
        raise invalid(
            field,
            f"{called(path)} holds no prompts; give CSV or TSV with a header, or JSON objects: "
            '{"prompt": "…"}',
        )
    return entries


@dataclass(frozen=True, kw_only=True, slots=True)
class _Columns:
    """The columns of a list, and which of them hold captions."""

    names: Sequence[str]
    prompts: Sequence[str]
    clips: Sequence[str]
    numbered: re.Pattern[str]
    """Names of captions with a number."""
    has_prompts: bool
    by_class: bool
    """Whether captions are those of the classes: there are classes, and no captions but numbers."""

    @classmethod
    def of(cls, rows: Sequence[Row], prompts: Sequence[str], clips: Sequence[str]) -> "_Columns":
        contents = [row.content for row in rows if not isinstance(row.content, str)]
        numbered = re.compile(rf"({'|'.join(map(re.escape, prompts))})_?\d+")
        names = list(dict.fromkeys(name for content in contents for name in content))
        holding = [name for name in names if name in prompts or numbered.fullmatch(name)]
        captioned = any(is_filled(content.get(name)) for content in contents for name in holding)
        return cls(
            names=names,
            prompts=prompts,
            clips=clips,
            numbered=numbered,
            has_prompts=bool(holding),
            by_class=not captioned and len(prompts) > 1 and any(map(_class_column, contents)),
        )

    def check(self, path: Path, field: str, *, needs_clip: bool) -> None:
        """Raise `InvalidInputError` if a column is missing."""
        for wanted, is_there in (
            (self.prompts, self.has_prompts or self.by_class),
            (self.clips, not needs_clip or not set(self.names).isdisjoint((*self.clips, _VIDEO))),
        ):
            if self.names and not is_there:
                raise invalid(
                    field,
                    f"{called(path)} has no column {_or(wanted)}; it has {', '.join(self.names)[:200]}",
                )

    def others(self, content: Mapping[str, Any], read: set[str | None]) -> dict[str, Any]:
        """Return the fields of a row that are not null, are no captions and not in `read`."""
        return {
            name: value
            for name, value in content.items()
            if value is not None
            and not self.numbered.fullmatch(name)
            and name not in self.prompts
            and name not in read
        }

    def captions(self, content: Mapping[str, Any], wordings: Wordings, sound: str | None) -> Sequence[object]:
        """Return the captions of a row; `[None]` if it has none."""
        if self.by_class:
            return [None] if sound is None else wordings.of(sound)
        first = next((content[name] for name in self.prompts if content.get(name) is not None), None)
        if first is None:
            found = [value for name, value in content.items() if self.numbered.fullmatch(name)]
        else:
            found = first if isinstance(first, list) else [first]
        return [caption for caption in found if caption is not None] or [None]


def _class_column(content: Mapping[str, Any]) -> str | None:
    """Return the column in which a row names its class; numbers are none."""
    return next(
        (name for name in CLASS_NAMES if isinstance(content.get(name), str) and is_filled(content[name])),
        None,
    )


def _known_names(content: Mapping[str, Any] | str, known: Sequence[str]) -> Mapping[str, Any] | str:
    """Return a row whose columns `known` are found in any case: ``Caption``."""
    if isinstance(content, str):
        return content
    lowered = {
        name: name.lower() for name in content if name.lower() in known and name.lower() not in content
    }
    return {lowered.get(name, name): value for name, value in content.items()}


def shortened(faults: Sequence[FieldViolation]) -> list[FieldViolation]:
    """Return the first few of `faults` and the number of the others: an error message is one line."""
    distinct = list(dict.fromkeys(faults))  # all captions of a row have the faults of its clip
    more = len(distinct) - _MAX_SHOWN
    return [*distinct[:_MAX_SHOWN], *([FieldViolation("…", f"and {more} more")] if more > 0 else [])]


def find_clip(entry: Entry, root: Path) -> Path:
    """Return the path of a row's clip: as the row names it, or as AudioCaps' and WavCaps' are usually named.

    Raises `InvalidInputError` if the row names none.
    """
    if entry.location is not None:
        return find_audio(entry.location, root)
    fields = {name: str(value) for name, value in entry.fields.items()}
    start = fields.get("start_time", "").removesuffix(".0")
    video, own = fields.get(_VIDEO), fields.get("id") or fields.get("fname") or ""
    stems = [f"Y{video}", video, f"{video}_{start}", f"{video}_{start}000"] if video else []
    stems += [fields.get("audiocap_id", ""), own, Path(own).stem]
    names = [f"{stem}{suffix}" for stem in stems if stem for suffix in AUDIO_SUFFIXES]
    found = next((root / name for name in names if exists(root / name)), None)
    if found is None and video is None:
        raise invalid(entry.place, "names no clip; give a column source, audio, file_name or youtube_id")
    return found or root / names[0]


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
