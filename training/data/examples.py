"""Labelled clips and preference pairs, read from lists and from Parquet files.

Clips are decoded on access, so a data set may be larger than memory.
"""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from services.audio import decoding
from services.errors import FieldViolation, InvalidInputError, invalid
from services.files import sha256_of
from services.lists import (
    EmbeddedClip,
    Entry,
    caption_fault,
    check_text_column,
    find_audio,
    find_clip,
    read_list,
    shortened,
    unreadable,
)
from services.models.clap.model import Waveform
from training.soundworld.captions import CaptionTruth

_LISTED = 5

DECODER = 2
"""Version of the decoder. Caches of clips are bound to it, so that a clip that it refuses is not used."""

LABEL_NAMES = ("label", "score", "reward")
"""Field names of labels; the first that is present is used. BATON's README names scores."""


class Clip(Hashable, Protocol):
    """A clip that is decoded on access."""

    @property
    def name(self) -> str:
        """Name of the clip in messages and reports."""

    @property
    def domain(self) -> str:
        """Kind of recording, by which metrics are grouped."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the content, or of all that it is computed from. Raises as `read` does."""

    def read(self) -> tuple[Waveform, int]:
        """Return samples [N] or [channels, N] and their rate in Hz. Raises OSError or ValueError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileClip:
    """A clip in an audio file."""

    path: Path
    domain: str = "recorded"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def digest(self) -> str:
        """SHA-256 of the encoded bytes."""
        return sha256_of(self.path)

    def read(self) -> tuple[Waveform, int]:
        """Decode the file. Raises OSError or ValueError."""
        return decode(self.content())

    def content(self) -> bytes:
        """Return the encoded bytes. Raises OSError."""
        return self.path.read_bytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetClip:
    """A clip in a Parquet column of ``{bytes, path}``, as Hugging Face's datasets write it."""

    cell: EmbeddedClip
    audio_root: Path
    """Folder that the paths of clips without bytes start from."""
    domain: str = "recorded"

    @property
    def name(self) -> str:
        """File, column, row group and row."""
        return f"{self.cell.path}:{self.cell.column}:{self.cell.group}:{self.cell.row}"

    @property
    def digest(self) -> str:
        """SHA-256 of the encoded bytes."""
        return hashlib.sha256(self.content()).hexdigest()

    def read(self) -> tuple[Waveform, int]:
        """Decode the bytes. Raises OSError or ValueError."""
        return decode(self.content())

    def content(self) -> bytes:
        """Return the encoded bytes. Raises OSError or ValueError."""
        return self.cell.read_bytes(self.audio_root)


def clip_of(entry: Entry, root: Path) -> Clip:
    """Return the clip of a row; paths start from `root`. Raises `InvalidInputError` if it names none."""
    if entry.embedded is not None:
        return ParquetClip(cell=entry.embedded, audio_root=root)
    return FileClip(path=find_clip(entry, root))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledClip:
    """A clip, labelled by whether annotators liked it for the prompt."""

    prompt: str
    clip: Clip
    label: float
    """1 yes, 0 no; in between, the share of annotators."""
    truth: CaptionTruth | None = None
    """The events of the prompt, if known; the prompt may then be paraphrased."""
    place: str = field(default="", compare=False)
    """File and row, for messages; empty if it is of no list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A preference pair: two clips of one prompt."""

    prompt: str
    chosen: Clip
    rejected: Clip
    kind: str = "preferred"
    """Mistake in the rejected clip (swapped, missing, added, replaced, other), or origin of the pair."""
    truth: CaptionTruth | None = None
    """The events of the prompt, if known; the prompt may then be paraphrased."""
    place: str = field(default="", compare=False)
    """File and row, for messages; empty if it is of no list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Labelled clips and preference pairs, of one split."""

    labelled: tuple[LabelledClip, ...] = ()
    pairs: tuple[Pair, ...] = ()

    def clips(self) -> Iterator[Clip]:
        """Yield the clips of all examples, with repetitions."""
        yield from (example.clip for example in self.labelled)
        for pair in self.pairs:
            yield from (pair.chosen, pair.rejected)

    def fixed(self) -> Iterator[LabelledClip | Pair]:
        """Yield the examples whose prompts are never paraphrased."""
        yield from (example for example in self.labelled if example.truth is None)
        yield from (pair for pair in self.pairs if pair.truth is None)

    def without(self, clips: set[Clip]) -> "Examples":
        """Return the examples that contain none of `clips`."""
        return Examples(
            labelled=tuple(example for example in self.labelled if example.clip not in clips),
            pairs=tuple(
                pair for pair in self.pairs if pair.chosen not in clips and pair.rejected not in clips
            ),
        )

    def preference_pairs(self) -> tuple[Pair, ...]:
        """Return the pairs, or if there are none, each liked clip of a prompt with each disliked one."""
        if self.pairs:
            return self.pairs
        by_prompt: dict[str, list[LabelledClip]] = defaultdict(list)
        for example in self.labelled:
            by_prompt[example.prompt].append(example)
        return tuple(
            Pair(prompt=prompt, chosen=liked.clip, rejected=disliked.clip, kind="labelled")
            for prompt, examples in by_prompt.items()
            for liked in examples
            for disliked in examples
            if disliked.label < 0.5 < liked.label
        )


