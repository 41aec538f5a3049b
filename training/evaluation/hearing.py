"""Every clip is heard once: how loud it is, what scorers, reward model and judge say, where it lies in each
space.

Shape legend: N clips, R reference clips, D embedding width, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.errors import FieldViolation, InvalidInputError
from training.data.examples import Clip, FileClip
from training.data.store import batches
from training.evaluation.config import EvaluationConfig, label_of
from training.evaluation.divergence import kl_divergence
from training.evaluation.embedders import Embedder, Embeddings, Loader, Sound, TaggerEmbedder
from training.evaluation.events import EVENT_FIGURES, event_values, is_clipped, is_silent, judge, loudness_db
from training.evaluation.prompts import Prompt
from training.evaluation.sources import Asked
from training.loop.progress import progress
from training.preferences.scorers import LoadedReward, LoadedScorer, load_reward_scorer

_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Panel:
    """All who hear."""

    scorers: Mapping[str, LoadedScorer]
    reward: LoadedReward | None
    embedders: Mapping[str, Embedder]
    judge: TaggerEmbedder | None

    def digests(self) -> dict[str, str]:
        """Of the weights of each, by name."""
        found = {f"clap.{name}": scorer.version.digest for name, scorer in self.scorers.items()}
        if self.reward is not None:
            found["reward"] = self.reward.version.digest
        if self.judge is not None:
            found["judge"] = self.judge.digest
        return found | {f"space.{label}": embedder.digest for label, embedder in self.embedders.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Space:
    """Where clips lie in one space; NaN for those that can't be read."""

    embeddings_ND: NDArray[np.float32]
    logits_NK: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Heard:
    """What was heard of the clips of one model, in the order of the plan."""

    values: Mapping[str, NDArray[np.float64]]
    """Figures of single clips by name, [N]; NaN where one does not count, or can't be read."""
    spaces: Mapping[str, Space]
    readable_N: NDArray[np.bool_]
    unreadable: Mapping[str, str]
    """Why, by name."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class References:
    """The real clips, each once, and whose they are."""

    spaces: Mapping[str, Space]
    row_N: NDArray[np.int64]
    """Of each clip of the plan, the row of its prompt's reference; -1 where it has none."""
    unreadable: Mapping[str, str]


def open_panel(config: EvaluationConfig) -> Panel:
    """Load all who hear. Raises `ModelError` where one was refused."""
    loader = Loader(config.device)
    scorers = dict(scorer.split("=", 1) for scorer in config.scorers)
    return Panel(
        scorers={name: loader.clap(uri) for name, uri in scorers.items()},
        reward=load_reward_scorer(config.reward, config.reward_clap, config.device)
        if config.reward
        else None,
        embedders={label_of(text): loader.embedder(text) for text in config.embedders},
        judge=None if config.judge is None else loader.tagger(config.judge),
    )


def hear_references(plan: Sequence[Asked], panel: Panel, config: EvaluationConfig) -> References:
    """Embed the references of the plan's prompts. Raises `InvalidInputError` where too many can't be read."""
    clips = list(
        dict.fromkeys(asked.prompt.reference for asked in plan if asked.prompt.reference is not None)
    )
    spaces: dict[str, list[Embeddings]] = {label: [] for label in panel.embedders}
    rows: dict[Clip, int] = {}
    unreadable: dict[str, str] = {}
    bar = progress(total=len(clips), desc="references", unit="clip")
    with bar:
        for batch in batches(clips, config.batch):
            read = _read(batch, unreadable)
            for (position, _), number in zip(read, range(len(rows), len(rows) + len(read)), strict=True):
                rows[batch[position]] = number
            _embed([clip for _, clip in read], panel, spaces)
            bar.update(len(batch))
    check_readable("references", unreadable, len(clips), config.max_unreadable)
    row_N = [rows.get(asked.prompt.reference, -1) if asked.prompt.reference else -1 for asked in plan]
    found = {label: _space(parts) for label, parts in spaces.items() if parts}
    return References(spaces=found, row_N=np.array(row_N, dtype=np.int64), unreadable=unreadable)


def hear(
    name: str,
    files: Sequence[Path],
    plan: Sequence[Asked],
    panel: Panel,
    references: References,
    config: EvaluationConfig,
) -> Heard:
    """Hear the clips of the model `name`. Raises `InvalidInputError` where too many of them can't be read."""
    names = [*(f"clap.{scorer}" for scorer in panel.scorers), *(["reward"] if panel.reward else [])]
    names += ["silent", "clipped", "loudness_db"]
    if panel.judge is not None and any(asked.prompt.truth for asked in plan):
        names += EVENT_FIGURES
    values = {figure: np.full(len(plan), np.nan) for figure in names}
    parts: dict[str, list[Embeddings]] = {label: [] for label in panel.embedders}
    readable: list[int] = []
    unreadable: dict[str, str] = {}
    bar = progress(total=len(plan), desc=f"hearing {name}", unit="clip")
    with bar:
        for numbers in batches(range(len(plan)), config.batch):
            read = _read([FileClip(path=files[number]) for number in numbers], unreadable)
            rows, clips = [numbers[position] for position, _ in read], [clip for _, clip in read]
            readable += rows
            for figure, column in _judged([plan[row].prompt for row in rows], clips, panel).items():
                values[figure][rows] = column
            _embed(clips, panel, parts)
            bar.update(len(numbers))
    check_readable(name, unreadable, len(plan), config.max_unreadable)
    spaces = {label: _space(found, readable, len(plan)) for label, found in parts.items() if found}
    for label, space in spaces.items():
        if space.logits_NK is not None and (references.row_N >= 0).any():
            values[f"kl.{label}"] = _kl(space.logits_NK, references, label, config)
    is_readable = np.zeros(len(plan), dtype=bool)
    is_readable[readable] = True
    return Heard(values=values, spaces=spaces, readable_N=is_readable, unreadable=unreadable)


