"""Compare explanations with the truth that a procedural world has: when each event sounds.

    milonga train evaluate-explanations --recipe mini

On *true* clips, rendered scenes with noise added, the intervals are exact. On *generated* clips they are the
independent tagger's. The folder has `clips.jsonl` (figures of each clip) and `report.json`; an interrupted
evaluation is resumed by the same call. This module imports the judge, so no training stage may import it.

Shapes: W words, T frames, N samples.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from services.api.explanation import ATTENTION, MASK, OCCLUSION
from services.api.generation import GenerationRequest
from services.audio.decoding import ReadClip
from services.files import write_atomically
from services.models.architectures import architecture_of
from services.models.explaining.explainer import DiffusionExplainer, ReadPrompt
from services.models.explaining.methods import Points
from services.weights.uri import resolve
from training.data.store import RowLog, claim, finish
from training.evaluation.bootstrap import paired_difference
from training.evaluation.embedders import Sound, TaggerEmbedder, load_tagger
from training.evaluation.explanation_areas import area_sets, areas, remaining
from training.evaluation.explanation_config import ExplanationEvaluation
from training.evaluation.explanation_metrics import (
    THRESHOLDS,
    classes_of_words,
    frames_inside,
    is_function_word,
    row_figures,
    unions,
)
from training.evaluation.explanation_report import TABLES, markdown
from training.loop.config import flatten
from training.loop.progress import progress
from training.objectives.statistics import Interval, mean_interval
from training.soundworld.scenes import SHORT, make_scene

CLIPS: Final = "clips.jsonl"

TRUE, GENERATED, SHUFFLED, OTHER_PROMPT = "true", "generated", "shuffled weights", "another prompt"
KINDS: Final = (TRUE, GENERATED, SHUFFLED, OTHER_PROMPT)
"""What is explained: two kinds of clips, and two sanity checks on true clips, which must be at chance."""

_MOST_DRAWS: Final = 4
"""Scenes to draw for each generated clip, at most: the judge must find all events."""

Spans = Mapping[str, tuple[float, float]]
"""Onset and offset in seconds of each event, by class."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subject:
    """A clip to explain, and the truth about it."""

    prompt: str
    points: Points
    """Where the methods ask the denoiser."""
    noised: Points
    """Where the areas are measured."""
    spans: Spans


