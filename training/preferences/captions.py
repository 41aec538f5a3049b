"""Select diverse captions: clusters of embedded captions, and some of each cluster (the paper: 200 x 70).

Writes ``captions.jsonl`` (the paper's T1: `caption`, `cluster`) and ``temporal.jsonl`` (T2: captions with a
temporal order, for strategy 3).
"""

import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault
from services.errors import invalid
from services.files import write_atomically
from services.weights.uri import ResolvedModel
from training.data.store import (
    Row,
    batches,
    claim,
    digest_of_value,
    file_digest,
    finish,
    read_rows,
    write_rows,
)
from training.loop.checks import check_minimum
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.preferences.embedders import Embedder, embedder_identity, load_embedder, resolve_embedder
from training.soundworld.scenes import SceneConfig, draw_caption

CAPTIONS = "captions.jsonl"
TEMPORAL = "temporal.jsonl"
TEMPORAL_WORDS: Final = ("before", "after", "then", "followed")
"""Words that make a caption one of strategy 3 (section 4.1.1)."""
FREE: Final = ("device", "batch")

_TEMPORAL = re.compile(rf"\b({'|'.join(TEMPORAL_WORDS)})\b", re.IGNORECASE)
_SHARD = 1_024
"""Captions whose embeddings make one file: the most that is lost by a kill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundworldCaptions:
    """Captions of the sound world's training split."""

    count: int = 20_000
    """Captions drawn, before equal ones are dropped."""
    seed: int = 4_001
    """Seed of the draw."""
    duration: float = 2.56
    """Seconds of their scenes: 5.12 for three events."""
    single: float = 0.2
    """Share of captions of one event."""
    sequence: float = 0.6
    """Share of captions of one event after another."""
    three: float = 0.0
    """Share of the sequences that have three events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsConfig:
    """The captions to select, and the number of each kind. The defaults are the paper's."""

    source: Path | None = None
    """CSV, JSON lines, JSON or Parquet; none: the sound world."""
    column: str = "caption"
    """Column of the captions in `source`."""
    soundworld: SoundworldCaptions = field(default_factory=SoundworldCaptions)
    """Used if `source` is none."""
    embedder: str = "sentence-transformers:thenlper/gte-large"
    """Embedder of the clustering: sentence-transformers:NAME_OR_PATH, tango:MODEL_URI (its text encoder),
    or clap:MODEL_URI (its text side)."""
    clusters: int = 200
    """Clusters of K-Means."""
    per_cluster: int = 70
    """Captions drawn from each cluster; all of a smaller one."""
    temporal_limit: int | None = None
    """Most captions for strategy 3, drawn at random; none: all."""
    seed: int = 0
    """Seed of K-Means and of the draws."""
    batch: int = 64
    """Captions embedded at once."""
    device: str = "auto"
    """Device of the embedder."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "clusters", "per_cluster", "batch")
        check_minimum(self, 0, "seed", *(("temporal_limit",) if self.temporal_limit is not None else ()))


def captions_identity(config: CaptionsConfig, model: ResolvedModel | None) -> dict[str, Plain]:
    """Return all that determines the result. `model` is the embedder's (`resolve_embedder`)."""
    inputs: dict[str, Plain] = {"embedder.identity": embedder_identity(config.embedder, model)}
    if config.source is not None:
        inputs["source.digest"] = file_digest(config.source, "source", "give CSV, JSON Lines or Parquet")
    return flatten(config) | inputs


def select_captions(config: CaptionsConfig, output: Path, *, model: ResolvedModel | None = None) -> Row:
    """Run the stage in `output`; return its report: how many captions there were, and of which clusters.

    `model` is the embedder's (`resolve_embedder`); None: it is resolved here.

    Raises:
        InvalidInputError: a source that can't be read, lacks the column, or has too few captions.
        ModelError: the embedder's model was refused.
    """
    model = model or resolve_embedder(config.embedder)
    if report := claim(output, captions_identity(config, model), FREE):
        return report
    captions, left_out = read_captions(config)
    if len(captions) < config.clusters:
        raise invalid(
            "clusters",
            f"is {config.clusters}, and there are {len(captions)} captions; give more captions, or fewer "
            "clusters",
        )
    vectors_ND = _embed(captions, config, output / "embeddings", model)
    labels_N = cluster(vectors_ND, config.clusters, config.seed)
    picked = pick(labels_N, config.per_cluster, config.seed)
    temporal = [caption for caption in captions if is_temporal(caption)]
    if config.temporal_limit is not None and len(temporal) > config.temporal_limit:
        chosen = np.random.default_rng([config.seed, 2]).choice(
            len(temporal), config.temporal_limit, replace=False
        )
        temporal = [temporal[index] for index in sorted(chosen)]
    write_rows(output / TEMPORAL, ({"caption": caption} for caption in temporal))
    write_rows(
        output / CAPTIONS, ({"caption": captions[index], "cluster": int(labels_N[index])} for index in picked)
    )
    sizes = np.bincount(labels_N, minlength=config.clusters)
    return finish(
        output,
        {
            "captions": len(captions),
            "left_out": left_out,
            "selected": len(picked),
            "temporal": len(temporal),
            "clusters": {
                "count": int((sizes > 0).sum()),
                "smallest": int(sizes.min()),
                "largest": int(sizes.max()),
                "short": int((sizes < config.per_cluster).sum()),
            },
        },
    )