def decode(content: bytes) -> tuple[Waveform, int]:
    """Return the samples [channels, N], float32, and the rate in Hz of an encoded clip.

    Raises ValueError for what the services refuse: the decoder is theirs.
    """
    clip = decode_clip(content)
    return clip.waveform, clip.sampling_rate


def decode_clip(content: bytes) -> decoding.ReadClip:
    """Return a clip [channels, N] with the decoder's warnings. Raises ValueError as `decode` does."""
    try:
        return decoding.decode(content, "clip", decoding.AudioBounds(), keep_channels=True)
    except InvalidInputError as error:
        raise ValueError("; ".join(violation.description for violation in error.violations)) from error


def read_labelled(
    path: Path,
    audio_root: Path | None = None,
    *,
    label: float | None = None,
    unusable: dict[str, str] | None = None,
) -> list[LabelledClip]:
    """Read the examples of a list (`services.lists`), as BATON's JSON: prompts, clips, labels in [0, 1].

    Raises `InvalidInputError`.

    Args:
        path: the list.
        audio_root: folder that clips start from; None: the list's folder.
        label: the label of all examples; the list needs none, as Tango's. None: the list's `LABEL_NAMES`.
        unusable: gets the place of each unusable prompt, with the reason; None: they are refused.
    """
    source = "data.labelled"
    root, examples, faults = audio_root or path.parent, list[LabelledClip](), list[FieldViolation]()
    for entry in read_list(path, source, clip="needed", embedded=True, keep_unusable=unusable is not None):
        if entry.fault is not None and unusable is not None:
            unusable[entry.place] = entry.fault
            continue
        names = [name for name in LABEL_NAMES if name in entry.fields]
        written = label if label is not None else entry.fields[names[0]] if names else None
        try:
            value = float(written or 0)
        except (TypeError, ValueError):
            value = float("nan")
        if written is None or not 0 <= value <= 1:
            name = names[0] if names else " or ".join(LABEL_NAMES)
            faults.append(FieldViolation(entry.place, f"{name} is {written!r}, must be 0 to 1"))
        clip = clip_of(entry, root)
        examples.append(LabelledClip(prompt=entry.prompt, clip=clip, label=value, place=entry.place))
    if faults:
        raise InvalidInputError(*shortened(faults))
    return examples


def read_pairs(
    path: Path, audio_root: Path | None = None, *, unusable: dict[str, str] | None = None
) -> list[Pair]:
    """Read the pairs of a Parquet file with audio-alpaca's columns: prompt, chosen, rejected, strategy.

    The clips are ``{bytes, path}`` or paths (relative to `audio_root`, by default the file's folder).
    `strategy` is optional. `unusable` gets the row of each unusable prompt, with the reason; None: they are
    refused. Of a list with labels, BATON's JSON, the pairs are each liked clip of a prompt with each disliked
    one. Raises `InvalidInputError`.
    """
    name, pairs, found = "data.pairs", list[Pair](), dict[str, str]()
    if path.suffix == ".json":
        labelled = read_labelled(path, audio_root, unusable=unusable)
        pairs = list(Examples(labelled=tuple(labelled)).preference_pairs())
        if not pairs:
            raise invalid(name, f"{path} has a liked and a disliked clip of no prompt; give more labels")
        return pairs
    columns = ("prompt", "strategy")
    for number, (row, chosen, rejected) in enumerate(pair_rows(path, name, audio_root, columns=columns)):
        prompt, fault = caption_fault(row["prompt"])
        kind = f"strategy {row['strategy']}" if row.get("strategy") is not None else "preferred"
        place = f"{path.name}, row {number}"
        if fault is None:
            pairs.append(Pair(prompt=prompt, chosen=chosen, rejected=rejected, kind=kind, place=place))
        else:
            found[place] = fault
    if not pairs and not found:
        raise invalid(name, f"{path} holds no pairs")
    if found and unusable is None:
        raise InvalidInputError(*shortened([FieldViolation(*fault) for fault in found.items()]))
    if unusable is not None:
        unusable |= found
    return pairs


