"""Files that a command writes: whole or not at all."""

from pathlib import Path

from services.errors import FieldViolation, InvalidInputError, OutputError
from services.files import temporary_name

ENCODINGS = {".wav": "wav", ".flac": "flac", ".ogg": "ogg"}
"""Encoding by the output's ending."""


def encoding_of(path: Path) -> str:
    """Return the encoding that the ending of `path` asks for."""
    try:
        return ENCODINGS[path.suffix.lower()]
    except KeyError:
        raise InvalidInputError(
            FieldViolation("--output", f"{path} must end in one of {', '.join(ENCODINGS)}")
        ) from None


def check_writable(path: Path) -> None:
    """Raise `OutputError` where `path` can't be written, before the work of making it is spent."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if not folder.is_dir():
        raise OutputError(f"{folder} does not exist; make it first, or write elsewhere")
    temporary = temporary_name(path)
    try:
        # Tried, not asked: to root, a read-only file system looks writable.
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}; write elsewhere") from error


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, or raise `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} can't be made: {error.strerror}; write elsewhere") from error
    check_writable(folder / "x")


def numbered(path: Path, index: int, count: int) -> Path:
    """Return `path` for the only clip, ``clip-1.wav``, ``clip-2.wav``, … for several."""
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")
