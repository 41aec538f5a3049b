"""Scenes of two or three recordings, in order or at once, with captions and the times of their events.

Single sounds do not teach *then* and *while*. As in CompA (arXiv 2310.08753), recordings are laid out in time
and mixed, and their captions are joined: "a dog bark, then rain".
Everything is a function of the recordings and of (seed, index).

Shape legend: N samples.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import soundfile
from numpy.typing import NDArray

from services.audio.resampling import resample
from services.errors import OutputError, invalid
from services.files import write_atomically
from services.lists import class_captions, class_phrase
from training.data.examples import Clip
from training.data.recordings import Recording
from training.loop.checks import Range, Seed, Share, check_ranges
from training.soundworld.captions import HELD_OUT_TEMPLATES, TEMPLATES, CaptionTruth, Relation, Templates
from training.soundworld.scenes import Event, layout

INDEX: Final = "scenes.jsonl"
VERSION: Final = 1
"""Of the mixing. Caches are bound to it."""
FLOOR: Final = (-72.0, -62.0)
"""Bounds of the level of the noise floor, in dB below full scale."""
LEVEL: Final = (-25.0, -19.0)
"""Bounds of the level of an event where it sounds, in dB below full scale."""
PEAK: Final = 0.9
"""Highest peak of a scene."""
FADE: Final = 0.01
"""Seconds over which an excerpt fades in and out."""
SOUNDING: Final = -35.0
"""An excerpt begins and ends where its level exceeds this, in dB relative to its loudest 20 ms."""
LOUD: Final = 0.5
"""An excerpt is drawn among those with at least this share of the energy of the loudest one."""

_FRAME = 0.02
_CLAUSES_AT_ONCE = ("{a} while {b}", "{a} as {b}")
_END = re.compile(r"[\s.!?;,]+$")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSceneConfig:
    """Kinds of scene, and their shares."""

    duration: Annotated[float, Range(1, 60)] = 5.12
    """Seconds."""
    sampling_rate: Annotated[int, Range(8_000, 192_000)] = 22_050
    """Hertz."""
    single: Share = 0.2
    """Share of scenes with one event."""
    sequence: Share = 0.5
    """Share of scenes with one event after another; the others have two at once."""
    three: Share = 0.0
    """Share of the sequences that have three events."""
    seed: Seed = 0
    """Another seed, other scenes."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.single + self.sequence > 1:
            raise ValueError(
                f"single and sequence add up to {self.single + self.sequence:g}, must be at most 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """An event of a scene: an excerpt of a clip."""

    clip: Clip
    sound: str
    """Its class; of a clip without one, its caption."""
    onset: float
    """Seconds from the scene's start."""
    length: float
    """Seconds at most: silence around the sound is left out."""
    level: float
    """dB below full scale, where it sounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSceneClip:
    """A scene, mixed on access."""

    parts: tuple[Part, ...]
    duration: float
    """Seconds."""
    sampling_rate: int
    """Hertz."""
    seed: tuple[int, ...]
    domain: str = "scene"

    @property
    def name(self) -> str:
        """Seed and events."""
        return f"scene {'-'.join(map(str, self.seed))} ({', '.join(part.sound for part in self.parts)})"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the clip, the recordings included."""
        parts = [[part.clip.digest, part.onset, part.length, part.level] for part in self.parts]
        whole = [VERSION, parts, self.duration, self.sampling_rate, self.seed]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def read(self) -> tuple[NDArray[np.float32], int]:
        """Mix the scene. Raises OSError or ValueError if a recording can't be read."""
        return self.render()[0], self.sampling_rate

    def render(self) -> tuple[NDArray[np.float32], tuple[Event, ...]]:
        """Return the scene [N] and its events, in order of onset for sequences. Raises as `read` does."""
        rng = np.random.default_rng(self.seed)
        count = round(self.duration * self.sampling_rate)
        mix = rng.standard_normal(count) * 10 ** (rng.uniform(*FLOOR) / 20)
        spans: list[tuple[int, int]] = []
        for part in self.parts:
            waveform_N = _mono(part.clip, self.sampling_rate)
            excerpt_N = excerpt(waveform_N, self.sampling_rate, part.length, rng)
            start = round(part.onset * self.sampling_rate)
            stop = min(count, start + len(excerpt_N))
            mix[start:stop] += excerpt_N[: stop - start] * 10 ** (part.level / 20)
            spans.append((start, stop))
        gain = min(1.0, PEAK / max(1e-9, float(np.abs(mix).max())))
        events = tuple(
            Event(
                event_class=part.sound,
                onset=start / self.sampling_rate,
                offset=stop / self.sampling_rate,
                level=part.level + 20 * math.log10(gain),
            )
            for part, (start, stop) in zip(self.parts, spans, strict=True)
        )
        return (mix * gain).astype(np.float32), events


@dataclass(frozen=True, kw_only=True, slots=True)
class LoudestPart:
    """The part of a clip that has most energy; a shorter clip is taken whole."""

    clip: Clip
    seconds: float

    @property
    def name(self) -> str:
        """The clip's name."""
        return self.clip.name

    @property
    def domain(self) -> str:
        """The clip's."""
        return self.clip.domain

    @property
    def digest(self) -> str:
        """SHA-256 of the clip's digest and the length."""
        return hashlib.sha256(f"loudest {self.seconds} {self.clip.digest}".encode()).hexdigest()

    def read(self) -> tuple[NDArray[np.float32], int]:
        """Return samples [N] and their rate in Hz. Raises OSError or ValueError."""
        waveform, rate = self.clip.read()
        mono_N = waveform.mean(axis=0) if waveform.ndim == 2 else waveform
        starts, energy = window_energy(mono_N, rate, round(self.seconds * rate))
        start = int(starts[int(energy.argmax())])
        return mono_N[start : start + round(self.seconds * rate)].astype(np.float32), rate


def window_energy(
    waveform_N: NDArray[np.floating], sampling_rate: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the starts of the windows of `size` samples, every 20 ms, and their energies.

    A shorter clip is one window.
    """
    hop = max(1, round(_FRAME * sampling_rate))
    starts = np.arange(0, max(1, len(waveform_N) - size + 1), hop)
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform_N, dtype=np.float64))])
    return starts, energy[np.minimum(starts + size, len(waveform_N))] - energy[starts]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedScene:
    """A scene with its caption and the truth about it."""

    clip: RecordedSceneClip
    caption: str
    truth: CaptionTruth
    """Classes in the order of time, and their relation."""
    texts: tuple[str, ...]
    """What the caption says of each event: `join_captions` words it in other ways."""
    phrases: bool
    """Whether they are phrases without a verb."""


class RecordedScenes:
    """The scenes of some recordings, by index."""

    def __init__(self, recordings: Sequence[Recording], config: RecordedSceneConfig) -> None:
        """Raises `InvalidInputError` if there are too few classes with captions for the events of a scene."""
        self.config = config
        self._by_sound: dict[str, list[Recording]] = {}
        for one in recordings:
            if one.captions:
                self._by_sound.setdefault(one.sound or one.captions[0], []).append(one)
        self._sounds = sorted(self._by_sound)
        needed = 1 if config.single == 1 else 3 if config.three and config.sequence else 2
        if len(self._sounds) < needed:
            raise invalid(
                "data",
                f"has {len(self._sounds)} class{'' if len(self._sounds) == 1 else 'es'} "
                f"({', '.join(self._sounds)[:80]}), and scenes of {needed} events need {needed}; add "
                "recordings of another class, or make scenes of fewer events, or none",
            )

    def scene(self, index: int) -> RecordedScene:
        """Return scene `index`."""
        seed = (self.config.seed, index)
        rng = np.random.default_rng(seed)
        relation, count = self._draw_kind(rng)
        sounds = [self._sounds[i] for i in rng.choice(len(self._sounds), size=count, replace=False)]
        picked = [self._by_sound[sound][int(rng.integers(len(self._by_sound[sound])))] for sound in sounds]
        truth = CaptionTruth(classes=tuple(sounds), relation=relation)
        spans = layout(truth, self.config.duration, rng)
        parts = tuple(
            Part(clip=one.clip, sound=sound, onset=onset, length=offset - onset, level=rng.uniform(*LEVEL))
            for one, sound, (onset, offset) in zip(picked, sounds, spans, strict=True)
        )
        texts = tuple(_drawn(texts_of(one), rng) for one in picked)
        phrases = all(_is_named_by_class(one) for one in picked)
        clip = RecordedSceneClip(
            parts=parts, duration=self.config.duration, sampling_rate=self.config.sampling_rate, seed=seed
        )
        caption = join_captions(texts, relation, rng, phrases=phrases)
        return RecordedScene(clip=clip, caption=caption, truth=truth, texts=texts, phrases=phrases)

    def _draw_kind(self, rng: np.random.Generator) -> tuple[Relation, int]:
        kind, three = rng.uniform(), rng.uniform()
        if kind < self.config.single:
            return "single", 1
        if kind < self.config.single + self.config.sequence:
            return "then", 3 if three < self.config.three else 2
        return "while", 2


def texts_of(recording: Recording) -> tuple[str, ...]:
    """Return what captions of scenes call a recording, without capital and full stop."""
    if recording.sound is not None and _is_named_by_class(recording):
        return class_phrase(recording.sound), f"the sound of {class_phrase(recording.sound)}"
    return tuple(_inside(caption) for caption in recording.captions)


def join_captions(
    texts: Sequence[str], relation: Relation, rng: np.random.Generator, *, phrases: bool
) -> str:
    """Return a caption of events in the order of time; `phrases`: none of the texts has a verb."""
    template = _drawn(templates(phrases=phrases)[relation, len(texts)], rng)
    text = template.format(**dict(zip("abc", texts, strict=False)))
    return text[0].upper() + text[1:]


@functools.cache
def templates(*, phrases: bool) -> Templates:
    """Return the templates of the grammar for phrases, or those that suit phrases and clauses alike.

    Whether somebody's caption is a clause ("a dog barks") or a phrase ("a dog barking") is not known.
    """
    found: dict[tuple[Relation, int], tuple[str, ...]] = {}
    for kind, written in TEMPLATES.items():
        both = [*written, *HELD_OUT_TEMPLATES.get(kind, ())]
        of_phrases = [_lower_fields(text) for text in both if not re.search(r"\{[abc]\}", text)]
        found[kind] = tuple(of_phrases if phrases else (text for text in both if text in of_phrases))
    found["single", 1] = ("{a}",)
    if not phrases:
        found["while", 2] += _CLAUSES_AT_ONCE
    return found


def excerpt(
    waveform_N: NDArray[np.float32], sampling_rate: int, length: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return a loud excerpt of at most `length` seconds without silence around it, its level 0 dB.

    It is drawn among the windows with `LOUD` of the loudest one's energy.
    """
    size = max(1, round(length * sampling_rate))
    waveform = waveform_N.astype(np.float64)
    if len(waveform) > size:
        starts, windows = window_energy(waveform, sampling_rate, size)
        loud = np.flatnonzero(windows >= LOUD * windows.max())
        start = int(starts[int(rng.choice(loud))])
        waveform = waveform[start : start + size]
    first, last = sounding_span(waveform, sampling_rate)
    waveform = waveform[first:last].copy()
    fade = min(len(waveform) // 2, round(FADE * sampling_rate))
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.arange(fade) / max(1, fade))
    waveform[:fade] *= ramp
    waveform[len(waveform) - fade :] *= ramp[::-1]
    power = float(np.square(waveform).mean())
    return waveform / math.sqrt(max(power, 1e-12))


def sounding_span(waveform_N: NDArray[np.float64], sampling_rate: int) -> tuple[int, int]:
    """Return the first and the last sample, exclusive, between which a clip sounds."""
    hop = max(1, round(_FRAME * sampling_rate))
    padded = np.pad(waveform_N, (0, -len(waveform_N) % hop)).reshape(-1, hop)
    power = np.square(padded).mean(axis=1)
    loud = np.flatnonzero(power >= power.max(initial=0.0) * 10 ** (SOUNDING / 10))
    if not len(loud) or power.max() <= 0:
        return 0, len(waveform_N)
    return int(loud[0]) * hop, min(len(waveform_N), (int(loud[-1]) + 1) * hop)


def export_recorded_scenes(
    scenes: RecordedScenes, folder: Path, count: int, split: str
) -> Iterable[Mapping[str, object]]:
    """Write `count` scenes as FLAC to `folder`, and yield the row of each for the list (`write_index`).

    Raises `OutputError`; OSError or ValueError if a recording can't be read.
    """
    for index in range(count):
        scene = scenes.scene(index)
        waveform_N, events = scene.clip.render()
        name = f"{split}-{scenes.config.seed}-{index:06d}.flac"
        temporary = folder / f".{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(
                temporary, waveform_N, scenes.config.sampling_rate, format="FLAC", subtype="PCM_16"
            )
            temporary.replace(folder / name)
        except (OSError, soundfile.SoundFileError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"{folder / name} can't be written: {error}; make room, or write elsewhere"
            ) from error
        yield {
            "location": name,
            "caption": scene.caption,
            "split": split,
            "relation": scene.truth.relation,
            "events": [asdict(event) for event in events],
            "recordings": [part.clip.name for part in scene.clip.parts],
        }


def write_index(folder: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write the list of exported scenes; where it exists, all its clips do. Returns its path."""
    path = folder / INDEX
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _lower_fields(template: str) -> str:
    return re.sub(r"\{[ABC]\}", lambda match: match[0].lower(), template)


def _is_named_by_class(recording: Recording) -> bool:
    return recording.sound is not None and recording.captions == class_captions(recording.sound)


def _inside(caption: str) -> str:
    """Return a caption as a part of a sentence."""
    text = _END.sub("", caption) or caption
    first = text.split()[0]
    is_name = first == "I" or first[1:] != first[1:].lower()
    return text if is_name else text[0].lower() + text[1:]


def _drawn(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


@functools.lru_cache(maxsize=512)  # 0.4 MB each at 5 s
def _mono(clip: Clip, sampling_rate: int) -> NDArray[np.float32]:
    """Return a clip [N] at a rate; cached, since a recording is in many scenes."""
    waveform, rate = clip.read()
    mono_N = waveform.mean(axis=0) if waveform.ndim == 2 else waveform
    return resample(np.asarray(mono_N, dtype=np.float32), rate, sampling_rate)
