"""Prompt files (JSON Lines), and resumable folders of clips.

Each line is an object: ``{"prompt": "A dog barks", "id": "dog", "seed": 7, "num_inference_steps": 50}``.
Only `prompt` is required. A prompt has its clips and a record in the folder: `dog.wav` and `dog.json`. The
record is written last, so a prompt without a record is not done. `index.jsonl` lists every clip in the order
of the prompts, in AudioCaps' format (`location`, `captions`), so that the folder is a data set.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_type_hints

from services.cli.outputs import numbered
from services.client import GenerationOptions
from services.errors import FieldViolation, InvalidInputError, invalid
from services.files import write_atomically

INDEX = "index.jsonl"
_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "id": (str, int),
    **{
        name: tuple(kind for kind in get_args(hint) if kind is not NoneType)
        for name, hint in get_type_hints(GenerationOptions).items()
        if name != "encoding"
    },
}
"""Fields of a line and their types. There is no `encoding`: it follows from the file extension."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_SHOWN = 5
_MAX_NAMED_CLIPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt of the file."""

    name: str
    """Stem of the file names: the line's `id`, or the line's number and first words."""
    prompt: str
    """The prompt."""
    options: GenerationOptions
    """The command's options, overridden by the line's; always with a seed."""
    ranking: Mapping[str, Any] = field(default_factory=dict)
    """Settings of best-of-n (`BestOf.settings`) for the record; empty if all clips are kept."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the file names of the clips."""
        # The service refuses a larger count; this only bounds the number of names.
        count = min(self.options.get("clip_count") or 1, _MAX_NAMED_CLIPS)
        return tuple(numbered(Path(f"{self.name}.wav"), index, count) for index in range(count))


def read_jobs(
    path: Path, defaults: GenerationOptions, ranking: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Job, ...]:
    """Return the prompts of a file.

    If neither a line nor `defaults` has a seed, the seed is a hash of the line's name and prompt, so that a
    resumed run makes the same clips.

    Raises:
        InvalidInputError: the file can't be read, or lines are invalid; names the first few, counts the rest.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise invalid("--prompts", f"{path} can't be read: {reason}") from error
    faults: list[FieldViolation] = []
    jobs: list[Job] = []
    taken: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields, fault = _parse(line)
        job = None if fault else _job(number, fields, defaults, ranking)
        # Compared in lower case, since some file systems ignore case.
        names = set() if job is None else {job.name.lower(), *(file.stem.lower() for file in job.files)}
        if job is not None and names & taken:
            fault = f"id {job.name!r} has the same file names as an earlier line; give it another id"
        if fault:
            faults.append(FieldViolation(f"{path.name}:{number}", fault))
        elif job is not None:
            taken |= names
            jobs.append(job)
    if not jobs and not faults:
        faults.append(
            FieldViolation("--prompts", f'{path} holds no prompt; write one per line: {{"prompt": "…"}}')
        )
    if faults:
        raise InvalidInputError(*shortened(faults))
    return tuple(jobs)


def shortened(faults: Sequence[FieldViolation]) -> list[FieldViolation]:
    """Return the first few of `faults` and the number of the others: an error message is one line."""
    shown = list(faults[:_MAX_SHOWN])
    if len(faults) > _MAX_SHOWN:
        shown.append(FieldViolation("…", f"and {len(faults) - _MAX_SHOWN} more"))
    return shown


def _parse(line: str) -> tuple[dict[str, Any], str | None]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        return {}, f"is no JSON: {error}"
    if not isinstance(fields, dict):
        return {}, f'must be an object with a prompt: {{"prompt": "…"}}, found {line.strip()[:40]!r}'
    unknown = sorted(set(fields) - set(_TYPES))
    if unknown:
        return {}, f"unknown field {', '.join(unknown)}; known fields: {', '.join(_TYPES)}"
    if "prompt" not in fields:
        return {}, "has no prompt"
    for name, value in fields.items():
        kinds_of = (*_TYPES[name], int) if float in _TYPES[name] else _TYPES[name]
        if isinstance(value, bool) or not isinstance(value, kinds_of):
            kinds = " or ".join(kind.__name__ for kind in kinds_of)
            return {}, f"{name} is {value!r}, must be {kinds}"
    name = str(fields.get("id", "x"))
    if not _NAME.fullmatch(name):
        return {}, f"id {name[:40]!r} must be a file name: at most 100 letters, digits, '.', '_' and '-'"
    return fields, None


def _job(
    number: int, fields: Mapping[str, Any], defaults: GenerationOptions, ranking: Mapping[str, Any]
) -> Job:
    prompt = str(fields["prompt"])
    name = str(fields["id"]) if "id" in fields else f"{number:05d}-{_slug(prompt)}".rstrip("-")
    own = {key: value for key, value in fields.items() if key not in ("id", "prompt")}
    options: GenerationOptions = {**defaults, **own}  # type: ignore[typeddict-item]
    if options.get("seed") is None:
        digest = hashlib.blake2b(f"{name}\n{prompt}".encode(), digest_size=4).digest()
        options["seed"] = int.from_bytes(digest, "big")
    return Job(name=name, prompt=prompt, options=options, ranking=ranking)


def _slug(prompt: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])[:48]


def request_record(job: Job, source: str) -> dict[str, Any]:
    """Return the request as the record holds it; `is_done` compares it before it skips a prompt.

    `source` is the model URI, or the service's address.
    """
    settings = {key: value for key, value in sorted(job.options.items()) if value is not None} | {
        **job.ranking
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
