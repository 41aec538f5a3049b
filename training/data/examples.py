"""Labelled clips and preference pairs, and the files that they are read from.

Clips are read when they are needed, so a data set may be larger than memory.
"""

import functools
import hashlib
import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from services.errors import FieldViolation, InvalidInputError
from services.models.clap.model import MAX_SECONDS, MIN_SECONDS, Waveform
from training.soundworld.captions import CaptionTruth

_LISTED = 5

PROMPT_NAMES = ("prompt", "captions", "caption", "text")
AUDIO_NAMES = ("audio", "location", "audio_path", "path", "wav", "file")
LABEL_NAMES = ("label", "score", "reward")
"""Field names of labelled JSON; the first that a row has counts. BATON's README has audio locations, captions
and scores; Tango's own lists, which BATON extends, have `location` and `captions`."""


class Clip(Protocol):
    """A clip that is read when it is needed. Hashable."""

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def domain(self) -> str:
        """Kind of recording; figures are reported for each kind."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the content, or of all that determines it. Raises as `read` does."""

    def read(self) -> tuple[Waveform, int]:
        """Return samples [N] or [channels, N], and their rate in hertz. Raises OSError or ValueError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileClip:
    """A clip in a file of its own."""

    path: Path
    domain: str = "recorded"

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def digest(self) -> str:
        """Of the encoded bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self) -> tuple[Waveform, int]:
        """Decode the file."""
        return decode(self.path.read_bytes())


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetClip:
    """A clip in a Parquet file's column of ``{bytes, path}``, as Hugging Face's data sets write them."""

    path: Path
    """The Parquet file."""
    column: str
    group: int
    """Row group."""
    row: int
    """Row in the group."""
    audio_root: Path
    """Folder of the clips that have a path in the place of bytes."""
    domain: str = "recorded"

    @property
    def name(self) -> str:
        """File, column, row group and row."""
        return f"{self.path}:{self.column}:{self.group}:{self.row}"

    @property
    def digest(self) -> str:
        """Of the encoded bytes."""
        return hashlib.sha256(self._content()).hexdigest()

    def read(self) -> tuple[Waveform, int]:
        """Decode the bytes."""
        return decode(self._content())

    def _content(self) -> bytes:
        cell = _parquet_column(self.path, self.column, self.group)[self.row] or {}
        content: bytes | None = cell.get("bytes")
        if content is None:
            if not cell.get("path"):
                raise ValueError("holds neither bytes nor a path")
            return find_audio(cell["path"], self.audio_root).read_bytes()
        return content


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A clip, and whether annotators liked it for the prompt."""

    prompt: str
    clip: Clip
    label: float
    """1 yes, 0 no; a share of annotators in between."""
    truth: CaptionTruth | None = None
    """Meaning of the prompt, if it may be paraphrased."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two clips of one prompt, the first liked better."""

    prompt: str
    chosen: Clip
    rejected: Clip
    kind: str = "preferred"
    """What is wrong with the rejected clip: swapped, missing, added, replaced; or its origin."""
    truth: CaptionTruth | None = None
    """Meaning of the prompt, if it may be paraphrased."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """The examples of one split."""

    labelled: tuple[Labelled, ...] = ()
    pairs: tuple[Pair, ...] = ()

    def clips(self) -> Iterator[Clip]:
        """Yield every clip, some of them several times."""
        yield from (example.clip for example in self.labelled)
        for pair in self.pairs:
            yield from (pair.chosen, pair.rejected)

    def prompts(self) -> Iterator[str]:
        """Yield every prompt that is not paraphrased, some of them several times."""
        yield from (example.prompt for example in self.labelled if example.truth is None)
        yield from (pair.prompt for pair in self.pairs if pair.truth is None)

    def without(self, clips: set[Clip]) -> "Examples":
        """Return the examples that use none of `clips`."""
        return Examples(
            labelled=tuple(example for example in self.labelled if example.clip not in clips),
            pairs=tuple(
                pair for pair in self.pairs if pair.chosen not in clips and pair.rejected not in clips
            ),
        )

    def comparable(self) -> tuple[Pair, ...]:
        """Return the pairs; without any, each good clip of a prompt with each bad one, by the labels."""
        if self.pairs:
            return self.pairs
        by_prompt: dict[str, list[Labelled]] = defaultdict(list)
        for example in self.labelled:
            by_prompt[example.prompt].append(example)
        return tuple(
            Pair(prompt=prompt, chosen=good.clip, rejected=bad.clip, kind="labelled")
            for prompt, examples in by_prompt.items()
            for good in examples
            for bad in examples
            if bad.label < 0.5 < good.label
        )


def decode(content: bytes) -> tuple[Waveform, int]:
    """Decode a clip to samples [channels, N] and their rate in hertz.

    Raises ValueError if it is no audio, is longer or shorter than CLAP accepts, or has samples not finite.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = int(file.samplerate)
            # Bounded by what is decoded, not by what a header claims.
            samples_NC = file.read(int(MAX_SECONDS * rate) + 1, dtype="float32", always_2d=True)
    except RuntimeError as error:  # libsndfile's errors
        raise ValueError(str(error)) from error
    seconds = len(samples_NC) / rate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(
            f"is {'over ' if seconds > MAX_SECONDS else ''}{seconds:.2f} s long, must be {MIN_SECONDS} to "
            f"{MAX_SECONDS:g}"
        )
    if not np.isfinite(samples_NC).all():
        raise ValueError("holds samples that are not finite")
    return np.ascontiguousarray(samples_NC.T), rate


