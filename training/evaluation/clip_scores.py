"""Metrics of single clips (loudness, CLAP score, reward, events), and their embeddings.

Shape legend: N clips of the plan, B clips, D embedding width, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.api.model import ModelVersion
from services.api.scoring import REWARD, CombinedScorers, Scorers
from services.audio.levels import is_silent
from services.errors import invalid
from services.local import LocalScorers
from training.data.examples import Clip, FileClip, check_readable, decode_clip, short_message
from training.data.prompts import on_prompts
from training.data.store import batches
from training.evaluation.audio_questions import AudioQuestions
from training.evaluation.config import EvaluationConfig, label_of
from training.evaluation.divergence import kl_divergence
from training.evaluation.embedders import Embedder, Embeddings, Loader, Sound, TaggerEmbedder
from training.evaluation.events import (
    EVENT_METRICS,
    compare_events,
    event_metrics,
    is_clipped,
    loudness_db,
    overshoots,
)
from training.evaluation.prompts import Prompt
from training.evaluation.round_trip import ROUND_TRIP_METRICS, RoundTrip, open_round_trip, round_trip
from training.evaluation.sources import PlannedClip
from training.loop.progress import progress

ANSWERS = Path("build/questions")
"""Default folder of the kept answers of a language model that takes audio."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluators:
    """The models that score or embed clips."""

    scorers: Scorers
    versions: Mapping[str, ModelVersion]
    """Versions of the CLAP scorers by name, and of the reward model under `REWARD`."""
    embedders: Mapping[str, Embedder]
    """Embedding models by name."""
    judge: TaggerEmbedder | None
    """The tagger, which no training stage uses; None: no metrics of events."""
    trip: RoundTrip | None
    """The captioner, which no training of a generator uses; None: no metrics of the round trip."""
    questions: AudioQuestions | None = None
    """A language model that takes audio; None: it is not asked."""

    @property
    def clap_names(self) -> list[str]:
        """Return the names of the CLAP scorers."""
        return [name for name in self.versions if name != REWARD]

    def digests(self) -> dict[str, str]:
        """Return the digests of the weights of all models, by name."""
        found = {f"clap.{name}": self.versions[name].digest for name in self.clap_names}
        if REWARD in self.versions:
            found["reward"] = self.versions[REWARD].digest
        if self.judge is not None:
            found["judge"] = self.judge.digest
        if self.trip is not None:
            found["captioner"] = self.trip.digest
        if self.questions is not None:
            found["asked"] = self.questions.digest
        return found | {f"space.{label}": embedder.digest for label, embedder in self.embedders.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipScores:
    """Metrics and embeddings of the clips of a source, in the order of the plan."""

    values: Mapping[str, NDArray[np.float64]]
    """Metrics by name, [N]; NaN if undefined, the clip is unreadable, or the scorer can't read the prompt."""
    embeddings: Mapping[str, Embeddings]
    """Embeddings [N, D] and logits [N, K] by embedder; NaN for unreadable clips."""
    readable_N: NDArray[np.bool_]
    unreadable: Mapping[str, str]
    """Reasons by name of the clip."""
    warnings: tuple[str, ...]
    """The decoder's, each after the name of the clip."""
    prompt_warnings: Mapping[str, Sequence[str]]
    """Of scorers and reward model, by prompt."""

    @classmethod
    def joined(cls, parts: "Sequence[ClipScores]") -> "ClipScores":
        """Return the scores of consecutive parts of a plan as those of the whole."""
        names = list(dict.fromkeys(name for part in parts for name in part.values))

        def column(part: ClipScores, name: str) -> NDArray[np.float64]:
            return part.values.get(name, np.full(len(part.readable_N), np.nan))

        return cls(
            values={name: np.concatenate([column(part, name) for part in parts]) for name in names},
            embeddings={
                label: _concatenate([part.embeddings[label] for part in parts])
                for label in parts[0].embeddings
            },
            readable_N=np.concatenate([part.readable_N for part in parts]),
            unreadable={name: reason for part in parts for name, reason in part.unreadable.items()},
            warnings=tuple(warning for part in parts for warning in part.warnings),
            prompt_warnings={text: found for part in parts for text, found in part.prompt_warnings.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class References:
    """Embeddings of the distinct reference clips."""

    embeddings: Mapping[str, Embeddings]
    """Embeddings and logits by embedder, a row per reference."""
    row_N: NDArray[np.int64]
    """For each clip of the plan, the row of its prompt's reference; -1 if it has none."""
    unreadable: Mapping[str, str]
    """Reasons by name of the clip."""
    warnings: tuple[str, ...]
    """The decoder's, each after the name of the clip."""


def open_evaluators(
    config: EvaluationConfig, *, scoring: Scorers | None = None, reward: Scorers | None = None
) -> Evaluators:
    """Load the models of `config`; `scoring` and `reward` replace its CLAP scorers and its reward model.

    Raises:
        ModelError: a model can't be loaded.
        InvalidInputError: `scoring` lacks a scorer of the config.
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
        raise invalid("--scoring", f"the service has no scorer {', '.join(missing)}; it has {listed}")
    names = [*uris, *([REWARD] if config.reward else [])]
    return Evaluators(
        scorers=scorers,
        versions={name: served[name] for name in names},
        embedders={label_of(text): loader.embedder(text) for text in config.embedders},
        judge=None if config.judge is None else loader.tagger(config.judge),
        trip=None if config.captioner is None else open_round_trip(config.captioner, config.device),
        questions=AudioQuestions(config.questions, config.questions.cache or ANSWERS) if config.ask else None,
    )


def embed_references(
    plan: Sequence[PlannedClip], evaluators: Evaluators, config: EvaluationConfig
) -> References:
    """Embed the references of the plan. Raises `InvalidInputError` if too many are unreadable."""
    clips = list(
        dict.fromkeys(planned.prompt.reference for planned in plan if planned.prompt.reference is not None)
    )
    parts: dict[str, list[Embeddings]] = {label: [] for label in evaluators.embedders}
    rows: dict[Clip, int] = {}
    unreadable: dict[Clip, str] = {}
    warnings: list[str] = []
    bar = progress(total=len(clips), desc="references", unit="clip")
    with bar:
        for batch in batches(clips, config.batch):
            read = _read(batch, unreadable, warnings)
            for position, _ in read:
                rows[batch[position]] = len(rows)
            _embed([clip for _, clip in read], evaluators, parts)
            bar.update(len(batch))
    check_readable(unreadable, len(clips), config.max_unreadable, field="references", quiet=True)
    row_N = [rows.get(planned.prompt.reference, -1) if planned.prompt.reference else -1 for planned in plan]
    embeddings = {label: _concatenate(found) for label, found in parts.items() if found}
    return References(
        embeddings=embeddings,
        row_N=np.array(row_N, dtype=np.int64),
        unreadable=_by_name(unreadable),
        warnings=tuple(warnings),
    )


def score_clips(
    name: str,
    files: Sequence[Path],
    plan: Sequence[PlannedClip],
    evaluators: Evaluators,
    references: References,
    config: EvaluationConfig,
) -> ClipScores:
    """Score and embed the clips of a source. Raises `InvalidInputError` if too many are unreadable."""
    metrics = [f"clap.{scorer}" for scorer in evaluators.clap_names]
    metrics += ["reward"] if REWARD in evaluators.versions else []
    metrics += ["silent", "clipped", "overshoot", "loudness_db"]
    if evaluators.judge is not None and any(planned.prompt.truth for planned in plan):
        metrics += EVENT_METRICS
    if evaluators.trip is not None:
        metrics += ROUND_TRIP_METRICS
    metrics += ["asked"] if evaluators.questions is not None else []
    values = {metric: np.full(len(plan), np.nan) for metric in metrics}
    parts: dict[str, list[Embeddings]] = {label: [] for label in evaluators.embedders}
    readable: list[int] = []
    unreadable: dict[Clip, str] = {}
    warnings: list[str] = []
    of_prompts: dict[str, list[str]] = {}
    bar = progress(total=len(plan), desc=f"scoring {name}", unit="clip")
    with bar:
        for numbers in batches(range(len(plan)), config.batch):
            read = _read([FileClip(path=files[number]) for number in numbers], unreadable, warnings)
            rows, clips = [numbers[position] for position, _ in read], [clip for _, clip in read]
            readable += rows
            prompts = [plan[row].prompt for row in rows]
            for metric, column in _score(prompts, clips, evaluators, of_prompts).items():
                values[metric][rows] = column
            _embed(clips, evaluators, parts)
            bar.update(len(numbers))
    check_readable(unreadable, len(plan), config.max_unreadable, field=name, quiet=True)
    embeddings = {label: _concatenate(found, readable, len(plan)) for label, found in parts.items() if found}
    for label, space in embeddings.items():
        if space.logits_BK is not None and (references.row_N >= 0).any():
            values[f"kl.{label}"] = _kl(space.logits_BK, references, label, config)
    is_readable = np.zeros(len(plan), dtype=bool)
    is_readable[readable] = True
    return ClipScores(
        values=values,
        embeddings=embeddings,
        readable_N=is_readable,
        unreadable=_by_name(unreadable),
        warnings=tuple(warnings),
        prompt_warnings=of_prompts,
    )


def _read(clips: Sequence[Clip], unreadable: dict[Clip, str], warnings: list[str]) -> list[tuple[int, Sound]]:
    """Return the position and waveform of each readable clip; add the others to `unreadable`."""
    found = []
    for position, clip in enumerate(clips):
        try:
            if isinstance(clip, FileClip):
                decoded = decode_clip(clip.content())
                warnings += [f"{clip.name}: {warning}" for warning in decoded.warnings]
                waveform, rate = decoded.waveform, decoded.sampling_rate
            else:
                waveform, rate = clip.read()
        except (OSError, ValueError) as error:
            unreadable[clip] = short_message(error)
            continue
        mono = waveform if waveform.ndim == 1 else waveform.mean(axis=0)
        found.append((position, Sound(mono.astype(np.float32), rate)))
    return found


def _by_name(unreadable: Mapping[Clip, str]) -> dict[str, str]:
    return {clip.name: reason for clip, reason in unreadable.items()}


def _score(
    prompts: Sequence[Prompt],
    clips: Sequence[Sound],
    evaluators: Evaluators,
    warnings: dict[str, list[str]],
) -> dict[str, NDArray[np.float64]]:
    """Return the metrics of a batch of clips by name, [B]; add warnings on their prompts to `warnings`."""
    waveforms = [clip.waveform_N for clip in clips]
    found: dict[str, list[float]] = {
        "silent": [float(is_silent(waveform)) for waveform in waveforms],
        "clipped": [float(is_clipped(waveform)) for waveform in waveforms],
        "overshoot": [float(overshoots(waveform)) for waveform in waveforms],
        "loudness_db": [loudness_db(waveform) for waveform in waveforms],
    }
    texts = [prompt.text for prompt in prompts]
    pairs = [(text, (clip.waveform_N, clip.sampling_rate)) for text, clip in zip(texts, clips, strict=True)]
    if pairs and evaluators.clap_names:
        scores = evaluators.scorers.score_audio(pairs, scorers=evaluators.clap_names)
        for index, scorer in enumerate(scores.scorers):
            values_B = np.where(scores.readable[:, index], scores.values[:, index], np.nan)
            found[f"clap.{scorer.name}"] = values_B.tolist()
        warnings |= {text: on_prompts(one) for text, one in zip(texts, scores.warnings, strict=True)}
    if pairs and REWARD in evaluators.versions:
        rewards = evaluators.scorers.compute_rewards(pairs).rewards
        found["reward"] = [reward.logit if reward.readable else math.nan for reward in rewards]
        for text, reward in zip(texts, rewards, strict=True):
            warnings[text] = on_prompts(warnings.get(text, ()), reward.warnings)
    if evaluators.judge is not None and any(prompt.truth for prompt in prompts):
        rows: list[dict[str, float]] = [dict.fromkeys(EVENT_METRICS, float("nan")) for _ in clips]
        known = [(position, truth) for position, prompt in enumerate(prompts) if (truth := prompt.truth)]
        events = evaluators.judge.detect([clips[position] for position, _ in known])
        for (position, truth), detected in zip(known, events, strict=True):
            clip = clips[position]
            seconds = clip.waveform_N.shape[-1] / clip.sampling_rate
            rows[position] = event_metrics(compare_events(truth, detected, seconds))
        found |= {name: [row[name] for row in rows] for name in EVENT_METRICS}
    if evaluators.trip is not None:
        trips = round_trip(evaluators.trip, texts, [sound for _, sound in pairs])
        found |= {name: [row[name] for row in trips] for name in ROUND_TRIP_METRICS}
    if evaluators.questions is not None:
        found["asked"] = evaluators.questions.scores(texts, [sound for _, sound in pairs])
    return {name: np.array(column, dtype=np.float64) for name, column in found.items()}


def _embed(clips: Sequence[Sound], evaluators: Evaluators, parts: dict[str, list[Embeddings]]) -> None:
    """Append the embeddings of `clips` to `parts`."""
    if clips:
        for label, embedder in evaluators.embedders.items():
            parts[label].append(embedder.embed(clips))


def _concatenate(
    parts: Sequence[Embeddings], rows: Sequence[int] | None = None, count: int | None = None
) -> Embeddings:
    """Concatenate `parts`; with `rows`, scatter them into `count` rows that are NaN otherwise."""

    def scatter(arrays: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        array = np.concatenate(arrays)
        if rows is None or count is None:
            return array
        scattered = np.full((count, array.shape[1]), np.nan, dtype=np.float32)
        scattered[list(rows)] = array
        return scattered

    logits = [part.logits_BK for part in parts if part.logits_BK is not None]
    return Embeddings(
        embeddings_BD=scatter([part.embeddings_BD for part in parts]),
        logits_BK=scatter(logits) if logits else None,
    )


def _kl(
    logits_NK: NDArray[np.float32], references: References, label: str, config: EvaluationConfig
) -> NDArray[np.float64]:
    """Return the KL divergence of each clip from its reference [N]; NaN without a reference."""
    divergence_N = np.full(len(logits_NK), np.nan)
    rows = np.flatnonzero((references.row_N >= 0) & np.isfinite(logits_NK).all(axis=1))
    reference_BK = references.embeddings[label].logits_BK
    assert reference_BK is not None
    divergence_N[rows] = kl_divergence(reference_BK[references.row_N[rows]], logits_NK[rows], config.kl)
    return divergence_N
