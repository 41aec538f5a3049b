"""People's ratings as training data: a database of ratings, or what `milonga ratings export` wrote of one.

    milonga train reward --set preferences.ratings=sqlite:///ratings.db
    milonga train dpo --set preferences.ratings=labels.json
    milonga train run --set preferences.ratings=pairs.parquet

A database is exported once, into a folder next to the model, and then read as any other file: a run that is
resumed learns from the same ratings, whatever was rated since.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from services.errors import InvalidInputError, invalid
from services.files import write_atomically
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.finetuning.sft import SftTraining
from training.reward.train import RewardTraining

SETTING: Final = "preferences.ratings"
"""Name of the setting, for every training."""

Kind = Literal["pairs", "labelled"]
Training = TypeVar("Training", RewardTraining, SftTraining, DpoTraining, BatonTraining)

_EXPORTS: Final[Mapping[Kind, str]] = {"pairs": "pairs.parquet", "labelled": "labels.json"}
_DONE: Final = "exports.json"
"""File of a folder of exports that says that they are complete."""
_NEEDS: Final[Mapping[Kind, str]] = {
    "pairs": "no pair that a majority has decided",
    "labelled": "no answer to whether a clip is right",
}
_OBJECTIVES: Final[Mapping[str, tuple[Kind, ...]]] = {
    "bce": ("labelled",),
    "bradley_terry": ("pairs",),
    "both": ("pairs", "labelled"),
}


def with_ratings(config: Training, ratings: str, folder: Path, *, fresh: bool = False) -> Training:
    """Return a training whose data have people's ratings in addition.

    Args:
        config: settings of the training.
        ratings: URL of a database, or a file that `milonga ratings export` wrote.
        folder: folder of the exports of a database.
        fresh: export again what was exported before.

    Raises:
        InvalidInputError: the ratings can't be read, or hold nothing that the training learns from.
        ServiceUnavailableError: the database can't be reached.
    """
    kinds = _kinds(config)
    files: dict[Kind, Path]
    files = _exports(ratings, kinds, folder, fresh=fresh) if is_database(ratings) else _file(ratings, kinds)
    return replace(config, data=replace(config.data, **_added(config.data, files)))


def _added(data: object, files: "Mapping[Kind, Path]") -> dict[str, Any]:
    return {kind: (*getattr(data, kind), path) for kind, path in files.items()}


def rated_files(ratings: str, folder: Path) -> tuple[Path, ...]:
    """Return the files of preference pairs that `ratings` hold. Arguments and errors as of `with_ratings`."""
    if is_database(ratings):
        return tuple(_exports(ratings, ("pairs",), folder).values())
    return tuple(_file(ratings, ("pairs",)).values())


def check_ratings(ratings: str | None) -> None:
    """Raise `InvalidInputError` if the setting is neither a database's URL nor a file of ratings."""
    if ratings is not None and not is_database(ratings):
        _file(ratings, ())


def is_database(ratings: str) -> bool:
    """Return whether `ratings` are a database's URL. Raises `InvalidInputError` if it has a password."""
    if re.match(r"[\w+]+://[^/@]*:[^/@]*@", ratings):
        raise invalid(
            SETTING,
            "has a password, which would be stored with the run; give it as PGPASSWORD, or in ~/.pgpass",
        )
    return "://" in ratings


def _kinds(config: RewardTraining | SftTraining | DpoTraining | BatonTraining) -> tuple[Kind, ...]:
    """Return what a training learns from."""
    match config:
        case RewardTraining():
            return _OBJECTIVES[config.objective]
        case BatonTraining():
            return ("labelled", "pairs")
        case _:
            return ("pairs",)


def _file(ratings: str, kinds: Sequence[Kind]) -> dict[Kind, Path]:
    path = Path(ratings)
    if path.suffix not in (".parquet", ".json"):
        raise invalid(
            SETTING,
            f"is {ratings!r}, must be a database (sqlite:///FILE, postgresql://USER@HOST/NAME), or what "
            "`milonga ratings export` wrote (pairs.parquet, labels.json)",
        )
    if not path.is_file():
        raise invalid(SETTING, f"is {ratings}, which is no file")
    labels = path.suffix == ".json" and "labelled" in kinds
    return {"labelled" if labels else "pairs": path}


def _exports(ratings: str, kinds: Sequence[Kind], folder: Path, *, fresh: bool = False) -> dict[Kind, Path]:
    """Export a database, unless that was done before; return the files of `kinds` that hold something."""
    done = folder / _DONE
    if fresh or not done.exists():
        done.unlink(missing_ok=True)
        counts = _export(ratings, folder)
        write_atomically(done, json.dumps({"ratings": ratings, **counts}) + "\n")
    counts = json.loads(done.read_text(encoding="utf-8"))
    found = {kind: folder / _EXPORTS[kind] for kind in kinds if counts[kind]}
    if not found:
        needs = " or ".join(_NEEDS[kind] for kind in kinds)
        raise invalid(SETTING, f"is {ratings}, which holds {needs}; have more rated")
    return found


def _export(ratings: str, folder: Path) -> dict[Kind, int]:
    """Export a database; return the numbers of pairs and labels, whose files are missing if 0."""
    try:
        from services.ratings.export import export_labels, export_pairs
        from services.ratings.store import RatingStore
    except ModuleNotFoundError as error:
        raise invalid(
            SETTING, f"is a database, which needs {error.name}; pip install 'milonga[ratings]'"
        ) from error

    exports = {"pairs": export_pairs, "labelled": export_labels}
    counts: dict[Kind, int] = {}
    store = RatingStore(ratings, SETTING, create=False)
    try:
        rated = store.ratings()
        folder.mkdir(parents=True, exist_ok=True)
        for kind, name in _EXPORTS.items():
            (folder / name).unlink(missing_ok=True)
            try:
                counts[kind] = exports[kind](store, rated, folder / name)
            except InvalidInputError:
                counts[kind] = 0
    finally:
        store.close()
    return counts