def find_audio(text: str, root: Path) -> Path:
    """Return the path of audio that a list calls `text`: under `root`, or as it is.

    Lists often hold paths of the machine they were made on; so the longest ending of `text` that exists under
    `root` is taken. If none exists, the result is the path under `root`.
    """
    path = Path(text)
    if path.is_absolute() and path.exists():
        return path
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for start in range(len(parts)):
        if (found := root.joinpath(*parts[start:])).exists():
            return found
    return root.joinpath(*parts)


def read_labelled(
    path: Path, audio_root: Path | None = None, *, label: float | None = None
) -> list[Labelled]:
    """Read the examples of a JSON file in BATON's format: a list of objects, or one object per line.

    Each has a prompt, an audio location (relative to `audio_root`, by default the file's folder) and a label
    in [0, 1], under one of the names above. `label` is for all examples of a file without labels, as Tango's
    lists are. Raises `InvalidInputError`.
    """
    field = "data.labelled"
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
    except (OSError, ValueError) as error:
        raise _invalid(field, f"{path} can't be read: {error}") from error
    if not rows:
        raise _invalid(field, f"{path} holds no examples")
    root, found = audio_root or path.parent, []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _invalid(field, f"{path}, example {number} is {type(row).__name__}, must be an object")
        where = f"{path}, example {number}"
        prompt, audio = (_value(row, names, where) for names in (PROMPT_NAMES, AUDIO_NAMES))
        written = _value(row, LABEL_NAMES, where) if label is None else label
        try:
            value = float(written)
        except (TypeError, ValueError):
            value = float("nan")
        if not 0 <= value <= 1:
            raise _invalid(field, f"{where} has the label {written!r}, must be 0 to 1")
        clip = FileClip(path=find_audio(str(audio), root))
        found.append(Labelled(prompt=str(prompt), clip=clip, label=value))
    return found


