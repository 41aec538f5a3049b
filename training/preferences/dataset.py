"""Write preference data as Parquet with the columns of the public audio-alpaca; read it, and the public one.

``data/train-00000-of-00003.parquet``: `prompt`, `chosen` and `rejected` (``{bytes, path}``, Hugging Face's
Audio at 16 kHz), `strategy`; in data from this pipeline also the scores of each scorer, rewards, seeds,
steps, the perturbed caption, and the digests of all models. ``datasets.load_dataset`` reads the folder as it
is.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from services.audio.encoding import encode_audio
from services.errors import invalid
from services.files import write_atomically
from services.lists import caption_fault
from training.data.content import report_content
from training.data.examples import Clip, FileClip, decode, pair_rows
from training.data.store import REPORT, Row, batches, claim, file_digest, finish, read_json
from training.loop.checks import Count, Share, check_ranges
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.preferences.candidates import candidates_digest, read_candidates
from training.preferences.pairs import PAIRS, read_pairs, table_2
from training.preferences.scores import refuse_unreadable

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

DATA = "data"
SIDES: Final = ("chosen", "rejected")
REQUIRED: Final = ("prompt", *SIDES)
SAMPLING_RATE: Final = 16_000
"""Sampling rate of the clips in hertz, as in the public data."""
ROW_GROUP = 32
"""Pairs of a row group, which is read at once for one clip."""
NAMES: Final[Mapping[str, str]] = {
    "1.1": "1.1 other steps",
    "1.2": "1.2 same steps",
    "2": "2 perturbed",
    "3": "3 temporal",
}
"""Names of the strategies in table 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """Division of the data set into files."""

    rows_per_file: Count = 1_000
    """Pairs per Parquet file."""
    max_unreadable: Share = 0.05
    """Share of clips that may be unreadable; above it the stage fails."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A pair of clips of one prompt. The clips are read when they are needed."""

    prompt: str
    chosen: Clip
    rejected: Clip
    strategy: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """The other columns: `chosen_scores`, `rejected_scores`, …; none in the public data."""


def dataset_identity(config: DatasetConfig, candidates: Path, pairs: Path) -> dict[str, Plain]:
    """Return all that determines the result."""
    return flatten(config) | {
        "input.candidates": candidates_digest(candidates),
        f"input.{PAIRS}": file_digest(pairs / PAIRS),
    }


def write_dataset(config: DatasetConfig, candidates: Path, scores: Path, pairs: Path, output: Path) -> Row:
    """Run the stage in `output`; return its report: pairs, digest, table 2, what was left out.

    `candidates`, `scores` and `pairs` are the folders of the stages before.

    Raises:
        InvalidInputError: more pairs lack a readable clip than may.
        OutputError: the disk is full.
    """
    if report := claim(output, dataset_identity(config, candidates, pairs)):
        return report
    clips = {row["id"]: row for row in read_candidates(candidates)}
    digests: dict[str, str] = read_json(scores / REPORT)["judges"]
    rows = read_pairs(pairs)
    names = list(rows[0]["chosen_scores"]) if rows else []
    unreadable: dict[FileClip, str] = {}
    used = dict.fromkeys(row[side] for row in rows for side in SIDES)
    lost = {
        name for name in used if not _is_readable(FileClip(path=candidates / clips[name]["file"]), unreadable)
    }
    refuse_unreadable(unreadable, len(used), config.max_unreadable)
    schema = _schema(names, list(digests))
    whole: list[Row] = []
    # Divided before the unreadable are left out, so that an existing file has the content it would have now.
    parts = list(batches(rows, config.rows_per_file))
    with progress(total=len(rows), desc="data set", unit="pair") as bar:
        for number, part in enumerate(parts):
            path = output / DATA / f"train-{number:05d}-of-{len(parts):05d}.parquet"
            kept = [row for row in part if not lost & {row[side] for side in SIDES}]
            if not path.exists():
                columns = [_columns(row, clips, candidates, digests) for row in kept]
                write_atomically(path, _parquet(columns, schema))
            whole += kept
            bar.update(len(part))
    read = {name: FileClip(path=candidates / clips[name]["file"]) for name in used}
    return finish(
        output,
        {
            "pairs": len(whole),
            "digest": dataset_digest(read_preferences(output)),
            "scorers": names,
            "judges": digests,
            "models": sorted({clips[row["chosen"]]["model"]["digest"] for row in whole}),
            "table": table_2(whole, names),
            "left_out": len(rows) - len(whole),
            "unreadable": {clip.name: reason for clip, reason in sorted(unreadable.items(), key=str)},
            **report_content([(read[row["chosen"]], read[row["rejected"]]) for row in whole]),
        },
    )