def is_temporal(caption: str) -> bool:
    """Return whether a caption has a temporal order."""
    return _TEMPORAL.search(caption) is not None


def selected(folder: Path) -> list[str]:
    """Return T1: the captions that the stage selected in `folder`, in order."""
    return [row["caption"] for row in read_rows(folder / CAPTIONS)]


def temporal(folder: Path) -> list[str]:
    """Return T2: the captions with an order of time."""
    return [row["caption"] for row in read_rows(folder / TEMPORAL)]


def read_captions(config: CaptionsConfig) -> tuple[list[str], dict[str, int]]:
    """Return all captions of the source, each once, and how many were left out for which reason."""
    texts = (
        _soundworld(config.soundworld) if config.source is None else read_column(config.source, config.column)
    )
    found: dict[str, None] = {}
    left_out = {"unusable": 0, "repeated": 0}
    for text in texts:
        caption = " ".join(text.split())
        if prompt_fault(caption, MAX_PROMPT_CHARACTERS) is not None:
            left_out["unusable"] += 1
        elif caption in found:
            left_out["repeated"] += 1
        else:
            found[caption] = None
    return list(found), left_out


def read_column(path: Path, column: str) -> Iterator[str]:
    """The texts of one column of a CSV, JSON, JSON lines or Parquet file; missing values are empty.

    Raises `InvalidInputError` for a file of another format, or without the column.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    readers |= dict.fromkeys((".jsonl", ".json", ".ndjson"), _read_json)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise invalid("source", f"{path} must end in one of {', '.join(readers)}")
    try:
        yield from ("" if text is None else str(text) for text in readers[suffix](path, column))
    except (OSError, ValueError, csv.Error) as error:
        raise invalid("source", f"{path} can't be read: {error}") from error


def cluster(vectors_ND: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.int64]:
    """Return the cluster [N] of each row, numbered by first appearance."""
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        # With fewer different points than clusters some stay empty, which the report shows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels_N = KMeans(clusters, random_state=seed, n_init=1).fit_predict(vectors_ND)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(int(label), len(numbers)) for label in labels_N], dtype=np.int64)


def pick(labels_N: NDArray[np.int64], per_cluster: int, seed: int) -> list[int]:
    """Rows drawn from each cluster, at most so many, cluster by cluster."""
    picked: list[int] = []
    for label in range(int(labels_N.max()) + 1):
        members = np.flatnonzero(labels_N == label)
        order = np.random.default_rng([seed, 1, label]).permutation(members)
        picked += sorted(order[:per_cluster].tolist())
    return picked


def _soundworld(config: SoundworldCaptions) -> Iterator[str]:
    scenes = SceneConfig(
        duration=config.duration,
        single=config.single,
        sequence=config.sequence,
        three=config.three,
        split="train",
    )
    for index in range(config.count):
        yield draw_caption(np.random.default_rng([config.seed, index]), scenes)[0]


def _embed(
    captions: Sequence[str], config: CaptionsConfig, folder: Path, model: ResolvedModel | None
) -> NDArray[np.float32]:
    """Return embeddings [N, D]; those of each `_SHARD` captions are kept on disk."""
    parts = []
    embedder: Embedder | None = None
    with progress(total=len(captions), desc="embeddings", unit="caption") as bar:
        for part in batches(captions, _SHARD):
            path = folder / f"{digest_of_value(part)[:24]}.npy"
            vectors_BD = _load(path, len(part))
            if vectors_BD is None:
                embedder = embedder or load_embedder(config.embedder, model, config.device)
                vectors_BD = np.concatenate([embedder.embed(piece) for piece in batches(part, config.batch)])
                _save(path, vectors_BD)
            parts.append(vectors_BD)
            bar.update(len(part))
    return np.concatenate(parts)


def _load(path: Path, count: int) -> NDArray[np.float32] | None:
    try:
        vectors_BD: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return vectors_BD if len(vectors_BD) == count else None


def _save(path: Path, vectors_BD: NDArray[np.float32]) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, vectors_BD, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def _read_csv(path: Path, column: str) -> Iterable[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        _check_column(path, column, reader.fieldnames or ())
        for row in reader:
            yield row[column]


def _read_json(path: Path, column: str) -> Iterable[Any]:
    text = path.read_text(encoding="utf-8-sig")
    lines = text.lstrip().startswith("[")
    rows = json.loads(text) if lines else [json.loads(line) for line in text.splitlines() if line.strip()]
    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    _check_column(path, column, tuple(names))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {type(row).__name__}, must be an object")
        yield row.get(column)


def _read_parquet(path: Path, column: str) -> Iterable[Any]:
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        with ParquetFile(path) as file:
            _check_column(path, column, file.schema_arrow.names)
            for batch in file.iter_batches(columns=[column]):
                yield from batch.column(0).to_pylist()
    except ArrowException as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def _check_column(path: Path, column: str, names: Sequence[str]) -> None:
    if column not in names:
        there = ", ".join(names) if names else "none"
        raise invalid("column", f"is {column!r}, and {path} has no such column; it has: {there}")
