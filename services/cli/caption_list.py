"""Lists of captions in SLAM-AAC's format: ``{"key": …, "source": …, "target": …}``, a clip per line.

A list that exists is continued: its clips are not described again. Each line is written as soon as its clip
is done, so that a run that is killed loses at most one batch.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from services.cli.outputs import check_writable
from services.errors import OutputError, invalid

SUFFIXES = frozenset(
    {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf"}
    | {".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr"}
)
"""Endings of audio files. Those that can't be decoded are refused by name, not left out in silence."""


def find_clips(folder: Path) -> list[Path]:
    """Return the audio files below a folder, sorted. Raises `InvalidInputError` if there are none."""
    if not folder.is_dir():
        raise invalid("--folder", f"{folder} is no folder; give one with audio files")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise invalid("--folder", f"{folder} has no audio files (.wav, .flac, .ogg, .mp3, .aiff, …)")
    return found


class CaptionList:
    """A list that is written line by line."""

    def __init__(self, path: Path) -> None:
        """Read the lines of `path`, if it exists; a last line that was cut off is removed.

        Raises:
            InvalidInputError: it has a line of another form.
            OutputError: it can't be written.
        """
        check_writable(path)
        self._path = path
        self._sources = set(self._read())

    def source_of(self, clip: Path) -> str:
        """Return how the list names a clip: relative to its folder if the clip is below, else absolute."""
        folder, clip = self._path.parent.resolve(), clip.absolute()
        return clip.relative_to(folder).as_posix() if clip.is_relative_to(folder) else clip.as_posix()

    def has(self, clip: Path) -> bool:
        """Return whether the list has a caption of a clip."""
        return self.source_of(clip) in self._sources

    def add(self, captions: Iterable[tuple[str, Path, str]]) -> None:
        """Append key, clip and caption of several clips. Raises `OutputError`."""
        lines = []
        for key, clip, caption in captions:
            source = self.source_of(clip)
            self._sources.add(source)
            lines.append(json.dumps({"key": key, "source": source, "target": caption}, ensure_ascii=False))
        try:
            with self._path.open("ab") as file:
                # A name that is not UTF-8 becomes JSON's escapes, by which it is recognised again.
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise OutputError(
                f"{self._path} can't be written: {error.strerror}; make room and run it again"
            ) from error

    def _read(self) -> Iterable[str]:
        if not self._path.exists():
            return
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise invalid("--output", f"{self._path} can't be read: {error.strerror}") from error
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                source, target = row["source"], row["target"]
                if not isinstance(source, str) or not isinstance(target, str):
                    raise TypeError
            except (ValueError, LookupError, TypeError) as error:
                raise invalid(
                    "--output",
                    f"{self._path}:{number} is no line of captions, so that the list is not continued; "
                    "write elsewhere",
                ) from error
            yield source
        if len(whole) < len(content):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