class Explained:
    """Makes the subjects of an evaluation, and computes their figures."""

    def __init__(self, config: ExplanationEvaluation) -> None:
        """Load the models. Raises `ModelError`."""
        self.config = config
        self.model = resolve(config.model)
        self.explainer = _load(self.model.folder)
        self.shuffled = _load(self.model.folder)
        _shuffle(self.shuffled)
        self.judge: TaggerEmbedder = load_tagger(config.judge)
        self._scenes = replace(SHORT, split=config.split)

    def request(self, prompt: str, seed: int) -> GenerationRequest:
        """Return the request of a clip."""
        defaults = self.explainer.description.generation.defaults
        return GenerationRequest.of(
            prompt,
            defaults,
            seed=seed,
            duration=self._scenes.duration,
            num_inference_steps=self.config.num_inference_steps,
        )

    def true_clip(self, index: int) -> Subject:
        """Return a rendered scene with noise."""
        scene = make_scene(self.config.world, index, self._scenes)
        given = ReadClip(waveform=scene.waveform, sampling_rate=16_000)
        points = self.explainer.noised(self.explainer.encoded(given), self.request(scene.caption, index))
        spans = {event.event_class: (event.onset, event.offset) for event in scene.events}
        return Subject(prompt=scene.caption, points=points, noised=points, spans=spans)

    def generated_clip(self, index: int) -> Subject | None:
        """Return a clip of the model; None if the judge does not find every event of its prompt."""
        scene = make_scene(self.config.world + 1, index, self._scenes)
        request = self.request(scene.caption, index)
        read = self.explainer.read(scene.caption)
        clean_1X, points = self.explainer.generate(request, read.conditioning)
        waveform_N = self.explainer.decoded(clean_1X, request)
        (found,) = self.judge.detect([Sound(waveform_N=waveform_N, sampling_rate=self.explainer.rate)])
        if not all(event.event_class in found for event in scene.events):
            return None
        spans = {
            event.event_class: (found[event.event_class].onset, found[event.event_class].offset)
            for event in scene.events
        }
        noised = self.explainer.noised(clean_1X, request)
        return Subject(prompt=scene.caption, points=points, noised=noised, spans=spans)

    def figures(self, subject: Subject, explainer: DiffusionExplainer, *, with_areas: bool) -> dict[str, Any]:
        """Return the figures of each method for one subject."""
        read = explainer.read(subject.prompt)
        found: dict[str, Any] = {}
        matrices: dict[str, NDArray[np.float32]] = {}
        for method in self.config.methods:
            matrix_WT, iterations = explainer.matrix(method, subject.points, read, self.config.iterations)
            matrices[method] = matrix_WT.float().numpy()
            found[method] = clip_figures(
                matrices[method], read, subject.prompt, subject.spans, explainer.frame_seconds
            ) | {"iterations": float(iterations)}
        if with_areas:
            for method, (deletion, insertion) in self._areas(subject, read, matrices).items():
                found.setdefault(method, {}).update(deletion=deletion, insertion=insertion)
        if OCCLUSION in matrices:
            for method in set(matrices) - {OCCLUSION}:
                found[method]["rank_correlation"] = rank_correlation(matrices[method], matrices[OCCLUSION])
        return found

    def _areas(
        self, subject: Subject, read: ReadPrompt, matrices: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, tuple[float, float]]:
        """Return the areas (deletion, insertion) of each method, and of a random order, for one event."""
        words = len(read.words)
        if words < 2:
            return {}
        rng = np.random.default_rng(len(subject.prompt))
        name = sorted(subject.spans)[int(rng.integers(len(subject.spans)))]
        inside_T = frames_inside(
            *subject.spans[name], next(iter(matrices.values())).shape[1], self.explainer.frame_seconds
        )
        orders = {
            method: np.argsort(-matrix_WT[:, inside_T].sum(1), kind="stable").tolist()
            for method, matrix_WT in matrices.items()
        } | {"random": rng.permutation(words).tolist()}
        # Orders share many sets: each is computed once.
        sets = {method: area_sets(order, words) for method, order in orders.items()}
        distinct, inverse = np.unique(np.concatenate(list(sets.values())), axis=0, return_inverse=True)
        points = subject.noised.spread(self.config.areas_points + 2)
        inner = Points(
            latents_SX=points.latents_SX[1:-1], timesteps_S=points.timesteps_S[1:-1], seconds=points.seconds
        )
        left = remaining(self.explainer, inner, read, distinct, inside_T)[inverse.ravel()]
        return {method: areas(part) for method, part in zip(sets, np.split(left, len(sets)), strict=True)}


def clip_figures(
    matrix_WT: NDArray[np.float32], read: ReadPrompt, prompt: str, spans: Spans, frame_seconds: float
) -> dict[str, Any]:
    """Return the figures of one explanation: means over the words that name events."""
    classes = classes_of_words(prompt, read.words)
    rows: dict[str, list[float]] = defaultdict(list)
    overlaps: list[NDArray[np.float64]] = []
    frames = matrix_WT.shape[1]
    inside = {name: frames_inside(*span, frames, frame_seconds) for name, span in spans.items()}
    for row_T, name in zip(matrix_WT, classes, strict=True):
        if name not in inside:
            continue
        for figure, value in row_figures(row_T, inside[name]).items():
            rows[figure].append(value)
        overlaps.append(unions(row_T, inside[name]))
        own = row_T[inside[name]].mean()
        for other, other_T in inside.items():
            # Where both sound, there is nothing to tell apart.
            apart_T = other_T & ~inside[name]
            if other != name and apart_T.any():
                rows["specificity"].append(float(own / (own + row_T[apart_T].mean() + 1e-30)))
    functions = [row_T.mean() for row_T, word in zip(matrix_WT, read.words, strict=True)
                 if is_function_word(word.text)]  # fmt: skip
    events = [row_T.mean() for row_T, name in zip(matrix_WT, classes, strict=True) if name in inside]
    found: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()}
    if events:
        found["unions"] = [round(float(value), 5) for value in np.mean(overlaps, axis=0)]
        # Their share of the two means: 0.5 if function words weigh as much as those that name events.
        if functions:
            found["function_words"] = float(
                np.mean(functions) / (np.mean(functions) + np.mean(events) + 1e-30)
            )
    return found


