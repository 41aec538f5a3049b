"""Select diverse captions: clusters of embedded captions, and some of each cluster (the paper: 200 x 70).

Writes ``captions.jsonl`` (the paper's T1: `caption`, `cluster`) and ``temporal.jsonl`` (T2: captions with a
temporal order, for strategy 3).
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.errors import invalid
from services.files import write_atomically
from services.lists import PROMPT_NAMES, caption_fault, read_list
from services.weights.uri import ResolvedModel
from training.data.prompts import report_prompts
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
from training.loop.checks import ClipSeconds, Count, Natural, Seed, Share, check_ranges
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

    count: Count = 20_000
    """Captions drawn, before equal ones are dropped."""
    seed: Seed = 4_001
    """Seed of the draw."""
    duration: ClipSeconds = 2.56
    """Seconds of their scenes: 5.12 for three events."""
    single: Share = 0.2
    """Share of captions of one event."""
    sequence: Share = 0.6
    """Share of captions of one event after another."""
    three: Share = 0.0
    """Share of the sequences that have three events."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self.scenes()

    def scenes(self) -> SceneConfig:
        """Return the scenes whose captions are drawn. Raises ValueError."""
        return SceneConfig(
            duration=self.duration,
            single=self.single,
            sequence=self.sequence,
            three=self.three,
            split="train",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsConfig:
    """The captions to select, and the number of each kind. The defaults are the paper's."""

    source: Path | None = None
    """List of captions (`services.lists`): CSV, TSV, JSON or Parquet; none: the sound world."""
    column: str | None = None
    """Column of the captions in `source`; none: prompt, captions, caption or text."""
    soundworld: SoundworldCaptions = field(default_factory=SoundworldCaptions)
    """Used if `source` is none."""
    embedder: str = "sentence-transformers:thenlper/gte-large"
    """Embedder of the clustering: sentence-transformers:NAME_OR_PATH, tango:MODEL_URI (its text encoder),
    or clap:MODEL_URI (its text side)."""
    clusters: Count = 200
    """Clusters of K-Means."""
    per_cluster: Count = 70
    """Captions drawn from each cluster; all of a smaller one."""
    temporal_limit: Natural | None = None
    """Most captions for strategy 3, drawn at random; none: all."""
    seed: Seed = 0
    """Seed of K-Means and of the draws."""
    batch: Count = 64
    """Captions embedded at once."""
    device: str = "auto"
    """Device of the embedder."""

    def __post_init__(self) -> None:
        check_ranges(self)


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
    places, left_out = read_captions(config)
    captions = list(places)
    if len(captions) < config.clusters:
        raise invalid(
            "clusters",
            f"is {config.clusters}, and there are {len(captions)} captions; give more captions, or fewer "
            "clusters",
        )
    embedder = functools.cache(partial(load_embedder, config.embedder, model, config.device))
    vectors_ND = _embed(captions, embedder, config.batch, output / "embeddings")
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
            **report_prompts(places, embedder().prompt_warnings, config.embedder),
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


def read_captions(config: CaptionsConfig) -> tuple[dict[str, str], dict[str, int]]:
    """Return the place of each caption of the source, and how many were left out for which reason.

    The place is the file and line of the first one of equal captions; empty for the sound world's.

    Raises `InvalidInputError` if the source can't be read, or has no such column.
    """
    found: dict[str, str] = {}
    left_out = {"unusable": 0, "repeated": 0}
    for caption, fault, place in _captions(config):
        if fault is not None:
            left_out["unusable"] += 1
        elif caption in found:
            left_out["repeated"] += 1
        else:
            found[caption] = place
    return found, left_out


def _captions(config: CaptionsConfig) -> Iterator[tuple[str, str | None, str]]:
    """Yield the captions of the source, why they are unusable, and their places."""
    if config.source is None:
        yield from ((*caption_fault(caption), "") for caption in _soundworld(config.soundworld))
        return
    names = PROMPT_NAMES if config.column is None else (config.column,)
    for entry in read_list(config.source, "source", prompts=names, clip="ignored", keep_unusable=True):
        yield entry.prompt, entry.fault, entry.place


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
    scenes = config.scenes()
    for index in range(config.count):
        yield draw_caption(np.random.default_rng([config.seed, index]), scenes)[0]


def _embed(
    captions: Sequence[str], embedder: Callable[[], Embedder], batch: int, folder: Path
) -> NDArray[np.float32]:
    """Return embeddings [N, D]; those of each `_SHARD` captions are kept on disk."""
    parts = []
    with progress(total=len(captions), desc="embeddings", unit="caption") as bar:
        for part in batches(captions, _SHARD):
            path = folder / f"{digest_of_value(part)[:24]}.npy"
            vectors_BD = _load(path, len(part))
            if vectors_BD is None:
                vectors_BD = np.concatenate([embedder().embed(piece) for piece in batches(part, batch)])
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
