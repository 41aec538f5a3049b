"""Read lists of prompts, captions and clips: one reader for every command.

The formats are CSV and TSV with a header, JSON Lines, a JSON array of objects, an object that holds one
(WavCaps: ``{"data": [...]}``), and Parquet. A row may have several captions: ``caption_1``, ``caption_2``, …
(Clotho), or a list. JSON Lines end at ``\\n`` only, so strings may hold U+2028 and U+0085.
"""

import contextlib
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Final, Literal, NamedTuple

from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault
from services.errors import FieldViolation, InvalidInputError, invalid
from services.files import HEAD, describe_archive, describe_file

PROMPT_NAMES: Final = ("prompt", "captions", "caption", "text", "target")
AUDIO_NAMES: Final = (
    "audio", "location", "audio_path", "path", "wav", "file", "file_name", "filename", "source",
)  # fmt: skip
"""Names of columns; the first that a row has is used. AudioCaps has `caption`, Tango `location` and
`captions`, WavCaps `audio` and `caption`, Clotho `file_name`, SLAM-AAC `source` and `target`."""

STANDARD_INPUT: Final = Path("-")

_MAX_SHOWN = 5
_DELIMITERS = ",\t;"
# A cell in quotes, at the start of a cell; `end` if its closing quote is there.
_QUOTED = re.compile(r'(?:(?<=[,;\t\r\n])|(?<=[,;\t] )|\A)"(?:[^"]++|"")*+(?P<end>"(?=[,;\t\r\n]|\Z))?')
_STATED = re.compile(r'"?sep=(.)"?[\r\n]+')
_GAP = re.compile(r"[\s,:]*")

_MISSING: Final = ("nan", "none", "null", "n/a", "<na>", "undefined")
"""Texts of a missing value, in lower case."""
_ENCODINGS: Final = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
"""Encodings by their byte order marks; longer marks come first."""

_Content = Mapping[str, Any] | str
"""The fields of a row, or what is wrong with it."""


class _Row(NamedTuple):
    place: str
    number: int
    content: _Content


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
    fields: Mapping[str, Any]
    """The other fields of the row that are not null; in a table, the other cells that are not empty."""


def read_list(
    path: Path,
    field: str,
    *,
    prompts: Sequence[str] = PROMPT_NAMES,
    clips: Sequence[str] = AUDIO_NAMES,
    clip: Literal["needed", "optional", "ignored"] = "optional",
    keep_unusable: bool = False,
    checked: bool = True,
) -> list[Entry]:
    """Return the captions of a file, or of standard input (``-``), in order.

    Args:
        path: the file.
        field: what errors about the whole file name.
        prompts: columns of captions, by preference; also followed by a number: ``caption_1``.
        clips: columns of clips, by preference; a single one must be there.
        clip: whether rows without a clip are refused, or Parquet that embeds its clips, which are not read.
        keep_unusable: return unusable captions, with their fault, instead of refusing the file.
        checked: blank and overlong captions, and those with control characters, are unusable. Otherwise only
            missing ones, and the caller checks the others.

    Raises:
        InvalidInputError: the file can't be read, has no rows or none of the columns, or rows are invalid:
            names the first few by line, counts the rest.
    """
    rows = [
        row._replace(content=_known_names(row.content, (*prompts, *clips)))
        for row in _rows(path, field, prompts, () if clip == "ignored" else clips)
    ]
    columns = dict.fromkeys(name for row in rows if not isinstance(row.content, str) for name in row.content)
    numbered = re.compile(rf"({'|'.join(map(re.escape, prompts))})_?\d+")
    has_prompts = any(name in prompts or numbered.fullmatch(name) for name in columns)
    needs_clips = clip == "needed" or len(clips) == 1
    for names, is_there in (
        (prompts, has_prompts),
        (clips, not needs_clips or not columns.keys().isdisjoint(clips)),
    ):
        if columns and not is_there:
            raise invalid(
                field, f"{_called(path)} has no column {_or(names)}; it has {', '.join(columns)[:200]}"
            )
    faults: list[FieldViolation] = []
    entries: list[Entry] = []
    for place, row_number, content in rows:
        if isinstance(content, str):
            faults.append(FieldViolation(place, content))
            continue
        location = next((content[name] for name in clips if content.get(name) is not None), None)
        captions = _captions(content, prompts, numbered)
        fields = {
            name: value
            for name, value in content.items()
            if value is not None and not numbered.fullmatch(name) and name not in (*prompts, *clips)
        }
        for number, caption in enumerate(captions, start=1):
            prompt, fault = caption_fault(caption, checked=checked)
            if fault is not None and not keep_unusable:
                faults.append(FieldViolation(place, fault))
            elif location is None and clip == "needed":
                faults.append(FieldViolation(place, f"has no location; it has {', '.join(content)[:200]}"))
            elif location is not None and not isinstance(location, str):
                faults.append(FieldViolation(place, f"location is {str(location)[:40]!r}, must be str"))
            else:
                entries.append(
                    Entry(
                        place=place, number=row_number, caption=number if len(captions) > 1 else 0,
                        prompt=prompt, fault=fault, location=location, fields=fields,
                    )
                )  # fmt: skip
    if faults:
        raise InvalidInputError(*shortened(faults))
    if not entries:
        raise invalid(
            field,
            f"{_called(path)} holds no prompts; give CSV or TSV with a header, or JSON objects: "
            '{"prompt": "…"}',
        )
    return entries


