"""The rows of a list, in whichever format: CSV, TSV, JSON, JSON Lines, Parquet.

JSON Lines end at ``\\n`` only, so strings may hold U+2028 and U+0085.
"""

import contextlib
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from services.errors import InvalidInputError, invalid
from services.files import HEAD, describe_archive, describe_file
from services.lists.clips import EmbeddedClip

STANDARD_INPUT: Final = Path("-")

_DELIMITERS = ",\t;"
# A cell in quotes, at the start of a cell; `end` if its closing quote is there.
_QUOTED = re.compile(r'(?:(?<=[,;\t\r\n])|(?<=[,;\t] )|\A)"(?:[^"]++|"")*+(?P<end>"(?=[,;\t\r\n]|\Z))?')
_STATED = re.compile(r'"?sep=(.)"?[\r\n]+')
_GAP = re.compile(r"[\s,:]*")

_ENCODINGS: Final = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
"""Encodings by their byte order marks; longer marks come first."""

_Content = Mapping[str, Any] | str
"""The fields of a row, or what is wrong with it."""


class Row(NamedTuple):
    """A row of a list."""

    place: str
    """File and line, or row of a Parquet file."""
    number: int
    """Line, or position in an array or a Parquet file, from 1."""
    content: _Content


def check_text_column(schema: Any, name: str, path: Path, field: str) -> None:
    """Raise `InvalidInputError` unless a column of a Parquet file, whose Arrow schema is given, is text."""
    if not _is_text(kind := schema.field(name).type):
        raise invalid(field, f"the column {name} of {path} is {kind}, must be text (string)")


def called(path: Path) -> str:
    """Return how messages call a file."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def read_rows(path: Path, field: str, texts: Sequence[str], clips: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file, or of standard input (``-``).

    Of Parquet, the first column of `texts` must be text, and a column of `clips` may embed its clips: its
    cells are then an `EmbeddedClip` each. Raises `InvalidInputError`, which names `field`.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, field, texts, clips)
        return
    name = called(path) if path == STANDARD_INPUT else path.name
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
            field, f"{called(path)} can't be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if what := _what_is(content):
        raise invalid(field, f"{called(path)} is {what}")
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


def _table(lines: Sequence[str], name: str, delimiter: str) -> Iterator[Row]:
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


def _row(name: str, line: int, content: _Content) -> Row:
    return Row(f"{name}:{line}", line, content)


def _json(text: str, name: str) -> Iterator[Row]:
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
        yield Row(f"{name}:{line}{shared}", number, _object(row))


def _json_lines(text: str, name: str) -> Iterator[Row]:
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


def _parquet(path: Path, field: str, texts: Sequence[str], clips: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a Parquet file, from the columns of text, numbers, lists of text and clips."""
    try:
        from pyarrow import ArrowException, types  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise invalid(field, f"{path} is Parquet; install milonga[training] to read it") from error
    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            for name in texts:
                if name in schema.names and not types.is_list(schema.field(name).type):
                    check_text_column(schema, name, path, field)
                    break
            embedded = [one for one in clips if _embeds_clips(schema, one)]
            names = [one.name for one in schema if _is_plain(one.type)]
            number = 0
            for group in range(file.num_row_groups):
                for index, row in enumerate(file.read_row_group(group, names).to_pylist()):
                    own = {
                        one: EmbeddedClip(path=path, column=one, group=group, row=index) for one in embedded
                    }
                    yield Row(f"{path.name}, row {number}", number + 1, row | own)
                    number += 1
    except (OSError, ValueError, ArrowException) as error:
        raise unreadable(path, field, error) from error


def _embeds_clips(schema: Any, name: str) -> bool:
    """Return whether a column is the ``{bytes, path}`` of Hugging Face's data sets."""
    from pyarrow import types

    if name not in schema.names or not types.is_struct(kind := schema.field(name).type):
        return False
    return not {"bytes", "path"}.isdisjoint(kind.field(index).name for index in range(kind.num_fields))


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