def rank_correlation(first_WT: NDArray[np.float32], second_WT: NDArray[np.float32]) -> float:
    """Return Spearman's correlation of two explanations, over words and frames."""
    from scipy.stats import spearmanr

    return float(spearmanr(first_WT.ravel(), second_WT.ravel()).statistic)


def evaluate_explanations(config: ExplanationEvaluation, output: Path) -> dict[str, Any]:
    """Explain the clips of a config by each method; return the report, with 95 % intervals.

    Raises:
        InvalidInputError: `output` belongs to other settings.
        ModelError: a model can't be loaded.
        OutputError: `output` can't be written.
    """
    settings = {**flatten(config), "digest": resolve(config.model).digest}
    if (report := claim(output, settings)) is not None:
        return report
    torch.set_num_threads(1)
    explained = Explained(config)
    with closing(RowLog(output / CLIPS)) as log:
        done = {(row["kind"], row["index"]) for row in log.rows}
        accepted = sum(row["kind"] == GENERATED and row["figures"] is not None for row in log.rows)
        wanted = config.true_clips + config.generated_clips + 2 * config.sanity_clips
        rest = sum(kind != GENERATED for kind, _ in done) + accepted
        with progress(total=wanted, desc="clips", unit="clip", initial=rest) as bar:
            for kind, index in _order(config):
                if (kind == GENERATED and accepted >= config.generated_clips) or (kind, index) in done:
                    continue
                figures = _one(explained, kind, index)
                log.append({"kind": kind, "index": index, "figures": figures})
                accepted += kind == GENERATED and figures is not None
                bar.update(figures is not None)
        rows = log.rows
    report = _report(config, explained.model.digest, rows)
    write_atomically(output / TABLES, markdown(report))
    return finish(output, report)


def _order(config: ExplanationEvaluation) -> Iterator[tuple[str, int]]:
    """Yield what to explain, the kinds mixed, so that the time that is left can be told early."""
    counts = {
        TRUE: config.true_clips,
        SHUFFLED: config.sanity_clips,
        OTHER_PROMPT: config.sanity_clips,
        GENERATED: _MOST_DRAWS * config.generated_clips,
    }
    for index in range(max(counts.values())):
        yield from ((kind, index) for kind, count in counts.items() if index < count)


def _one(explained: Explained, kind: str, index: int) -> dict[str, Any] | None:
    """Return the figures of one clip; None for a generated one without its events."""
    if kind == GENERATED:
        subject = explained.generated_clip(index)
        return None if subject is None else explained.figures(subject, explained.explainer, with_areas=True)
    subject = explained.true_clip(index)
    if kind == SHUFFLED:
        return explained.figures(subject, explained.shuffled, with_areas=False)
    if kind == OTHER_PROMPT:
        other = explained.true_clip(index + explained.config.true_clips)
        # Its events are not in the clip: each is given one of the clip's intervals, at random, so that not
        # even the order of the events can be right.
        rng = np.random.default_rng(index)
        spans = list(subject.spans.values())
        drawn = {name: spans[int(rng.integers(len(spans)))] for name in other.spans}
        return explained.figures(
            replace(subject, prompt=other.prompt, spans=drawn), explained.explainer, with_areas=False
        )
    return explained.figures(subject, explained.explainer, with_areas=True)


# -------------------------------------------------------------------------------------------------- report


CHANCES: Final = {
    "mass_inside": "chance",
    "average_precision": "chance",
    "pointing": "pointing_chance",
    "iou": "iou_chance",
    "specificity": 0.5,
    "function_words": 0.5,
    "deletion": "random",
    "insertion": "random",
}
"""Figures with what chance gives: another figure of the same clip, a number, or the random order's area."""


