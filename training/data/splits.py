"""Divide recordings into a training part and a held-out part, no recording in both.

A recording may be cut into several clips, and a data set may hold a file twice: all such clips go to the same
part, so that a model is never examined on what it has learned.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from services.errors import invalid
from training.data.recordings import HELD_OUT_FOLDS, TRAINING_FOLDS, Recording
from training.loop.checks import Share, check_ranges

NONE: Final = "none"
"""Name of a fold that says: ignore the folds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """What is held out."""

    folds: tuple[str, ...] = ()
    """Folds to hold out. None given: those called validation, test, …; of numbered folds the last one. The
    word ``none`` ignores the folds of a data set."""
    held_out: Share = 0.1
    """Without folds: share of the recordings of each class to hold out, at least one of two or more."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The two parts."""

    train: tuple[Recording, ...]
    held_out: tuple[Recording, ...]
    rule: str
    """How they were divided, for reports: ``fold 5``, ``10 % of the recordings of each class``."""


def split_recordings(recordings: Sequence[Recording], config: SplitConfig) -> Splits:
    """Divide recordings. The result depends on what the clips are, not on their order or their folder.

    A recording with clips in several folds is in training if any of them is.

    Raises `InvalidInputError` if a fold of `config` is none of the data set's.
    """
    groups = recording_groups(recordings)
    folds = _held_out_folds([one.fold for one in recordings], config.folds)
    if folds:
        rule = f"fold {', '.join(sorted(folds))}"
        held = {group for group, one in zip(groups, recordings, strict=True) if one.fold in folds}
        held -= {group for group, one in zip(groups, recordings, strict=True) if one.fold not in folds}
    else:
        rule = f"{config.held_out:.0%} of the recordings of each class"
        held = _drawn(groups, recordings, config.held_out)
    sides: tuple[list[Recording], list[Recording]] = ([], [])
    for group, one in zip(groups, recordings, strict=True):
        sides[group in held].append(one)
    return Splits(train=tuple(sides[0]), held_out=tuple(sides[1]), rule=rule)


def describe_splits(source: str, splits: Splits) -> dict[str, Any]:
    """Return what a report says of recordings, with licences and authors; `source` is their name."""

    def stated(names: Sequence[str]) -> list[str]:
        found = (one.fields.get(name) for one in splits.train for name in names)
        return sorted({str(value) for value in found if value})

    return {
        "source": source,
        "recordings": len(splits.train),
        "held_out_recordings": len(splits.held_out),
        "split": splits.rule,
        "classes": sorted({one.sound for one in splits.train if one.sound is not None}),
        "licences": stated(("license", "licence")),
        "authors": stated(("author", "manufacturer", "artist", "user")),
    }


def recording_groups(recordings: Sequence[Recording]) -> list[str]:
    """Return the name of each clip's recording: the same for all pieces and copies of one recording.

    Pieces have the same `Recording.source`, copies the same bytes. A clip that can't be read is its own.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    names = []
    for one in recordings:
        content = f"name {one.clip.name}"
        with suppress(OSError, ValueError):
            content = f"content {one.clip.digest}"
        own = content if one.source is None else f"source {one.source}"
        first, second = sorted((root(own), root(content)), reverse=True)
        parents[second] = first  # a source, if there is one, names the group
        names.append(own)
    return [root(name) for name in names]


def _held_out_folds(folds: Iterable[str | None], wanted: Sequence[str]) -> set[str]:
    """Return the folds to hold out; none: the data set has no folds, or they are ignored."""
    known = {fold for fold in folds if fold is not None}
    if wanted == (NONE,):
        return set()
    if wanted:
        if missing := [fold for fold in wanted if fold not in known]:
            listed = ", ".join(sorted(known)) or "none: the data set has no column fold or split"
            raise invalid("split.folds", f"is {missing[0]!r}, which is no fold; the folds are {listed}")
        return set(wanted)
    named = {fold for fold in known if fold.lower() in HELD_OUT_FOLDS}
    if named and any(fold.lower() in TRAINING_FOLDS for fold in known):
        return named
    numbers = {float(fold): fold for fold in known if fold.replace(".", "", 1).isdigit()}
    return {numbers[max(numbers)]} if len(numbers) == len(known) > 1 else set()


def _drawn(groups: Sequence[str], recordings: Sequence[Recording], share: float) -> set[str]:
    """Return the groups to hold out of each class: those with the lowest hashes."""
    by_class: dict[str, dict[str, None]] = {}
    taken: set[str] = set()
    for group, one in zip(groups, recordings, strict=True):
        if group not in taken:
            taken.add(group)
            by_class.setdefault(one.sound or "", {})[group] = None
    held: set[str] = set()
    for members in by_class.values():
        count = max(1, math.floor(share * len(members) + 0.5)) if share and len(members) > 1 else 0
        held.update(sorted(members, key=_hash)[: min(count, len(members) - 1)])
    return held


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
