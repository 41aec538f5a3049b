"""Prompts of an evaluation, from a file or of the sound world, and their splits."""

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from services.errors import InvalidInputError, invalid
from training.data.examples import AUDIO_NAMES, PROMPT_NAMES, Clip, FileClip, find_audio
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
    """Read the prompts of a CSV file with a header, or of JSON Lines; repeated prompts are dropped.

    Raises `InvalidInputError` if the file can't be read, lacks the column, or has a row without a caption.
    """
    rows = _read_rows(path)
    if not rows:
        raise _invalid(f"{path} holds no prompts")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    caption = _column(path, columns, caption_column, PROMPT_NAMES)
    if caption is None:
        raise _invalid(
            f"{path} has no column {' or '.join(PROMPT_NAMES)}; it has {', '.join(columns)}: "
            "name the column of captions by caption_column"
        )
    references = _column(path, columns, reference_column, REFERENCE_NAMES)
    found: dict[str, Prompt] = {}
    for number, row in rows:
        text = row.get(caption)
        if not isinstance(text, str) or not text.strip():
            raise _invalid(f"{path}:{number} has no text in its column {caption}")
        location = row.get(references) if references else None
        reference = FileClip(path=find_audio(str(location), audio_root or path.parent)) if location else None
        found.setdefault(text.strip(), Prompt(text=text.strip(), reference=reference))
    return tuple(found.values())


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows with their line numbers."""
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                return [(reader.line_num, {k: v for k, v in row.items() if k is not None}) for row in reader]
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [(number, json.loads(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise _invalid(f"{path} can't be read: {reason}; give CSV (.csv) or JSON Lines") from error
    if wrong := next((number for number, row in rows if not isinstance(row, dict)), None):
        raise _invalid(f"{path}:{wrong} is no JSON object")
    return rows


def _column(path: Path, columns: list[str], name: str | None, known: tuple[str, ...]) -> str | None:
    if name is None:
        return next((column for column in known if column in columns), None)
    if name not in columns:
        raise _invalid(f"{path} has no column {name}; it has {', '.join(columns)}")
    return name


def _invalid(description: str) -> InvalidInputError:
    return invalid("prompts", description)