def _known_names(content: _Content, known: Sequence[str]) -> _Content:
    """Return a row whose columns `known` are found in any case: ``Caption``."""
    if isinstance(content, str) or not content.keys().isdisjoint(known):
        return content
    return {name.lower() if name.lower() in known else name: value for name, value in content.items()}


def shortened(faults: Sequence[FieldViolation]) -> list[FieldViolation]:
    """Return the first few of `faults` and the number of the others: an error message is one line."""
    distinct = list(dict.fromkeys(faults))  # all captions of a row have the faults of its clip
    more = len(distinct) - _MAX_SHOWN
    return [*distinct[:_MAX_SHOWN], *([FieldViolation("…", f"and {more} more")] if more > 0 else [])]


def find_audio(text: str, root: Path) -> Path:
    r"""Return the path of the audio file that a list calls `text`, which may be a Windows path (``a\b.wav``).

    An absolute path that exists is returned unchanged. Lists often contain paths of another machine, so
    otherwise the longest suffix of `text` that exists under `root` is taken; if none exists, all of it.
    """
    path: PurePath = Path(text)
    if path.is_absolute() and _exists(Path(path)):
        return Path(path)
    if "\\" in text and not _exists(root / path):
        path = PureWindowsPath(text)
    parts = path.parts[1:] if path.anchor else path.parts
    for start in range(len(parts)):
        if _exists(found := root.joinpath(*parts[start:])):
            return found
    return root.joinpath(*parts)


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or holds a NUL
        return path.exists()
    return False


def check_text_column(schema: Any, name: str, path: Path, field: str) -> None:
    """Raise `InvalidInputError` unless a column of a Parquet file, whose Arrow schema is given, is text."""
    if not _is_text(kind := schema.field(name).type):
        raise invalid(field, f"the column {name} of {path} is {kind}, must be text (string)")


def caption_fault(caption: object, *, checked: bool = True) -> tuple[str, str | None]:
    """Return a caption, white space as single spaces, and why it is unusable; None if it is usable."""
    if caption is None:
        return "", "has no prompt"
    if not isinstance(caption, str):
        return "", f"prompt is {str(caption)[:40]}, must be str"
    prompt = " ".join(caption.split())
    if prompt.lower() in _MISSING:
        return "", f"has no prompt: {prompt!r} is what programs write for a missing value"
    fault = prompt_fault(prompt, MAX_PROMPT_CHARACTERS) if checked else None
    return prompt, None if fault is None else f"prompt {fault}"


