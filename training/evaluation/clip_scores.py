"""The scores of every clip: loudness, CLAP, reward, events, and its embeddings in each space.

Shape legend: N clips, R reference clips, D embedding width, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.api.model import ModelVersion
from services.api.scoring import REWARD, CombinedScorers, Scorers
from services.errors import FieldViolation, InvalidInputError
from services.local import LocalScorers
from training.data.examples import Clip, FileClip
from training.data.store import batches
from training.evaluation.config import EvaluationConfig, label_of
from training.evaluation.divergence import kl_divergence
from training.evaluation.embedders import Embedder, Embeddings, Loader, Sound, TaggerEmbedder
from training.evaluation.events import EVENT_FIGURES, event_values, is_clipped, is_silent, judge, loudness_db
from training.evaluation.prompts import Prompt
from training.evaluation.sources import Asked
from training.loop.progress import progress

_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluators:
    """Everything that scores or embeds clips."""

    scorers: Scorers
    versions: Mapping[str, ModelVersion]
    """The weights of the CLAP scorers by name, and of the reward model by `REWARD`."""
    embedders: Mapping[str, Embedder]
    judge: TaggerEmbedder | None

    @property
    def clap_names(self) -> list[str]:
        """Return the names of the CLAP scorers."""
        return [name for name in self.versions if name != REWARD]

    def digests(self) -> dict[str, str]:
        """Return the digest of the weights of each, by name."""
        found = {f"clap.{name}": self.versions[name].digest for name in self.clap_names}
        if REWARD in self.versions:
            found["reward"] = self.versions[REWARD].digest
        if self.judge is not None:
            found["judge"] = self.judge.digest
        return found | {f"space.{label}": embedder.digest for label, embedder in self.embedders.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Space:
    """Where clips lie in one space; NaN for those that can't be read."""

    embeddings_ND: NDArray[np.float32]
    logits_NK: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipScores:
    """Scores and embeddings of the clips of one model, in the order of the plan."""

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


def open_evaluators(
    config: EvaluationConfig, *, scoring: Scorers | None = None, reward: Scorers | None = None
) -> Evaluators:
    """Load the models of `config`; `scoring` and `reward` stand in for its CLAP scorers and its reward model.

    Raises:
        ModelError: one was refused.
        InvalidInputError: `scoring` lacks one of the config's scorers.
    """
    loader = Loader(config.device)
    uris = dict(scorer.split("=", 1) for scorer in config.scorers)
    claps = {} if scoring else {name: loader.clap(uri) for name, uri in uris.items()}
    model = None
    if config.reward and not reward:
        model = loader.reward(config.reward, config.reward_clap)
    local = LocalScorers(claps, model)
    scorers = CombinedScorers(clap=scoring or local, reward=(reward or local) if config.reward else None)
    served = scorers.versions()
    if missing := [name for name in uris if name not in served]:
        listed = ", ".join(name for name in served if name != REWARD)
        raise InvalidInputError(
            FieldViolation("--scoring", f"the service has no scorer {', '.join(missing)}; it has {listed}")
        )
    wanted = [*uris, *([REWARD] if config.reward else [])]
    return Evaluators(
        scorers=scorers,
        versions={name: served[name] for name in wanted},
        embedders={label_of(text): loader.embedder(text) for text in config.embedders},
        judge=None if config.judge is None else loader.tagger(config.judge),
    )


def embed_references(plan: Sequence[Asked], evaluators: Evaluators, config: EvaluationConfig) -> References:
    """Embed the references of the plan's prompts. Raises `InvalidInputError` where too many can't be read."""
    clips = list(
        dict.fromkeys(asked.prompt.reference for asked in plan if asked.prompt.reference is not None)
    )
    spaces: dict[str, list[Embeddings]] = {label: [] for label in evaluators.embedders}
    rows: dict[Clip, int] = {}
    unreadable: dict[str, str] = {}
    bar = progress(total=len(clips), desc="references", unit="clip")
    with bar:
        for batch in batches(clips, config.batch):
            read = _read(batch, unreadable)
            for (position, _), number in zip(read, range(len(rows), len(rows) + len(read)), strict=True):
                rows[batch[position]] = number
            _embed([clip for _, clip in read], evaluators, spaces)
            bar.update(len(batch))
    check_readable("references", unreadable, len(clips), config.max_unreadable)
    row_N = [rows.get(asked.prompt.reference, -1) if asked.prompt.reference else -1 for asked in plan]
    found = {label: _space(parts) for label, parts in spaces.items() if parts}
    return References(spaces=found, row_N=np.array(row_N, dtype=np.int64), unreadable=unreadable)


