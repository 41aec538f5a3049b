"""Words that a model does not use: events of a prompt that hardly change what its denoiser predicts.

Shapes: E events, W words, L text tokens, S points.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.api.generation import GenerationRequest
from services.audio.decoding import ReadClip
from services.audio.words import find_words
from services.models.architectures import architecture_of
from services.models.explaining.explainer import DiffusionExplainer
from services.weights.uri import ResolvedModel
from training.data.examples import FileClip
from training.evaluation.explanation_areas import remaining
from training.evaluation.explanation_metrics import classes_of_phrases
from training.evaluation.sources import PlannedClip
from training.loop.progress import progress
from training.soundworld.captions import VOCABULARY

UNUSED_WORDS: Final = "unused_words"
"""Metric: whether a prompt has an event that is not used; `unused_words.CLASS` for those of one class."""

THRESHOLD: Final = 0.1
"""Share of what all words change, below which an event's phrase counts as not used."""

_LEVELS: Final = 4
"""Noise levels of a clip."""


def event_shares(explainer: DiffusionExplainer, prompt: str, clip: ReadClip, seed: int) -> dict[str, float]:
    """Return for each event of a prompt of the grammar how much its phrase matters to a clip's denoising.

    ``|v(without the event's phrase) - v|² / |v(without any word) - v|²``, summed over the clip and the noise
    levels: 0 if the phrase changes nothing, 1 if it changes as much as all words do. The whole phrase is
    masked ("a dog barks"): a text encoder puts some of the noun into its article. Empty if the prompt is not
    of the grammar.
    """
    read = explainer.read(prompt)
    classes = classes_of_phrases(prompt, read.words)
    events = list(dict.fromkeys(name for name in classes if name is not None))
    if not events:
        return {}
    defaults = explainer.description.generation.defaults
    request = GenerationRequest.of(
        prompt, defaults, seed=seed, duration=clip.seconds, num_inference_steps=_LEVELS
    )
    points = explainer.noised(explainer.encoded(clip), request)
    masked_EW = np.array([[name == event for name in classes] for event in events])
    every_T = np.ones(points.latents_SX.shape[2], dtype=bool)
    left_E = remaining(explainer, points, read, masked_EW, every_T)
    return {event: float(1 - left) for event, left in zip(events, left_E, strict=True)}


def unused_words(
    name: str, model: ResolvedModel, files: Sequence[Path], plan: Sequence[PlannedClip], device: str
) -> dict[str, NDArray[np.float64]]:
    """Return the metrics `UNUSED_WORDS` of a model's own clips, [N] each: 1 or 0, NaN where undefined.

    Raises:
        UnsupportedError: the model has no denoiser, or its denoiser's latents have no frequency.
    """
    architecture = architecture_of(model.folder)
    explainer = DiffusionExplainer(architecture.load(model.folder, device=device), architecture)
    names = [UNUSED_WORDS, *(f"{UNUSED_WORDS}.{event}" for event in VOCABULARY)]
    found = {column: np.full(len(plan), math.nan) for column in names}
    bar = progress(total=len(plan), desc=f"words of {name}", unit="clip")
    with bar, torch.no_grad():
        for number, (path, planned) in enumerate(zip(files, plan, strict=True)):
            try:
                waveform, rate = FileClip(path=path).read()
            except (OSError, ValueError):
                continue  # reported by the scorers
            clip = ReadClip(waveform=waveform.astype(np.float32), sampling_rate=rate)
            shares = event_shares(explainer, planned.prompt.text, clip, planned.seed or 0)
            for event, share in shares.items():
                found[f"{UNUSED_WORDS}.{event}"][number] = float(share < THRESHOLD)
            if shares:
                found[UNUSED_WORDS][number] = float(min(shares.values()) < THRESHOLD)
            bar.update()
    # Of the same columns for every model of the plan.
    named = {one for planned in plan for one in _classes(planned.prompt.text)}
    return {
        column: values
        for column, values in found.items()
        if column == UNUSED_WORDS or column.rpartition(".")[2] in named
    }


def _classes(prompt: str) -> set[str]:
    return {name for name in classes_of_phrases(prompt, find_words(prompt)) if name is not None}