def read_pairs(path: Path, audio_root: Path | None = None) -> list[Pair]:
    """Read the pairs of a Parquet file with audio-alpaca's columns: prompt, chosen, rejected, strategy.

    The clips are ``{bytes, path}`` or paths (relative to `audio_root`, by default the file's folder).
    `strategy` may be missing. Raises `InvalidInputError`.
    """
    field = "data.pairs"
    found = [
        Pair(
            prompt=str(row["prompt"]),
            chosen=chosen,
            rejected=rejected,
            kind=f"strategy {row['strategy']}" if row.get("strategy") is not None else "preferred",
        )
        for row, chosen, rejected in pair_rows(path, field, audio_root, columns=("prompt", "strategy"))
    ]
    if not found:
        raise _invalid(field, f"{path} holds no pairs")
    return found


def pair_rows(
    path: Path,
    field: str,
    audio_root: Path | None = None,
    *,
    domain: str = "recorded",
    columns: Collection[str] | None = None,
) -> Iterator[tuple[dict[str, Any], Clip, Clip]]:
    """Read the rows of a Parquet file with the columns prompt, chosen and rejected, in order.

    Args:
        path: of the file.
        field: what messages name as wrong.
        audio_root: of paths in the place of clips; None: the file's folder.
        domain: of the clips.
        columns: to read beside the clips; None: all.

    Returns each row, its chosen and its rejected clip. Raises `InvalidInputError`.
    """
    from pyarrow import ArrowException, types  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    sides, root = ("chosen", "rejected"), audio_root or path.parent
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            if missing := [name for name in ("prompt", *sides) if name not in schema.names]:
                raise _invalid(
                    field, f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}"
                )
            embedded = {side: types.is_struct(schema.field(side).type) for side in sides}
            wanted = {*sides, *(schema.names if columns is None else columns)}
            light = [name for name in schema.names if name in wanted and not embedded.get(name)]
            groups = [file.read_row_group(group, light).to_pylist() for group in range(file.num_row_groups)]
    except (OSError, ArrowException) as error:
        raise _invalid(field, f"{path} can't be read: {str(error).partition(chr(10))[0]}") from error

    def clip(column: str, group: int, number: int, row: Mapping[str, Any]) -> Clip:
        if embedded[column]:
            return ParquetClip(
                path=path, column=column, group=group, row=number, audio_root=root, domain=domain
            )
        return FileClip(path=find_audio(str(row[column]), root), domain=domain)

    for group, rows in enumerate(groups):
        for number, row in enumerate(rows):
            yield row, clip("chosen", group, number, row), clip("rejected", group, number, row)


def counts(examples: Examples) -> dict[str, int]:
    """Count the labelled examples by label, the pairs by kind."""
    labels = Counter("liked" if example.label > 0.5 else "not liked" for example in examples.labelled)
    return dict(labels) | dict(Counter(pair.kind for pair in examples.pairs))


@functools.lru_cache(maxsize=4)
def _parquet_column(path: Path, column: str, group: int) -> list[dict[str, Any] | None]:
    """Read one column of one row group. Clips are read in order, so its neighbours are next."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows: list[dict[str, Any] | None] = file.read_row_group(group, [column])[column].to_pylist()
    except ArrowException as error:
        raise ValueError(str(error)) from error
    return rows


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _value(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise _invalid("data.labelled", f"{where} has none of {', '.join(names)}; it has {', '.join(row)}")


def _invalid(field: str, description: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation(field, description))


def check_readable(unreadable: Mapping[Clip, str], total: int, limit: float, *, quiet: bool = False) -> None:
    """Print which clips are left out. Raises `InvalidInputError` if they are more than `limit` of all."""
    if not unreadable:
        return
    listed = [f"{clip.name}: {reason}" for clip, reason in unreadable.items()]
    found = f"{len(listed)} of {total} clips can't be read"
    if len(listed) > limit * total:
        more = f"; and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        raise InvalidInputError(
            FieldViolation(
                "data", f"{found}, at most {limit:.0%} may be: {'; '.join(listed[:_LISTED])}{more}"
            )
        )
    if not quiet:
        print(f"{found} and are left out:", *listed, sep="\n  ", file=sys.stderr)