def score_clips(
    name: str,
    files: Sequence[Path],
    plan: Sequence[Asked],
    evaluators: Evaluators,
    references: References,
    config: EvaluationConfig,
) -> ClipScores:
    """Score the clips of the model `name`. Raises `InvalidInputError` where too many can't be read."""
    names = [f"clap.{name}" for name in evaluators.clap_names]
    names += ["reward"] if REWARD in evaluators.versions else []
    names += ["silent", "clipped", "loudness_db"]
    if evaluators.judge is not None and any(asked.prompt.truth for asked in plan):
        names += EVENT_FIGURES
    values = {figure: np.full(len(plan), np.nan) for figure in names}
    parts: dict[str, list[Embeddings]] = {label: [] for label in evaluators.embedders}
    readable: list[int] = []
    unreadable: dict[str, str] = {}
    bar = progress(total=len(plan), desc=f"scoring {name}", unit="clip")
    with bar:
        for numbers in batches(range(len(plan)), config.batch):
            read = _read([FileClip(path=files[number]) for number in numbers], unreadable)
            rows, clips = [numbers[position] for position, _ in read], [clip for _, clip in read]
            readable += rows
            for figure, column in _scores_of([plan[row].prompt for row in rows], clips, evaluators).items():
                values[figure][rows] = column
            _embed(clips, evaluators, parts)
            bar.update(len(numbers))
    check_readable(name, unreadable, len(plan), config.max_unreadable)
    spaces = {label: _space(found, readable, len(plan)) for label, found in parts.items() if found}
    for label, space in spaces.items():
        if space.logits_NK is not None and (references.row_N >= 0).any():
            values[f"kl.{label}"] = _kl(space.logits_NK, references, label, config)
    is_readable = np.zeros(len(plan), dtype=bool)
    is_readable[readable] = True
    return ClipScores(values=values, spaces=spaces, readable_N=is_readable, unreadable=unreadable)


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


def _scores_of(
    prompts: Sequence[Prompt], clips: Sequence[Sound], evaluators: Evaluators
) -> dict[str, NDArray[np.float64]]:
    """The figures of a few clips."""
    waveforms = [clip.waveform_N for clip in clips]
    found: dict[str, list[float]] = {
        "silent": [float(is_silent(waveform)) for waveform in waveforms],
        "clipped": [float(is_clipped(waveform)) for waveform in waveforms],
        "loudness_db": [loudness_db(waveform) for waveform in waveforms],
    }
    texts = [prompt.text for prompt in prompts]
    pairs = [(text, (clip.waveform_N, clip.sampling_rate)) for text, clip in zip(texts, clips, strict=True)]
    if pairs and evaluators.clap_names:
        scores = evaluators.scorers.score_audio(pairs, scorers=evaluators.clap_names)
        for index, scorer in enumerate(scores.scorers):
            found[f"clap.{scorer.name}"] = scores.values[:, index].tolist()
    if pairs and REWARD in evaluators.versions:
        rewards = evaluators.scorers.compute_rewards(pairs).rewards
        found["reward"] = [reward.logit for reward in rewards]
    if evaluators.judge is not None and any(prompt.truth for prompt in prompts):
        rows: list[dict[str, float]] = [dict.fromkeys(EVENT_FIGURES, float("nan")) for _ in clips]
        known = [(position, truth) for position, prompt in enumerate(prompts) if (truth := prompt.truth)]
        events = evaluators.judge.detect([clips[position] for position, _ in known])
        for (position, truth), detected in zip(known, events, strict=True):
            rows[position] = event_values(judge(truth, detected))
        found |= {name: [row[name] for row in rows] for name in EVENT_FIGURES}
    return {name: np.array(column, dtype=np.float64) for name, column in found.items()}


def _embed(clips: Sequence[Sound], evaluators: Evaluators, spaces: dict[str, list[Embeddings]]) -> None:
    """Add the embeddings of `clips`, in their order."""
    if clips:
        for label, embedder in evaluators.embedders.items():
            spaces[label].append(embedder.embed(clips))


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
