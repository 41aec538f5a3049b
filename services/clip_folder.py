"""Folders of clips that are generated once: a clip with a complete file is never generated again.

::

    folder = ClipFolder(output, lambda prompt: [f"{name_of(prompt)}.wav"])
    for prompt, generation in folder.make(folder.missing(prompts), maker.generate, 16):
        ...                    # its files are written; if killed, the same call generates the rest
"""

import io
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar, Unpack

import soundfile

from services.api.generation import Clip, ClipMaker, Generation, GenerationOptions
from services.audio.containers import ContainerError, open_container
from services.errors import InvalidInputError, MilongaError
from services.files import side_by_side, write_atomically


class HasClips(Protocol):
    """The result of an item."""

    @property
    def clips(self) -> Sequence[Clip]:
        """The clips to write, encoded."""


Item = TypeVar("Item")
Result = TypeVar("Result", bound=HasClips)


class ClipFolder(Generic[Item]):
    """The clips of many items, in files. An item is anything from which file names and clips can be made."""

    def __init__(self, folder: Path, files: Callable[[Item], Sequence[str | Path]]) -> None:
        """Use `folder`. `files` returns the files of an item's clips, relative to it, in the clips' order."""
        self.folder, self._files = folder, files

    def paths(self, item: Item) -> list[Path]:
        """Return the files of an item's clips."""
        return [self.folder / file for file in self._files(item)]

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Return the items of which a file is missing or incomplete."""
        return [item for item in items if not all(map(is_whole, self.paths(item)))]

    def make(
        self,
        items: Iterable[Item],
        make: Callable[[Item], Result],
        in_flight: int,
        *,
        stop: Callable[[], None] | None = None,
        refused: Callable[[Item, InvalidInputError], None] | None = None,
    ) -> Generator[tuple[Item, Result], None, None]:
        """Make the clips of items, up to `in_flight` at a time; yield each item when its files are written.

        Args:
            items: the items.
            make: makes the clips of an item, on a thread.
            in_flight: items at a time.
            stop: called to cancel items in progress if one fails, or if the caller stops early.
            refused: called with an item that was refused; the others continue. None: the refusal is raised.

        Raises:
            OutputError: a file can't be written.
        """

        def attempt(item: Item) -> Result | InvalidInputError:
            try:
                return make(item)
            except InvalidInputError as error:
                if refused is None:
                    raise
                return error

        for item, result in side_by_side(attempt, items, in_flight, stop):
            if isinstance(result, InvalidInputError):
                assert refused is not None
                refused(item, result)
                continue
            for clip, path in zip(result.clips, self.paths(item), strict=True):
                write_atomically(path, clip.audio)
            yield item, result


def is_whole(path: Path) -> bool:
    """Return whether a file exists and has audio, none of which is cut off."""
    try:
        _, content = open_container(path.read_bytes())
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            file.seek(max(0, file.frames - 1))
            return len(file.read(1)) == 1
    except (OSError, ContainerError, RuntimeError):  # RuntimeError: libsndfile's
        return False


def generate_pinned(
    maker: ClipMaker, digest: str, prompt: str, **options: Unpack[GenerationOptions]
) -> Generation:
    """Make the clips of a prompt with the weights `digest` only.

    Raises:
        MilongaError: other weights made them.
    """
    made = maker.generate(prompt, **options)
    if made.model.digest != digest:
        raise MilongaError(
            f"the weights changed from {digest} to {made.model.digest}; "
            "pin the service to one version and run again"
        )
    return made