def _read(clips: Sequence[Clip], unreadable: dict[str, str]) -> list[tuple[int, Sound]]:
    """Positions and sounds of those that can be read."""
    found = []
    for position, clip in enumerate(clips):
        try:
            waveform, rate = clip.read()
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
            unreadable[clip.name] = reason
            continue
        mono = waveform if waveform.ndim == 1 else waveform.mean(axis=0)
        found.append((position, Sound(mono.astype(np.float32), rate)))
    return found


def _judged(
    prompts: Sequence[Prompt], clips: Sequence[Sound], panel: Panel
) -> dict[str, NDArray[np.float64]]:
    """The figures of a few clips."""
    waveforms = [clip.waveform_N for clip in clips]
    found: dict[str, list[float]] = {
        "silent": [float(is_silent(waveform)) for waveform in waveforms],
        "clipped": [float(is_clipped(waveform)) for waveform in waveforms],
        "loudness_db": [loudness_db(waveform) for waveform in waveforms],
    }
    texts = [prompt.text for prompt in prompts]
    for name, scorer in panel.scorers.items():
        windows = [scorer.model.prepare(clip.waveform_N, clip.sampling_rate) for clip in clips]
        if windows:
            scores_B = (scorer.model.embed_text(texts) * scorer.model.embed_windows(windows)).sum(-1)
            found[f"clap.{name}"] = scores_B.tolist()
    if panel.reward is not None and clips:
        model = panel.reward.model
        found["reward"] = model.reward(
            texts, [model.prepare(clip.waveform_N, clip.sampling_rate) for clip in clips]
        ).tolist()
    if panel.judge is not None and any(prompt.truth for prompt in prompts):
        rows: list[dict[str, float]] = [dict.fromkeys(EVENT_FIGURES, float("nan")) for _ in clips]
        told = [(position, truth) for position, prompt in enumerate(prompts) if (truth := prompt.truth)]
        events = panel.judge.detect([clips[position] for position, _ in told])
        for (position, truth), heard in zip(told, events, strict=True):
            rows[position] = event_values(judge(truth, heard))
        found |= {name: [row[name] for row in rows] for name in EVENT_FIGURES}
    return {name: np.array(column, dtype=np.float64) for name, column in found.items()}


def _embed(clips: Sequence[Sound], panel: Panel, spaces: dict[str, list[Embeddings]]) -> None:
    """Add what each embedder makes of `clips`, in their order."""
    if clips:
        for label, embedder in panel.embedders.items():
            spaces[label].append(embedder.hear(clips))


def _space(parts: Sequence[Embeddings], rows: Sequence[int] | None = None, count: int | None = None) -> Space:
    """`parts` together; with `rows` each at its place among `count`."""

    def together(found: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        stacked = np.concatenate(found)
        if rows is None or count is None:
            return stacked
        placed = np.full((count, stacked.shape[1]), np.nan, dtype=np.float32)
        placed[list(rows)] = stacked
        return placed

    logits = [part.logits_BK for part in parts if part.logits_BK is not None]
    return Space(
        embeddings_ND=together([part.embeddings_BD for part in parts]),
        logits_NK=together(logits) if logits else None,
    )


def _kl(
    logits_NK: NDArray[np.float32], references: References, label: str, config: EvaluationConfig
) -> NDArray[np.float64]:
    """KL of each clip that has a reference [N]."""
    found = np.full(len(logits_NK), np.nan)
    rows = np.flatnonzero((references.row_N >= 0) & np.isfinite(logits_NK).all(axis=1))
    reference_RK = references.spaces[label].logits_NK
    assert reference_RK is not None
    found[rows] = kl_divergence(reference_RK[references.row_N[rows]], logits_NK[rows], config.kl)
    return found


def check_readable(name: str, unreadable: Mapping[str, str], total: int, limit: float) -> None:
    """Raise `InvalidInputError` where more than `limit` of the clips can't be read."""
    if len(unreadable) <= limit * total:
        return
    listed = [f"{clip}: {reason}" for clip, reason in unreadable.items()]
    more = f"; and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    raise InvalidInputError(
        FieldViolation(
            name,
            f"{len(listed)} of {total} clips can't be read, at most {limit:.0%} may be: "
            f"{'; '.join(listed[:_LISTED])}{more}",
        )
    )