def pair_rows(
    path: Path,
    field: str,
    audio_root: Path | None = None,
    *,
    domain: str = "recorded",
    columns: Collection[str] | None = None,
) -> Iterator[tuple[dict[str, Any], Clip, Clip]]:
    """Yield the rows of a Parquet file with the columns prompt, chosen and rejected, in order.

    Each comes with its chosen and its rejected clip. Raises `InvalidInputError`.

    Args:
        path: the Parquet file.
        field: the field that errors name.
        audio_root: folder that paths of clips start from; None: the file's folder.
        domain: domain of the clips.
        columns: columns to read in addition to the clips; None: all.
    """
    from pyarrow import ArrowException, types  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    sides, root = ("chosen", "rejected"), audio_root or path.parent
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            if missing := [name for name in ("prompt", *sides) if name not in schema.names]:
                raise invalid(
                    field, f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}"
                )
            embedded = {side: types.is_struct(schema.field(side).type) for side in sides}
            for side in (side for side in sides if embedded[side]):
                kind = schema.field(side).type
                if not {"bytes", "path"} & {kind.field(number).name for number in range(kind.num_fields)}:
                    raise invalid(field, f"the column {side} of {path} is {kind}, must have bytes or path")
            for name in ("prompt", *(side for side in sides if not embedded[side])):
                check_text_column(schema, name, path, field)
            selected = {*sides, *(schema.names if columns is None else columns)}
            names = [name for name in schema.names if name in selected and not embedded.get(name)]
            groups = [file.read_row_group(group, names).to_pylist() for group in range(file.num_row_groups)]
    except (OSError, ArrowException) as error:
        raise unreadable(path, field, error) from error

    def clip(column: str, group: int, number: int, row: Mapping[str, Any]) -> Clip:
        if embedded[column] or row[column] is None:
            cell = EmbeddedClip(path=path, column=column, group=group, row=number)
            return ParquetClip(cell=cell, audio_root=root, domain=domain)
        return FileClip(path=find_audio(row[column], root), domain=domain)

    for group, rows in enumerate(groups):
        for number, row in enumerate(rows):
            yield row, clip("chosen", group, number, row), clip("rejected", group, number, row)


def counts(examples: Examples) -> dict[str, int]:
    """Return the number of labelled clips by label, and of pairs by kind."""
    labels = Counter("liked" if example.label > 0.5 else "not liked" for example in examples.labelled)
    return dict(labels) | dict(Counter(pair.kind for pair in examples.pairs))


def short_message(error: Exception) -> str:
    """Return the message of an `OSError` without its path, or the first line of another error's."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]


def shown(lines: Sequence[str]) -> list[str]:
    """Return the first few lines, and how many more there are, so that a log stays short."""
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return [*lines[:_LISTED], *more]


ClipOrRow = TypeVar("ClipOrRow", bound=Clip | str)


def check_readable(
    unreadable: Mapping[ClipOrRow, str],
    total: int,
    limit: float,
    *,
    field: str = "data",
    quiet: bool = False,
    what: str = "clips can't be read",
) -> None:
    """Print the unreadable clips, or the rows of unusable prompts, on stderr, unless `quiet`.

    Raises `InvalidInputError`, which names `field`, if their share of `total` exceeds `limit`.
    """
    if not unreadable:
        return
    listed = [f"{one if isinstance(one, str) else one.name}: {reason}" for one, reason in unreadable.items()]
    found = f"{len(listed)} of {total} {what}"
    if len(listed) > limit * total:
        raise invalid(field, f"{found}, at most {limit:.0%} may be: {'; '.join(shown(listed))}")
    if not quiet:
        print(f"{found} and are left out:", *shown(listed), sep="\n  ", file=sys.stderr)


def check_prompts(unusable: Mapping[str, str], usable: int, limit: float, *, quiet: bool = False) -> None:
    """Print the rows of unusable prompts. Raises `InvalidInputError` if their share exceeds `limit`."""
    check_readable(unusable, usable + len(unusable), limit, quiet=quiet, what="prompts are unusable")
