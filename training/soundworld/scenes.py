"""Scenes: events laid out in time, mixed to a clip, with caption and ground truth."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.soundworld.captions import CaptionTruth, Relation, write_caption
from training.soundworld.synthesis import CLASSES, SAMPLING_RATE, synthesise

Split = Literal["train", "validation", "test"]
DURATIONS = (2.56, 5.12)
"""Clip lengths in seconds."""
HEADROOM = 0.5
"""Highest peak of a scene. Autoencoder, vocoder and guidance together raise peaks by up to 6 dB."""


BACKGROUNDS = ("silence", "near silence", "noise")
"""Kinds of clip without an event."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One sound event of a clip: the ground truth."""

    event_class: str
    onset: float
    """Seconds from the clip's start."""
    offset: float
    """Seconds from the clip's start."""
    level: float
    """Root mean square over the event's length, in dB below full scale (negative)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A clip, its caption and the truth about it."""

    waveform: NDArray[np.float32]
    """Mono samples [N] in [-1, 1] at 16 kHz."""
    caption: str
    truth: CaptionTruth
    events: tuple[Event, ...]
    """Events; of a sequence, in order of onset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """Kinds of scene, and their probabilities."""

    duration: float = 2.56
    """Clip length in seconds: 2.56 or 5.12."""
    single: float = 0.2
    """Share of scenes with one event."""
    sequence: float = 0.5
    """Share of scenes with one event after another."""
    three: float = 0.0
    """Share of the sequences that have three events (only at 5.12 s is there room for it)."""
    split: Split = "train"
    """Captions are divided by a hash of their text: 90 % train, 5 % validation, 5 % test."""
    held_out_templates: bool = False
    """Write captions by the templates of no training; give a `split` other than train too."""

    def __post_init__(self) -> None:
        if self.duration not in DURATIONS:
            raise ValueError(f"duration must be one of {DURATIONS} seconds, got {self.duration}")
        if self.three and self.duration < 5:
            raise ValueError(f"three events need duration 5.12, got {self.duration}: set three=0")
        if not 0 <= self.single + self.sequence <= 1 or not 0 <= self.three <= 1:
            raise ValueError(f"shares must lie in [0, 1], got {self}")


SHORT = SceneConfig(single=0.2, sequence=0.55)
"""Scenes of the shorter duration, as the denoisers are trained on."""


def overlap_share(events: Sequence[Event]) -> float:
    """Return how long all `events` sound at once, as a share of the shortest one's length."""
    together = min(event.offset for event in events) - max(event.onset for event in events)
    return max(0.0, together) / min(event.offset - event.onset for event in events)


def split_of(caption: str) -> Split:
    """Return the split that a caption's text belongs to, whatever its case and punctuation."""
    normalised = " ".join(re.sub(r"[^\w\s'’-]", " ", caption.lower()).split())
    bucket = int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:4]) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def draw_truth(rng: np.random.Generator, config: SceneConfig) -> CaptionTruth:
    """Draw classes (all different) and their relation."""
    kind = rng.uniform()
    relation: Relation
    if kind < config.single:
        relation, count = "single", 1
    elif kind < config.single + config.sequence:
        relation, count = "then", 3 if rng.uniform() < config.three else 2
    else:
        relation, count = "while", 2
    picked = rng.choice(len(CLASSES), size=count, replace=False)
    return CaptionTruth(classes=tuple(CLASSES[i] for i in picked), relation=relation)


def draw_caption(rng: np.random.Generator, config: SceneConfig) -> tuple[str, CaptionTruth]:
    """Draw until the caption falls into the configured split."""
    while True:
        truth = draw_truth(rng, config)
        caption = write_caption(truth, rng, held_out=config.held_out_templates)
        if split_of(caption) == config.split:
            return caption, truth


def layout(truth: CaptionTruth, duration: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Draw onset and offset in seconds of each event, inside the clip."""
    stretch = duration / 2.56
    if truth.relation == "then":
        count = len(truth.classes)
        room = duration - 0.1
        lengths = rng.uniform(0.6, 1.05, count) * stretch * 2 / count
        gaps = np.append(rng.uniform(0.05, 0.25, count - 1), 0.0)
        total = lengths.sum() + gaps.sum()
        if total > room:
            lengths *= (room - gaps.sum()) / lengths.sum()
            total = room
        start = 0.05 + rng.uniform(0, room - total)
        spans = []
        for length, gap in zip(lengths.tolist(), gaps.tolist(), strict=True):
            spans.append((start, start + length))
            start += length + gap
        return spans
    if truth.relation == "single":
        length = rng.uniform(0.7, 1.5) * stretch
        start = rng.uniform(0.05, duration - length - 0.05)
        return [(start, start + length)]
    # Together: onsets within 0.15 s, so that neither precedes the other, and at least 1.1 s of each.
    lengths = rng.uniform(1.1, 1.8, len(truth.classes)) * stretch
    start = rng.uniform(0.05, duration - 0.2 - lengths.min())
    onsets = start + rng.uniform(0.0, 0.15, len(lengths))
    ends = np.minimum(onsets + lengths, duration - 0.05)
    return list(zip(onsets.tolist(), ends.tolist(), strict=True))


def render(
    truth: CaptionTruth, duration: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], list[Event]]:
    """Synthesise and mix the events of `truth` over a noise floor: waveform [N] and the ground truth."""
    n = round(duration * SAMPLING_RATE)
    floor = rng.uniform(-68, -58)
    mix = rng.standard_normal(n) * 10 ** (floor / 20)
    events = []
    for event_class, (onset, offset) in zip(truth.classes, layout(truth, duration, rng), strict=True):
        start, stop = int(onset * SAMPLING_RATE), int(offset * SAMPLING_RATE)
        level = rng.uniform(-25, -19)
        mix[start:stop] += synthesise(event_class, rng, stop - start) * 10 ** (level / 20)
        level += 20 * math.log10(HEADROOM)
        events.append(Event(event_class=event_class, onset=onset, offset=offset, level=level))
    peak = float(np.abs(mix).max())
    if peak > 0.97:
        # Peaks of impulsive events only: a soft knee keeps the level of everything else.
        mix = np.where(
            np.abs(mix) > 0.8, np.sign(mix) * (0.8 + 0.19 * np.tanh((np.abs(mix) - 0.8) / 0.19)), mix
        )
    return (HEADROOM * mix).astype(np.float32), events


def background(kind: str, duration: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a clip without an event: one of `BACKGROUNDS`, at a random level."""
    n = round(duration * SAMPLING_RATE)
    if kind == "silence":
        return np.zeros(n, np.float32)
    low, high = (-100.0, -60.0) if kind == "near silence" else (-50.0, -20.0)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    # White to brown noise: power falls with frequency to the 0th to 2nd power.
    spectrum /= np.maximum(1.0, np.arange(len(spectrum))) ** rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(spectrum, n)
    return (noise / noise.std() * 10 ** (rng.uniform(low, high) / 20)).astype(np.float32)


def make_scene(seed: int, index: int, config: SceneConfig) -> Scene:
    """Scene number `index` of the world `seed`: the same on every machine."""
    rng = np.random.default_rng([seed, index])
    caption, truth = draw_caption(rng, config)
    waveform, events = render(truth, config.duration, rng)
    return Scene(waveform=waveform, caption=caption, truth=truth, events=tuple(events))