def _captions(row: Mapping[str, Any], names: Sequence[str], numbered: re.Pattern[str]) -> Sequence[object]:
    """Return the captions of a row; `[None]` if it has none."""
    first = next((row[name] for name in names if row.get(name) is not None), None)
    if first is None:
        first = [value for name, value in row.items() if numbered.fullmatch(name) and value is not None]
    found = [caption for caption in first if caption is not None] if isinstance(first, list) else [first]
    return found or [None]


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _called(path: Path) -> str:
    return "standard input" if path == STANDARD_INPUT else str(path)


def _rows(path: Path, field: str, prompts: Sequence[str], clips: Sequence[str]) -> Iterator[_Row]:
    """Yield the rows of a file in whichever format."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, field, prompts, clips)
        return
    name = _called(path) if path == STANDARD_INPUT else path.name
    text = _text(path, field, name)
    is_json = suffix in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("{", "[")
    if is_json and suffix not in (".csv", ".tsv"):
        found = _json(text, name)
    else:
        lines = list(io.StringIO(text, newline=""))
        if lines and (stated := _STATED.fullmatch(lines[0])):  # Excel's first line
            found = _table(["\n", *lines[1:]], name, stated[1])
        else:
            header = next(filter(str.strip, lines), "")
            found = _table(lines, name, "\t" if suffix == ".tsv" else max(_DELIMITERS, key=header.count))
    yield from found


def _text(path: Path, field: str, name: str) -> str:
    """Return the text of a file without a byte order mark."""
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise invalid(
            field, f"{_called(path)} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if what := _what_is(content):
        raise invalid(field, f"{_called(path)} is {what}")
    try:
        return content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise invalid(f"{name}:{line}", f"is no UTF-8 text ({error.reason}); save it as UTF-8") from error


def _what_is(content: bytes) -> str | None:
    """Return what a file is that is no list, and the remedy."""
    # A JSON list may look like a server's reply.
    return describe_archive(content) or (
        None if content.lstrip()[:1] in (b"{", b"[", b"") else describe_file(content[:HEAD])
    )


def _encoding(content: bytes) -> str:
    """Return the encoding by the byte order mark; without one, Windows' wide text by the NUL of its ASCII."""
    marked = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), None)
    by_nul = {b"\0": "utf-16-be"}.get(content[:1]) or {b"\0": "utf-16-le"}.get(content[1:2])
    return marked or by_nul or "utf-8-sig"