def _report(config: ExplanationEvaluation, digest: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_kind = {kind: [row["figures"] for row in rows if row["kind"] == kind] for kind in KINDS}
    kept = {kind: [one for one in found if one is not None] for kind, found in by_kind.items()}
    return {
        "name": config.name,
        "model": config.model,
        "digest": digest,
        "clips": {kind: len(found) for kind, found in kept.items()},
        "left_out": {GENERATED: len(by_kind[GENERATED]) - len(kept[GENERATED])},
        "figures": {
            kind: {method: method_figures(found, method) for method in config.methods}
            for kind, found in kept.items()
            if found
        },
        "comparisons": {
            kind: compared
            for kind in (TRUE, GENERATED)
            if kept[kind] and (compared := _comparisons(kept[kind], config.methods))
        },
        "settings": {**flatten(config), "digest": digest},
    }


def method_figures(clips: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """Return the figures of a method over clips: value, chance, and their difference, with 95 % intervals."""
    found = [clip[method] for clip in clips]
    table: dict[str, Any] = {}
    columns = _columns(found)
    columns["random"] = np.array([np.nan] * len(clips))
    for name in ("mass_inside", "pointing", "average_precision", "iou", "specificity", "function_words",
                 "deletion", "insertion"):  # fmt: skip
        values_N = columns.get(name)
        if values_N is None or np.isnan(values_N).all():
            continue
        chance = CHANCES[name]
        if chance == "random":
            chance_N = np.array([clip.get("random", {}).get(name, np.nan) for clip in clips], dtype=float)
        else:
            chance_N = np.full(len(clips), chance) if isinstance(chance, float) else columns[str(chance)]
        known = ~(np.isnan(values_N) | np.isnan(chance_N))
        keys = [str(index) for index in np.flatnonzero(known)]
        table[name] = {
            "value": _plain(mean_interval(values_N[known])),
            "chance": float(chance_N[known].mean()),
            "over_chance": _plain(paired_difference(chance_N[known], values_N[known], keys)),
        }
    for name in ("rank_correlation", "iterations"):
        if name in columns and not np.isnan(columns[name]).all():
            table[name] = {"value": _plain(mean_interval(columns[name]))}
    if "threshold" in columns:
        table["iou"]["threshold"] = float(columns["threshold"][0])
    return table


def _columns(found: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Return each figure of clips as a column, NaN where a clip has none; the IoU at its best threshold."""
    names = {name for one in found for name in one} - {"unions"}
    columns = {name: np.array([one.get(name, np.nan) for one in found], dtype=float) for name in names}
    overlaps = np.array([one.get("unions", [np.nan] * len(THRESHOLDS)) for one in found], dtype=float)
    if not np.isnan(overlaps).all():
        best = int(np.nanmean(overlaps, axis=0).argmax())
        columns["iou"] = overlaps[:, best]
        columns["threshold"] = np.full(len(found), THRESHOLDS[best])
        # A row that takes every frame has the share of frames inside.
        columns["iou_chance"] = columns["chance"]
    return columns


def _comparisons(clips: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Return the paired differences of areas and mass: occlusion and mask against attention."""
    found: dict[str, Any] = {}
    keys = [str(index) for index in range(len(clips))]
    for first, second in ((ATTENTION, OCCLUSION), (ATTENTION, MASK), (OCCLUSION, MASK)):
        if first not in methods or second not in methods:
            continue
        found[f"{second} minus {first}"] = {
            name: _plain(
                paired_difference(
                    [clip[first].get(name, np.nan) for clip in clips],
                    [clip[second].get(name, np.nan) for clip in clips],
                    keys,
                )
            )
            for name in ("mass_inside", "average_precision", "deletion", "insertion")
        }
    return found


def _plain(interval: Interval) -> dict[str, float | int]:
    return cast(dict[str, float | int], asdict(interval))


def _load(folder: Path) -> DiffusionExplainer:
    architecture = architecture_of(folder)
    return DiffusionExplainer(architecture.load(folder), architecture)


def _shuffle(explainer: DiffusionExplainer) -> None:
    """Shuffle each weight of the denoiser: the same numbers, without what was learned."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in explainer.denoiser.parameters():
            flat = parameter.view(-1)
            flat.copy_(flat[torch.randperm(len(flat), generator=generator)])
