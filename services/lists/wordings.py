"""Captions of classes that a folder brings: ``captions.json`` or ``captions.csv``.

{"dog_bark": ["a dog barks", "a hound is barking"], "rain": "rain falls"}

class,caption
dog_bark,a dog barks
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from services.errors import FieldViolation, InvalidInputError, invalid
from services.lists.captions import caption_fault
from services.lists.classes import class_captions, class_phrase
from services.lists.columns import AUDIO_NAMES, CLASS_NAMES, PROMPT_NAMES
from services.lists.rows import read_rows

FILES: Final = ("captions.json", "captions.csv", "captions.tsv")
_MAX_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Wordings:
    """The captions of classes: those of a file, else those of the templates."""

    path: Path | None = None
    """The file; None: there is none."""
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Captions by class."""

    def of(self, name: str) -> tuple[str, ...]:
        """Return the captions of a class, however it is written: ``dog_bark``, ``Dog bark``."""
        return self._by_phrase().get(class_phrase(name)) or class_captions(name)

    def check(self, classes: Iterable[str]) -> None:
        """Raise `InvalidInputError` if the file names a class that is none of `classes`."""
        known = {class_phrase(name) for name in classes}
        unknown = [name for name in self.captions if class_phrase(name) not in known]
        if unknown and self.path is not None:
            raise invalid(
                self.path.name,
                f"names the class {unknown[0]!r}, of which there is no clip; the classes are "
                f"{', '.join(sorted(dict.fromkeys(classes)))[:200]}",
            )

    def _by_phrase(self) -> dict[str, tuple[str, ...]]:
        return {class_phrase(name): captions for name, captions in self.captions.items()}


def read_wordings(folder: Path) -> Wordings:
    """Return the captions of classes that `folder` brings. Raises `InvalidInputError`."""
    for name in FILES:
        path = folder / name
        found = _read(path) if path.is_file() else None
        if found is not None:
            return Wordings(path=path, captions=found)
    return Wordings()


def _read(path: Path) -> dict[str, tuple[str, ...]] | None:
    """Return the captions by class; None if the file is a list of clips. Raises `InvalidInputError`."""
    captions: dict[str, list[Any]] = {}
    for row in read_rows(path, path.name, (), ()):
        if isinstance(row.content, str):
            raise invalid(row.place, row.content)
        if not row.content.keys().isdisjoint(AUDIO_NAMES):
            return None
        sound = next((name for name in CLASS_NAMES if name in row.content), None)
        text = next((name for name in PROMPT_NAMES if name in row.content), None)
        if sound and text:
            captions.setdefault(str(row.content[sound]), []).append(row.content[text])
        elif sound or text or path.suffix != ".json" or captions:
            return None
        else:
            captions = {name: one if isinstance(one, list) else [one] for name, one in row.content.items()}
    faults, usable = list[FieldViolation](), dict[str, tuple[str, ...]]()
    for name, texts in captions.items():
        checked = [caption_fault(text) for text in texts]
        faults += [FieldViolation(f"{path.name}: {name}", fault) for _, fault in checked if fault is not None]
        usable[name] = tuple(caption for caption, _ in checked)
    if faults:
        raise InvalidInputError(*faults[:_MAX_SHOWN])
    return usable or None
