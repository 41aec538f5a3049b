"""Prompts of a list (`services.lists`), and resumable folders of clips.

A row may have options of its own: ``{"prompt": "A dog barks", "id": "dog", "seed": 7, "duration": 2.5}``. A
prompt has its clips and a record in the folder: `dog.wav` and `dog.json`. The record is written last, so a
prompt without a record is not done. `index.jsonl` lists every clip in the order of the prompts, in AudioCaps'
format (`location`, `captions`), so that the folder is a data set.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_type_hints

import typer

from services.cli.outputs import numbered
from services.client import GenerationOptions
from services.errors import FieldViolation, InvalidInputError, invalid
from services.files import write_atomically
from services.lists import Entry, read_list, shortened

INDEX = "index.jsonl"
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    **{
        name: tuple(kind for kind in get_args(hint) if kind is not NoneType)
        for name, hint in get_type_hints(GenerationOptions).items()
        if name != "encoding"
    },
}
"""Fields of a row besides its prompt, and their types. There is no `encoding`: the file extension decides."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_NAMED_CLIPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt of the file."""

    name: str
    """Stem of the file names: the row's `id`, or its number and first words. The number of the caption
    follows if the row has several."""
    prompt: str
    """The prompt."""
    options: GenerationOptions
    """The command's options, overridden by the line's; always with a seed."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """Further settings for the record (`Place.settings`): of best-of-n, and the watermark."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the file names of the clips."""
        # The service refuses a larger count; this only bounds the number of names.
        count = min(self.options.get("clip_count") or 1, _MAX_NAMED_CLIPS)
        return tuple(numbered(Path(f"{self.name}.wav"), index, count) for index in range(count))


def read_jobs(
    path: Path, defaults: GenerationOptions, further: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Job, ...]:
    """Return the prompts of a list.

    If neither a row nor `defaults` has a seed, the seed is a hash of the row's name and prompt, so that a
    resumed run makes the same clips. Columns that are not used are named in a warning on stderr.

    Raises:
        InvalidInputError: the list can't be read, or rows are invalid; names the first few, counts the rest.
    """
    faults: list[FieldViolation] = []
    jobs: list[Job] = []
    taken: set[str] = set()
    unused: dict[str, None] = {}
    # The model checks prompts, by its own limit; the others of the list are generated.
    for entry in read_list(path, "--prompts", clip="ignored", checked=False):
        unused |= dict.fromkeys(name for name in entry.fields if name not in _TYPES)
        own, fault = _options(entry)
        job = None if fault else _job(entry, own, defaults, further)
        # Compared in lower case, since some file systems ignore case.
        names = set() if job is None else {job.name.lower(), *(file.stem.lower() for file in job.files)}
        if job is not None and names & taken:
            fault = f"id {job.name!r} has the same file names as an earlier line; give it another id"
        if fault:
            faults.append(FieldViolation(entry.place, fault))
        elif job is not None:
            taken |= names
            jobs.append(job)
    if faults:
        raise InvalidInputError(*shortened(faults))
    if unused:
        typer.echo(f"warning: {path}: the columns {', '.join(unused)} are not used", err=True)
    return tuple(jobs)


def _options(entry: Entry) -> tuple[dict[str, Any], str | None]:
    """Return `id` and the options of a row, and what is wrong with them."""
    own: dict[str, Any] = {}
    for name, value in entry.fields.items():
        if name not in _TYPES:
            if entry.location is None and _is_misspelt(name):
                return {}, f"unknown field {name}; known fields: prompt, {', '.join(_TYPES)}"
            continue
        kinds = (*_TYPES[name], int) if float in _TYPES[name] else _TYPES[name]
        own[name] = value if str in kinds or not isinstance(value, str) else _number(value)
        if isinstance(own[name], bool) or not isinstance(own[name], kinds):
            return {}, f"{name} is {value!r}, must be {' or '.join(kind.__name__ for kind in kinds)}"
    name = str(own.get("id", "x"))
    if not _NAME.fullmatch(name):
        return {}, f"id {name[:40]!r} must be a file name: at most 100 letters, digits, '.', '_' and '-'"
    return own, None


def _is_misspelt(name: str) -> bool:
    """Return whether a column seems to be meant as an option; others are a data set's own."""
    is_part = any(name in option for option in _TYPES)
    return is_part or bool(get_close_matches(name, [*_TYPES, "clips", "guidance", "sample_rate"]))


def _number(text: str) -> int | float | str:
    """Return the number that a cell of a table holds, or the cell."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _job(
    entry: Entry, own: Mapping[str, Any], defaults: GenerationOptions, further: Mapping[str, Any]
) -> Job:
    parts = [str(own["id"])] if "id" in own else [f"{entry.number:05d}", _slug(entry.prompt)]
    if entry.caption:
        parts.insert(1, str(entry.caption))
    name = "-".join(filter(None, parts))
    options: GenerationOptions = {**defaults, **own}  # type: ignore[typeddict-item]
    options.pop("id", None)  # type: ignore[typeddict-item]
    if options.get("seed") is None:
        digest = hashlib.blake2b(f"{name}\n{entry.prompt}".encode(), digest_size=4).digest()
        options["seed"] = int.from_bytes(digest, "big")
    return Job(name=name, prompt=entry.prompt, options=options, further=further)


def _slug(prompt: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])[:48]


def request_record(job: Job, source: str) -> dict[str, Any]:
    """Return the request as the record holds it; `is_done` compares it before it skips a prompt.

    `source` is the model URI, or the service's address.
    """
    settings = {key: value for key, value in sorted(job.options.items()) if value is not None} | {
        **job.further
    }
    return {"prompt": job.prompt, "source": source, "settings": settings}


def is_done(folder: Path, job: Job, source: str) -> bool:
    """Return whether `folder` has the record of `job` and every clip that the record names.

    Raises:
        InvalidInputError: it has, but they were made from another prompt or with other settings.
    """
    record = read_record(folder, job)
    if record is None or not all((folder / clip["location"]).is_file() for clip in record["clips"]):
        return False
    request = request_record(job, source)
    if record["request"] == request:
        return True
    changed = _differences(record["request"], request)
    raise invalid(
        "--output",
        f"{folder / job.name}.json was made with other settings ({changed}); "
        "choose another folder, or regenerate all clips with --overwrite",
    )


def read_record(folder: Path, job: Job) -> dict[str, Any] | None:
    """Return the record of `job`; None if it is missing or can't be read."""
    try:
        record = json.loads((folder / f"{job.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"request", "clips"} <= record.keys() else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, after = ({**one.get("settings", {}), **one, "settings": None} for one in (old, new))
    return ", ".join(
        f"{key} {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    )


def write_index(folder: Path, jobs: Sequence[Job]) -> None:
    """Write `index.jsonl`: one line per clip of every finished prompt, in the order of the prompts."""
    rows = [
        {"location": clip["location"], "captions": job.prompt, "seed": clip["seed"], "model": record["model"]}
        for job in jobs
        if (record := read_record(folder, job)) is not None
        for clip in record["clips"]
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / INDEX, lines.encode())