def _table(lines: Sequence[str], name: str, delimiter: str) -> Iterator[_Row]:
    """Yield the rows of CSV or TSV, each with the line where it starts."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            rest = "".join(lines[line - 1 :])
            opened = next((quoted.start() for quoted in _QUOTED.finditer(rest) if not quoted["end"]), 0)
            line += rest.count("\n", 0, opened)
            yield _row(
                name, line, f"has a quote that is not closed or not doubled ({error}): {rest[opened:][:40]!r}"
            )
            return
        if not cells or (len(cells) > 1 and not any(cells)):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if twice := next((column for column in header if header.count(column) > 1), None):
                yield _row(name, line, f"names the column {twice!r} twice")
                return
        elif len(cells) != len(header):
            yield _row(
                name,
                line,
                f"has {len(cells)} cells, the header {len(header)}; quote a cell that holds {delimiter!r}",
            )
        else:
            values = (cell.strip() or None for cell in cells)
            yield _row(name, line, dict(zip(header, values, strict=True)))


def _row(name: str, line: int, content: _Content) -> _Row:
    return _Row(f"{name}:{line}", line, content)


def _json(text: str, name: str) -> Iterator[_Row]:
    """Yield the rows of JSON Lines, of an array, or of the one array of objects in an object."""
    start = len(text) - len(text.lstrip())
    try:
        whole = json.loads(text, object_pairs_hook=_fields)
    except (ValueError, RecursionError) as error:
        is_json = not isinstance(error, json.JSONDecodeError | RecursionError)
        if is_json or text[start : start + 1] == "[":
            yield _row(name, getattr(error, "lineno", 1), f"is no JSON: {error}")
        else:
            yield from _json_lines(text, name)
        return
    rows = [(whole, start)]
    if isinstance(whole, list):
        rows = list(_members(text, start))
    elif isinstance(whole, dict):
        inside = [at for value, at in _members(text, start) if _is_list_of_objects(value)]
        rows = list(_members(text, inside[0])) if len(inside) == 1 else rows
    line, last, compact = 1, 0, text.count("\n") + 1 < len(rows)
    for number, (row, at) in enumerate(rows, start=1):
        line, last = line + text.count("\n", last, at), at
        # Rows on one line are also counted, from 0.
        shared = f", row {number - 1}" if compact else ""
        yield _Row(f"{name}:{line}{shared}", number, _object(row))


def _json_lines(text: str, name: str) -> Iterator[_Row]:
    for line, written in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        # A byte order mark may also begin a later line: files were joined.
        if written := written.strip("\ufeff \t\r"):
            try:
                content = _object(json.loads(written, object_pairs_hook=_fields))
            except json.JSONDecodeError as error:
                content = f"is no JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                content = f"is no JSON: {error}"
            yield _row(name, line, content)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError if it has a field twice, of which json would take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the field {twice!r} twice")
    return row


def _object(row: object) -> Mapping[str, Any] | str:
    if isinstance(row, dict):
        return row
    return f'must be an object with a prompt: {{"prompt": "…"}}, found {json.dumps(row)[:40]}'


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _members(text: str, start: int) -> Iterator[tuple[Any, int]]:
    """Yield the values of the valid array or object that starts at `start`, each with its offset."""
    decoder = json.JSONDecoder()
    at = _after_gap(text, start + 1)
    while text[at] not in "]}":
        if text[start] == "{":
            _, at = decoder.raw_decode(text, at)
            at = _after_gap(text, at)
        value, end = decoder.raw_decode(text, at)
        yield value, at
        at = _after_gap(text, end)


def _after_gap(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return gap.end() if gap else at


def _parquet(path: Path, field: str, prompts: Sequence[str], clips: Sequence[str]) -> Iterator[_Row]:
    """Yield the rows of a Parquet file, from the columns of text, numbers and lists of text."""
    try:
        from pyarrow import ArrowException, types  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise invalid(field, f"{path} is Parquet; install milonga[training] to read it") from error
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            for name in prompts:
                if name in schema.names and not types.is_list(schema.field(name).type):
                    check_text_column(schema, name, path, field)
                    break
            for name in clips:
                if name in schema.names and types.is_struct(schema.field(name).type):
                    raise invalid(
                        field, f"the column {name} of {path} embeds its clips; give a column of their paths"
                    )
            names = [one.name for one in schema if _is_plain(one.type)]
            number = 0
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    yield _Row(f"{path.name}, row {number}", number + 1, row)
                    number += 1
    except (OSError, ValueError, ArrowException) as error:
        raise unreadable(path, field, error) from error


def unreadable(path: Path, field: str, error: Exception) -> InvalidInputError:
    """Return the error of a Parquet file that can't be read: what it is instead, or the library's message."""
    what = None
    with contextlib.suppress(OSError), path.open("rb") as file:
        what = _what_is(file.read(HEAD))
    fault = f"is {what}" if what else f"can't be read: {str(error).partition(chr(10))[0]}"
    return invalid(field, f"{path} {fault}")


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    return _is_text(kind.value_type if types.is_list(kind) else kind) or types.is_primitive(kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    while types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
