"""Prompts of an evaluation, from a file or of the sound world, and their splits."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from services.lists import AUDIO_NAMES, PROMPT_NAMES, Entry, find_clip, read_list
from training.data.examples import Clip, FileClip, clip_of
from training.data.scenes import SceneClip
from training.soundworld.captions import CaptionTruth
from training.soundworld.scenes import SceneConfig, Split, draw_caption

PROMPT_SEED = 606
PROMPTS = SceneConfig(single=0.2, sequence=0.5, split="validation")
LONG_PROMPTS = replace(PROMPTS, duration=5.12, three=0.5)
"""Prompts for clips of 5.12 s: half of the sequences have three events."""

REFERENCE_NAMES = ("reference", *AUDIO_NAMES)
"""Columns of reference clips; the first that is present is used."""

TEMPORAL = re.compile(r"\b(while|as|before|after|then|followed)\b", re.IGNORECASE)
"""Words that make a prompt temporal (Tango 2, arXiv 2404.09956, section 5)."""
_JOINING = re.compile(r"\b(and|with)\b|[,;]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt with its events and a reference clip, if known."""

    text: str
    truth: CaptionTruth | None = None
    """Its events; None unless it is of the sound world."""
    reference: Clip | None = None
    """A real clip that matches it."""
    place: str = field(default="", compare=False)
    """Row of the list that it is from; empty if it is from none."""


def is_temporal(prompt: Prompt) -> bool:
    """Return whether the prompt contains a word of `TEMPORAL`."""
    return TEMPORAL.search(prompt.text) is not None


def is_multiple(prompt: Prompt) -> bool:
    """Return whether the prompt has several events.

    If its events are unknown, a rule decides: a temporal word, *and*, *with*, a comma or a semicolon. The
    Tango 2 paper does not state its rule, so its splits may differ.
    """
    if prompt.truth is not None:
        return len(prompt.truth.classes) > 1
    return is_temporal(prompt) or _JOINING.search(prompt.text) is not None


SPLITS: Mapping[str, Callable[[Prompt], bool]] = {
    "all": lambda prompt: True,
    "temporal": is_temporal,
    "non-temporal": lambda prompt: not is_temporal(prompt),
    "multiple concepts": is_multiple,
    "single concept": lambda prompt: not is_multiple(prompt),
}
"""Splits of the prompts by name; metrics are reported for each."""


def held_out_prompts(count: int, config: SceneConfig = PROMPTS) -> list[tuple[str, CaptionTruth]]:
    """Return the first `count` prompts of `config`'s split, always the same ones."""
    return [draw_caption(np.random.default_rng([PROMPT_SEED, i]), config) for i in range(count)]


def world_prompts(count: int, split: Split, duration: float | None = None) -> tuple[Prompt, ...]:
    """Return distinct prompts of the sound world, with scenes of `duration` seconds as references."""
    scenes = replace(PROMPTS if duration in (None, PROMPTS.duration) else LONG_PROMPTS, split=split)
    prompts: dict[str, Prompt] = {}
    index = 0
    while len(prompts) < count:
        text, truth = draw_caption(np.random.default_rng([PROMPT_SEED, index]), scenes)
        reference = SceneClip(truth=truth, seed=(PROMPT_SEED, index), duration=scenes.duration, gain=0.0)
        prompts.setdefault(text, Prompt(text=text, truth=truth, reference=reference))
        index += 1
    return tuple(prompts.values())


def read_prompts(
    path: Path,
    *,
    caption_column: str | None = None,
    reference_column: str | None = None,
    audio_root: Path | None = None,
) -> tuple[Prompt, ...]:
    """Read the prompts of a list (`services.lists`); repeated prompts are dropped.

    Raises `InvalidInputError` if the list can't be read, lacks a column, or has an unusable prompt.
    """
    found: dict[str, Prompt] = {}
    for entry in read_list(
        path,
        "prompts",
        prompts=PROMPT_NAMES if caption_column is None else (caption_column,),
        clips=REFERENCE_NAMES if reference_column is None else (reference_column,),
        embedded=True,
    ):
        reference = _reference(entry, audio_root or path.parent)
        found.setdefault(entry.prompt, Prompt(text=entry.prompt, reference=reference, place=entry.place))
    return tuple(found.values())


def _reference(entry: Entry, root: Path) -> Clip | None:
    """Return a row's clip; None if it names none, or has AudioCaps' name of one that is not there."""
    if entry.location is not None or entry.embedded is not None:
        return clip_of(entry, root)
    path = find_clip(entry, root) if "youtube_id" in entry.fields else None
    return FileClip(path=path) if path is not None and path.exists() else None