def read_preferences(path: Path) -> list[Preference]:
    """Read the pairs of a Parquet file, or of all in a folder (of this module, or the public data), in order.

    Clips that are not in the file are expected next to it. Raises `InvalidInputError`.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise invalid("preferences", f"{path} holds no Parquet file; give a data set's folder or file")
    found = [preference for file in files for preference in _read_file(file)]
    if not found:
        raise invalid("preferences", f"{path} holds no pairs")
    return found


def dataset_digest(preferences: Iterable[Preference]) -> str:
    """Return ``sha256:`` and the digest over prompts, strategies and encoded clips, in order.

    It does not depend on the division into files. An unreadable clip counts as empty.
    """
    digest = hashlib.sha256()
    for one in preferences:
        row = [one.prompt, one.strategy, _content_digest(one.chosen), _content_digest(one.rejected)]
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def print_table(table: Mapping[str, Row], console: Console | None = None) -> None:
    """Print table 2 (`pairs.table_2`)."""
    scorers = list(dict.fromkeys(name for row in table.values() for name in row if name != "samples"))
    shown = Table(title="Preference pairs: mean CLAP scores")
    shown.add_column("strategy", no_wrap=True)
    shown.add_column("samples", justify="right")
    for name in scorers:
        for figure in ("chosen", "rejected", "delta"):
            shown.add_column(f"{name}\n{figure}", justify="right")
    for number, (strategy, row) in enumerate(table.items()):
        figures = [
            f"{row[name][figure]:.3f}" if name in row else "–"
            for name in scorers
            for figure in ("chosen", "rejected", "delta")
        ]
        shown.add_row(
            NAMES.get(strategy, strategy), str(row["samples"]), *figures, end_section=number == len(table) - 2
        )
    (console or Console()).print(shown)


def _read_file(path: Path) -> Iterator[Preference]:
    for number, (row, chosen, rejected) in enumerate(pair_rows(path, "preferences", domain="generated")):
        prompt, fault = caption_fault(row["prompt"])
        if fault is not None:
            raise invalid(f"{path.name}, row {number}", fault)
        strategy = row.get("strategy")
        yield Preference(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            strategy="" if strategy is None else str(strategy),
            details={name: value for name, value in row.items() if name not in (*REQUIRED, "strategy")},
        )


def _is_readable(clip: Any, unreadable: dict[Any, str]) -> bool:
    if clip in unreadable:
        return False
    try:
        clip.read()
    except (OSError, ValueError) as error:
        unreadable[clip] = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        return False
    return True


def _content_digest(clip: Clip) -> str:
    try:
        return clip.digest
    except (OSError, ValueError):
        return ""


def _columns(row: Row, clips: Mapping[str, Row], folder: Path, digests: Mapping[str, str]) -> Row:
    chosen, rejected = clips[row["chosen"]], clips[row["rejected"]]
    return {
        "prompt": row["prompt"],
        "chosen": _audio(folder / chosen["file"]),
        "rejected": _audio(folder / rejected["file"]),
        "strategy": row["strategy"],
        "rejected_prompt": rejected["prompt"],
        "rejected_kind": rejected["kind"],
        "chosen_scores": row["chosen_scores"],
        "rejected_scores": row["rejected_scores"],
        "chosen_reward": row["chosen_reward"],
        "rejected_reward": row["rejected_reward"],
        "chosen_seed": chosen["seed"],
        "rejected_seed": rejected["seed"],
        "chosen_steps": chosen["num_inference_steps"],
        "rejected_steps": rejected["num_inference_steps"],
        "model": chosen["model"]["name"],
        "model_version": chosen["model"]["version"],
        "model_digest": chosen["model"]["digest"],
        "judge_digests": dict(digests),
    }


def _audio(path: Path) -> Row:
    """Return the file as it is, or encoded again if it is not mono at 16 kHz."""
    content = path.read_bytes()
    waveform_CN, rate = decode(content)
    if rate != SAMPLING_RATE or len(waveform_CN) != 1:
        content = encode_audio(waveform_CN.mean(0), rate, "flac", SAMPLING_RATE)
        path = path.with_suffix(".flac")
    return {"bytes": content, "path": path.name}


def _schema(scorers: Sequence[str], digests: Sequence[str]) -> "pyarrow.Schema":
    """Return Arrow's schema, with Hugging Face's features, by which `datasets` decodes the clips."""
    from datasets import Audio, Features, Value  # type: ignore[import-untyped]

    audio = Audio(sampling_rate=SAMPLING_RATE)
    text, whole, real = Value("string"), Value("int64"), Value("float64")
    columns = {"prompt": text, "chosen": audio, "rejected": audio, "strategy": text}
    columns |= {"rejected_prompt": text, "rejected_kind": text}
    columns |= {f"{side}_scores": dict.fromkeys(scorers, real) for side in SIDES}
    columns |= {f"{side}_reward": real for side in SIDES}
    columns |= {f"{side}_{name}": whole for name in ("seed", "steps") for side in SIDES}
    columns |= {"model": text, "model_version": text, "model_digest": text}
    columns |= {"judge_digests": dict.fromkeys(digests, text)}
    # Parquet has no struct without fields.
    return Features({name: kind for name, kind in columns.items() if kind != {}}).arrow_schema


def _parquet(rows: list[Row], schema: "pyarrow.Schema") -> bytes:
    import io

    import pyarrow as pa
    from pyarrow.parquet import write_table  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    # The clips are compressed already.
    write_table(pa.Table.from_pylist(rows, schema), buffer, row_group_size=ROW_GROUP, compression="snappy")
    return buffer.getvalue()
